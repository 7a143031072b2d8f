//! Restore: image → [`plan`] (a value) → [`execute`].

pub(crate) mod births;
pub(crate) mod descriptors;
pub(crate) mod environment;
pub(crate) mod execute;
pub(crate) mod files;
pub(crate) mod handover;
mod machine;
pub(crate) mod plan;
pub(crate) mod program;
pub(crate) mod shares;
pub(crate) mod vdso;

use crate::{
    error::{Error, Result},
    image::Image,
    objects::regular,
    tree::{
        cgroups::CgroupOptions,
        clocks::{Continued, TimeNamespace},
    },
};
use standstill_images::types::{FileKind, OpenFile};

/// A restore to carry out.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// Only make the plan and return it as text.
    pub dry_run: bool,
    /// What to do about recorded cgroups.
    pub cgroups: CgroupOptions,
    /// What to do about the tree's clocks.
    pub time_namespace: TimeNamespace,
}

/// What a restore did.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Pid of the root, which is a child of this process.
    pub root: i32,
    /// The plan, one step a line, if asked for.
    pub plan: Option<String>,
    /// Microseconds it took.
    pub elapsed_us: u64,
}

/// Restores the tree of `image`. When this returns it runs, and its root is a child of this process.
///
/// # Errors
/// Everything that could be created before the error has been killed again.
pub fn restore(image: &Image, options: &RestoreOptions) -> Result<Restored> {
    let begin = std::time::Instant::now();
    for file in image.files.values() {
        check_file(file)?;
    }
    let env = environment::Environment::current()?;
    let clocks = Continued::choose(image.clocks, options.time_namespace)?;
    let plan = plan::plan(image, &env, clocks.as_ref(), execute::BLOB.len())?;
    let root = image.inventory.root;
    if options.dry_run {
        let mut text = String::new();
        for task in &plan.tasks {
            for thread in &task.threads {
                text += &format!("task {}, thread {}\n", task.pid, thread.tid);
                for line in plan.programs[thread.program].listing() {
                    text += &format!("  {line}\n");
                }
            }
        }
        return Ok(Restored { root, plan: Some(text), elapsed_us: 0 });
    }
    execute::run(image, &plan, &options.cgroups)?;
    Ok(Restored { root, plan: None, elapsed_us: begin.elapsed().as_micros() as u64 })
}

fn check_file(file: &OpenFile) -> Result<()> {
    match &file.kind {
        FileKind::Regular(f) => regular::check(f),
        FileKind::Linked { file, name } => regular::check(file).map_err(|e| match e {
            Error::File { path, reason } => {
                let reason = format!("{reason} (a link to what was {}; the first restore removes it)", name.lossy());
                Error::File { path, reason }
            }
            other => other,
        }),
        _ => Ok(()),
    }
}
