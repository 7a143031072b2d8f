//! Namespaces (namespaces(7)). A tree lives in those of this process. Only a time namespace may be its own, if all of it is
//! in the same one: see [`super::clocks`].

use crate::{
    error::{Error, Result},
    kernel::proc,
    observe::ProcessState,
};
use std::{path::PathBuf, sync::LazyLock};

const NAMES: [&str; 10] =
    ["mnt", "net", "ipc", "uts", "user", "pid", "cgroup", "time", "pid_for_children", "time_for_children"];

/// The namespaces of the processes looked at so far.
#[derive(Default)]
pub(crate) struct Collected {
    /// The first process, and its time namespace if that is not ours.
    time: Option<(i32, Option<PathBuf>)>,
}

impl Collected {
    /// Refuses a process in a namespace that a restore could not give it.
    pub(crate) fn process(&mut self, pid: i32, seen: Option<&ProcessState>) -> Result<()> {
        let foreign = seen.map_or_else(|| foreign(pid), |p| p.foreign_namespaces.clone());
        if let Some(name) = foreign.iter().find(|name| !matches!(**name, "time" | "time_for_children")) {
            return Err(refuse(pid, &format!("a process in another {name} namespace")));
        }
        let mut time = None;
        if !foreign.is_empty() {
            time = link(pid, "time");
            if time != link(pid, "time_for_children") {
                return Err(refuse(pid, "a process whose children will be in another time namespace than itself"));
            }
        }
        match &self.time {
            Some((first, theirs)) if *theirs != time => {
                Err(refuse(pid, &format!("a process in another time namespace than process {first}")))
            }
            Some(_) => Ok(()),
            None => {
                self.time = Some((pid, time));
                Ok(())
            }
        }
    }

    /// A process of the tree if that has a time namespace of its own.
    pub(crate) fn time(&self) -> Option<i32> {
        self.time.as_ref().filter(|(_, namespace)| namespace.is_some()).map(|(pid, _)| *pid)
    }
}

fn refuse(pid: i32, object: &str) -> Error {
    Error::unsupported(pid, object, format!("run standstill inside it: nsenter -t {pid} -a"))
}

/// Which namespace a process is in. One for children that has no process yet has no name either.
fn link(pid: i32, name: &str) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()
}

/// The namespaces of a process that are not ours.
fn foreign(pid: i32) -> Vec<&'static str> {
    static OWN: LazyLock<[Option<PathBuf>; 10]> = LazyLock::new(|| {
        NAMES.map(|name| std::fs::read_link(format!("/proc/self/ns/{}", name.trim_end_matches("_for_children"))).ok())
    });
    let differs = |(name, ours): &(&'static str, &Option<PathBuf>)| ours.is_some() && link(pid, name) != **ours;
    NAMES.into_iter().zip(&*OWN).filter(differs).map(|(name, _)| name).collect()
}

/// Whether this process's time namespace is that of its children too.
pub(crate) fn has_one_time() -> bool {
    let own = std::process::id() as i32;
    proc::path(own, "timens_offsets").exists() && link(own, "time") == link(own, "time_for_children")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_our_own_namespaces_are_not_foreign() {
        let own = std::process::id() as i32;
        let mut collected = Collected::default();
        assert_eq!(foreign(own), Vec::<&str>::new());
        collected.process(own, None).unwrap();
        collected.process(own, None).unwrap();
        assert_eq!(collected.time(), None);
    }
}
