//! Processes that share memory (CLONE_VM), and some of them signal actions (CLONE_SIGHAND): a child with a thread, a child
//! of that one, a member of another session, and two siblings whose parent has other memory.
//!
//! Option: `--mib N` of memory that the root writes all the time (default 1).

mod member;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use member::{HIGH, Kind, MEMBERS, SIGNAL, Slot, TOKEN, Table};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getpid};
use standstill_tests::workload::{Args, Checker, Control, Meter, PAGE, SelfState};

const EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(5);

/// Who has what: memory, signal actions and descriptors, by number.
const SHARES: [(&str, u8, u8, u8); MEMBERS] = [
    ("root", 0, 0, 0),
    ("child with a thread", 0, 1, 1),
    ("grandchild", 0, 1, 1),
    ("child", 0, 2, 2),
    ("another session", 0, 0, 0),
    ("first sibling", 3, 3, 3),
    ("second sibling", 3, 3, 4),
    ("fork of the grandchild", 5, 5, 5),
];

fn main() {
    let args = Args::parse();
    let control = Control::new("one_memory", &args);
    let checker = Arc::clone(&control.checker);
    let table = Table::new();
    member::place(fs::File::open("/dev/zero").expect("open"), HIGH);
    member::catch_signals();
    table.begin(Kind::Root, getpid().as_raw(), 0);
    // While there is one thread: it is a fork.
    table.start(Kind::FirstSibling);
    table.await_all(&[Kind::FirstSibling, Kind::SecondSibling]);
    for kind in [Kind::WithThread, Kind::Child, Kind::Session] {
        table.start(kind);
    }
    table.await_all(&Kind::ALL);
    let pids = table.pids();
    let mut memory = vec![0_u8; args.value("mib", 1_usize) << 20];
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    let outside = pids.map(facts);
    control.ready();
    let mut round: u64 = 0;
    control.serve(Some(&meter), EVERY, |request| {
        round += 1;
        for (n, page) in memory.chunks_mut(PAGE).enumerate() {
            let old = u64::from_ne_bytes(page[..8].try_into().expect("eight bytes"));
            checker.equal("memory of all", &old, &if round == 1 { 0 } else { (round - 1) << 32 | n as u64 });
            page[..8].copy_from_slice(&(round << 32 | n as u64).to_ne_bytes());
        }
        SelfState::of_process().check(&checker, "root", &before);
        checker.equal("processes", &table.pids(), &pids);
        checker.equal("facts of all", &pids.map(facts), &outside);
        check_partition(&checker, pids);
        check_members(&checker, table);
        if request.thorough() {
            check_signals(&checker, table);
        }
        if request == standstill_tests::workload::Request::End {
            end(&checker, pids);
        }
    });
}

/// What procfs tells of a member: parent, session, threads, working directory, mask of caught signals.
fn facts(pid: i32) -> (Vec<String>, Option<std::path::PathBuf>) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let wanted = ["PPid:", "NSsid:", "NSpgid:", "Threads:", "SigCgt:", "Name:"];
    let lines = status.lines().filter(|l| wanted.iter().any(|w| l.starts_with(w)));
    // The root's parent is another after a restore.
    let root = pid == getpid().as_raw();
    let lines = lines.filter(|l| !root || !l.starts_with("PPid:")).map(str::to_owned);
    (lines.collect(), fs::read_link(format!("/proc/{pid}/cwd")).ok())
}

fn check_partition(checker: &Checker, pids: [i32; MEMBERS]) {
    for (a, one) in SHARES.iter().enumerate() {
        for (b, other) in SHARES.iter().enumerate().take(a) {
            let kinds =
                [(1, "memory", one.1 == other.1), (4, "actions", one.2 == other.2), (2, "table", one.3 == other.3)];
            for (kind, what, want) in kinds {
                // SAFETY: kcmp takes numbers only.
                let order = unsafe { libc::syscall(libc::SYS_kcmp, pids[a], pids[b], kind, 0, 0) };
                checker.equal(&format!("{what} of {} and {} is the same", one.0, other.0), &(order == 0), &want);
            }
        }
    }
}

/// Waits for something that all members do at their own pace.
fn comes(checker: &Checker, what: impl FnOnce() -> String, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    let mut ok = is();
    while !ok && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
        ok = is();
    }
    checker.that(ok, what);
}

fn check_members(checker: &Checker, table: Table) {
    let name = |slot: &Slot| SHARES[slot.kind() as usize].0;
    // What the root writes to its private memory, those see who have the same.
    TOKEN.fetch_add(1, SeqCst);
    let token = TOKEN.load(SeqCst);
    for slot in table.slots().iter().filter(|slot| slot.kind() != Kind::Root) {
        let begin = slot.beats.load(SeqCst);
        comes(checker, || format!("{} stands still", name(slot)), || slot.beats.load(SeqCst) > begin + 2);
        checker.equal(&format!("errors of {}", name(slot)), &slot.errors.load(SeqCst), &0);
        match slot.kind() {
            Kind::WithThread => {
                let begin = slot.thread_beats.load(SeqCst);
                comes(checker, || "the thread stands still".into(), || slot.thread_beats.load(SeqCst) > begin + 2);
                comes(checker, || "the token of a sharer".into(), || slot.echo.load(SeqCst) == token);
            }
            Kind::Grandchild | Kind::Child | Kind::Session => {
                comes(checker, || format!("{} has other memory", name(slot)), || slot.echo.load(SeqCst) == token);
            }
            Kind::SecondSibling => {
                // The first one counts in their memory.
                let counted = table.slot(Kind::FirstSibling).echo.load(SeqCst);
                comes(checker, || "siblings have other memory".into(), || slot.echo.load(SeqCst) >= counted);
                checker.that(counted >= member::OF_SIBLINGS, || "siblings have the root's memory".into());
            }
            Kind::Fork => _ = checker.equal("memory of a fork", &slot.echo.load(SeqCst), &member::OF_FORK),
            Kind::Root | Kind::FirstSibling => {}
        }
    }
}

fn check_signals(checker: &Checker, table: Table) {
    for slot in table.slots() {
        let before = slot.signals.load(SeqCst);
        let pid = slot.pid.load(SeqCst);
        // SAFETY: kill takes numbers only.
        checker.equal("kill", &unsafe { libc::kill(pid, SIGNAL) }, &0);
        let weight = member::weight(slot.kind());
        let name = SHARES[slot.kind() as usize].0;
        comes(checker, || format!("{name} gets no signal"), || slot.signals.load(SeqCst) == before + weight);
    }
}

fn end(checker: &Checker, pids: [i32; MEMBERS]) {
    for pid in &pids[1..] {
        checker.works("kill", kill(Pid::from_raw(*pid), Signal::SIGKILL));
    }
    for kind in [Kind::WithThread, Kind::Child, Kind::Session, Kind::FirstSibling, Kind::SecondSibling] {
        checker.works("wait", waitpid(Pid::from_raw(pids[kind as usize]), Some(WaitPidFlag::__WALL)));
    }
}
