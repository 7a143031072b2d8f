//! procfs, parsed. Formats: proc(5).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// `/proc/<pid>/<name>`.
pub(crate) fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} has an unknown format"))
}

/// Thread ids of a process, in creation order (the leader first).
pub(crate) fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let mut tids = fs::read_dir(path(pid, "task"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect::<Vec<i32>>();
    // The kernel lists them in creation order; the leader leads also when its number is not the smallest.
    if let Some(leader) = tids.iter().position(|&t| t == pid) {
        tids[..=leader].rotate_right(1);
    }
    Ok(tids)
}

/// Children of all threads of a process (CONFIG_PROC_CHILDREN).
pub(crate) fn children(pid: i32, tids: &[i32]) -> io::Result<Vec<i32>> {
    let mut all = Vec::new();
    for tid in tids {
        match fs::read_to_string(path(pid, &format!("task/{tid}/children"))) {
            Ok(text) => all.extend(text.split_ascii_whitespace().filter_map(|s| s.parse::<i32>().ok())),
            Err(e) if is_gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// Whether the error says that the process is no more.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The fields of `/proc/<pid>/stat` that are used.
#[derive(Clone, Debug)]
pub(crate) struct Stat {
    pub comm: Vec<u8>,
    pub state: u8,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub flags: u64,
    pub threads: u64,
    /// Clock ticks since boot.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub exit_signal: i32,
    pub exit_code: i32,
}

impl Stat {
    /// Whether it is dead or on its way out.
    pub(crate) fn is_ending(&self) -> bool {
        const PF_EXITING: u64 = 4; // include/linux/sched.h
        matches!(self.state, b'Z' | b'X') || self.flags & PF_EXITING != 0
    }

    /// Whether it is a leader that has exited while other threads of its process live.
    pub(crate) fn is_dead_leader(&self) -> bool {
        self.state == b'Z' && self.threads > 1
    }
}

/// `/proc/<pid>/stat`.
pub(crate) fn stat(pid: i32) -> io::Result<Stat> {
    parse_stat(&fs::read(path(pid, "stat"))?).ok_or_else(|| invalid("/proc/pid/stat"))
}

fn parse_stat(text: &[u8]) -> Option<Stat> {
    // The name may hold anything, parentheses too: it ends at the last one.
    let open = text.iter().position(|&b| b == b'(')?;
    let close = text.iter().rposition(|&b| b == b')')?;
    let fields: Vec<&str> = std::str::from_utf8(text.get(close + 2..)?).ok()?.split_ascii_whitespace().collect();
    // Field numbers of proc(5) start at 1, and `fields` at the third.
    let field = |n: usize| fields.get(n - 3).copied();
    let address = |n: usize| field(n)?.parse::<u64>().ok();
    Some(Stat {
        comm: text.get(open + 1..close)?.to_vec(),
        state: *field(3)?.as_bytes().first()?,
        ppid: field(4)?.parse().ok()?,
        pgid: field(5)?.parse().ok()?,
        sid: field(6)?.parse().ok()?,
        flags: address(9)?,
        threads: address(20)?,
        start_time: address(22)?,
        start_code: address(26)?,
        end_code: address(27)?,
        start_stack: address(28)?,
        exit_signal: field(38)?.parse().ok()?,
        start_data: address(45)?,
        end_data: address(46)?,
        start_brk: address(47)?,
        arg_start: address(48)?,
        arg_end: address(49)?,
        env_start: address(50)?,
        env_end: address(51)?,
        exit_code: field(52)?.parse().ok()?,
    })
}

/// The fields of `/proc/<pid>/status` that are used.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    pub tgid: i32,
    pub umask: u32,
    pub tracer: i32,
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub ns_pids: Vec<i32>,
    pub pending: u64,
    pub pending_shared: u64,
    pub ignored: u64,
    pub caught: u64,
    pub caps: [u64; 5],
    pub no_new_privs: bool,
    pub seccomp: u32,
    /// What PR_SET_SPECULATION_CTRL was given for each kind of misfeature; 0: nothing.
    pub speculation: [u32; 2],
}

/// `/proc/<pid>/task/<tid>/status`.
pub(crate) fn status(pid: i32, tid: i32) -> io::Result<Status> {
    let text = fs::read(path(pid, &format!("task/{tid}/status")))?;
    Ok(parse_status(&String::from_utf8_lossy(&text)))
}

fn parse_status(text: &str) -> Status {
    let mut s = Status::default();
    let hex = |v: &str| u64::from_str_radix(v, 16).unwrap_or(0);
    let list = |v: &str| v.split_ascii_whitespace().filter_map(|n| n.parse::<u32>().ok()).collect::<Vec<_>>();
    let four = |v: &str| <[u32; 4]>::try_from(list(v)).unwrap_or_default();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name {
            "Tgid" => s.tgid = value.parse().unwrap_or(0),
            "Umask" => s.umask = u32::from_str_radix(value, 8).unwrap_or(0),
            "TracerPid" => s.tracer = value.parse().unwrap_or(0),
            "Uid" => s.uids = four(value),
            "Gid" => s.gids = four(value),
            "Groups" => s.groups = list(value),
            "NSpid" => s.ns_pids = list(value).iter().map(|&n| n as i32).collect(),
            "SigPnd" => s.pending = hex(value),
            "ShdPnd" => s.pending_shared = hex(value),
            "SigIgn" => s.ignored = hex(value),
            "SigCgt" => s.caught = hex(value),
            "CapInh" => s.caps[0] = hex(value),
            "CapPrm" => s.caps[1] = hex(value),
            "CapEff" => s.caps[2] = hex(value),
            "CapBnd" => s.caps[3] = hex(value),
            "CapAmb" => s.caps[4] = hex(value),
            "NoNewPrivs" => s.no_new_privs = value == "1",
            "Seccomp" => s.seccomp = value.parse().unwrap_or(0),
            "Speculation_Store_Bypass" => s.speculation[0] = speculation(value),
            "SpeculationIndirectBranch" => s.speculation[1] = speculation(value),
            _ => {}
        }
    }
    s
}

/// What a thread has chosen, if it may choose.
fn speculation(text: &str) -> u32 {
    match text {
        "thread mitigated" | "conditional disabled" => libc::PR_SPEC_DISABLE,
        "thread force mitigated" | "conditional force disabled" => libc::PR_SPEC_FORCE_DISABLE,
        _ => 0,
    }
}

/// `/proc/<pid>/coredump_filter`; the usual one if the kernel makes no core dumps.
pub(crate) fn coredump_filter(pid: i32) -> u32 {
    let text = fs::read_to_string(path(pid, "coredump_filter")).unwrap_or_default();
    u32::from_str_radix(text.trim(), 16).unwrap_or(crate::tree::attributes::COREDUMP_FILTER)
}

/// One number in a small procfs file.
pub(crate) fn number<T: std::str::FromStr>(path: &Path) -> io::Result<T> {
    fs::read_to_string(path)?.trim().parse().map_err(|_| invalid(&path.display().to_string()))
}

/// `/proc/<pid>/limits`: soft and hard limits by RLIMIT number (the file lists them in that order).
pub(crate) fn limits(pid: i32) -> io::Result<Vec<(u64, u64)>> {
    parse_limits(&fs::read_to_string(path(pid, "limits"))?).ok_or_else(|| invalid("/proc/pid/limits"))
}

fn parse_limits(text: &str) -> Option<Vec<(u64, u64)>> {
    // Numbers of the resources, in the file's order: see getrlimit(2) and fs/proc/base.c.
    let parse = |v: &str| if v == "unlimited" { Some(u64::MAX) } else { v.parse().ok() };
    text.lines()
        .skip(1)
        .map(|line| {
            let mut values = line.get(26..)?.split_ascii_whitespace();
            Some((parse(values.next()?)?, parse(values.next()?)?))
        })
        .collect()
}

/// A line of `/proc/<pid>/maps`, as far as it is needed before anything else is known.
#[derive(Clone, Debug)]
pub(crate) struct MapLine {
    pub start: u64,
    pub end: u64,
    pub shared: bool,
    /// Device, as two numbers.
    pub dev: String,
    pub ino: u64,
    pub name: String,
}

/// `/proc/<pid>/maps`.
pub(crate) fn maps(pid: i32) -> io::Result<Vec<MapLine>> {
    let text = fs::read(path(pid, "maps"))?;
    String::from_utf8_lossy(&text)
        .lines()
        .map(|line| {
            let mut fields = line.splitn(6, ' ');
            let (start, end) = fields.next()?.split_once('-')?;
            let hex = |text| u64::from_str_radix(text, 16).ok();
            let shared = fields.next()?.ends_with('s');
            let dev = fields.nth(1)?.to_string();
            let ino = fields.next()?.parse().ok()?;
            let name = fields.next().unwrap_or("").trim_start().to_string();
            Some(MapLine { start: hex(start)?, end: hex(end)?, shared, dev, ino, name })
        })
        .collect::<Option<_>>()
        .ok_or_else(|| invalid("/proc/pid/maps"))
}

/// A timer in `/proc/<pid>/timers`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimerLine {
    pub id: i32,
    pub signal: i32,
    pub value: u64,
    pub notify: i32,
    pub tid: i32,
    pub clock: i32,
}

/// `/proc/<pid>/timers` (CONFIG_CHECKPOINT_RESTORE).
pub(crate) fn timers(pid: i32) -> io::Result<Vec<TimerLine>> {
    parse_timers(&fs::read_to_string(path(pid, "timers"))?).ok_or_else(|| invalid("/proc/pid/timers"))
}

fn parse_timers(text: &str) -> Option<Vec<TimerLine>> {
    let mut all = Vec::new();
    for line in text.lines() {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if name == "ID" {
            all.push(TimerLine { id: value.parse().ok()?, ..Default::default() });
            continue;
        }
        let timer = all.last_mut()?;
        match name {
            "signal" => {
                let (signal, pointer) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (kind, target) = value.split_once('/')?;
                timer.notify = match kind {
                    "signal" => libc::SIGEV_SIGNAL,
                    "none" => libc::SIGEV_NONE,
                    _ => libc::SIGEV_THREAD,
                };
                let (how, id) = target.split_once('.')?;
                if how == "tid" {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.tid = id.parse().ok()?;
                }
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => {}
        }
    }
    Some(all)
}

/// The `name:\tvalue` lines of `/proc/<pid>/fdinfo/<fd>`.
pub(crate) fn fdinfo(pid: i32, fd: i32) -> io::Result<String> {
    fs::read_to_string(path(pid, &format!("fdinfo/{fd}")))
}

/// Value of a `name:` line.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// From the last number in a list of ranges like `0-3,8`.
pub(crate) fn possible_cpus() -> Option<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").ok()?;
    let last = list.trim_end().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok().map(|n| n + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_process_with_a_hostile_name() {
        let mut text = b"7 (a) R (b) ) S 1 7 7 0 -1 4194560".to_vec();
        for n in 10..=52 {
            text.extend_from_slice(format!(" {n}").as_bytes());
        }
        let stat = parse_stat(&text).unwrap();
        assert_eq!(stat.comm, b"a) R (b) ");
        assert_eq!((stat.state, stat.ppid, stat.start_brk, stat.exit_code), (b'S', 1, 47, 52));
    }

    #[test]
    fn stat_that_is_cut_short_is_an_error() {
        assert!(parse_stat(b"7 (a) S 1 7").is_none());
        assert!(parse_stat(b"").is_none());
    }

    #[test]
    fn own_files_parse() {
        let pid = std::process::id() as i32;
        let stat = stat(pid).unwrap();
        assert_eq!(stat.ppid, nix::unistd::getppid().as_raw());
        assert_eq!(limits(pid).unwrap().len(), 16);
        assert_eq!(status(pid, pid).unwrap().uids[0], nix::unistd::getuid().as_raw());
        assert!(maps(pid).unwrap().iter().any(|m| m.name == "[stack]"));
        assert!(threads(pid).unwrap().contains(&pid));
    }

    #[test]
    fn timers_of_both_notification_kinds() {
        let text = "ID: 0\nsignal: 60/00007fff8b42\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 1\nsignal: 34/0\nnotify: none/tid.12\nClockID: 1\n";
        let timers = parse_timers(text).unwrap();
        assert_eq!(timers[0], TimerLine { id: 0, signal: 60, value: 0x7fff_8b42, notify: 0, tid: 0, clock: 0 });
        assert_eq!((timers[1].notify, timers[1].tid), (libc::SIGEV_NONE | libc::SIGEV_THREAD_ID, 12));
    }
}
