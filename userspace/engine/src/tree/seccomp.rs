//! seccomp(2): strict mode and chains of filters.
//!
//! The restorer installs them while it still has the privileges for it, and suspended: PTRACE_O_SUSPEND_SECCOMP lasts
//! until the thread, which has its own registers by then, is let go of. When the restore dies, so does the thread.

use crate::{
    error::{Context, Error, Result},
    kernel::ptrace,
    restore::program::Program,
};
use standstill_images::types::{BpfInstruction, Seccomp, SeccompFilter, SeccompMode, SeccompThread};
use std::collections::HashMap;

/// What a filter returns for the supervisor to decide (SECCOMP_RET_USER_NOTIF).
const USER_NOTIF: u32 = 0x7fc0_0000;
const ACTION: u32 = 0xffff_0000;

/// What is known of the threads of a tree.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    known: HashMap<SeccompFilter, u32>,
    all: Seccomp,
}

impl Collected {
    /// Reads a stopped thread that is in `mode`.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or if this process has filters itself; refuses filters with a supervisor.
    pub(crate) fn thread(&mut self, pid: i32, tid: i32, mode: u32) -> Result<()> {
        let mode = match mode {
            libc::SECCOMP_MODE_DISABLED => return Ok(()),
            libc::SECCOMP_MODE_STRICT => SeccompMode::Strict,
            _ => SeccompMode::Filter(self.chain(pid, tid)?),
        };
        self.all.threads.push(SeccompThread { tid, mode });
        Ok(())
    }

    fn chain(&mut self, pid: i32, tid: i32) -> Result<Vec<u32>> {
        let context = || format!("read the seccomp filters of thread {tid}");
        let mut chain = Vec::new();
        loop {
            let number = chain.len();
            let program = match ptrace::seccomp_filter(tid, number) {
                Err(e) if e.raw_os_error() == Some(libc::EACCES) => return Err(not_permitted(tid)),
                other => other.context(context)?,
            };
            let Some(program) = program else { return Ok(chain) };
            let filter = SeccompFilter {
                flags: ptrace::seccomp_flags(tid, number).context(context)?,
                program: program.iter().map(|i| BpfInstruction { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect(),
            };
            if has_supervisor(&filter.program) {
                return Err(Error::unsupported(
                    pid,
                    format!("thread {tid}, whose seccomp filter asks a supervisor (SECCOMP_RET_USER_NOTIF),"),
                    "run the program without that supervisor",
                ));
            }
            let next = self.known.len() as u32;
            chain.push(*self.known.entry(filter).or_insert_with_key(|filter| {
                self.all.filters.push(filter.clone());
                next
            }));
        }
    }

    /// The record, if there is anything to tell.
    pub(crate) fn into_record(mut self) -> Option<Seccomp> {
        self.all.threads.sort_unstable_by_key(|t| t.tid);
        (!self.all.threads.is_empty()).then_some(self.all)
    }
}

/// Whether a filter may return SECCOMP_RET_USER_NOTIF. Nobody tells whether there is a listener for it.
fn has_supervisor(program: &[BpfInstruction]) -> bool {
    const RETURN: u16 = 0x06;
    const RETURN_ACCUMULATOR: u16 = 0x16;
    let asks = |i: &BpfInstruction| i.k & ACTION == USER_NOTIF;
    let computes = program.iter().any(|i| i.code == RETURN_ACCUMULATOR);
    program.iter().any(|i| asks(i) && (i.code == RETURN || computes))
}

/// The error for a thread whose filters cannot be read or suspended.
pub(crate) fn not_permitted(tid: i32) -> Error {
    Error::Missing {
        what: format!("CAP_SYS_ADMIN, and to be free of seccomp, to dump thread {tid}, which is under seccomp,"),
        remedy: "run as root, outside of containers that have filters".into(),
    }
}

/// How many of their oldest filters all these threads have in common: those are the same objects again if the first
/// thread installs them before it starts the others (SECCOMP_FILTER_FLAG_TSYNC asks for that).
pub(crate) fn common(seccomp: &Seccomp, tids: impl Iterator<Item = i32>) -> usize {
    let chains = tids.map(|tid| chain(seccomp, tid));
    let same = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    chains.reduce(|a, b| &a[..same(a, b)]).map_or(0, <[u32]>::len)
}

fn mode(seccomp: &Seccomp, tid: i32) -> Option<&SeccompMode> {
    seccomp.threads.binary_search_by_key(&tid, |t| t.tid).ok().map(|n| &seccomp.threads[n].mode)
}

fn chain(seccomp: &Seccomp, tid: i32) -> &[u32] {
    match mode(seccomp, tid) {
        Some(SeccompMode::Filter(chain)) => chain,
        _ => &[],
    }
}

/// Installs those filters of a thread that all of its process have.
pub(crate) fn restore_common(seccomp: &Seccomp, tid: i32, common: usize, program: &mut Program) {
    for &number in &chain(seccomp, tid)[..common] {
        install(&seccomp.filters[number as usize], program);
    }
}

/// Installs the other ones, or strict mode.
pub(crate) fn restore_own(seccomp: &Seccomp, tid: i32, common: usize, program: &mut Program) {
    for &number in &chain(seccomp, tid)[common..] {
        install(&seccomp.filters[number as usize], program);
    }
    if let Some(SeccompMode::Strict) = mode(seccomp, tid) {
        let args = [libc::PR_SET_SECCOMP.into(), libc::SECCOMP_MODE_STRICT.into(), 0.into()];
        program.call("enter the strict mode of seccomp", libc::SYS_prctl, &args);
    }
}

fn install(filter: &SeccompFilter, program: &mut Program) {
    let instruction = |i: &BpfInstruction| {
        u64::from(i.code) | u64::from(i.jt) << 16 | u64::from(i.jf) << 24 | u64::from(i.k) << 32 // struct sock_filter
    };
    let instructions = program.words(&filter.program.iter().map(instruction).collect::<Vec<_>>());
    let block = program.words(&[filter.program.len() as u64, 0]); // struct sock_fprog
    program.point(block, 8, instructions);
    let args = [libc::SECCOMP_SET_MODE_FILTER.into(), filter.flags.into(), block];
    program.call("install a seccomp filter", libc::SYS_seccomp, &args);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(instructions: &[(u16, u32)]) -> Vec<BpfInstruction> {
        instructions.iter().map(|&(code, k)| BpfInstruction { code, jt: 0, jf: 0, k }).collect()
    }

    #[test]
    fn supervisors_are_noticed() {
        const LOAD: u16 = 0x00;
        const ALLOW: u32 = 0x7fff_0000;
        assert!(has_supervisor(&program(&[(LOAD, 1), (0x06, USER_NOTIF | 5)])));
        assert!(has_supervisor(&program(&[(LOAD, USER_NOTIF), (0x16, 0)])));
        // A comparison with that number is none.
        assert!(!has_supervisor(&program(&[(0x15, USER_NOTIF), (0x06, ALLOW)])));
        assert!(!has_supervisor(&program(&[(0x06, 0x0005_0001)])));
    }

    #[test]
    fn threads_have_the_beginning_of_their_chains_in_common() {
        let filter = |tid, chain: &[u32]| SeccompThread { tid, mode: SeccompMode::Filter(chain.to_vec()) };
        let strict = SeccompThread { tid: 4, mode: SeccompMode::Strict };
        let threads = vec![filter(1, &[0, 1, 2]), filter(2, &[0, 1]), filter(3, &[0, 1, 3]), strict];
        let seccomp = Seccomp { filters: Vec::new(), threads };
        let common = |tids: &[i32]| common(&seccomp, tids.iter().copied());
        assert_eq!([common(&[1]), common(&[1, 2, 3]), common(&[1, 4]), common(&[1, 9])], [3, 2, 0, 0]);
    }
}
