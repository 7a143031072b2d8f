//! Which task creates which open file, and how every descriptor gets its number.
//!
//! A file that only one task has is made by that task; one that several have is made by the root before anybody else
//! exists and inherited by all at a high number that no table uses.

use super::{files::Numbers, program::Program};
use crate::{
    error::{Error, Result},
    objects::{self, Referenced, epoll, eventfd, unix},
};
use standstill_images::types::{EpollTarget, FdTable, FileKind, OpenFile, OpenFileId};
use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
};

/// Numbers that no table of the tree uses: those just above all others (a descriptor table is as long as its highest
/// number demands), then gaps.
pub(crate) struct HighNumbers {
    used: BTreeSet<i32>,
    limit: i32,
}

impl HighNumbers {
    pub(crate) fn new<'a>(
        tables: impl Iterator<Item = &'a FdTable>,
        files: impl Iterator<Item = &'a OpenFile>,
        limit: i32,
    ) -> Self {
        let mut used: BTreeSet<i32> = tables.flat_map(|t| t.fds.iter().map(|d| d.fd)).collect();
        for file in files {
            // An epoll set may know a file by a number that was closed since.
            if let FileKind::Epoll { targets } = &file.kind {
                used.extend(targets.iter().map(|t| t.fd));
            }
        }
        Self { used, limit }
    }

    pub(crate) fn take(&mut self) -> Result<i32> {
        let above = self.used.last().map_or(0, |last| last.saturating_add(1));
        let free = match above.cmp(&self.limit) {
            Ordering::Less => Some(above),
            Ordering::Equal => (0..self.limit).rev().find(|n| !self.used.contains(n)),
            // One of the tree's own numbers is beyond the limit.
            Ordering::Greater => None,
        };
        let number = free.ok_or_else(|| Error::Missing {
            what: "room for descriptors".into(),
            remedy: "raise the hard limit RLIMIT_NOFILE (ulimit -Hn) above all descriptor numbers of the tree".into(),
        })?;
        self.used.insert(number);
        Ok(number)
    }
}

/// Files that must be made together: the ends of one pipe, the ends of one socket pair, the pidfds of one dead process, or
/// one file.
fn group_key(file: &OpenFile) -> (u8, u32) {
    match &file.kind {
        FileKind::Pipe { pipe } => (1, *pipe),
        FileKind::DeadPidFd { process, .. } => (3, *process),
        FileKind::Socket(s) => match s.pair.as_ref().and_then(|p| p.peer) {
            Some(peer) => (2, peer.min(file.id)),
            None => (0, file.id),
        },
        _ => (0, file.id),
    }
}

/// The distribution of files over creators.
pub(crate) struct Distribution<'a> {
    files: &'a BTreeMap<OpenFileId, OpenFile>,
    groups: BTreeMap<(u8, u32), Vec<&'a OpenFile>>,
    /// Number at which a file made by the root is inherited.
    pub inherited: HashMap<OpenFileId, i32>,
    /// Numbers to move the ends of a pipe to while they are in each other's way.
    scratch: Vec<i32>,
    /// A number for a descriptor whose own one is lent to an epoll registration.
    lent: i32,
    /// Table that registers the targets of each epoll set.
    epoll_owner: HashMap<OpenFileId, u32>,
    /// Files that are opened once their process is complete.
    late: BTreeSet<OpenFileId>,
}

/// Whether a file says something about a task, which has to exist and to be as it was: procfs makes the text of such a
/// file when the offset is set.
fn is_about_a_task(file: &OpenFile) -> bool {
    let path = match &file.kind {
        FileKind::Regular(f) => &f.path,
        FileKind::Directory { path, removed: false } => path,
        _ => return false,
    };
    path.0.strip_prefix(b"/proc/").is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit))
}

impl<'a> Distribution<'a> {
    /// Decides for all files that `tables` have.
    pub(crate) fn new(
        files: &'a BTreeMap<OpenFileId, OpenFile>,
        tables: &BTreeMap<u32, FdTable>,
        high: &mut HighNumbers,
    ) -> Result<Self> {
        let mut groups: BTreeMap<(u8, u32), Vec<&OpenFile>> = BTreeMap::new();
        let mut users: BTreeMap<(u8, u32), BTreeSet<u32>> = BTreeMap::new();
        let mut epoll_owner = HashMap::new();
        let mut seen = BTreeSet::new();
        for table in tables.values() {
            for descriptor in &table.fds {
                let file = &files[&descriptor.file];
                let key = group_key(file);
                users.entry(key).or_default().insert(table.id);
                if seen.insert(file.id) {
                    groups.entry(key).or_default().push(file);
                }
                if let FileKind::Epoll { targets } = &file.kind {
                    let registers = |t: &EpollTarget| table.fds.iter().any(|d| d.file == t.file);
                    if targets.iter().all(registers) {
                        epoll_owner.entry(file.id).or_insert(table.id);
                    }
                }
            }
        }
        for file in groups.values().flatten().filter(|f| matches!(f.kind, FileKind::Epoll { .. })) {
            if !epoll_owner.contains_key(&file.id) {
                return Err(Error::Target(format!(
                    "no process of the image has all descriptors that epoll set {} watches",
                    file.id
                )));
            }
        }
        let mut inherited = HashMap::new();
        for (key, group) in &groups {
            // A pidfd needs its process, which the root comes before: each table has one of its own.
            let anywhere = !matches!(group[0].kind, FileKind::PidFd { .. });
            // One that has to end is made before it could take an id of the tree, a connection by a name before anybody
            // else can have the name.
            let early = matches!(group[0].kind, FileKind::DeadPidFd { .. }) || unix::is_named(group);
            if users[key].len() > 1 && anywhere || early {
                for file in group {
                    inherited.insert(file.id, high.take()?);
                }
            }
        }
        let widest = groups.values().map(Vec::len).max().unwrap_or(0);
        // Twice as many as there are ends: the ends themselves may have been made at some of these numbers.
        let scratch = (0..if widest > 1 { 2 * widest } else { 0 }).map(|_| high.take()).collect::<Result<_>>()?;
        let late = files.values().filter(|f| is_about_a_task(f) && !inherited.contains_key(&f.id));
        let late = late.map(|f| f.id).collect();
        Ok(Self { files, groups, inherited, scratch, lent: high.take()?, epoll_owner, late })
    }

    /// The root's part: makes what several tasks have.
    pub(crate) fn make_inherited(
        &self,
        refs: &Referenced<'_>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<()> {
        let groups = self.groups.values().filter(|g| self.inherited.contains_key(&g[0].id));
        let (named, others): (Vec<_>, Vec<_>) = groups.partition(|g| unix::is_named(g));
        if !named.is_empty() {
            unix::apart(numbers, program, |numbers, program| {
                named.into_iter().try_for_each(|group| self.make_one_inherited(group, refs, numbers, program))
            })?;
        }
        others.into_iter().try_for_each(|group| self.make_one_inherited(group, refs, numbers, program))
    }

    fn make_one_inherited(
        &self,
        group: &[&OpenFile],
        refs: &Referenced<'_>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<()> {
        let mut made = objects::create(group, refs, numbers, program)?;
        let places: Vec<i32> = group.iter().map(|file| self.inherited[&file.id]).collect();
        if group.len() > 1 && places.iter().any(|place| made.contains(place)) {
            self.step_aside(&mut made, numbers, program);
        }
        for (fd, place) in made.into_iter().zip(places).filter(|(fd, place)| fd != place) {
            move_to(fd, place, numbers, program);
        }
        Ok(())
    }

    /// Moves the ends of a pipe or socket pair away from each other's places.
    fn step_aside(&self, made: &mut [i32], numbers: &mut Numbers, program: &mut Program) {
        let free: Vec<i32> = self.scratch.iter().copied().filter(|fd| !made.contains(fd)).collect();
        for (fd, scratch) in made.iter_mut().zip(free) {
            move_to(*fd, scratch, numbers, program);
            *fd = scratch;
        }
    }

    /// One task's part: its whole descriptor table.
    pub(crate) fn make_table(
        &self,
        table: &FdTable,
        refs: &Referenced<'_>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<()> {
        let mut places: BTreeMap<OpenFileId, Vec<(i32, bool)>> = BTreeMap::new();
        for d in &table.fds {
            places.entry(d.file).or_default().push((d.fd, d.cloexec));
        }
        let mut done = BTreeSet::new();
        for d in &table.fds {
            let key = group_key(&self.files[&d.file]);
            if let Some(&from) = self.inherited.get(&d.file) {
                duplicate(from, d.fd, d.cloexec, program);
                numbers.occupy(d.fd);
            } else if done.insert(key) {
                let group = &self.groups[&key];
                let mut made = match self.late.contains(&d.file) {
                    true => vec![eventfd::create(0, false, 0, numbers, program)], // it keeps the numbers
                    false => objects::create(group, refs, numbers, program)?,
                };
                let targets = |file: &OpenFile| places.get(&file.id).map_or(&[][..], Vec::as_slice);
                let in_the_way = group.len() > 1
                    && group
                        .iter()
                        .zip(&made)
                        .any(|(f, own)| targets(f).iter().any(|(fd, _)| fd != own && made.contains(fd)));
                if in_the_way {
                    self.step_aside(&mut made, numbers, program);
                }
                for (file, &fd) in group.iter().zip(&made) {
                    place(fd, targets(file), numbers, program);
                }
            }
        }
        self.register(table, &places, program);
        Ok(())
    }

    /// The last part, once the process is as it was: the files that tell about tasks.
    pub(crate) fn make_late(
        &self,
        table: &FdTable,
        refs: &Referenced<'_>,
        numbers: &mut Numbers,
        program: &mut Program,
    ) -> Result<()> {
        let mut done = BTreeSet::new();
        for d in table.fds.iter().filter(|d| self.late.contains(&d.file) && done.insert(d.file)) {
            let made = objects::create(&[&self.files[&d.file]], refs, numbers, program)?[0];
            let places: Vec<_> =
                table.fds.iter().filter(|other| other.file == d.file).map(|d| (d.fd, d.cloexec)).collect();
            place(made, &places, numbers, program);
        }
        Ok(())
    }

    /// Whether a table has files for [`Self::make_late`].
    pub(crate) fn has_late(&self, table: &FdTable) -> bool {
        table.fds.iter().any(|d| self.late.contains(&d.file))
    }

    /// Registers the targets of epoll sets.
    fn register(&self, table: &FdTable, places: &BTreeMap<OpenFileId, Vec<(i32, bool)>>, program: &mut Program) {
        for d in &table.fds {
            let FileKind::Epoll { targets } = &self.files[&d.file].kind else { continue };
            if self.epoll_owner.get(&d.file) != Some(&table.id) || places[&d.file][0].0 != d.fd {
                continue;
            }
            for target in targets {
                let now = table.fds.iter().find(|o| o.fd == target.fd);
                let in_place = now.is_some_and(|o| o.file == target.file);
                let from = if in_place { target.fd } else { places[&target.file][0].0 };
                epoll::add(d.fd, target, from, now.map(|o| o.cloexec), self.lent, program);
            }
        }
    }
}

/// Gives a new file all its numbers and closes the one it was made at if that is none of them.
fn place(made: i32, targets: &[(i32, bool)], numbers: &mut Numbers, program: &mut Program) {
    let mut stays = false;
    for &(fd, cloexec) in targets {
        if fd == made {
            stays = true;
            if cloexec {
                let args = [fd.into(), libc::F_SETFD.into(), libc::FD_CLOEXEC.into()];
                program.call("set close-on-exec", libc::SYS_fcntl, &args);
            }
        } else {
            duplicate(made, fd, cloexec, program);
            numbers.occupy(fd);
        }
    }
    if !stays {
        program.call("close the temporary number", libc::SYS_close, &[made.into()]);
        numbers.release(made);
    }
}

fn duplicate(from: i32, to: i32, cloexec: bool, program: &mut Program) {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    program.call(format!("place descriptor {to}"), libc::SYS_dup3, &[from.into(), to.into(), flags.into()]);
}

fn move_to(from: i32, to: i32, numbers: &mut Numbers, program: &mut Program) {
    duplicate(from, to, false, program);
    program.call("close the temporary number", libc::SYS_close, &[from.into()]);
    numbers.release(from);
    numbers.occupy(to);
}
