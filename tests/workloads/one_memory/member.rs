//! The members. Those that share the root's memory share its thread-local storage too, so they use nothing of the C
//! library: system calls are made by hand, and what they find is left in memory that all of the tree have.

use std::arch::asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64};
use std::time::Duration;

use standstill_tests::workload::Mapping;

pub(crate) const MEMBERS: usize = 8;
/// A descriptor that the root has, and those that share its table.
pub(crate) const HIGH: i32 = 100;
/// A signal that all catch.
pub(crate) const SIGNAL: i32 = 40;
/// What the fork of the grandchild has in the place of the token.
pub(crate) const OF_FORK: u64 = 77;

/// What siblings begin to count with there.
pub(crate) const OF_SIBLINGS: u64 = 1 << 40;

/// In private memory: another one in each address space.
pub(crate) static TOKEN: AtomicU64 = AtomicU64::new(0);
static TABLE: AtomicPtr<[Slot; MEMBERS]> = AtomicPtr::new(std::ptr::null_mut());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Kind {
    Root,
    WithThread,
    Grandchild,
    Child,
    Session,
    FirstSibling,
    SecondSibling,
    Fork,
}

impl Kind {
    pub(crate) const ALL: [Self; MEMBERS] = [
        Self::Root,
        Self::WithThread,
        Self::Grandchild,
        Self::Child,
        Self::Session,
        Self::FirstSibling,
        Self::SecondSibling,
        Self::Fork,
    ];

    /// Flags of clone(2) that make it, and whose child it is.
    fn birth(self) -> (i32, Self) {
        const MEMORY: i32 = libc::CLONE_VM;
        const ACTIONS: i32 = libc::CLONE_VM | libc::CLONE_SIGHAND;
        match self {
            Self::Root | Self::FirstSibling => (0, Self::Root),
            Self::WithThread | Self::Child => (MEMORY, Self::Root),
            Self::Grandchild => (ACTIONS | libc::CLONE_FILES, Self::WithThread),
            Self::Session => (ACTIONS | libc::CLONE_FILES, Self::Root),
            Self::SecondSibling => (ACTIONS | libc::CLONE_PARENT, Self::Root),
            Self::Fork => (0, Self::Grandchild),
        }
    }
}

/// What one signal adds to the count of a member: tells which handler it has.
pub(crate) fn weight(kind: Kind) -> u64 {
    if matches!(kind, Kind::WithThread | Kind::Grandchild | Kind::Fork) { 1000 } else { 1 }
}

/// One member, for all to see.
#[repr(C)]
pub(crate) struct Slot {
    pub(crate) pid: AtomicI32,
    pub(crate) beats: AtomicU64,
    pub(crate) thread_beats: AtomicU64,
    /// What it finds in the place of the token.
    pub(crate) echo: AtomicU64,
    pub(crate) signals: AtomicU64,
    /// One bit for each thing that was wrong.
    pub(crate) errors: AtomicU64,
    /// Tops of stacks: its own and its thread's.
    stacks: [AtomicU64; 2],
}

impl Slot {
    pub(crate) fn kind(&self) -> Kind {
        let first = TABLE.load(SeqCst) as usize;
        Kind::ALL[(std::ptr::from_ref(self) as usize - first) / size_of::<Self>()]
    }

    fn wrong(&self, what: u64) {
        self.errors.fetch_or(1 << what, SeqCst);
    }
}

/// All members.
#[derive(Clone, Copy)]
pub(crate) struct Table(&'static [Slot; MEMBERS]);

impl Table {
    pub(crate) fn new() -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let memory = Mapping::new(4096, protection, libc::MAP_SHARED, None).expect("map");
        TABLE.store(memory.start() as *mut _, SeqCst);
        // SAFETY: the mapping is never unmapped, aligned and zeroed, and only used through atomics.
        let table = Self(unsafe { &*(memory.start() as *const _) });
        for stack in table.0.iter().flat_map(|slot| &slot.stacks) {
            let memory = Mapping::private(64 << 10).expect("map a stack");
            stack.store((memory.start() + memory.length()) as u64, SeqCst);
        }
        table
    }

    pub(crate) fn slots(self) -> &'static [Slot; MEMBERS] {
        self.0
    }

    pub(crate) fn slot(self, kind: Kind) -> &'static Slot {
        &self.0[kind as usize]
    }

    pub(crate) fn pids(self) -> [i32; MEMBERS] {
        std::array::from_fn(|n| self.0[n].pid.load(SeqCst))
    }

    /// A member tells who it is.
    pub(crate) fn begin(self, kind: Kind, pid: i32, token: u64) {
        self.slot(kind).echo.store(token, SeqCst);
        self.slot(kind).pid.store(pid, SeqCst);
    }

    pub(crate) fn await_all(self, kinds: &[Kind]) {
        while kinds.iter().any(|kind| self.slot(*kind).pid.load(SeqCst) == 0) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes a member.
    pub(crate) fn start(self, kind: Kind) {
        let (flags, _) = kind.birth();
        let pid = spawn(flags | libc::SIGCHLD, &self.slot(kind).stacks[0], live, kind as u64);
        assert!(pid > 0, "clone: {pid}");
    }
}

pub(crate) fn place(file: File, at: i32) {
    // SAFETY: descriptors from HIGH on are not owned by anything.
    assert_eq!(unsafe { libc::dup3(file.as_raw_fd(), at, 0) }, at, "dup3");
}

/// A system call.
#[inline(always)]
fn call(nr: i64, args: [u64; 4]) -> i64 {
    let result;
    // SAFETY: all callers pass numbers, or pointers that are valid for what the call reads or writes.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], lateout("rcx") _, lateout("r11") _);
    }
    result
}

/// clone(2) of a task on a stack of its own that runs `body` with `argument`.
#[inline(never)]
fn spawn(flags: i32, stack: &AtomicU64, body: extern "C" fn(u64) -> !, argument: u64) -> i64 {
    let result;
    // SAFETY: the stack is used by nobody else. The child has its registers, jumps to `body` and never comes back; a stack
    // that a call would leave 8 bytes below a multiple of 16.
    unsafe {
        asm!(
            "syscall",
            "test eax, eax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone => result,
            in("rdi") flags as u64,
            in("rsi") stack.load(SeqCst),
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") argument,
            in("r13") body,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

fn pid() -> i32 {
    call(libc::SYS_getpid, [0; 4]) as i32
}

fn slots() -> &'static [Slot; MEMBERS] {
    // SAFETY: the mapping is there before any member is.
    unsafe { &*TABLE.load(SeqCst) }
}

fn count(add: u64) {
    let pid = pid();
    for slot in slots().iter().filter(|slot| slot.pid.load(SeqCst) == pid) {
        slot.signals.fetch_add(add, SeqCst);
    }
}

extern "C" fn of_root(_: i32) {
    count(1);
}

extern "C" fn of_others(_: i32) {
    count(1000);
}

/// The handler of the root, and of those who share it or have a copy.
pub(crate) fn catch_signals() {
    set_handler(of_root);
}

std::arch::global_asm!(".globl leave_signal_handler", "leave_signal_handler:", "mov eax, 15", "syscall");

unsafe extern "C" {
    fn leave_signal_handler();
}

fn set_handler(handler: extern "C" fn(i32)) -> i64 {
    const SA_RESTORER: u64 = 0x0400_0000;
    let restorer = leave_signal_handler as *const () as u64;
    let action = [handler as *const () as u64, SA_RESTORER | libc::SA_RESTART as u64, restorer, 0];
    call(libc::SYS_rt_sigaction, [SIGNAL as u64, action.as_ptr() as u64, 0, 8])
}

fn handler() -> u64 {
    let mut action = [0_u64; 4];
    call(libc::SYS_rt_sigaction, [SIGNAL as u64, 0, action.as_mut_ptr() as u64, 8]);
    action[0]
}

fn nap() {
    let time = [0_u64, 3_000_000];
    call(libc::SYS_nanosleep, [time.as_ptr() as u64, 0, 0, 0]);
}

/// The life of a member.
extern "C" fn live(number: u64) -> ! {
    let kind = Kind::ALL[number as usize];
    let slot = &slots()[kind as usize];
    let own = pid();
    let has_file = !matches!(kind, Kind::WithThread | Kind::Grandchild | Kind::Fork);
    match kind {
        Kind::WithThread => {
            call(libc::SYS_chdir, [c"/usr".as_ptr() as u64, 0, 0, 0]);
            call(libc::SYS_close, [HIGH as u64, 0, 0, 0]);
            set_handler(of_others);
            const THREAD: i32 = libc::CLONE_THREAD
                | libc::CLONE_VM
                | libc::CLONE_SIGHAND
                | libc::CLONE_FILES
                | libc::CLONE_FS
                | libc::CLONE_SYSVSEM;
            spawn(THREAD, &slot.stacks[1], beat, number);
        }
        Kind::Session => _ = call(libc::SYS_setsid, [0; 4]),
        Kind::FirstSibling => TOKEN.store(OF_SIBLINGS, SeqCst),
        Kind::Fork => TOKEN.store(OF_FORK, SeqCst),
        _ => {}
    }
    // Where the parent makes them, they have what it has by then.
    let next = match kind {
        Kind::WithThread => Some(Kind::Grandchild),
        Kind::Grandchild => Some(Kind::Fork),
        Kind::FirstSibling => Some(Kind::SecondSibling),
        _ => None,
    };
    if let Some(next) = next {
        let flags = next.birth().0 | if next.birth().0 & libc::CLONE_PARENT == 0 { libc::SIGCHLD } else { 0 };
        spawn(flags, &slots()[next as usize].stacks[0], live, next as u64);
    }
    let marks: [u64; 32] = std::array::from_fn(|n| std::hint::black_box(number << 32 | n as u64));
    let expected = handler();
    slot.echo.store(TOKEN.load(SeqCst), SeqCst);
    slot.pid.store(own, SeqCst);
    loop {
        slot.beats.fetch_add(1, SeqCst);
        if kind == Kind::FirstSibling {
            TOKEN.fetch_add(1, SeqCst);
        }
        slot.echo.store(TOKEN.load(SeqCst), SeqCst);
        // A parent that has just made it may not have told its number yet.
        let parent = slots()[kind.birth().1 as usize].pid.load(SeqCst);
        if pid() != own || parent != 0 && call(libc::SYS_getppid, [0; 4]) as i32 != parent {
            slot.wrong(1);
        }
        if (0..32).any(|n| std::hint::black_box(&marks)[n as usize] != number << 32 | n) {
            slot.wrong(2);
        }
        if (call(libc::SYS_fcntl, [HIGH as u64, libc::F_GETFD as u64, 0, 0]) >= 0) != has_file {
            slot.wrong(3);
        }
        if handler() != expected {
            slot.wrong(4);
        }
        nap();
    }
}

/// The life of a second thread.
extern "C" fn beat(number: u64) -> ! {
    let slot = &slots()[number as usize];
    loop {
        slot.thread_beats.fetch_add(1, SeqCst);
        nap();
    }
}
