//! A long computation: its result is written to `result` in the directory when all steps are done, and is always the
//! same. Nothing is written on the way, so that it can be taken back to any earlier moment.
//!
//! Options: `--steps N` (default 1000), `--array MiB` (default 64), `--pause-us N` after each step (default 0).

use std::io::Write;
use std::time::Duration;
use std::{fs, thread};

use standstill_tests::workload::{Args, Computation};

fn main() {
    let args = Args::parse();
    let (steps, pause) = (args.value("steps", 1000), Duration::from_micros(args.value("pause-us", 0)));
    let mut computation = Computation::new(args.value("array", 64));
    let mut out = std::io::stdout().lock();
    out.write_all(b"READY\n").and_then(|()| out.flush()).expect("print READY");
    while computation.steps() < steps {
        computation.step();
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    fs::write(args.dir().join("result"), format!("{:016x}\n", computation.result())).expect("write the result");
}
