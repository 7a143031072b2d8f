//! Comparing a restored tree with the original: names of nameless objects and ids of the kernel's are new.

use std::collections::BTreeMap;

use super::Snapshot;

/// Facts that are those of the process that did the restore, or of the moment.
const NEW_ON_RESTORE: [&str; 4] = ["syscall", "start time", "FDSize", "children"];

/// Lines of fdinfo files that are ids of the kernel's.
const KERNEL_IDS: [&str; 4] = ["mnt_id", "ino", "eventfd-id", "scm_fds"];

impl Snapshot {
    /// Leaves out what a program does between two verdicts: its system calls, and how far its heap has grown.
    pub fn without_activity(mut self) -> Self {
        let heap = |name: &str, value: &str| name.contains(" map ") && value.ends_with("[heap]");
        let grows = |name: &str| name.ends_with(" VmData") || name.ends_with(" VmSize") || name.ends_with(" VmStk");
        self.facts.retain(|name, value| !name.ends_with(" syscall") && !heap(name, value) && !grows(name));
        self
    }

    /// Leaves out what a program at work may change at any time: its address space, and positions in files.
    pub fn of_running(mut self) -> Self {
        self.facts.retain(|name, _| !name.contains(" map ") && !name.contains(" Vm"));
        for (_, info) in self.facts.iter_mut().filter(|(name, _)| name.contains(" fdinfo ")) {
            *info = info.lines().filter(|line| !line.starts_with("pos:")).collect::<Vec<_>>().join("\n");
        }
        self
    }

    /// The facts that a restored tree must have in common with the original one. The root's parent and what the list of
    /// facts that are `NEW_ON_RESTORE` says are left out; pipes, sockets and shared memory are numbered in the order in
    /// which they appear.
    pub fn restorable(&self) -> Self {
        let mut ids = Ids::default();
        let root = self.facts.keys().filter_map(|name| name.split([' ', '/']).next()?.parse::<i32>().ok()).next();
        let parent = root.map(|root| format!("{root}/{root} parent"));
        let parent_line = root.map(|root| format!("{root}/{root} PPid"));
        let mut facts = BTreeMap::new();
        for (name, value) in &self.facts {
            let (owner, kind) = name.split_once(' ').unwrap_or((name, ""));
            if NEW_ON_RESTORE.contains(&kind) || Some(name) == parent.as_ref() || Some(name) == parent_line.as_ref() {
                continue;
            }
            // Other threads than the first see the root's parent as well.
            if root.is_some_and(|root| owner.starts_with(&format!("{root}/"))) && matches!(kind, "parent" | "PPid") {
                continue;
            }
            let value = match kind.split(' ').next() {
                Some("fd") => ids.name(value),
                Some("fdinfo") => without_ids(value),
                _ => value.clone(),
            };
            facts.insert(name.clone(), value);
        }
        merge_maps(&mut facts, &mut ids);
        Self { facts }
    }
}

/// Numbers for names such as `pipe:[4711]`.
#[derive(Default)]
struct Ids(BTreeMap<String, usize>);

impl Ids {
    fn name(&mut self, value: &str) -> String {
        match value.split_once(":[") {
            Some((kind, _)) => format!("{kind} number {}", self.number(value)),
            None => value.to_owned(),
        }
    }

    fn number(&mut self, value: &str) -> usize {
        let next = self.0.len();
        *self.0.entry(value.to_owned()).or_insert(next)
    }
}

fn without_ids(info: &str) -> String {
    let keep = |line: &&str| !KERNEL_IDS.iter().any(|id| line.starts_with(&format!("{id}:")));
    let mut lines: Vec<String> = info
        .lines()
        .filter(keep)
        .map(|line| {
            // Entries of an epoll instance name the inode watched.
            line.strip_prefix("tfd:").map_or_else(
                || line.to_owned(),
                |entry| format!("tfd: {}", entry.split_whitespace().take(5).collect::<Vec<_>>().join(" ")),
            )
        })
        .collect();
    // The entries come in the order of kernel addresses.
    lines.sort_by_key(|line| (line.starts_with("tfd:"), line.starts_with("tfd:").then(|| line.clone())));
    lines.join("\n")
}

/// One mapping as a snapshot tells it.
struct Map {
    start: u64,
    end: u64,
    protection: String,
    offset: u64,
    file: String,
}

/// Joins neighbouring mappings: whether the kernel keeps two or makes one of them depends on history.
fn merge_maps(facts: &mut BTreeMap<String, String>, ids: &mut Ids) {
    let old: Vec<(String, String)> =
        facts.iter().filter(|(name, _)| name.contains(" map ")).map(|(n, v)| (n.clone(), v.clone())).collect();
    let mut merged: Vec<(String, Map)> = Vec::new();
    for (name, value) in old {
        facts.remove(&name);
        let Some(map) = parse_map(&name, &value, ids) else {
            facts.insert(name, value);
            continue;
        };
        match merged.last_mut() {
            Some((last_name, last)) if continues(last_name, &name, last, &map) => last.end = map.end,
            _ => merged.push((name, map)),
        }
    }
    for (name, map) in merged {
        facts.insert(name, format!("{:x} {} {:x} {}", map.end, map.protection, map.offset, map.file));
    }
}

fn continues(last_name: &str, name: &str, last: &Map, map: &Map) -> bool {
    let same_process = last_name.split(' ').next() == name.split(' ').next();
    let anonymous = last.file.ends_with(" 0 ") || last.file.starts_with("0 ");
    let in_file = anonymous || last.offset + (last.end - last.start) == map.offset;
    same_process && last.end == map.start && last.protection == map.protection && last.file == map.file && in_file
}

fn parse_map(name: &str, value: &str, ids: &mut Ids) -> Option<Map> {
    let start = u64::from_str_radix(name.rsplit(' ').next()?, 16).ok()?;
    let mut words = value.splitn(6, ' ');
    let end = u64::from_str_radix(words.next()?, 16).ok()?;
    let protection = words.next()?.to_owned();
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let device = words.next()?;
    let inode = words.next()?;
    let path = words.next().unwrap_or("");
    // Memory without a real file has a new inode after each restore, but the same one in each process.
    let nameless = path.ends_with("(deleted)");
    // Shared anonymous memory may come back as a memfd of the same name.
    let path = path.replace("/memfd:/dev/zero", "/dev/zero");
    let file = match inode {
        _ if nameless => format!("{path} number {}", ids.number(&format!("{device} {inode}"))),
        _ => format!("{inode} {path}"),
    };
    let offset = if inode == "0" { 0 } else { offset };
    Some(Map { start, end, protection, offset, file })
}
