//! Processes and threads with attributes that few have: those of prctl(2), memory policies, SCHED_DEADLINE.
//!
//! Options: `--members` (with the attributes of prctl(2) and of scheduling), `--mappings` (these have mappings with memory
//! policies, too), `--member NAME` (one of those that many machines refuse), `--leaderless` (a process whose first thread
//! has exited), `--stopped` (parents of stopped children, one that has waited for the stop and one that has not).
//! What this kernel or machine does not let be set is reported as UNAVAILABLE.

mod leaderless;
mod stopped;

use std::io::Error;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::unistd::gettid;
use standstill_tests::workload::{Args, Checker, Control, Mapping, Meter, Request, SelfState, fork_child};

const EVERY: Duration = Duration::from_millis(200);
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_GET_IO_FLUSHER: i32 = 58;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

fn main() {
    let args = Args::parse();
    let mut control = Control::new("attributes", &args);
    let checker = Arc::clone(&control.checker);
    if args.flag("members") {
        for member in MEMBERS {
            fork_member(&mut control, member, args.flag("mappings"));
        }
    }
    let rare: String = args.value("member", String::new());
    for member in RARE.into_iter().filter(|member| member.name == rare) {
        fork_member(&mut control, member, false);
    }
    let leaderless = args.flag("leaderless").then(leaderless::Leaderless::new);
    let stopped = args.flag("stopped").then(|| stopped::Parents::new(&mut control));
    control.collect();
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), EVERY, |request| {
        SelfState::of_process().check(&checker, "root", &before);
        if let Some(child) = &leaderless {
            child.check(&checker, request == Request::End);
        }
        if let Some(parents) = &stopped {
            parents.check(&checker, request);
        }
    });
}

/// A process that sets something, and what it finds then.
struct Member {
    name: &'static str,
    set: fn() -> Result<(), Error>,
    get: fn() -> Vec<i64>,
}

const MEMBERS: [Member; 16] = [
    Member { name: "usual", set: || Ok(()), get: everything },
    Member { name: "coredump_filter", set: || std::fs::write("/proc/self/coredump_filter", "0x1f4"), get: everything },
    Member { name: "THP_DISABLE", set: || prctl(libc::PR_SET_THP_DISABLE, [1, 0, 0, 0]), get: everything },
    // PR_THP_DISABLE_EXCEPT_ADVISED, Linux 6.18.
    Member { name: "THP_DISABLE but advised", set: || prctl(libc::PR_SET_THP_DISABLE, [1, 2, 0, 0]), get: everything },
    Member { name: "MDWE", set: || prctl(PR_SET_MDWE, [1, 0, 0, 0]), get: with_mdwe },
    Member { name: "MDWE without children", set: || prctl(PR_SET_MDWE, [3, 0, 0, 0]), get: with_mdwe },
    Member { name: "MEMORY_MERGE", set: || prctl(PR_SET_MEMORY_MERGE, [1, 0, 0, 0]), get: everything },
    Member { name: "MCE_KILL early", set: || mce_kill(libc::PR_MCE_KILL_EARLY), get: everything },
    Member { name: "MCE_KILL late", set: || mce_kill(libc::PR_MCE_KILL_LATE), get: everything },
    Member { name: "a membarrier", set: || register(&[1 << 4]), get: everything },
    Member { name: "every membarrier", set: || register(&[1 << 2, 1 << 4, 1 << 6, 1 << 8]), get: everything },
    // SECBIT_NOROOT, SECBIT_KEEP_CAPS_LOCKED.
    Member { name: "securebits", set: || prctl(libc::PR_SET_SECUREBITS, [0x21, 0, 0, 0]), get: everything },
    Member { name: "parent-death signal", set: || prctl(libc::PR_SET_PDEATHSIG, [10, 0, 0, 0]), get: everything },
    Member { name: "timer slack", set: || prctl(libc::PR_SET_TIMERSLACK, [123_456, 0, 0, 0]), get: everything },
    Member { name: "login uid", set: || std::fs::write("/proc/self/loginuid", "4711"), get: everything },
    Member { name: "policy of a thread", set: || set_mempolicy(libc::MPOL_BIND), get: everything },
];

/// What many machines refuse.
const RARE: [Member; 2] = [
    Member { name: "IO_FLUSHER", set: || prctl(PR_SET_IO_FLUSHER, [1, 0, 0, 0]), get: everything },
    Member { name: "speculation", set: || prctl(libc::PR_SET_SPECULATION_CTRL, [0, 4, 0, 0]), get: everything },
];

fn prctl(option: i32, args: [u64; 4]) -> Result<(), Error> {
    // SAFETY: the options that this is used for take numbers only.
    match unsafe { libc::prctl(option, args[0], args[1], args[2], args[3]) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

fn mce_kill(policy: i32) -> Result<(), Error> {
    prctl(libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET as u64, policy as u64, 0, 0])
}

fn set_mempolicy(mode: i32) -> Result<(), Error> {
    let nodes = 1_u64;
    // SAFETY: the kernel reads one word.
    match unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 65) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// MEMBARRIER_CMD_REGISTER_*
fn register(commands: &[i32]) -> Result<(), Error> {
    commands.iter().try_for_each(|command| match membarrier(*command) {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    })
}

fn membarrier(command: i32) -> i64 {
    // SAFETY: membarrier(2) takes numbers only.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}

/// Mode and first nodes of the calling thread's policy, or of the memory at an address.
fn get_mempolicy(address: Option<usize>) -> [i64; 2] {
    let (mut mode, mut nodes) = (0_i32, [0_u64; 16]);
    let flags = if address.is_some() { 2 } else { 0 };
    let address = address.unwrap_or(0);
    // SAFETY: there is room for an int and 1024 bits.
    let result =
        unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1025, address, flags) };
    [if result == 0 { mode.into() } else { -1 }, nodes[0] as i64]
}

/// All that can be asked for.
fn everything() -> Vec<i64> {
    let get = |option| {
        // SAFETY: these options take no memory.
        i64::from(unsafe { libc::prctl(option, 0, 0, 0, 0) })
    };
    let filter = std::fs::read_to_string("/proc/self/coredump_filter").unwrap_or_default();
    let mut all = vec![i64::from_str_radix(filter.trim(), 16).unwrap_or(-1)];
    all.extend([libc::PR_GET_THP_DISABLE, PR_GET_MDWE, PR_GET_MEMORY_MERGE, libc::PR_MCE_KILL_GET].map(get));
    all.extend([PR_GET_IO_FLUSHER, libc::PR_GET_SECUREBITS, libc::PR_GET_TIMERSLACK].map(get));
    let mut signal = 0_i32;
    // SAFETY: the kernel writes an int.
    unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal) };
    let loginuid = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    all.extend([signal.into(), loginuid.parse().unwrap_or(-1)]);
    // SAFETY: these options take numbers only.
    all.extend([0, 1].map(|kind| i64::from(unsafe { libc::prctl(libc::PR_GET_SPECULATION_CTRL, kind, 0, 0, 0) })));
    all.extend(get_mempolicy(None));
    // What was registered, and whether the process may use it.
    all.extend([1 << 9, 1 << 3].map(membarrier));
    all
}

/// The same, and whether memory can be made executable.
fn with_mdwe() -> Vec<i64> {
    let page = Mapping::private(4096).expect("map a page");
    let gained = page.protect(libc::PROT_READ | libc::PROT_EXEC).map_err(|e| e.raw_os_error());
    // SAFETY: nobody has a pointer into the page.
    unsafe { libc::munmap(page.start() as *mut _, 4096) };
    assert_eq!(gained, Err(Some(libc::EACCES)), "MDWE is not in effect");
    everything()
}

fn fork_member(control: &mut Control, member: Member, mappings: bool) {
    let name = member.name;
    let child = control.for_child(name);
    let pid = fork_child(move || {
        if let Err(error) = (member.set)() {
            println!("UNAVAILABLE {name}: {error}");
        }
        let mut others = Vec::new();
        if name == "usual" {
            others = OTHERS.iter().map(|other| Other::start(*other)).collect();
        }
        let regions = if mappings { regions() } else { Vec::new() };
        let checker = Arc::clone(&child.checker);
        let policies = || regions.iter().map(|m| get_mempolicy(Some(m.start()))).collect::<Vec<_>>();
        let before = ((member.get)(), policies(), SelfState::of_process());
        child.serve(None, EVERY, |_| {
            checker.equal(name, &(member.get)(), &before.0);
            checker.equal("policies of mappings", &policies(), &before.1);
            SelfState::of_process().check(&checker, name, &before.2);
            others.iter().for_each(|other| other.check(&checker));
        });
    });
    control.adopt(pid, name);
}

/// Mappings with policies of their own: bound, preferred with static nodes, interleaved; and one without in between.
fn regions() -> Vec<Mapping> {
    const STATIC: i32 = 1 << 15;
    let modes = [libc::MPOL_BIND, libc::MPOL_DEFAULT, libc::MPOL_PREFERRED | STATIC, libc::MPOL_INTERLEAVE];
    let whole = Mapping::private(modes.len() * 16384).expect("map memory");
    let nodes = 1_u64;
    for (n, mode) in modes.into_iter().enumerate().filter(|(_, mode)| *mode != libc::MPOL_DEFAULT) {
        let part = whole.part(n * 16384, 16384);
        // SAFETY: the range belongs to this mapping; the kernel reads one word of nodes.
        let result =
            unsafe { libc::syscall(libc::SYS_mbind, part.start(), part.length(), mode, &raw const nodes, 65, 0) };
        if result != 0 {
            println!("UNAVAILABLE mbind: {}", Error::last_os_error());
        }
        part.words_mut().fill(n as u64);
    }
    (0..modes.len()).map(|n| whole.part(n * 16384, 16384)).collect()
}

/// A thread that sets something for itself alone.
type Setting = (&'static str, fn() -> Result<(), Error>, fn() -> Vec<i64>);

const OTHERS: [Setting; 5] = [
    ("TSC of a thread", || prctl(libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV as u64, 0, 0, 0]), tsc),
    ("MCE_KILL of a thread", || mce_kill(libc::PR_MCE_KILL_EARLY), everything),
    ("interleaving of a thread", || set_mempolicy(libc::MPOL_INTERLEAVE), everything),
    ("deadline", || set_deadline(0), deadline),
    ("deadline that is reset by fork", || set_deadline(libc::SCHED_FLAG_RESET_ON_FORK as u64), deadline),
];

fn tsc() -> Vec<i64> {
    let mut mode = 0_i32;
    // SAFETY: there is room for an int.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut mode, 0, 0, 0) }, 0, "PR_GET_TSC");
    vec![mode.into()]
}

fn set_deadline(flags: u64) -> Result<(), Error> {
    let ms = 1_000_000;
    // struct sched_attr: size and policy, flags, nice and priority, runtime, deadline, period.
    let attr = [48 | 6 << 32, flags, 0, 2 * ms, 50 * ms, 100 * ms];
    // SAFETY: the kernel reads 48 bytes.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, attr.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

fn deadline() -> Vec<i64> {
    let mut attr = [0_i64; 6];
    // SAFETY: there is room for 48 bytes.
    let result = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), 48, 0) };
    assert_eq!(result, 0, "sched_getattr");
    attr.to_vec()
}

struct Other {
    setting: Setting,
    before: Vec<i64>,
    ask: Sender<()>,
    answer: Receiver<(i32, Vec<i64>)>,
    tid: i32,
}

impl Other {
    fn start(setting: Setting) -> Self {
        let ((ask, asked), (answers, answer)) = (channel(), channel());
        std::thread::spawn(move || {
            if let Err(error) = setting.1() {
                println!("UNAVAILABLE {}: {error}", setting.0);
            }
            // Nothing here may look at the clock: the time stamp counter may be forbidden.
            loop {
                answers.send((gettid().as_raw(), setting.2())).expect("the process listens");
                asked.recv().expect("the process asks");
            }
        });
        let (tid, before) = answer.recv().expect("the first answer");
        Self { setting, before, ask, answer, tid }
    }

    fn check(&self, checker: &Checker) {
        self.ask.send(()).expect("the thread listens");
        let answer = self.answer.recv().expect("an answer");
        checker.equal(self.setting.0, &answer, &(self.tid, self.before.clone()));
    }
}
