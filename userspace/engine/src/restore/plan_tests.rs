//! Plans of random trees, carried out on a model of the kernel: each process must come out as it was in the image.

#[path = "plan_tests/dump.rs"]
mod dump;
#[path = "plan_tests/history.rs"]
mod history;
#[path = "plan_tests/interpreter.rs"]
mod interpreter;
#[path = "plan_tests/model.rs"]
mod model;

use super::*;
use crate::restore::environment::KernelMapping;
use dump::Store;
use history::{History, KERNEL, Op, Start, ops, starts};
use interpreter::Interpreter;
use model::{OUTSIDE, Origin, PAGE, Page, compare};
use proptest::prelude::*;
use standstill_images::types::{Attributes, Creds, Sched};

/// Bytes of the restorer's code.
const BLOB: usize = 5000;
/// Where the restoring process has its own memory, some of it where trees have theirs.
const USED: [(u64, u64); 2] = [(0x4000_2000, 0x4000_5000), (0x7000_0000_0000, 0x7000_0000_3000)];
const KERNEL_AT: u64 = 0x7100_0000_0000;

fn environment(fd_limit: i32) -> Environment {
    let kernel = KERNEL.iter().map(|(name, distance, len)| KernelMapping {
        name: (*name).into(),
        start: KERNEL_AT + distance,
        len: *len,
    });
    let kernel: Vec<_> = kernel.collect();
    Environment {
        creds: Creds::default(),
        sched: Sched::default(),
        attributes: Attributes { coredump_filter: Some(0x33), ..Default::default() },
        limits: Vec::new(),
        ignored: 0,
        personality: 0,
        loginuid: u32::MAX,
        label: None,
        may_raise_limits: true,
        may_filter: true,
        used: USED.into_iter().chain(kernel.iter().map(|m| (m.start, m.start + m.len))).collect(),
        kernel_mappings: kernel,
        vdso: vec![0x0f, 0x05],
        fd_limit,
        max_mappings: usize::MAX,
        xstate_size: 0,
        cpus: 1,
    }
}

/// The memory of the restoring process.
fn own_memory(env: &Environment) -> BTreeMap<u64, Page> {
    let pages = |start: u64, end: u64| (start..end).step_by(PAGE as usize);
    let mut memory = BTreeMap::new();
    for (start, end) in USED {
        memory.extend(pages(start, end).map(|at| (at, Page::new(Origin::Foreign { stays: false }, 7))));
    }
    for m in &env.kernel_mappings {
        let page = |at: u64| Page::new(Origin::Kernel { name: m.name.clone(), offset: (at - m.start) / PAGE }, 5);
        memory.extend(pages(m.start, m.start + m.len).map(|at| (at, page(at))));
    }
    memory
}

/// Whether the tree could be restored; an error if it could not be, or comes out otherwise than it was.
fn restore(store: &Store, history: &History, env: &Environment, seed: u64) -> Result<bool, String> {
    let image = store.image(history, &env.vdso);
    let plan = match plan(&image, env, None, BLOB) {
        Ok(plan) => plan,
        Err(e) if is_expected(&e.to_string()) => return Ok(false),
        Err(e) => return Err(e.to_string()),
    };
    if plan.tasks.iter().any(|t| t.pid == OUTSIDE) {
        // The dump refuses a session whose leader is alive and not of the tree.
        return Ok(false);
    }
    let mut run = Interpreter::new(&plan, &image, own_memory(env), env, seed);
    run.run()?;
    for task in plan.tasks.iter().filter(|t| !t.ends) {
        let page = run.world.space(task.pid).pages.get(&(task.syscall_at & !(PAGE - 1)));
        if page.is_none_or(|p| p.from != Origin::Kernel { name: "[vdso]".into(), offset: 0 }) {
            return Err(format!("process {} leaves the restorer from {:x}", task.pid, task.syscall_at));
        }
    }
    compare(&history.world, &run.world).map(|()| true)
}

/// Trees that no order of calls brings back.
fn is_expected(refusal: &str) -> bool {
    [
        "is dead or outside the tree",
        "which no living ancestor belongs to",
        "have another parent or exit signal",
        "are in the session around the tree",
        "whose leader is dead, and shares",
        "but neither with its parent nor with a child of it",
        "between them has others",
        "no order of forks brings about",
        "has left the process group",
        "no process of the image has all descriptors",
        "room for descriptors is missing",
    ]
    .iter()
    .any(|reason| refusal.contains(reason))
}

fn check(start: Start, ops: &[Op], fd_limit: i32, seed: u64) -> Result<(), TestCaseError> {
    thread_local!(static STORES: [Store; 3] = [1, 3, 12].map(Store::new));
    let history = History::new(start, ops);
    prop_assume!(history.stored < 512);
    let outcome = STORES.with(|stores| restore(&stores[(seed % 3) as usize], &history, &environment(fd_limit), seed));
    prop_assert!(outcome.is_ok(), "{}", outcome.unwrap_err());
    Ok(())
}

proptest! {
    #[test]
    fn trees_sessions_and_groups(start in starts(), ops in ops(8, 1, 1), seed: u64) {
        check(start, &ops, 1024, seed)?;
    }

    #[test]
    fn descriptors(start in starts(), ops in ops(1, 8, 1), seed: u64) {
        check(start, &ops, 1024, seed)?;
    }

    #[test]
    fn descriptors_up_to_the_limit(start in starts(), ops in ops(1, 8, 1), seed: u64) {
        check(start, &ops, 64, seed)?;
    }

    /// A program that lowered its limit keeps the descriptors beyond it.
    #[test]
    fn descriptors_beyond_the_limit(start in starts(), ops in ops(1, 8, 1), seed: u64) {
        check(start, &ops, 32, seed)?;
    }

    #[test]
    fn memory(start in starts(), ops in ops(1, 1, 6), seed: u64) {
        check(start, &ops, 1024, seed)?;
    }

    #[test]
    fn everything(start in starts(), ops in ops(2, 2, 2), seed: u64) {
        check(start, &ops, 1024, seed)?;
    }
}
