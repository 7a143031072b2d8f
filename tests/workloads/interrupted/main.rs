//! Threads blocked in system calls: after the checkpoint each call must go on as if nothing had happened.
//!
//! Some threads sleep for a fixed time, over and over, and compare how long that took; the others wait until the main
//! thread wakes them for a verdict.
//!
//! Options: `--sleep-ms N` (length of a sleep, default 3000), `--lenient` (a sleep may end early with `EINTR`, as with
//! tools that do not restart it).

mod sleepers;
mod waiters;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use standstill_tests::workload::{Args, Control, Meter, Request, SelfState};

use sleepers::Sleepers;
use waiters::Waiters;

fn main() {
    let args = Args::parse();
    let control = Control::new("interrupted", &args);
    let checker = Arc::clone(&control.checker);
    let meter = Meter::start(Duration::from_millis(1));
    let waiters = Waiters::start(&checker);
    let length = Duration::from_millis(args.value("sleep-ms", 3000));
    let sleepers = Sleepers::start(&checker, &meter, length, args.flag("lenient"));
    thread::sleep(Duration::from_millis(100));
    let before = SelfState::of_process().without(&["parent"]);
    control.ready();
    control.serve(Some(&meter), Duration::from_millis(100), |request| {
        SelfState::of_process().check(&checker, "process", &before);
        if request.thorough() {
            waiters.wake_all();
            sleepers.await_round();
            if request == Request::End {
                waiters.end();
            }
        }
    });
}
