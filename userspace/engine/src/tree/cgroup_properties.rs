//! Limits and other properties of cgroups: files that can be read and written, of a fixed list. What only counts, and what
//! acts when it is written to, is none. Frozen cgroups (`freezer.state`, `cgroup.freeze`) come back thawed.

use standstill_images::types::Bytes;
use std::{fs, io, path::Path};

/// The files of both versions, in the order in which they have to be written. docs/support-matrix.md has the same list.
const FILES: &[&str] = &[
    // Version 2: what a cgroup is, and which files those below it have.
    "cgroup.type",
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.pressure",
    // Nothing can enter a cpuset without these two.
    "cpuset.cpus",
    "cpuset.mems",
    "cpuset.cpus.exclusive",
    "cpuset.cpus.partition",
    "cpuset.cpu_exclusive",
    "cpuset.mem_exclusive",
    "cpuset.mem_hardwall",
    "cpuset.memory_migrate",
    "cpuset.memory_spread_page",
    "cpuset.memory_spread_slab",
    "cpuset.sched_load_balance",
    "cpuset.sched_relax_domain_level",
    "cgroup.clone_children",
    "cpu.weight",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.uclamp.min",
    "cpu.uclamp.max",
    "cpu.shares",
    "cpu.cfs_period_us",
    "cpu.cfs_quota_us",
    "cpu.cfs_burst_us",
    "cpu.rt_period_us",
    "cpu.rt_runtime_us",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.zswap.writeback",
    "memory.oom.group",
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.kmem.tcp.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "memory.move_charge_at_immigrate",
    "memory.use_hierarchy",
    "pids.max",
    "io.weight",
    "io.bfq.weight",
    "io.max",
    "io.latency",
    "io.prio.class",
    "blkio.weight",
    "blkio.weight_device",
    "blkio.bfq.weight",
    "blkio.prio.class",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.write_iops_device",
    "net_cls.classid",
    "net_prio.ifpriomap",
    "rdma.max",
    "misc.max",
    "dmem.min",
    "dmem.low",
    "dmem.max",
    "devices.list",
    "notify_on_release",
    "cgroup.subtree_control",
];

/// Reads the properties of a cgroup; none of one that was removed.
pub(super) fn read(dir: &Path) -> io::Result<Vec<(Bytes, Bytes)>> {
    let mut all = Vec::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let name = entry?.file_name();
        let Some(place) = name.to_str().and_then(place) else { continue };
        // Some are there and cannot be read where the machine has no use for them.
        if let Ok(value) = fs::read(dir.join(&name)) {
            all.push((place, Bytes::from(Path::new(&name)), Bytes(value)));
        }
    }
    all.sort();
    Ok(all.into_iter().map(|(_, name, value)| (name, value)).collect())
}

/// Where a file is in the order of writing; `None`: it is no property. Those of hugetlb have sizes in their names.
fn place(name: &str) -> Option<usize> {
    let limit = [".max", ".limit_in_bytes"].iter().any(|end| name.ends_with(end));
    if name.starts_with("hugetlb.") && limit && !name.contains('/') {
        return Some(FILES.len());
    }
    FILES.iter().position(|file| *file == name)
}

/// Gives a cgroup its properties. What is as it should be already is not written, nor what this kernel does not have.
pub(super) fn write(dir: &Path, properties: &[(Bytes, Bytes)]) -> io::Result<()> {
    let known = |name: &Bytes| name.as_path().to_str().is_some_and(|name| place(name).is_some());
    let mut left: Vec<_> = properties.iter().filter(|(name, _)| known(name)).collect();
    // One limit may stand in the way of another until that is written as well.
    for last in [false, true] {
        let mut failed = Vec::new();
        for property in left {
            let (name, value) = property;
            let Ok(now) = fs::read(dir.join(name.as_path())) else {
                tracing::warn!("cgroup {} has no {} here: it is left out", dir.display(), name.lossy());
                continue;
            };
            if now == value.0 {
                continue;
            }
            let result = steps(&name.lossy(), &value.lossy(), &String::from_utf8_lossy(&now))
                .into_iter()
                .try_for_each(|(file, text)| fs::write(dir.join(file), text));
            match result {
                Err(e) if last => {
                    let text = format!("{} = {}: {e}", name.lossy(), value.lossy().trim_end().replace('\n', "; "));
                    return Err(io::Error::new(e.kind(), text));
                }
                Err(_) => failed.push(property),
                Ok(()) => {}
            }
        }
        left = failed;
    }
    Ok(())
}

/// What has to be written where for a value, if the value is `now` another one.
fn steps(name: &str, value: &str, now: &str) -> Vec<(String, String)> {
    let write = |file: &str, text: &str| (file.to_owned(), text.to_owned());
    let lines = value.lines().filter(|line| !line.is_empty());
    match name {
        // The others are what the kernel makes of it.
        "cgroup.type" if value.trim() != "threaded" => Vec::new(),
        "cgroup.subtree_control" => {
            let has = |text: &str, word: &str| text.split_ascii_whitespace().any(|w| w == word);
            let more = value.split_ascii_whitespace().filter(|w| !has(now, w)).map(|w| format!("+{w}"));
            let less = now.split_ascii_whitespace().filter(|w| !has(value, w)).map(|w| format!("-{w}"));
            more.chain(less).map(|text| write(name, &text)).collect()
        }
        "cpuset.cpus.partition" => lines.take(1).map(|l| write(name, l.split(' ').next().unwrap_or(l))).collect(),
        "memory.oom_control" => {
            lines.filter_map(|line| line.strip_prefix("oom_kill_disable ")).map(|v| write(name, v)).collect()
        }
        "devices.list" if value.starts_with("a ") => vec![write("devices.allow", "a")],
        "devices.list" => {
            // Denying all is forbidden where there are cgroups below.
            let all = now.starts_with("a ").then(|| write("devices.deny", "a"));
            let had = |text: &str, line: &str| text.lines().any(|l| l == line);
            let less = now.lines().filter(|l| !l.starts_with("a ") && !had(value, l)).map(|l| write("devices.deny", l));
            let more = lines.filter(|l| !had(now, l)).map(|l| write("devices.allow", l));
            all.into_iter().chain(less).chain(more).collect()
        }
        // One device, interface or resource a line; one that has no line any more gets no limit by that.
        _ if value.lines().count() > 1 || name.ends_with("_device") || matches!(name, "io.max" | "io.latency") => {
            lines.map(|line| write(name, line)).collect()
        }
        _ => vec![write(name, value.trim_end_matches('\n'))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, value: &str, now: &str) -> Vec<String> {
        steps(name, value, now).into_iter().map(|(file, text)| format!("{file}={text}")).collect()
    }

    #[test]
    fn how_values_are_written() {
        assert_eq!(texts("pids.max", "17\n", "max\n"), ["pids.max=17"]);
        assert_eq!(texts("cpuset.cpus", "\n", "0\n"), ["cpuset.cpus="]);
        assert_eq!(texts("cgroup.type", "domain threaded\n", "domain\n"), [""; 0]);
        assert_eq!(texts("cgroup.type", "threaded\n", "domain\n"), ["cgroup.type=threaded"]);
        let control = texts("cgroup.subtree_control", "cpu pids\n", "cpu memory\n");
        assert_eq!(control, ["cgroup.subtree_control=+pids", "cgroup.subtree_control=-memory"]);
        let oom = texts("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 0\n", "");
        assert_eq!(oom, ["memory.oom_control=1"]);
        let devices = texts("devices.list", "c 1:3 rwm\nb *:* m\n", "a *:* rwm\n");
        assert_eq!(devices, ["devices.deny=a", "devices.allow=c 1:3 rwm", "devices.allow=b *:* m"]);
        let devices = texts("devices.list", "c 1:3 rwm\n", "c 1:3 rwm\nb *:* m\n");
        assert_eq!(devices, ["devices.deny=b *:* m"]);
        assert_eq!(texts("devices.list", "a *:* rwm\n", "c 1:3 rwm\n"), ["devices.allow=a"]);
        assert_eq!(texts("io.max", "8:0 rbps=1 wbps=max\n8:16 rbps=2\n", "").len(), 2);
        assert_eq!(texts("io.max", "", "8:0 rbps=1\n"), [""; 0]);
    }

    #[test]
    fn what_is_a_property() {
        assert!(place("hugetlb.2MB.max").is_some() && place("hugetlb.1GB.rsvd.limit_in_bytes").is_some());
        for name in [
            "hugetlb.2MB.current",
            "memory.force_empty",
            "cgroup.kill",
            "freezer.state",
            "tasks",
            "../pids.max",
            "hugetlb./../x.max",
        ] {
            assert_eq!(place(name), None, "{name}");
        }
    }

    #[test]
    fn files_are_written_once_and_only_if_they_are_there() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pids.max"), "max\n").unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        let property = |name: &str, value: &str| (Bytes::from(name.as_bytes()), Bytes::from(value.as_bytes()));
        let wanted = [property("pids.max", "9\n"), property("cpu.shares", "5\n"), property("cgroup.procs", "1")];
        write(dir.path(), &wanted).unwrap();
        assert_eq!(read(dir.path()).unwrap(), [property("pids.max", "9")]);
        assert_eq!(fs::read(dir.path().join("cgroup.procs")).unwrap(), b"");
        assert!(!dir.path().join("cpu.shares").exists());
    }
}
