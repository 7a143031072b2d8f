//! Membership in cgroups (cgroups(7)): one cgroup of each hierarchy.
//!
//! Paths are those of the own cgroup namespace, and hierarchies are mounted where nobody else sees them. What cgroups that
//! are made get of limits and the like is in [`super::cgroup_properties`].

use super::cgroup_properties;
use crate::{
    error::{Context, Error, Result},
    kernel::{proc, sys},
    task::FrozenProcess,
};
use standstill_images::types::{Bytes, Cgroup, CgroupAccess, CgroupDirectory, Cgroups};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, PermissionsExt, chown},
        },
    },
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

/// What a restore does about cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupMode {
    /// The tree stays in those of the restoring process.
    #[default]
    Ignore,
    /// Processes come into those they were in, which must exist.
    None,
    /// The same, and these get the properties that they had.
    Props,
    /// Those that are missing are made, with their properties; others stay as they are.
    Soft,
    /// The same, and those that exist get the properties that they had as well.
    Full,
    /// All are made, with their properties; none may exist.
    Strict,
}

/// Cgroups of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupOptions {
    /// What to do.
    pub mode: CgroupMode,
    /// What takes the place of the cgroup that the root process was in, by controller or name of the hierarchy; without one, in
    /// all other hierarchies. Cgroups below move along.
    pub roots: Vec<(Option<String>, PathBuf)>,
}

/// Reads the cgroups of processes and threads. `inside`: a process of the tree, if that has a cgroup namespace of its own.
///
/// # Errors
/// Refuses cgroups outside of the own cgroup namespace.
pub(crate) fn collect(processes: &[FrozenProcess], inside: Option<i32>) -> Result<Cgroups> {
    let mut all = Cgroups::default();
    let mut known: HashMap<Vec<Cgroup>, u32> = HashMap::new();
    for process in processes {
        let pid = process.id();
        let number = number_of(of(process.pid, process.pid)?, pid, &mut known, &mut all)?;
        all.processes.push((pid, number));
        for &(tid, _) in process.threads.iter().filter(|(tid, _)| *tid != process.pid) {
            let own = number_of(of(process.pid, tid)?, tid, &mut known, &mut all)?;
            if own != number {
                all.threads.push((tid, own));
            }
        }
    }
    if let Some(pid) = inside {
        let roots = namespace_roots(pid, of(pid, pid)?)?;
        all.namespace = Some(number_of(roots, pid, &mut known, &mut all)?);
    }
    Ok(all)
}

/// The number of a set of cgroups, in which task `tid` is.
fn number_of(set: Vec<Cgroup>, tid: i32, known: &mut HashMap<Vec<Cgroup>, u32>, all: &mut Cgroups) -> Result<u32> {
    if let Some(outside) = set.iter().find(|c| c.path.as_path().components().any(|c| c == Component::ParentDir)) {
        return Err(Error::unsupported(
            tid,
            format!(
                "cgroup {} of hierarchy `{}`, outside of the cgroup namespace,",
                outside.path.lossy(),
                outside.hierarchy.lossy()
            ),
            "run standstill in the cgroup namespace of whoever manages these cgroups",
        ));
    }
    let next = known.len() as u32;
    Ok(*known.entry(set).or_insert_with_key(|set| {
        all.sets.push(set.clone());
        next
    }))
}

/// Where the root directories of a process's cgroup namespace are. `outer`: its cgroups as we see them.
fn namespace_roots(pid: i32, outer: Vec<Cgroup>) -> Result<Vec<Cgroup>> {
    let context = || format!("look into the cgroup namespace of process {pid}");
    // The file shows paths as whoever reads it sees them, and each thread can have a namespace of its own.
    let look = || -> io::Result<Vec<u8>> {
        let namespace = fs::File::open(proc::path(pid, "ns/cgroup"))?;
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
        fs::read(proc::path(pid, "cgroup"))
    };
    let inner = std::thread::scope(|scope| scope.spawn(look).join());
    let inner = parse(&inner.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context(context)?);
    outer
        .into_iter()
        .map(|cgroup| {
            let within = inner.iter().find(|c| c.hierarchy == cgroup.hierarchy);
            let root = within.and_then(|within| root_of(&cgroup.path.0, &within.path.0)).ok_or_else(|| {
                let (path, hierarchy) = (cgroup.path.lossy(), cgroup.hierarchy.lossy());
                let object =
                    format!("cgroup {path} of hierarchy `{hierarchy}`, outside of the process's own cgroup namespace,");
                Error::unsupported(pid, object, "move the process back into it before the dump")
            })?;
            Ok(Cgroup { path: root.into(), hierarchy: cgroup.hierarchy })
        })
        .collect()
}

/// The root of a namespace in which what has the path `outer` is called `inner`.
fn root_of<'a>(outer: &'a [u8], inner: &[u8]) -> Option<&'a [u8]> {
    let root = outer.strip_suffix(if inner == b"/" { &b""[..] } else { inner })?;
    Some(if root.is_empty() { b"/" } else { root })
}

/// Completes what can be read while the tree runs: permissions and properties of its cgroups, of those above, and of those
/// below, which may be empty.
pub(crate) fn describe(all: &mut Cgroups) -> Result<()> {
    let mut mounts = Mounts::default();
    let mut wanted = BTreeSet::new();
    for cgroup in all.sets.iter().flatten() {
        let paths = cgroup.path.as_path().ancestors().filter(|path| path.parent().is_some());
        wanted.extend(paths.map(|path| (cgroup.hierarchy.clone(), Bytes::from(path))));
        // Whoever lives in the root does not own the hierarchy.
        if cgroup.path.0 != b"/" {
            let context = || format!("look below {}", name(cgroup));
            let dir = mounts.path(&cgroup.hierarchy.0, cgroup.path.as_path()).context(context)?;
            let mut below = Vec::new();
            list(&dir, cgroup.path.as_path(), &mut below).context(context)?;
            wanted.extend(below.iter().map(|path| (cgroup.hierarchy.clone(), Bytes::from(path.as_path()))));
        }
    }
    // In this order parents come first.
    for (hierarchy, path) in wanted {
        let context = || format!("look at cgroup {} of hierarchy `{}`", path.lossy(), hierarchy.lossy());
        let dir = mounts.path(&hierarchy.0, path.as_path()).context(context)?;
        let access = access(&dir).context(context)?;
        let properties = cgroup_properties::read(&dir).context(context)?;
        all.directories.push(CgroupDirectory { hierarchy, path, access, properties });
    }
    Ok(())
}

/// The paths of all cgroups below `dir`, whose own is `path`. They may go at any time.
fn list(dir: &Path, path: &Path, all: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let below = path.join(entry.file_name());
            list(&entry.path(), &below, all)?;
            all.push(below);
        }
    }
    Ok(())
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
    /// Where a cgroup is.
    fn path(&mut self, hierarchy: &[u8], path: &Path) -> io::Result<PathBuf> {
        if !self.0.contains_key(hierarchy) {
            // A hierarchy without a mount and without children goes with its last mount, and until it is gone there cannot be
            // another one.
            const PATIENCE: Duration = Duration::from_secs(2);
            let limit = Instant::now() + PATIENCE;
            let mount = loop {
                match sys::mount_cgroups(hierarchy) {
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < limit => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    other => break other?,
                }
            };
            self.0.insert(hierarchy.to_vec(), mount);
        }
        let mut dir = PathBuf::from(format!("/proc/self/fd/{}", self.0[hierarchy].as_raw_fd()));
        dir.extend(path.components().filter(|c| matches!(c, Component::Normal(_))));
        Ok(dir)
    }
}

fn of(pid: i32, tid: i32) -> Result<Vec<Cgroup>> {
    let path = proc::path(pid, &format!("task/{tid}/cgroup"));
    let text = fs::read(&path).context(|| format!("read {}", path.display()))?;
    Ok(parse(&text))
}

/// Lines `number:hierarchy:path`; a cgroup that was removed has ` (deleted)` behind its path.
fn parse(text: &[u8]) -> Vec<Cgroup> {
    let line = |line: &[u8]| {
        let mut fields = line.splitn(3, |&b| b == b':').skip(1);
        let (hierarchy, path) = (fields.next()?, fields.next()?);
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        Some(Cgroup { hierarchy: hierarchy.into(), path: path.into() })
    };
    text.split(|&b| b == b'\n').filter_map(line).collect()
}

/// Puts processes into their cgroups. Cgroups that it made are removed when it is dropped before [`Self::keep`].
pub(crate) struct Placement<'a> {
    cgroups: &'a Cgroups,
    options: &'a CgroupOptions,
    mounts: Mounts,
    /// Where cgroups are that are as they have to be, by hierarchy and path of the image.
    ready: BTreeMap<(&'a Bytes, &'a Path), PathBuf>,
    made: Vec<PathBuf>,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(cgroups: &'a Cgroups, options: &'a CgroupOptions) -> Self {
        Self { cgroups, options, mounts: Mounts::default(), ready: BTreeMap::new(), made: Vec::new() }
    }

    /// Makes all cgroups, and moves the root: to where its cgroup namespace begins, if it has one of its own. Its children
    /// begin where it is.
    pub(crate) fn place_root(&mut self, root: i32) -> Result<()> {
        let Some(home) = self.home(root) else { return Ok(()) };
        let cgroups = self.cgroups;
        let mode = format!("{:?}", self.options.mode).to_lowercase();
        let failed = |hierarchy: &Bytes, path: &Path, source| {
            let (path, hierarchy) = (path.display(), hierarchy.lossy());
            let step = format!("prepare cgroup {path} of hierarchy `{hierarchy}` (--manage-cgroups={mode})");
            Error::Restore { pid: root, step, source }
        };
        for Cgroup { hierarchy, path } in cgroups.sets.iter().flatten() {
            self.prepare(root, hierarchy, path.as_path()).map_err(|e| failed(hierarchy, path.as_path(), e))?;
        }
        for CgroupDirectory { hierarchy, path, .. } in &cgroups.directories {
            if self.wants_empty(hierarchy, path.as_path()) {
                self.prepare(root, hierarchy, path.as_path()).map_err(|e| failed(hierarchy, path.as_path(), e))?;
            }
        }
        let own = of(std::process::id() as i32, std::process::id() as i32)?;
        self.place(root, home, &own, "cgroup.procs")
    }

    /// Moves those that are elsewhere than the root was put.
    pub(crate) fn place_others(&mut self, root: i32) -> Result<()> {
        let Some(home) = self.home(root) else { return Ok(()) };
        let cgroups = self.cgroups;
        let others = cgroups.processes.iter().filter(|(_, set)| *set != home);
        others
            .into_iter()
            .try_for_each(|&(pid, set)| self.place(pid, set, &cgroups.sets[home as usize], "cgroup.procs"))
    }

    /// Moves threads that are elsewhere than their process.
    pub(crate) fn place_threads(&mut self, root: i32) -> Result<()> {
        if self.home(root).is_none() {
            return Ok(());
        }
        self.cgroups.threads.iter().try_for_each(|&(tid, set)| self.place(tid, set, &of(tid, tid)?, "tasks"))
    }

    /// Moves a task that is now in `from`, if its cgroups are others.
    fn place(&mut self, tid: i32, set: u32, from: &[Cgroup], file: &str) -> Result<()> {
        let cgroups = self.cgroups;
        // Under other roots nothing is where the image has it.
        let there = |cgroup: &&Cgroup| self.options.roots.is_empty() && from.contains(cgroup);
        for cgroup in cgroups.sets[set as usize].iter().filter(|cgroup| !there(cgroup)) {
            let dir = &self.ready[&(&cgroup.hierarchy, cgroup.path.as_path())];
            let file = if file == "tasks" && cgroup.hierarchy.0.is_empty() { "cgroup.threads" } else { file };
            fs::write(dir.join(file), tid.to_string()).map_err(|source| Error::Restore {
                pid: tid,
                step: format!("enter {}", name(cgroup)),
                source,
            })?;
        }
        Ok(())
    }

    /// The set that the root begins in; `None`: it stays where it is.
    fn home(&self, root: i32) -> Option<u32> {
        let own = self.cgroups.processes.iter().find(|(of, _)| *of == root).map(|(_, set)| *set);
        self.cgroups.namespace.or(own).filter(|_| self.options.mode != CgroupMode::Ignore)
    }

    /// Whether a cgroup is to be there in which nobody is: below one that is new, or if all are to be as they were.
    fn wants_empty(&self, hierarchy: &'a Bytes, path: &'a Path) -> bool {
        let above = path.parent().and_then(|above| self.ready.get(&(hierarchy, above)));
        match self.options.mode {
            CgroupMode::Ignore | CgroupMode::None | CgroupMode::Props => false,
            CgroupMode::Soft => above.is_some_and(|above| self.made.contains(above)),
            CgroupMode::Full | CgroupMode::Strict => above.is_some(),
        }
    }

    /// Sees to it that a cgroup is there, with all above it.
    fn prepare(&mut self, root: i32, hierarchy: &'a Bytes, path: &'a Path) -> io::Result<()> {
        let mode = self.options.mode;
        let top = self.top(root, hierarchy);
        let to = self.moved(hierarchy, path, top)?;
        let above: Vec<&Path> = path.ancestors().collect();
        for path in above.into_iter().rev() {
            let key = (hierarchy, path);
            if self.ready.contains_key(&key) {
                continue;
            }
            // What lies above the tree's own cgroups is somebody else's.
            let own = top.is_some_and(|top| path.starts_with(top)) && path != Path::new("/");
            let place = match (&to, top) {
                (Some(to), Some(top)) => match path.strip_prefix(top) {
                    Ok(rest) => self.make_above(hierarchy, to, rest)?,
                    Err(_) => continue,
                },
                _ => self.mounts.path(&hierarchy.0, path)?,
            };
            let makes = matches!(mode, CgroupMode::Soft | CgroupMode::Full | CgroupMode::Strict);
            let made = makes && make(&place)?;
            if made {
                self.made.push(place.clone());
            } else if mode == CgroupMode::Strict && own {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            if made || own && matches!(mode, CgroupMode::Props | CgroupMode::Full) {
                self.configure(hierarchy, path, &place, made)?;
            }
            self.ready.insert(key, place);
        }
        Ok(())
    }

    /// Gives a cgroup its properties, and its permissions if it is new.
    fn configure(&self, hierarchy: &Bytes, path: &Path, place: &Path, made: bool) -> io::Result<()> {
        let wanted = |d: &&CgroupDirectory| d.hierarchy == *hierarchy && d.path.as_path() == path;
        let Some(directory) = self.cgroups.directories.iter().find(wanted) else { return Ok(()) };
        if made {
            delegate(place, &directory.access)?;
        }
        cgroup_properties::write(place, &directory.properties)
    }

    /// The path of the cgroup that the root process was in.
    fn top(&self, root: i32, hierarchy: &Bytes) -> Option<&'a Path> {
        let set = self.cgroups.processes.iter().find(|(of, _)| *of == root)?.1;
        let set = self.cgroups.namespace.unwrap_or(set);
        let cgroup = self.cgroups.sets[set as usize].iter().find(|c| c.hierarchy == *hierarchy)?;
        Some(cgroup.path.as_path())
    }

    /// What takes the place of `top`, if something does.
    fn moved(&self, hierarchy: &Bytes, path: &Path, top: Option<&Path>) -> io::Result<Option<PathBuf>> {
        let named = |name: &str| hierarchy.lossy().split(',').any(|part| part == name);
        let roots = &self.options.roots;
        let by_name = roots.iter().find(|(name, _)| name.as_deref().is_some_and(named));
        let Some((_, to)) = by_name.or_else(|| roots.iter().find(|(name, _)| name.is_none())) else { return Ok(None) };
        if !top.is_some_and(|top| path.starts_with(top)) {
            let reason = "it is not below that of the root process, for which --cgroup-root gives another one";
            return Err(io::Error::other(reason));
        }
        Ok(Some(to.clone()))
    }

    /// Where `rest` is below another root. That root itself, and what is above it, is made if it may be.
    fn make_above(&mut self, hierarchy: &Bytes, to: &Path, rest: &Path) -> io::Result<PathBuf> {
        if rest == Path::new("") && !matches!(self.options.mode, CgroupMode::None | CgroupMode::Props) {
            let above: Vec<&Path> = to.parent().into_iter().flat_map(Path::ancestors).collect();
            for path in above.into_iter().rev() {
                let dir = self.mounts.path(&hierarchy.0, path)?;
                if make(&dir)? {
                    self.made.push(dir);
                }
            }
        }
        self.mounts.path(&hierarchy.0, &to.join(rest))
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

fn name(cgroup: &Cgroup) -> String {
    format!("cgroup {} of hierarchy `{}`", cgroup.path.lossy(), cgroup.hierarchy.lossy())
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
        let cgroup = |hierarchy: &[u8], path: &[u8]| Cgroup { hierarchy: hierarchy.into(), path: path.into() };
        assert_eq!(found, [cgroup(b"name=a", b"b:/x"), cgroup(b"cpu,cpuacct", b"/y"), cgroup(b"", b"/z:1")]);
    }

    #[test]
    fn roots_of_namespaces() {
        for (outer, inner, root) in [("/a/b", "/b", "/a"), ("/a/b", "/", "/a/b"), ("/a", "/a", "/"), ("/", "/", "/")] {
            assert_eq!(root_of(outer.as_bytes(), inner.as_bytes()), Some(root.as_bytes()), "{outer} {inner}");
        }
        assert_eq!(root_of(b"/a/b", b"/../c"), None);
    }
}
