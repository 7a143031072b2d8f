//! Namespaces (namespaces(7)). A tree lives in those of this process. Only a time namespace and a cgroup namespace may be its
//! own, if all of it is in the same ones: see [`super::clocks`] and [`super::cgroups`].

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
    /// Whether cgroups are recorded.
    cgroups: bool,
    /// The first process, with its time and cgroup namespace where they are not ours.
    first: Option<(i32, [Option<PathBuf>; 2])>,
}

/// The namespaces that a tree can have of its own.
const OWN: [&str; 2] = ["time", "cgroup"];

impl Collected {
    /// Whether cgroups are recorded, without which a cgroup namespace would be nothing.
    pub(crate) fn may_have_cgroups(&mut self, recorded: bool) {
        self.cgroups = recorded;
    }

    /// Refuses a process in a namespace that a restore could not give it.
    pub(crate) fn process(&mut self, pid: i32, seen: Option<&ProcessState>) -> Result<()> {
        let foreign = seen.map_or_else(|| foreign(pid), |p| p.foreign_namespaces.clone());
        for name in &foreign {
            match *name {
                "time" | "time_for_children" if link(pid, "time") == link(pid, "time_for_children") => {}
                "time" | "time_for_children" => {
                    return Err(refuse(pid, "a process whose children will be in another time namespace than itself"));
                }
                "cgroup" if self.cgroups => {}
                "cgroup" => {
                    let object = "a process in another cgroup namespace";
                    return Err(Error::unsupported(pid, object, "dump it with --manage-cgroups"));
                }
                name => return Err(refuse(pid, &format!("a process in another {name} namespace"))),
            }
        }
        let own = OWN.map(|name| if foreign.contains(&name) { link(pid, name) } else { None });
        let (first, firsts) = self.first.get_or_insert_with(|| (pid, own.clone()));
        match OWN.iter().zip(own.iter().zip(&*firsts)).find(|(_, (own, firsts))| own != firsts) {
            Some((name, _)) => Err(refuse(pid, &format!("a process in another {name} namespace than process {first}"))),
            None => Ok(()),
        }
    }

    /// A process of the tree if that has a time namespace of its own.
    pub(crate) fn time(&self) -> Option<i32> {
        self.with(0)
    }

    /// A process of the tree if that has a cgroup namespace of its own.
    pub(crate) fn cgroup(&self) -> Option<i32> {
        self.with(1)
    }

    fn with(&self, which: usize) -> Option<i32> {
        self.first.as_ref().filter(|(_, own)| own[which].is_some()).map(|(pid, _)| *pid)
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
    static OURS: LazyLock<[Option<PathBuf>; 10]> = LazyLock::new(|| {
        NAMES.map(|name| std::fs::read_link(format!("/proc/self/ns/{}", name.trim_end_matches("_for_children"))).ok())
    });
    let differs = |(name, ours): &(&'static str, &Option<PathBuf>)| ours.is_some() && link(pid, name) != **ours;
    NAMES.into_iter().zip(&*OURS).filter(differs).map(|(name, _)| name).collect()
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
        assert_eq!((collected.time(), collected.cgroup()), (None, None));
    }
}
