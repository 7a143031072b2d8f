//! Processes come back into their cgroups.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use standstill_tests::harness::left::expect_none_of;
use standstill_tests::harness::{Target, Tool, Turn, proc, skip, standstill};

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
