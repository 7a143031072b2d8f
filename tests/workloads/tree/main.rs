//! A tree of processes in several sessions and groups, with zombies and a stopped one.
//!
//! Options: `--depth N` (default 12), `--processes N` (further children, default 0), `--orphans` (a session whose leader
//! has died), `--extras` (pending signals, timers, limits), `--credentials`.

mod extras;
mod still;

use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Pid, getpid, getppid, getsid, setpgid, setsid};
use standstill_tests::workload::{Args, Checker, Control, Meter, SelfState, fork_child, proc_stat_fields};

use still::{Stopped, Zombies};

const EVERY: Duration = Duration::from_millis(200);

fn main() {
    let args = Args::parse();
    let mut control = Control::new("tree", &args);
    let checker = Arc::clone(&control.checker);
    fork_chain(&mut control, args.value("depth", 12));
    for number in 0..args.value("processes", 0) {
        fork_member(&mut control, &format!("flat{number}"), |_| {});
    }
    fork_sessions(&mut control);
    if args.flag("orphans") {
        fork_orphan(&mut control);
    }
    if args.flag("extras") {
        extras::fork_all(&mut control);
    }
    if args.flag("credentials") {
        extras::fork_nobody(&mut control, &args.dir());
    }
    let zombies = Zombies::new();
    let stopped = Stopped::new(&control, &args.dir());
    control.collect();
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), EVERY, |request| {
        SelfState::of_process().check(&checker, "root", &before);
        zombies.check(&checker);
        stopped.check(&checker, request);
    });
}

/// Forks a process that prepares itself and then only looks after its own state.
fn fork_member(control: &mut Control, member: &str, prepare: impl FnOnce(&mut Control)) -> Pid {
    let mut child = control.for_child(member);
    let pid = fork_child(move || {
        prepare(&mut child);
        serve(child);
    });
    control.adopt(pid, member);
    pid
}

/// Serves requests as a process that compares its own state only.
fn serve(control: Control) -> ! {
    let before = SelfState::of_process();
    let checker = Arc::clone(&control.checker);
    control.serve(None, EVERY, |_| SelfState::of_process().check(&checker, "member", &before))
}

/// A process that is the parent of one that is the parent of one…
fn fork_chain(control: &mut Control, depth: usize) {
    if depth == 0 {
        return;
    }
    fork_member(control, &format!("deep{depth}"), |child| fork_chain(child, depth - 1));
}

/// A session of its own with three process groups in it, and a session inside of that.
fn fork_sessions(control: &mut Control) {
    fork_member(control, "session leader", |leader| {
        setsid().expect("setsid");
        fork_member(leader, "same group", |_| {});
        let first = fork_member(leader, "group leader", |_| become_leader());
        // Both do it, so that neither has to wait for the other.
        setpgid(first, first).expect("setpgid");
        fork_member(leader, "group member", |_| setpgid(Pid::from_raw(0), first).expect("setpgid"));
        fork_member(leader, "inner session leader", |inner| {
            setsid().expect("setsid");
            fork_member(inner, "inner session member", |_| {});
        });
    });
}

fn become_leader() {
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).expect("setpgid");
}

/// A process whose session leader and parent has died, so that it is a child of the root now.
fn fork_orphan(control: &mut Control) {
    nix::sys::prctl::set_child_subreaper(true).expect("become a subreaper");
    let child = control.for_child("orphan");
    let leader = fork_child(|| {
        setsid().expect("setsid");
        let leader = getpid();
        fork_child(move || {
            while getppid() == leader {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(getsid(None), Ok(leader), "session of an orphan");
            serve(child);
        });
    });
    nix::sys::wait::waitpid(leader, None).expect("wait for the leader");
    let orphan = children_of(getpid())
        .into_iter()
        .find(|child| stat_field(*child, 6) == leader.as_raw().to_string())
        .expect("the orphan is a child of the subreaper");
    control.adopt(orphan, "orphan");
}

fn children_of(pid: Pid) -> Vec<Pid> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("read the children");
    children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a pid"))).collect()
}

/// A field of a process's stat file by its number in proc(5).
fn stat_field(pid: Pid, number: usize) -> String {
    let fields = proc_stat_fields(&format!("/proc/{pid}/stat")).unwrap_or_default();
    fields.get(number - 3).cloned().unwrap_or_default()
}

/// Checks a process's state letter. A checkpoint in progress may be visible for a moment: not all processes go on at the
/// same instant.
fn check_state(checker: &Checker, pid: Pid, state: &str) {
    for _ in 0..200 {
        if stat_field(pid, 3) == state {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    checker.equal(&format!("state of process {pid}"), &stat_field(pid, 3).as_str(), &state);
}
