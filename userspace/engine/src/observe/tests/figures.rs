//! What reading costs. Figures, not checks: `cargo test --release -p standstill-engine --lib -- --ignored figures
//! --nocapture`.

use super::{
    super::procfs,
    iterators,
    victim::{Victim, branch},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Opens `count` descriptors of the four most usual kinds, then makes `children` copies of the process.
pub(super) fn many(script: &str) {
    let (count, children) = script.split_once(' ').unwrap();
    let (count, children): (usize, usize) = (count.parse().unwrap(), children.parse().unwrap());
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let deep = std::path::Path::new("a/few/levels/deep");
    std::fs::create_dir_all(deep).unwrap();
    for n in 0..count / 5 {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(deep.join(n.to_string())).unwrap();
        std::mem::forget((file.try_clone().unwrap(), file));
        std::mem::forget(nix::unistd::pipe().unwrap());
        std::mem::forget(nix::sys::eventfd::EventFd::new().unwrap());
    }
    for _ in 0..children {
        branch();
    }
}

/// What some runs gave, how long the best of them took, and how much of this thread's processor time.
fn best(mut what: impl FnMut() -> usize) -> (usize, Duration, Duration) {
    let cpu = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let mut best = (0, Duration::MAX, Duration::MAX);
    for _ in 0..9 {
        let begin = (Instant::now(), cpu());
        best.0 = what();
        best.1 = best.1.min(begin.0.elapsed());
        best.2 = best.2.min(cpu() - begin.1);
    }
    best
}

#[test]
#[ignore = "prints figures"]
fn figures() {
    let Some(mut all) = iterators() else { return };
    let show = |what: &str, (n, wall, cpu): (usize, Duration, Duration)| {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{what:70} {n:7} {:9.3} ms, processor {:9.3} ms", ms(wall), ms(cpu));
    };
    show("load the programs", best(|| iterators().map_or(0, |_| 3)));
    for (script, what) in
        [("many 15000 0", "1 process"), ("many 1500 9", "10 processes"), ("many 100 99", "100 processes")]
    {
        let victim = Victim::start(script);
        let pids = &victim.pids;
        show(
            &format!("{what}: descriptors, all with paths, nothing read ahead"),
            best(|| {
                all.ahead.order.clear();
                all.files(pids).unwrap().len()
            }),
        );
        show(
            &format!("{what}: reading ahead"),
            best(|| {
                all.prefetch_paths(pids).unwrap();
                all.ahead.order.len()
            }),
        );
        show(&format!("{what}: descriptors, paths read ahead"), best(|| all.files(pids).unwrap().len()));
        show(
            &format!("{what}: the same without userspace"),
            best(|| {
                all.write_paths(false).unwrap();
                all.run(super::super::iter::What::Files, pids).unwrap();
                all.stream.len()
            }),
        );
        show(&format!("{what}: descriptors through procfs"), best(|| procfs::files(pids).unwrap().len()));
        show(&format!("{what}: threads"), best(|| all.threads(pids).unwrap().len()));
        show(&format!("{what}: mappings"), best(|| all.vmas(pids).unwrap().len()));
        show(&format!("{what}: mappings through procfs"), best(|| procfs::vmas(pids).unwrap().len()));
    }
}
