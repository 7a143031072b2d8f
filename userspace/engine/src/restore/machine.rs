//! Whether this machine can have the tree, before anything of it is made.

use super::environment::Environment;
use crate::{
    error::{Error, Result},
    image::Image,
    memory::aio,
    tree::{limits, thread},
};
use standstill_images::types::Attributes;

/// What of the machine must be as it was.
pub(super) fn check(image: &Image, env: &Environment) -> Result<()> {
    let content = |reason: String| Error::ImageContent { dir: image.dir.clone(), reason };
    if let (Some(thread), false) = (image.seccomp.threads.first(), env.may_filter) {
        return Err(Error::Missing {
            what: format!("CAP_SYS_ADMIN, and to be free of seccomp, to put thread {} under seccomp,", thread.tid),
            remedy: "restore as root, outside of containers that have filters".into(),
        });
    }
    // Beside its own, a task has a few of ours while it is restored.
    const OURS: usize = 64;
    for task in image.tasks.values() {
        let Some(live) = &task.live else { continue };
        for t in &live.threads {
            let size = thread::registers(&t.context).1.len();
            if size != env.xstate_size {
                return Err(content(format!(
                    "its processor state is {size} bytes, this machine's {}: restore it on the same kind of processor",
                    env.xstate_size
                )));
            }
        }
        let space = &image.spaces[&live.address_space];
        if !aio::has_room(space, env.cpus) {
            return Err(Error::Missing {
                what: format!("room in an AIO ring of process {} for {} processors", task.pid, env.cpus),
                remedy: "restore on a machine that can have no more of them than that of the dump".into(),
            });
        }
        let mappings = space.vmas.len();
        if mappings + OURS > env.max_mappings {
            return Err(Error::Missing {
                what: format!("room for the {mappings} mappings of process {}", task.pid),
                remedy: format!("sysctl vm.max_map_count={}", mappings + OURS),
            });
        }
        let flusher = |a: &&Attributes| a.threads.iter().any(|t| t.io_flusher);
        if !env.may_raise_limits && image.attributes.get(&task.pid).filter(flusher).is_some() {
            return Err(Error::Missing {
                what: format!("CAP_SYS_RESOURCE, to make process {} an I/O flusher (PR_SET_IO_FLUSHER),", task.pid),
                remedy: "restore with that capability".into(),
            });
        }
        if !env.may_raise_limits
            && let Some(name) = limits::first_raised(&live.rlimits, &env.limits)
        {
            return Err(Error::Missing {
                what: format!("CAP_SYS_RESOURCE, to give process {} its hard limit RLIMIT_{name},", task.pid),
                remedy: "restore with that capability, or raise the limit of the restoring shell".into(),
            });
        }
    }
    Ok(())
}
