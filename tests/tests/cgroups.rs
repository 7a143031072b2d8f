//! Processes come back into their cgroups.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::Pid;
use standstill_tests::harness::left::expect_none_of;
use standstill_tests::harness::{Target, Tool, Turn, proc, skip, standstill, workload};

/// A cgroup of version 2 made for a test, and one in it.
struct Cgroups(PathBuf);

impl Cgroups {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
        let unified = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        let mount = Path::new(unified.split_whitespace().nth(4).expect("a mount point"));
        let own = mount.join(format!("standstill-test-{}", std::process::id()));
        fs::create_dir(&own).ok()?;
        let cgroups = Self(own);
        cgroups.make();
        Some(cgroups)
    }

    fn inner(&self) -> PathBuf {
        self.0.join("inner")
    }

    fn make(&self) {
        for dir in [&self.0, &self.inner()] {
            _ = fs::create_dir(dir);
            fs::set_permissions(dir, fs::Permissions::from_mode(0o751)).expect("set the mode");
        }
    }

    fn remove(&self) {
        for dir in [&self.inner(), &self.0] {
            fs::remove_dir(dir).unwrap_or_else(|error| panic!("remove {}: {error}", dir.display()));
        }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // The last processes may still be on their way out.
        for _ in 0..100 {
            _ = fs::remove_dir(self.inner());
            if fs::remove_dir(&self.0).is_ok() || !self.0.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn cgroup_of(pid: Pid) -> String {
    let all = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read the cgroups");
    all.lines().find_map(|line| line.strip_prefix("0::")).expect("version 2").to_owned()
}

/// A tree whose root is in a cgroup and whose other processes are in one below, and where each is.
fn scattered(cgroups: &Cgroups) -> (Target, Vec<(Pid, String)>) {
    let mut target = Target::workload("tree", &["--depth", "2"]);
    for (n, pid) in target.processes().into_iter().enumerate() {
        let dir = if n == 0 { cgroups.0.clone() } else { cgroups.inner() };
        fs::write(dir.join("cgroup.procs"), pid.to_string()).expect("move a process");
    }
    // The dead are nowhere.
    let living = target.processes().into_iter().filter(|pid| proc::state(*pid) != Some('Z'));
    let places = living.map(|pid| (pid, cgroup_of(pid))).collect();
    (target, places)
}

fn dump(tool: &Tool, target: &mut Target) -> PathBuf {
    let images = target.images("image");
    tool.dump(target.pid(), &images).arg("--manage-cgroups").run().expect_success();
    target.await_gone();
    images
}

#[test]
fn processes_return_into_cgroups_that_exist_or_do_not() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Cgroups::new() else { return skip("no cgroup of version 2 can be made here") };
    let (mut target, places) = scattered(&cgroups);
    for mode in ["--manage-cgroups=none", "--manage-cgroups"] {
        let images = dump(&tool, &mut target);
        if mode == "--manage-cgroups" {
            cgroups.remove();
        }
        tool.restore(&images).args(["-d", mode]).run().expect_success();
        let now: Vec<_> = places.iter().map(|(pid, _)| (*pid, cgroup_of(*pid))).collect();
        assert_eq!(now, places, "{mode}");
        let mode = fs::metadata(cgroups.inner()).expect("the inner one is there").mode();
        assert_eq!(mode & 0o777, 0o751, "mode of the inner one");
        target.assert_well();
    }
    target.finish(0);
}

#[test]
fn a_cgroup_that_is_missing() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Cgroups::new() else { return skip("no cgroup of version 2 can be made here") };
    let (mut target, places) = scattered(&cgroups);
    let images = dump(&tool, &mut target);
    cgroups.remove();
    let pids: Vec<Pid> = places.iter().map(|p| p.0).collect();
    let name = cgroups.0.file_name().and_then(|name| name.to_str()).expect("a name");
    tool.restore(&images).args(["-d", "--manage-cgroups=none"]).run().expect_error(7, &[name]);
    expect_none_of(&pids);
    // Without the option it does not matter.
    tool.restore(&images).arg("-d").run().expect_success();
    assert_eq!(cgroup_of(target.pid()), cgroup_of(nix::unistd::getpid()), "cgroup of the restoring command");
    target.assert_well();
    target.finish(0);
}

/// Cgroups of a test in several hierarchies, each with one in it.
struct Scattered(Vec<PathBuf>);

/// Hierarchies with a property of each, its value, and another one.
const PROPERTIES: [(&str, &str, &str, &str); 6] = [
    ("pids", "pids.max", "1234", "77"),
    ("cpu", "cpu.shares", "333", "444"),
    ("cpuset", "cpuset.cpus", "0", "0"),
    ("memory", "memory.limit_in_bytes", "4294967296", "8589934592"),
    ("devices", "devices.list", "c 1:3 rwm", "c 1:3 rwm\nc 1:5 r"),
    ("", "cgroup.max.descendants", "12", "13"),
];

impl Scattered {
    /// In the hierarchies of [`PROPERTIES`], as far as there are any. Removes them and makes them anew if `Some` are there.
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
        let name = format!("standstill-test-{}-properties", std::process::id());
        let mounted = |controller: &str| {
            let line = mounts.lines().find(|line| match controller {
                "" => line.contains(" - cgroup2 "),
                _ => {
                    line.contains(" - cgroup ")
                        && line.rsplit([' ', ',']).take_while(|word| *word != "rw").any(|word| word == controller)
                }
            })?;
            Some(PathBuf::from(line.split_whitespace().nth(4)?).join(&name))
        };
        let all: Option<Vec<PathBuf>> = PROPERTIES.iter().map(|(controller, ..)| mounted(controller)).collect();
        let own = Self(all?);
        for dir in &own.0 {
            for dir in [dir.clone(), dir.join("inner")] {
                fs::create_dir(&dir).ok()?;
                // Nothing can enter a cpuset without these.
                for file in ["cpuset.cpus", "cpuset.mems"].iter().filter(|file| dir.join(file).exists()) {
                    fs::write(dir.join(file), "0").expect("set up a cpuset");
                }
            }
        }
        Some(own)
    }

    fn set(&self, other: bool) {
        for (dir, (_, file, value, another)) in self.0.iter().zip(PROPERTIES) {
            let inner = dir.join("inner");
            let value = if other { another } else { value };
            if file == "devices.list" {
                let now = fs::read_to_string(inner.join(file)).expect("read the devices");
                for line in now.lines().filter(|now| value.lines().all(|line| line != *now)) {
                    // All can be denied as long as there is no cgroup below.
                    let line = if line.starts_with("a ") { "a" } else { line };
                    fs::write(inner.join("devices.deny"), line).expect("deny a device");
                }
                value.lines().for_each(|line| fs::write(inner.join("devices.allow"), line).expect("allow a device"));
                continue;
            }
            fs::write(inner.join(file), value).unwrap_or_else(|error| panic!("set {file}: {error}"));
        }
    }

    fn get(&self) -> Vec<String> {
        let read = |(dir, property): (&PathBuf, &(&str, &str, &str, &str))| {
            let value = fs::read_to_string(dir.join("inner").join(property.1)).unwrap_or_default();
            format!("{}={}", property.1, value.trim_end())
        };
        self.0.iter().zip(&PROPERTIES).map(read).collect()
    }

    fn wanted(other: bool) -> Vec<String> {
        let value = |p: &(&str, &str, &str, &str)| format!("{}={}", p.1, if other { p.3 } else { p.2 });
        PROPERTIES.iter().map(value).collect()
    }

    fn enter(&self, pid: Pid, inner: &str) {
        for dir in &self.0 {
            fs::write(dir.join(inner).join("cgroup.procs"), pid.to_string()).expect("move a process");
        }
    }

    /// One below in which nobody is.
    fn add_empty(&self) {
        for dir in &self.0 {
            _ = fs::create_dir(dir.join("inner/empty"));
        }
    }

    /// All of them, those below first.
    fn all(&self) -> impl Iterator<Item = PathBuf> {
        self.0.iter().flat_map(|dir| [dir.join("inner/empty"), dir.join("inner"), dir.clone()])
    }

    fn remove(&self) {
        for dir in self.all().filter(|dir| dir.exists()) {
            fs::remove_dir(&dir).unwrap_or_else(|error| panic!("remove {}: {error}", dir.display()));
        }
    }
}

impl Drop for Scattered {
    fn drop(&mut self) {
        for _ in 0..100 {
            self.all().for_each(|dir| _ = fs::remove_dir(dir));
            if self.0.iter().all(|dir| !dir.exists()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn all_of(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("read the cgroups")
}

#[test]
fn properties_of_cgroups() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Scattered::new() else { return skip("the hierarchies of version 1 are not all mounted here") };
    let mut target = Target::workload("clock", &[]);
    cgroups.enter(target.pid(), "inner");
    let before = all_of(target.pid());
    for (mode, there, other) in [
        ("soft", false, false),
        ("soft", true, true),
        ("none", true, true),
        ("props", true, false),
        ("full", false, false),
        ("full", true, false),
        ("strict", false, false),
    ] {
        cgroups.set(false);
        cgroups.add_empty();
        let images = dump(&tool, &mut target);
        match there {
            true => cgroups.set(true),
            false => cgroups.remove(),
        }
        if there {
            let strict = tool.restore(&images).args(["-d", "--manage-cgroups=strict"]).run();
            strict.expect_error(7, &["strict", "standstill-test"]);
        }
        tool.restore(&images).arg("-d").arg(format!("--manage-cgroups={mode}")).run().expect_success();
        assert_eq!(cgroups.get(), Scattered::wanted(other), "{mode}, there before: {there}");
        assert_eq!(all_of(target.pid()), before, "{mode}");
        assert!(cgroups.0.iter().all(|dir| dir.join("inner/empty").exists()), "{mode}: those that nobody was in");
        target.assert_well();
    }
    target.finish(0);
}

#[test]
fn another_root_of_cgroups() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Scattered::new() else { return skip("the hierarchies of version 1 are not all mounted here") };
    let mut target = Target::workload("tree", &["--depth", "2"]);
    let living: Vec<Pid> = target.processes().into_iter().filter(|pid| proc::state(*pid) != Some('Z')).collect();
    for (n, pid) in living.iter().enumerate() {
        cgroups.enter(*pid, if n == 0 { "" } else { "inner" });
    }
    let places = || living.iter().map(|pid| all_of(*pid)).collect::<Vec<_>>();
    let before = places();
    let name = cgroups.0[0].file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let images = dump(&tool, &mut target);
    let root = format!("/{name}/inner");
    // One that is given for a hierarchy counts more than the one for all.
    let options = ["-d", "--manage-cgroups", "--cgroup-root", &root, "--cgroup-root", &format!("cpu:/{name}")];
    tool.restore(&images).args(options).run().expect_success();
    for (before, now) in before.iter().zip(places()) {
        for (before, now) in before.lines().zip(now.lines()).filter(|(before, _)| before.contains(&name)) {
            let moved = before.replace(&name, &format!("{name}/inner"));
            let expected = if before.contains(":cpu:") { before } else { &moved };
            assert_eq!(now, expected);
        }
    }
    target.assert_well();
    // What was made for it, also in hierarchies in which it was in the root.
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let mount = Path::new(line.split_whitespace().nth(4).expect("a mount point"));
        for path in ["inner/inner", "inner", ""].map(|path| mount.join(&name).join(path)) {
            let inside = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            for pid in inside.lines() {
                fs::write(mount.join("cgroup.procs"), pid).expect("move a process");
            }
            _ = fs::remove_dir(path);
        }
        assert!(!mount.join(&name).exists(), "left in {}", mount.display());
    }
    target.finish(0);
}

#[test]
fn threads_in_cgroups_of_their_own() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Scattered::new() else { return skip("the hierarchies of version 1 are not all mounted here") };
    let mut target = Target::workload("clock", &["--threads", "4"]);
    let threads = proc::threads(target.pid());
    let unified = cgroups.0.last().expect("version 2");
    // Both are threaded then, and their parent is the domain of their processes.
    cgroups.enter(target.pid(), "");
    fs::write(unified.join("inner/cgroup.type"), "threaded").expect("make a threaded cgroup");
    for (dir, (controller, ..)) in cgroups.0.iter().zip(PROPERTIES) {
        // The memory of threads is that of their process.
        if controller != "memory" {
            let file = if controller.is_empty() { "cgroup.threads" } else { "tasks" };
            fs::write(dir.join("inner").join(file), threads[2].to_string()).expect("move a thread");
        }
    }
    let places = || threads.iter().map(|tid| all_of(*tid)).collect::<Vec<_>>();
    let before = places();
    assert_ne!(before[0], before[2]);
    for round in 0..2 {
        let images = dump(&tool, &mut target);
        if round == 1 {
            cgroups.remove();
        }
        tool.restore(&images).args(["-d", "--manage-cgroups"]).run().expect_success();
        assert_eq!(places(), before, "round {round}");
        target.assert_well();
    }
    target.finish(0);
}

#[test]
fn a_cgroup_namespace_of_its_own() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let Some(cgroups) = Cgroups::new() else { return skip("no cgroup of version 2 can be made here") };
    let procs = cgroups.0.join("cgroup.procs");
    let start = |dir: &Path| {
        let mut command = Command::new("/bin/sh");
        let program = workload("clock").get_program().to_owned();
        let script = "echo $$ > \"$1\"; shift; exec unshare --cgroup \"$@\"";
        command.args(["-c", script, "sh"]).arg(&procs).arg(program).arg("--dir").arg(dir);
        command
    };
    let mut target = Target::start("clock", start).await_ready();
    fs::write(cgroups.inner().join("cgroup.procs"), target.pid().to_string()).expect("move the process");
    let namespace = |pid: Pid| fs::read_link(format!("/proc/{pid}/ns/cgroup")).expect("the cgroup namespace");
    let inside = |pid: Pid| {
        let pid = pid.to_string();
        let file = format!("/proc/{pid}/cgroup");
        let output = Command::new("nsenter").args(["--cgroup", "-t", &pid, "cat", &file]).output().expect("nsenter");
        String::from_utf8_lossy(&output.stdout).lines().find(|line| line.starts_with("0::")).map(str::to_owned)
    };
    assert_eq!(inside(target.pid()).as_deref(), Some("0::/inner"));
    let images = target.images("refused");
    tool.dump(target.pid(), &images).run().expect_error(4, &["another cgroup namespace", "--manage-cgroups"]);
    target.assert_free();
    for reader in ["auto", "procfs"] {
        let images = target.images(reader);
        tool.dump(target.pid(), &images).args(["--manage-cgroups", "--reader", reader]).run().expect_success();
        target.await_gone();
        cgroups.remove();
        tool.restore(&images).args(["-d", "--manage-cgroups"]).run().expect_success();
        assert_ne!(namespace(target.pid()), namespace(nix::unistd::getpid()));
        assert_eq!(inside(target.pid()).as_deref(), Some("0::/inner"), "as the process sees itself");
        target.assert_well();
    }
    // Where the command is.
    let images = dump(&tool, &mut target);
    tool.restore(&images).arg("-d").run().expect_success();
    assert_ne!(namespace(target.pid()), namespace(nix::unistd::getpid()));
    assert_eq!(inside(target.pid()).as_deref(), Some("0::/"), "as the process sees itself");
    assert_eq!(cgroup_of(target.pid()), cgroup_of(nix::unistd::getpid()), "cgroup of the restoring command");
    target.assert_well();
    target.finish(0);
}
