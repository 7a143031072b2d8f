//! Membership in cgroups (cgroups(7)): one cgroup of each hierarchy.
//!
//! Paths are those of the own cgroup namespace, and hierarchies are mounted where nobody else sees them. Threads that are
//! in another cgroup than their process come to that of the process; limits and other properties are not kept.

use crate::{
    error::{Context, Error, Result},
    kernel::{proc, sys},
    task::FrozenProcess,
};
use standstill_images::types::{Bytes, Cgroup, CgroupAccess, Cgroups};
use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, PermissionsExt, chown},
        },
    },
    path::{Component, Path, PathBuf},
};

/// What a restore does about cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupMode {
    /// The tree stays in those of the restoring process.
    #[default]
    Ignore,
    /// Processes come into those they were in, which must exist.
    Exist,
    /// The same; those that are missing are made, without limits.
    Create,
}

/// Reads the cgroups of processes.
///
/// # Errors
/// Refuses cgroups outside of the own cgroup namespace.
pub(crate) fn collect(processes: &[FrozenProcess]) -> Result<Cgroups> {
    let mut all = Cgroups::default();
    let mut known: HashMap<Vec<Cgroup>, u32> = HashMap::new();
    for process in processes {
        let pid = process.id();
        let set = of(process.pid)?;
        if let Some(outside) = set.iter().find(|c| c.path.as_path().components().any(|c| c == Component::ParentDir)) {
            return Err(Error::unsupported(
                pid,
                format!(
                    "cgroup {} of hierarchy `{}`, outside of the cgroup namespace,",
                    outside.path.lossy(),
                    outside.hierarchy.lossy()
                ),
                "run standstill in the cgroup namespace of whoever manages these cgroups",
            ));
        }
        let next = known.len() as u32;
        let number = *known.entry(set).or_insert_with_key(|set| {
            all.sets.push(set.clone());
            next
        });
        all.processes.push((pid, number));
    }
    let mut mounts = Mounts::default();
    for cgroup in all.sets.iter_mut().flatten().filter(|c| c.path.0 != b"/") {
        let (path, hierarchy) = (cgroup.path.lossy(), cgroup.hierarchy.lossy());
        let context = || format!("look at cgroup {path} of hierarchy `{hierarchy}`");
        let dir = mounts.path(&cgroup.hierarchy.0, &cgroup.path).context(context)?;
        cgroup.access = access(&dir).context(context)?;
    }
    Ok(all)
}

/// The permissions of a cgroup, and of those files in it that do not belong to root; none of one that was removed.
fn access(dir: &Path) -> io::Result<Vec<CgroupAccess>> {
    let of = |file: &[u8], m: &fs::Metadata| CgroupAccess {
        file: file.into(),
        mode: m.mode() & 0o7777,
        owner: (m.uid(), m.gid()),
    };
    let mut all = match fs::metadata(dir) {
        Ok(m) => vec![of(b"", &m)],
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    for entry in fs::read_dir(dir)? {
        let (entry, m) = entry.and_then(|entry| Ok((entry.file_name(), entry.metadata()?)))?;
        if m.is_file() && (m.uid(), m.gid()) != (0, 0) {
            all.push(of(entry.as_bytes(), &m));
        }
    }
    all.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(all)
}

/// Hierarchies, mounted where nobody sees them.
#[derive(Default)]
struct Mounts(HashMap<Vec<u8>, OwnedFd>);

impl Mounts {
    /// Where a hierarchy is.
    fn root(&mut self, hierarchy: &[u8]) -> io::Result<PathBuf> {
        if !self.0.contains_key(hierarchy) {
            self.0.insert(hierarchy.to_vec(), sys::mount_cgroups(hierarchy)?);
        }
        Ok(PathBuf::from(format!("/proc/self/fd/{}", self.0[hierarchy].as_raw_fd())))
    }

    fn path(&mut self, hierarchy: &[u8], path: &Bytes) -> io::Result<PathBuf> {
        let mut dir = self.root(hierarchy)?;
        dir.extend(names(path));
        Ok(dir)
    }
}

fn names(path: &Bytes) -> impl Iterator<Item = Component<'_>> {
    path.as_path().components().filter(|c| matches!(c, Component::Normal(_)))
}

fn of(pid: i32) -> Result<Vec<Cgroup>> {
    let path = proc::path(pid, "cgroup");
    let text = fs::read(&path).context(|| format!("read {}", path.display()))?;
    Ok(parse(&text))
}

/// Lines `number:hierarchy:path`; a cgroup that was removed has ` (deleted)` behind its path.
fn parse(text: &[u8]) -> Vec<Cgroup> {
    let line = |line: &[u8]| {
        let mut fields = line.splitn(3, |&b| b == b':').skip(1);
        let (hierarchy, path) = (fields.next()?, fields.next()?);
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        Some(Cgroup { hierarchy: hierarchy.into(), path: path.into(), access: Vec::new() })
    };
    text.split(|&b| b == b'\n').filter_map(line).collect()
}

/// Puts processes into their cgroups. Cgroups that it made are removed when it is dropped before [`Self::keep`].
pub(crate) struct Placement<'a> {
    cgroups: &'a Cgroups,
    mode: CgroupMode,
    mounts: Mounts,
    made: Vec<PathBuf>,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(cgroups: &'a Cgroups, mode: CgroupMode) -> Self {
        Self { cgroups, mode, mounts: Mounts::default(), made: Vec::new() }
    }

    /// Moves a process that is now in `from`, if its cgroups are others.
    fn place(&mut self, pid: i32, set: u32, from: &[Cgroup]) -> Result<()> {
        let there =
            |cgroup: &&Cgroup| from.iter().any(|c| (&c.hierarchy, &c.path) == (&cgroup.hierarchy, &cgroup.path));
        for cgroup in self.cgroups.sets[set as usize].iter().filter(|cgroup| !there(cgroup)) {
            let moved = self.directory(cgroup).and_then(|dir| fs::write(dir.join("cgroup.procs"), pid.to_string()));
            moved.map_err(|source| {
                let (path, hierarchy) = (cgroup.path.lossy(), cgroup.hierarchy.lossy());
                Error::Restore { pid, step: format!("enter cgroup {path} of hierarchy `{hierarchy}`"), source }
            })?;
        }
        Ok(())
    }

    /// Moves the root, which is in our cgroups. Its children begin where it is.
    pub(crate) fn place_root(&mut self, root: i32) -> Result<()> {
        match self.set(root) {
            Some(set) if self.mode != CgroupMode::Ignore => self.place(root, set, &of(std::process::id() as i32)?),
            _ => Ok(()),
        }
    }

    /// Moves those that are elsewhere than the root.
    pub(crate) fn place_others(&mut self, root: i32) -> Result<()> {
        let Some(home) = self.set(root).filter(|_| self.mode != CgroupMode::Ignore) else { return Ok(()) };
        let cgroups = self.cgroups;
        let others = cgroups.processes.iter().filter(|(_, set)| *set != home);
        others.into_iter().try_for_each(|&(pid, set)| self.place(pid, set, &cgroups.sets[home as usize]))
    }

    fn set(&self, pid: i32) -> Option<u32> {
        self.cgroups.processes.iter().find(|(of, _)| *of == pid).map(|(_, set)| *set)
    }

    fn directory(&mut self, cgroup: &Cgroup) -> io::Result<PathBuf> {
        let mut dir = self.mounts.root(&cgroup.hierarchy.0)?;
        for name in names(&cgroup.path) {
            dir.push(name);
            if self.mode == CgroupMode::Create && make(&dir)? {
                self.made.push(dir.clone());
                if dir.ends_with(cgroup.path.as_path().strip_prefix("/").unwrap_or(Path::new(""))) {
                    delegate(&dir, &cgroup.access)?;
                }
            }
        }
        Ok(dir)
    }

    /// The cgroups stay.
    pub(crate) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Placement<'_> {
    fn drop(&mut self) {
        for dir in self.made.iter().rev() {
            if let Err(e) = fs::remove_dir(dir) {
                tracing::warn!("cannot remove cgroup {}: {e}", dir.display());
            }
        }
    }
}

/// Gives a new cgroup its permissions. Files that this kernel does not have are left out.
fn delegate(dir: &Path, access: &[CgroupAccess]) -> io::Result<()> {
    for CgroupAccess { file, mode, owner } in access.iter().filter(|a| a.file.0 != b".." && !a.file.0.contains(&b'/')) {
        let path = dir.join(file.as_path());
        if path.exists() {
            chown(&path, Some(owner.0), Some(owner.1))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
        }
    }
    Ok(())
}

/// Makes a cgroup; false if it is there.
fn make(dir: &Path) -> io::Result<bool> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_versions() {
        let found = parse(b"14:name=a:b:/x\n3:cpu,cpuacct:/y (deleted)\n0::/z:1\n");
        let cgroup = |hierarchy: &[u8], path: &[u8]| Cgroup {
            hierarchy: hierarchy.into(),
            path: path.into(),
            access: Vec::new(),
        };
        assert_eq!(found, [cgroup(b"name=a", b"b:/x"), cgroup(b"cpu,cpuacct", b"/y"), cgroup(b"", b"/z:1")]);
    }
}
