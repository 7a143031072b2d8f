//! An image for people to read.

use super::{
    files::{File, Holder},
    output::plain,
    processes::{Process, State},
    view::View,
};
use indicatif::HumanBytes;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

/// A text being written: writing to a String cannot fail.
macro_rules! line {
    ($text:expr, $($format:tt)*) => {{
        let start = $text.len();
        let _ = write!($text, $($format)*);
        let end = start + $text[start..].trim_end().len();
        $text.truncate(end);
        $text.push('\n');
    }};
}

/// The whole report.
pub(crate) fn render(view: &View) -> String {
    let mut text = String::new();
    header(&mut text, view);
    processes(&mut text, view);
    memory(&mut text, view);
    chain(&mut text, view);
    descriptors(&mut text, view);
    pipes(&mut text, view);
    listening(&mut text, view);
    timings(&mut text, view);
    text
}

fn plural(n: usize, what: &str) -> String {
    match (n, what.strip_suffix('s')) {
        (1, _) => format!("1 {what}"),
        (_, Some(_)) => format!("{n} {what}es"),
        _ => format!("{n} {what}s"),
    }
}

fn pages(n: u64) -> String {
    format!("{} ({})", plural(n as usize, "page"), HumanBytes(n * 4096))
}

fn header(text: &mut String, view: &View) {
    let image = &view.image;
    line!(text, "{}: {}", plain(&image.directory), plural(view.processes.len(), "process"));
    let (writer, kernel, machine) = (plain(image.writer), plain(image.kernel), plain(image.machine));
    line!(text, "made {} by standstill {writer} on Linux {kernel} ({machine})", image.created_utc);
    if image.shell_job {
        line!(text, "a shell job: restore it with --shell-job");
    }
}

/// The tree, every process below its parent.
fn processes(text: &mut String, view: &View) {
    line!(text, "\nProcesses");
    let by_pid: BTreeMap<i32, &Process> = view.processes.iter().map(|p| (p.pid, p)).collect();
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for process in by_pid.values().filter(|p| p.pid != view.image.root) {
        children.entry(process.ppid).or_default().push(process.pid);
    }
    let mut left: BTreeSet<i32> = by_pid.keys().copied().collect();
    // What is not below the root comes afterwards, at the margin: an image can say anything.
    for start in [view.image.root].into_iter().chain(by_pid.keys().copied()) {
        let mut stack = vec![(start, "  ".to_string(), "  ".to_string())];
        while let Some((pid, branch, below)) = stack.pop() {
            if !left.remove(&pid) {
                continue;
            }
            line!(text, "{branch}{}", process(by_pid[&pid]));
            let own = children.get(&pid).map_or(&[][..], Vec::as_slice);
            for (n, &child) in own.iter().enumerate().rev() {
                let (corner, bar) = if n + 1 == own.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
                stack.push((child, format!("{below}{corner}"), format!("{below}{bar}")));
            }
        }
    }
}

fn process(process: &Process) -> String {
    let state = match process.state {
        State::Running => "running".to_string(),
        State::Stopped { signal, .. } => format!("stopped by {}", signal_name(signal)),
        State::Dead { status } if libc::WIFSIGNALED(status) => {
            format!("dead, killed by {}", signal_name(libc::WTERMSIG(status)))
        }
        State::Dead { status } => format!("dead, exit status {}", libc::WEXITSTATUS(status)),
    };
    let mut parts = vec![state];
    if let Some(live) = &process.live {
        parts.push(plural(live.threads.len(), "thread"));
        parts.push(plural(live.descriptors.len(), "descriptor"));
        if let Some(memory) = &live.memory {
            parts.push(plural(memory.mappings.len(), "mapping"));
            parts.push(HumanBytes(memory.stored_pages * 4096).to_string());
        }
    }
    format!("{} {}  {}", process.pid, plain(&process.comm), parts.join(", "))
}

fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |s| s.to_string())
}

fn memory(text: &mut String, view: &View) {
    line!(text, "\n{:<18} {:>8} {:>12} {:>8}  in the image", "Memory", "mappings", "mapped", "objects");
    for total in &view.memory {
        let mapped = HumanBytes(total.mapped_bytes).to_string();
        let objects = if total.objects == 0 { String::new() } else { total.objects.to_string() };
        let stored = if total.stored_pages == 0 { String::new() } else { pages(total.stored_pages) };
        line!(text, "  {:<16} {:>8} {mapped:>12} {objects:>8}  {stored}", total.kind, total.mappings);
    }
    let store = &view.store;
    let compression = match (store.compression, store.level) {
        ("none", _) => "not compressed".to_string(),
        (name, None) => format!("{} by {name}", HumanBytes(store.stored_bytes)),
        (name, Some(level)) => format!("{} by {name} level {level}", HumanBytes(store.stored_bytes)),
    };
    let place = match view.chain.stores.len() {
        0 | 1 => plain(store.pages_file),
        stores => format!("{stores} page stores"),
    };
    line!(text, "  stored: {}, {compression}, in {place}", pages(store.pages));
    line!(text, "  shared copy-on-write: {}; only zeros: {}", pages(store.shared_pages), pages(store.zero_pages));
}

/// The page stores of an image that has several, or parents.
fn chain(text: &mut String, view: &View) {
    let chain = &view.chain;
    if chain.stores.len() < 2 && chain.parents.is_empty() {
        return;
    }
    line!(
        text,
        "\n{:<28} {:>10} {:>10} {:>12}  directory",
        "Page stores, oldest first",
        "pages",
        "used here",
        "in the file"
    );
    for store in &chain.stores {
        let (file, bytes) = (plain(store.pages_file), HumanBytes(store.stored_bytes).to_string());
        let dropped =
            if store.dropped_pages == 0 { String::new() } else { format!(", {} given up", pages(store.dropped_pages)) };
        let place = plain(&store.directory);
        line!(text, "  {file:<26} {:>10} {:>10} {bytes:>12}  {place}{dropped}", store.pages, store.used_pages);
    }
    for (n, parent) in chain.parents.iter().enumerate() {
        line!(text, "  {} {}", if n == 0 { "parent" } else { "its parent" }, plain(parent));
    }
}

/// Who has something open: `pid,pid:fd,fd`, processes with the same numbers together. JSON has them all.
fn holders(all: &[Holder]) -> String {
    const MOST: usize = 6;
    let mut numbers: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    for holder in all {
        numbers.entry(holder.pid).or_default().push(holder.fd.to_string());
    }
    let mut groups: BTreeMap<Vec<String>, Vec<String>> = BTreeMap::new();
    for (pid, fds) in numbers {
        groups.entry(fds).or_default().push(pid.to_string());
    }
    let list = |items: &[String]| match items.len().saturating_sub(MOST) {
        0 => items.join(","),
        more => format!("{},…{more} more", items[..MOST].join(",")),
    };
    let mut parts: Vec<String> = groups.iter().map(|(fds, pids)| format!("{}:{}", list(pids), list(fds))).collect();
    let more = parts.len().saturating_sub(MOST);
    if more > 0 {
        parts.truncate(MOST);
        parts.push(format!("…{more} more"));
    }
    parts.join(" ")
}

/// Open files by kind, each with everybody who has it.
fn descriptors(text: &mut String, view: &View) {
    let mut files: Vec<&File> = view.files.iter().filter(|f| !f.held_by.is_empty()).collect();
    if files.is_empty() {
        return;
    }
    files.sort_by_key(|f| (f.kind, f.held_by.first().map(|h| (h.pid, h.fd))));
    let total: usize = files.iter().map(|f| f.held_by.len()).sum();
    line!(text, "\nDescriptors: {total}, of {}", plural(files.len(), "open file"));
    let held: Vec<String> = files.iter().map(|f| holders(&f.held_by)).collect();
    let width = held.iter().map(|h| h.chars().count()).max().unwrap_or(0).min(40);
    for (file, held) in files.iter().zip(held) {
        let pos = if file.pos == 0 { String::new() } else { format!(" at {}", file.pos) };
        line!(text, "  {:<16} {held:<width$}  {} ({}{pos})", file.kind, plain(&file.summary), file.mode());
    }
}

fn pipes(text: &mut String, view: &View) {
    if view.pipes.is_empty() {
        return;
    }
    line!(text, "\nPipes");
    for pipe in &view.pipes {
        let ends = |ends: &[Holder]| if ends.is_empty() { "nobody".to_string() } else { holders(ends) };
        let (from, to) = (ends(&pipe.writers), ends(&pipe.readers));
        let path = pipe.fifo.as_ref().map(|p| format!(", {}", plain(p))).unwrap_or_default();
        let (waiting, capacity) = (pipe.waiting_bytes, pipe.capacity);
        line!(text, "  pipe {:<3} {waiting} of {capacity} bytes waiting, from {from} to {to}{path}", pipe.id);
    }
}

fn listening(text: &mut String, view: &View) {
    let mut sockets = view.files.iter().filter(|f| f.listening).peekable();
    if sockets.peek().is_some() {
        line!(text, "\nListening sockets");
    }
    for socket in sockets {
        line!(text, "  {}  {}", holders(&socket.held_by), plain(&socket.summary));
    }
}

fn timings(text: &mut String, view: &View) {
    let stats = view.timings;
    let ms = |us: u64| format!("{:.2} ms", us as f64 / 1000.0);
    line!(text, "\nTimings (descriptors read by {})", plain(&stats.reader));
    let before = [("prepare", stats.prepare_us), ("freezing", stats.freezing_us), ("frozen", stats.frozen_us)];
    for (name, us) in before {
        line!(text, "  {name:<16} {:>12}", ms(us));
    }
    for (name, us) in &stats.phases {
        line!(text, "    {:<14} {:>12}", plain(name), ms(*us));
    }
    line!(text, "  {:<16} {:>12}", "total", ms(stats.total_us));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_grouped_by_process() {
        let all: Vec<Holder> = [(7, 0), (7, 1), (8, 1), (9, 1)].map(|(pid, fd)| Holder { pid, fd }).into();
        assert_eq!(holders(&all), "7:0,1 8,9:1");
        assert_eq!(holders(&[]), "");
        let many: Vec<Holder> = (1..=9).map(|pid| Holder { pid, fd: 2 }).collect();
        assert_eq!(holders(&many), "1,2,3,4,5,6,…3 more:2");
    }

    #[test]
    fn plurals() {
        assert_eq!(
            [plural(1, "process"), plural(2, "process"), plural(0, "page")],
            ["1 process", "2 processes", "0 pages"]
        );
    }
}
