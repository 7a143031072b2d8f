//! Random lives of process trees, so that every tree is one that the kernel allows.

use super::model::{OUTSIDE, Origin, PAGE, Page, Space, What, World};
use proptest::prelude::*;

pub(super) const ROOT: i32 = 10;
/// The kernel's mappings: name, distance from the first, length.
pub(super) const KERNEL: [(&str, u64, u64); 2] = [("[vvar]", 0, 2 * PAGE), ("[vdso]", 3 * PAGE, PAGE)];
const HEAP: u64 = 0x4000_0000;
const LIBRARIES: u64 = 0x5000_0000;
const NUMBERS: [i32; 12] = [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 40, 62];
const PROTS: [u8; 5] = [0, 1, 3, 5, 7];

/// Who does it, and three choices.
pub(super) type Args = (u8, u8, u8, u8);

/// A step in the life of a tree. One that is not possible does nothing.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Fork(Args),
    Unshare(Args),
    Chdir(Args),
    Thread(Args),
    Setsid(Args),
    Setpgid(Args),
    Exit(Args),
    Reap(Args),
    Exec(Args),
    Open(Args),
    Pipe(Args),
    Reopen(Args),
    Dup(Args),
    Cloexec(Args),
    Close(Args),
    Seek(Args),
    Write(Args),
    Watch(Args),
    Map(Args),
    Unmap(Args),
    Protect(Args),
    Touch(Args),
    Drop(Args),
    Guard(Args),
    Advise(Args),
}

/// Weights of processes, descriptors and memory among the operations.
pub(super) fn ops(processes: u32, files: u32, memory: u32) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 * processes => any::<Args>().prop_map(Op::Fork),
        processes => any::<Args>().prop_map(Op::Unshare),
        processes => any::<Args>().prop_map(Op::Chdir),
        processes => any::<Args>().prop_map(Op::Thread),
        2 * processes => any::<Args>().prop_map(Op::Setsid),
        4 * processes => any::<Args>().prop_map(Op::Setpgid),
        2 * processes => any::<Args>().prop_map(Op::Exit),
        processes => any::<Args>().prop_map(Op::Reap),
        processes => any::<Args>().prop_map(Op::Exec),
        4 * files => any::<Args>().prop_map(Op::Open),
        3 * files => any::<Args>().prop_map(Op::Pipe),
        files => any::<Args>().prop_map(Op::Reopen),
        6 * files => any::<Args>().prop_map(Op::Dup),
        files => any::<Args>().prop_map(Op::Cloexec),
        3 * files => any::<Args>().prop_map(Op::Close),
        files => any::<Args>().prop_map(Op::Seek),
        files => any::<Args>().prop_map(Op::Write),
        2 * files => any::<Args>().prop_map(Op::Watch),
        5 * memory => any::<Args>().prop_map(Op::Map),
        memory => any::<Args>().prop_map(Op::Unmap),
        2 * memory => any::<Args>().prop_map(Op::Protect),
        5 * memory => any::<Args>().prop_map(Op::Touch),
        memory => any::<Args>().prop_map(Op::Drop),
        memory => any::<Args>().prop_map(Op::Guard),
        2 * memory => any::<Args>().prop_map(Op::Advise),
    ];
    proptest::collection::vec(op, 0..60)
}

/// How the root began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// It leads a session.
    Session,
    /// The job of a shell: it leads a group of the session around it.
    Job,
    /// It stays in the group around it.
    Member,
}

pub(super) fn starts() -> impl Strategy<Value = Start> {
    prop_oneof![Just(Start::Session), Just(Start::Job), Just(Start::Member)]
}

/// A tree and what its dump would need to know beyond it.
pub(super) struct History {
    start: Start,
    pub world: World,
    /// Pages of the store in use.
    pub stored: u64,
    /// Shared memory objects; whether each is a memfd.
    pub objects: Vec<bool>,
}

impl History {
    /// Lives through `ops`.
    pub(super) fn new(start: Start, ops: &[Op]) -> Self {
        let mut history = Self { start, world: World::new(), stored: 0, objects: Vec::new() };
        history.world.fork(OUTSIDE, ROOT, 0).expect("the number is free");
        let begun = match start {
            Start::Session => history.world.setsid(ROOT),
            Start::Job => history.world.setpgid(ROOT, ROOT),
            Start::Member => Ok(0),
        };
        begun.expect("it leads nothing yet");
        history.exec(ROOT, 0).expect("nothing is mapped yet");
        for op in ops {
            history.step(op);
        }
        history
    }

    fn step(&mut self, op: &Op) {
        match op.clone() {
            Op::Fork(args) => {
                self.with(args, |h, pid, a| h.world.fork(pid, i32::from(a[0] % 40) + 2, born_with(a[1])).ok());
            }
            Op::Unshare(args) => self.with(args, |h, pid, a| h.world.unshare(pid, shared(a[0])).ok()),
            Op::Chdir(args) => {
                self.with(args, |h, pid, a| {
                    let fs = h.world.process(pid).fs;
                    h.world.directories[fs] = format!("/{}", a[0] % 3);
                    Some(())
                });
            }
            Op::Thread(args) => self.with(args, |h, pid, a| h.world.thread(pid, i32::from(a[0] % 40) + 50).ok()),
            Op::Setsid(args) => self.with(args, |h, pid, _| h.world.setsid(pid).ok()),
            Op::Setpgid(args) => {
                self.with(args, |h, pid, a| {
                    let other = h.world.processes.values().nth(a[0] as usize % h.world.processes.len())?;
                    let pgid = if a[1] % 2 == 0 { pid } else { other.pgid };
                    // By its root's group an image tells which one is around the tree.
                    if pid == ROOT || h.start == Start::Job && pgid == OUTSIDE {
                        return None;
                    }
                    h.world.setpgid(pid, pgid).ok()
                });
            }
            Op::Exit(args) => self.with(args, |h, pid, a| h.exit(pid, [0, 3 << 8, libc::SIGKILL][a[0] as usize % 3])),
            Op::Reap(args) => {
                self.with(args, |h, pid, _| {
                    let child = h.world.processes.iter().find(|(_, p)| p.ppid == pid && p.dead.is_some()).map(|p| *p.0);
                    h.world.wait(pid, child?).ok()
                });
            }
            Op::Exec(args) => self.with(args, |h, pid, a| h.exec(pid, a[0])),
            Op::Open(args) => self.with(args, Self::open),
            Op::Pipe(args) => self.with(args, |h, pid, _| Some(h.world.pipe(pid))),
            Op::Reopen(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |what| matches!(what, What::Pipe(_) | What::Path(_) | What::Memory(_)))?;
                    let mode = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR][a[1] as usize % 3];
                    h.world.reopen(pid, fd, mode | if a[2] % 2 == 0 { libc::O_NONBLOCK } else { 0 }).ok()
                });
            }
            Op::Dup(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |_| true)?;
                    h.world.dup3(pid, fd, NUMBERS[a[1] as usize % NUMBERS.len()], a[2] % 2 == 0).ok()
                });
            }
            Op::Cloexec(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |_| true)?;
                    h.world.table(pid).get_mut(&fd).map(|f| f.1 = true)
                });
            }
            Op::Close(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |_| true)?;
                    h.world.close(pid, fd).ok()
                });
            }
            Op::Seek(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |what| matches!(what, What::Path(_) | What::Memory(_)))?;
                    h.world.file(pid, fd).map(|f| f.pos = a[1].into()).ok()
                });
            }
            Op::Write(args) => {
                self.with(args, |h, pid, a| {
                    let fd = h.fd(pid, a[0], |what| matches!(what, What::Pipe(_)))?;
                    let What::Pipe(pipe) = h.world.file(pid, fd).ok()?.what else { return None };
                    h.world.pipes[pipe].push(a[1]);
                    Some(())
                });
            }
            Op::Watch(args) => {
                self.with(args, |h, pid, a| {
                    let epoll = h.fd(pid, a[0], |what| matches!(what, What::Epoll(_)))?;
                    let fd = h.fd(pid, a[1], |_| true)?;
                    h.world.epoll_add(pid, epoll, fd).ok()
                });
            }
            Op::Map(args) => self.with(args, Self::map),
            Op::Unmap(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    h.world.munmap(pid, start, len).ok()
                });
            }
            Op::Protect(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    h.world.mprotect(pid, start, len, PROTS[a[2] as usize % PROTS.len()]).ok()
                });
            }
            Op::Touch(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    let before = h.stored;
                    h.stored += len / PAGE;
                    // Through the debugger's door, which cares for no protection.
                    h.change(pid, start, len, |n, page| {
                        if page.is_private() && !page.guard {
                            page.content = Some(before + n);
                        }
                    })
                });
            }
            Op::Drop(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    h.change(pid, start, len, |_, page| page.content = None)
                });
            }
            Op::Guard(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    h.change(pid, start, len, |_, page| {
                        if page.from == Origin::Anonymous {
                            (page.guard, page.content) = (true, None);
                        }
                    })
                });
            }
            Op::Advise(args) => {
                self.with(args, |h, pid, a| {
                    let (start, len) = range(a);
                    h.change(pid, start, len, |_, page| {
                        let anonymous = page.from == Origin::Anonymous;
                        match a[2] % 6 {
                            0 => page.flags.dontfork = true,
                            1 => page.flags.wipeonfork = anonymous,
                            2 => page.flags.dontdump = true,
                            3 => page.flags.mergeable = page.is_private(),
                            4 => page.flags.hugepage = anonymous && !page.flags.nohugepage,
                            _ => page.flags.locked = true,
                        }
                    })
                });
            }
        }
    }

    /// Does something as one of the living.
    fn with<T>(&mut self, args: Args, act: impl FnOnce(&mut Self, i32, [u8; 3]) -> Option<T>) {
        let living = self.world.processes.iter().filter(|(pid, p)| **pid != OUTSIDE && p.dead.is_none());
        let pids: Vec<i32> = living.map(|p| *p.0).collect();
        // Much of what they try is not possible: then nothing happened.
        act(self, pids[args.0 as usize % pids.len()], [args.1, args.2, args.3]);
    }

    /// One of the descriptors that a process has.
    fn fd(&mut self, pid: i32, choice: u8, fits: impl Fn(&What) -> bool) -> Option<i32> {
        let files = &self.world.files;
        let fds: Vec<i32> = self.world.fds(pid).iter().filter(|f| fits(&files[f.1.0].what)).map(|f| *f.0).collect();
        (!fds.is_empty()).then(|| fds[choice as usize % fds.len()])
    }

    /// Dies; children fall to the root, as if it were a subreaper.
    fn exit(&mut self, pid: i32, status: i32) -> Option<()> {
        if pid == ROOT {
            return None;
        }
        for child in self.world.processes.values_mut().filter(|p| p.ppid == pid) {
            child.ppid = ROOT;
        }
        self.world.exit(pid, status);
        Some(())
    }

    /// Another program, with as many libraries as `choice` says.
    fn exec(&mut self, pid: i32, choice: u8) -> Option<()> {
        self.world.unshare(pid, libc::CLONE_FILES).ok()?;
        self.world.table(pid).retain(|_, f| !f.1);
        self.world.process(pid).tids.clear();
        self.world.begin_actions(pid);
        let exe = format!("/bin/{}", choice % 8);
        self.world.begin_space(pid, Space { exe: exe.clone(), ..Space::default() });
        self.world.forget_closed();
        let files = std::iter::once(exe).chain((0..choice % 8).map(|n| format!("/lib/{n}")));
        for (n, path) in files.enumerate() {
            let page = |prot| Page::new(Origin::Private { path: path.clone(), offset: 0 }, prot);
            self.world.map(pid, LIBRARIES + n as u64 * 0x10_0000, [page(5), page(3)].into_iter()).ok()?;
        }
        for (name, distance, len) in KERNEL {
            let pages = (0..len / PAGE).map(|offset| Page::new(Origin::Kernel { name: name.into(), offset }, 5));
            self.world.map(pid, 0x6000_0000 + u64::from(choice) * 0x1_0000 + distance, pages).ok()?;
        }
        Some(())
    }

    fn open(&mut self, pid: i32, a: [u8; 3]) -> Option<i32> {
        let flag = |choice: u8, flag: i32| if choice < 64 { flag } else { 0 };
        let extra = flag(a[1], libc::O_NONBLOCK) | flag(a[2], libc::O_CLOEXEC);
        let (what, flags) = match a[0] % 7 {
            0 => (What::Epoll(Default::default()), libc::O_RDWR),
            1 | 2 => (What::EventFd(u64::from(a[1] % 2)), libc::O_RDWR | extra),
            3 => {
                self.objects.push(true);
                (What::Memory(self.objects.len() as u32 - 1), libc::O_RDWR)
            }
            4 => (What::Path(format!("/file/{}", a[1] % 3)), libc::O_RDONLY | extra),
            5 => {
                let other = *self.world.processes.keys().nth(a[1] as usize % self.world.processes.len())?;
                let what = (other != OUTSIDE).then_some(What::PidFd(other));
                (what?, libc::O_RDWR | libc::O_CLOEXEC)
            }
            _ => (What::Path(format!("/file/{}", a[1] % 3)), libc::O_RDWR | libc::O_APPEND | extra),
        };
        Some(self.world.open(pid, what, flags))
    }

    fn map(&mut self, pid: i32, a: [u8; 3]) -> Option<i64> {
        let (start, len) = range(a);
        let prot = PROTS[(a[2] / 8) as usize % PROTS.len()];
        let offset = u64::from(a[1] % 3);
        let path = format!("/file/{}", a[2] % 3);
        let object = u32::from(a[1]) % (self.objects.len() as u32 + 1);
        let from = |n: u64| match a[2] % 8 {
            0..=2 => Origin::Anonymous,
            3 | 4 => Origin::Private { path: path.clone(), offset: offset + n },
            5 => Origin::Shared { path: path.clone(), offset: offset + n, may_write: true },
            6 => Origin::Shared { path: path.clone(), offset: offset + n, may_write: false },
            _ => Origin::Memory { object, offset: offset + n },
        };
        if a[2] % 8 == 7 && object as usize == self.objects.len() {
            self.objects.push(false);
        }
        let prot = if a[2] % 8 == 6 { prot & !(libc::PROT_WRITE as u8) } else { prot };
        self.world.munmap(pid, start, len).ok()?;
        self.world.map(pid, start, (0..len / PAGE).map(|n| Page::new(from(n), prot))).ok()
    }

    /// Changes the pages of a range that are the program's own.
    fn change(&mut self, pid: i32, start: u64, len: u64, change: impl Fn(u64, &mut Page)) -> Option<()> {
        for (at, page) in self.world.space_mut(pid).pages.range_mut(start..start + len) {
            change((at - start) / PAGE, page);
        }
        Some(())
    }
}

/// Flags of clone(2) or unshare(2); mostly none.
fn shared(choice: u8) -> i32 {
    let flag = |bit: u8, flag: i32| if choice & bit != 0 { flag } else { 0 };
    if choice < 128 { 0 } else { flag(1, libc::CLONE_FILES) | flag(2, libc::CLONE_FS) }
}

/// Flags of clone(2); mostly none.
fn born_with(choice: u8) -> i32 {
    shared(choice) | [0, 0, 0, libc::CLONE_VM, libc::CLONE_VM | libc::CLONE_SIGHAND][usize::from(choice / 4 % 5)]
}

/// A few pages of the heap.
fn range(a: [u8; 3]) -> (u64, u64) {
    (HEAP + u64::from(a[0] % 24) * PAGE, (1 + u64::from(a[1] % 5)) * PAGE)
}
