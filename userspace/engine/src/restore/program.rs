//! Operation lists for the restorer, before and after they have addresses.
//!
//! Every step carries a text for the error message, kept on our side: an operation that fails in a task is reported by
//! its index.

use crate::kernel::sys::CloneArgs;
use standstill_parasite_abi::{EXPECT, Kind, LOAD, MAY_FAIL, Op, Task};
use std::mem::{offset_of, size_of};

/// An argument of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arg {
    /// A constant.
    Value(u64),
    /// Address of a byte of this program's data.
    Data(u64),
    /// Address of another program (a child or thread to start).
    Program(usize),
    /// Address of a word that tasks wait for, by its number.
    Word(usize),
}

impl Arg {
    /// The address so many bytes further on in the data.
    pub(crate) fn byte(self, offset: u64) -> Self {
        if let Self::Data(first) = self { Self::Data(first + offset) } else { self }
    }
}

macro_rules! arg_from {
    ($($ty:ty),*) => { $(impl From<$ty> for Arg {
        fn from(value: $ty) -> Self {
            Self::Value(value as i64 as u64)
        }
    })* };
}
arg_from!(i32, u32, i64, usize);

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

#[derive(Clone, Debug)]
struct Step {
    kind: Kind,
    flags: u32,
    nr: u64,
    args: [Arg; 6],
    expected: u64,
    label: String,
}

/// What one task (process or thread) does on its way back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    steps: Vec<Step>,
    data: Vec<u8>,
    /// 8-byte words of `data` that hold the address of another byte of `data`.
    pointers: Vec<(u64, u64)>,
}

impl Program {
    /// Constant bytes for arguments, 16-byte aligned.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Arg {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let offset = self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        Arg::Data(offset)
    }

    /// A NUL-terminated string.
    pub(crate) fn string(&mut self, bytes: &[u8]) -> Arg {
        let mut terminated = bytes.to_vec();
        terminated.push(0);
        self.data(&terminated)
    }

    /// 64-bit words.
    pub(crate) fn words(&mut self, words: &[u64]) -> Arg {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.data(&bytes)
    }

    /// Makes the word at `offset` of the data `block` point to the data `target`.
    pub(crate) fn point(&mut self, block: Arg, offset: u64, target: Arg) {
        if let (Arg::Data(block), Arg::Data(target)) = (block, target) {
            self.pointers.push((block + offset, target));
        }
    }

    /// A system call that must succeed.
    pub(crate) fn call(&mut self, label: impl Into<String>, nr: libc::c_long, args: &[Arg]) {
        self.push(Kind::Syscall, nr as u64, args, 0, label.into());
    }

    /// A system call whose failure does not matter.
    pub(crate) fn try_call(&mut self, label: impl Into<String>, nr: libc::c_long, args: &[Arg]) {
        self.push(Kind::Syscall, nr as u64, args, MAY_FAIL, label.into());
    }

    /// A system call whose result must be `expected`.
    pub(crate) fn call_expecting(
        &mut self,
        label: impl Into<String>,
        nr: libc::c_long,
        args: &[Arg],
        expected: impl TryInto<u64>,
    ) {
        self.push(Kind::Syscall, nr as u64, args, EXPECT, label.into());
        if let (Some(step), Ok(expected)) = (self.steps.last_mut(), expected.try_into()) {
            step.expected = expected;
        }
    }

    /// Reads `len` bytes at `offset` of a file to `address`.
    pub(crate) fn read_full(&mut self, label: impl Into<String>, fd: i32, address: u64, len: u64, offset: u64) {
        let args = [fd.into(), address.into(), len.into(), offset.into()];
        self.push(Kind::ReadFull, 0, &args, 0, label.into());
    }

    /// Writes data to a descriptor.
    pub(crate) fn write_full(&mut self, label: impl Into<String>, fd: i32, bytes: &[u8]) {
        let data = self.data(bytes);
        self.push(Kind::WriteFull, 0, &[fd.into(), data, bytes.len().into()], 0, label.into());
    }

    /// Stops for the tracer.
    pub(crate) fn trap(&mut self, stage: u64) {
        self.push(Kind::Trap, 0, &[stage.into()], 0, format!("stage {stage}"));
    }

    /// Lets those go on that [`Self::wait_for`] this word.
    pub(crate) fn post(&mut self, label: impl Into<String>, word: usize) {
        self.push(Kind::Post, 0, &[Arg::Word(word)], 0, label.into());
    }

    /// Waits until so many have posted a word.
    pub(crate) fn wait_for(&mut self, label: impl Into<String>, word: usize, posts: usize) {
        self.push(Kind::Await, 0, &[Arg::Word(word), posts.into()], 0, label.into());
    }

    /// Ends the thread; a process with one thread ends with this status.
    pub(crate) fn exit(&mut self, status: i32) {
        self.push(Kind::Exit, 0, &[status.into()], 0, "exit".into());
    }

    /// clone3(2) of a task with the id `tid` that runs the program number `child`.
    pub(crate) fn clone_task(
        &mut self,
        label: impl Into<String>,
        flags: u64,
        exit_signal: i32,
        tid: i32,
        child: usize,
    ) {
        let set_tid = self.data(&tid.to_le_bytes());
        let args = CloneArgs { flags, exit_signal: exit_signal as u64, set_tid_size: 1, ..Default::default() };
        let words = [args.flags, 0, 0, 0, args.exit_signal, 0, 0, 0, 0, args.set_tid_size, 0];
        let block = self.words(&words);
        self.point(block, offset_of!(CloneArgs, set_tid) as u64, set_tid);
        let args = [block, size_of::<CloneArgs>().into(), Arg::Program(child)];
        self.push(Kind::Clone, 0, &args, 0, label.into());
    }

    /// clone3(2) of a child with any id, that runs the program number `child` untraced and has no exit signal: where its id
    /// is found, for [`Self::call_with`].
    pub(crate) fn clone_untraced(&mut self, label: impl Into<String>, child: usize) -> Arg {
        let id = self.data(&[0; 8]);
        let flags = libc::CLONE_UNTRACED as u64 | libc::CLONE_PARENT_SETTID as u64;
        let block = self.words(&[flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.point(block, offset_of!(CloneArgs, parent_tid) as u64, id);
        let args = [block, size_of::<CloneArgs>().into(), Arg::Program(child)];
        self.push(Kind::Clone, 0, &args, 0, label.into());
        id
    }

    /// A system call that must succeed, whose first argument is the number found at `at`; with its expected result.
    pub(crate) fn call_with(
        &mut self,
        label: impl Into<String>,
        nr: libc::c_long,
        at: Arg,
        args: &[Arg],
        expected: Option<u64>,
    ) {
        let args: Vec<Arg> = std::iter::once(at).chain(args.iter().copied()).collect();
        let flags = LOAD | if expected.is_some() { EXPECT } else { 0 };
        self.push(Kind::Syscall, nr as u64, &args, flags, label.into());
        if let (Some(step), Some(expected)) = (self.steps.last_mut(), expected) {
            step.expected = expected;
        }
    }

    fn push(&mut self, kind: Kind, nr: u64, args: &[Arg], flags: u32, label: String) {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.steps.push(Step { kind, flags, nr, args: all, expected: 0, label });
    }

    /// What step `index` is about.
    pub(crate) fn label(&self, index: u64) -> &str {
        self.steps.get(index as usize).map_or("?", |s| &s.label)
    }

    /// One line a step, for `restore --dry-run`.
    pub(crate) fn listing(&self) -> impl Iterator<Item = &str> {
        self.steps.iter().map(|s| s.label.as_str())
    }

    /// A step as the restorer sees it: kind, flags, number, arguments, expected result.
    #[cfg(test)]
    pub(crate) fn step(&self, index: usize) -> Option<(Kind, u32, u64, [Arg; 6], u64)> {
        self.steps.get(index).map(|s| (s.kind, s.flags, s.nr, s.args, s.expected))
    }

    /// The data that arguments point to.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.data
    }

    /// What a word of the data points to.
    #[cfg(test)]
    pub(crate) fn target(&self, word: u64) -> Option<u64> {
        self.pointers.iter().find(|p| p.0 == word).map(|p| p.1)
    }

    /// Bytes that [`Layout`] needs for it.
    fn size(&self) -> u64 {
        let task = size_of::<Task>().next_multiple_of(64) as u64;
        let ops = (self.steps.len() * size_of::<Op>()) as u64;
        task + ops.next_multiple_of(64) + (self.data.len() as u64).next_multiple_of(64)
    }
}

const STACK: u64 = 4096;

/// Where everything of a restore lies in the memory that its tasks share.
#[derive(Debug)]
pub(crate) struct Layout {
    base: u64,
    /// Offset of each program's [`Task`].
    tasks: Vec<u64>,
    words: u64,
    stacks: u64,
    size: u64,
}

impl Layout {
    /// Size in bytes that programs need behind a blob of `blob` bytes.
    pub(crate) fn size_for(blob: usize, programs: &[Program]) -> u64 {
        Self::new(0, blob, programs).size
    }

    /// Gives the programs addresses: blob first, then programs, words, stacks.
    pub(crate) fn new(base: u64, blob: usize, programs: &[Program]) -> Self {
        let mut at = (blob as u64).next_multiple_of(64);
        let tasks = programs
            .iter()
            .map(|p| {
                let offset = at;
                at += p.size();
                offset
            })
            .collect();
        let words = at;
        let count = programs.iter().flat_map(|p| p.steps.iter().flat_map(|s| s.args)).filter_map(|arg| match arg {
            Arg::Word(n) => Some(n + 1),
            _ => None,
        });
        at += 4 * count.max().unwrap_or(0) as u64;
        let stacks = at.next_multiple_of(4096);
        let size = stacks + STACK * programs.len() as u64;
        Self { base, tasks, words, stacks, size: size.next_multiple_of(4096) }
    }

    /// Total size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Address of the [`Task`] of program `index`.
    pub(crate) fn task(&self, index: usize) -> u64 {
        self.base + self.tasks[index]
    }

    /// Writes the blob and all programs into `memory`, which lies (or will lie) at the layout's base.
    pub(crate) fn write(&self, memory: &mut [u8], blob: &[u8], programs: &[Program]) {
        memory[..blob.len()].copy_from_slice(blob);
        for (index, program) in programs.iter().enumerate() {
            let task = self.tasks[index];
            let ops = task + size_of::<Task>().next_multiple_of(64) as u64;
            let data = ops + ((program.steps.len() * size_of::<Op>()) as u64).next_multiple_of(64);
            let stack = self.base + self.stacks + STACK * (index as u64 + 1);
            let mut put = |offset: u64, bytes: &[u8]| memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            let header = [self.base + ops, program.steps.len() as u64, 0, 0, stack];
            for (n, word) in header.iter().enumerate() {
                put(task + 8 * n as u64, &word.to_le_bytes());
            }
            put(data, &program.data);
            for &(word, target) in &program.pointers {
                put(data + word, &(self.base + data + target).to_le_bytes());
            }
            for (n, step) in program.steps.iter().enumerate() {
                let at = ops + (n * size_of::<Op>()) as u64;
                let kind_and_flags = u64::from(step.kind as u32) | u64::from(step.flags) << 32;
                let args = step.args.map(|arg| match arg {
                    Arg::Value(v) => v,
                    Arg::Data(offset) => self.base + data + offset,
                    Arg::Program(p) => self.task(p),
                    Arg::Word(n) => self.base + self.words + 4 * n as u64,
                });
                let words = [kind_and_flags, step.nr].into_iter().chain(args).chain([step.expected]);
                for (i, word) in words.enumerate() {
                    put(at + 8 * i as u64, &word.to_le_bytes());
                }
            }
        }
    }

    /// Index of the operation under way and errno of a failed one, as the task left them in `memory`.
    pub(crate) fn state(&self, memory: &[u8], index: usize) -> (u64, u64) {
        let word = |offset: usize| {
            let at = self.tasks[index] as usize + offset;
            u64::from_le_bytes(memory[at..at + 8].try_into().expect("eight bytes"))
        };
        (word(offset_of!(Task, at)), word(offset_of!(Task, error)))
    }
}
