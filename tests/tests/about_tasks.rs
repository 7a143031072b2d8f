//! Descriptors of procfs files that tell about tasks of the tree: threads must exist and be as they were before such a
//! file is opened and its offset set.

use standstill_tests::harness::{Target, Turn, standstill, wait_until};
use std::{fs, process::Command, time::Duration};

/// Opens files about itself, one of them of a thread, and reads a part of each. When told, it reads the rest, and
/// compares with a new reading what does not change by itself.
const SCRIPT: &str = r#"
import os, signal, sys, threading, time
os.chdir(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGALRM])
ready = threading.Event()
def thread():
    global tid
    tid = threading.get_native_id()
    ready.set()
    time.sleep(1000)
threading.Thread(target=thread, daemon=True).start()
ready.wait()
# What a thread other than the first blocks comes back last of all.
def facts(text, path):
    names = ['SigIgn', 'SigCgt', 'Uid', 'Threads'] + ['SigBlk'] * (path == '/proc/self/status')
    return [line for line in text.splitlines() if line.split(':')[0] in names]
paths = ['/proc/self/status', f'/proc/self/task/{tid}/status', f'/proc/{os.getpid()}/task/{tid}/comm']
fds = [os.open(path, os.O_RDONLY) for path in paths]
extra = os.dup2(fds[0], 77)
directory = os.open(f'/proc/self/task/{tid}', os.O_DIRECTORY)
begun = [os.read(fd, 32) for fd in fds[:2]]
open('started', 'w').close()
while not os.path.exists('told'):
    time.sleep(0.02)
wrong = []
for path, fd, begin in zip(paths, fds, begun):
    rest = begin + os.read(extra if fd == fds[0] else fd, 65536)
    rest, now = facts(rest.decode(), path), facts(open(path).read(), path)
    if rest != now:
        wrong.append(f'{path}: {rest} is not {now}')
if os.read(fds[2], 100) != open(paths[2], 'rb').read():
    wrong.append(paths[2])
if 'status' not in os.listdir(directory):
    wrong.append('directory')
with open('verdict.new', 'w') as verdict:
    verdict.write('\n'.join(wrong) or 'well')
os.rename('verdict.new', 'verdict')
time.sleep(1000)
"#;

#[test]
fn files_about_threads_are_opened_when_these_exist() {
    let _turn = Turn::take();
    let Some(tool) = standstill() else { return };
    let mut target = Target::start("about", |dir| {
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(dir);
        command
    });
    let file = |name: &str| target.dir().join(name);
    let (started, told, verdict) = (file("started"), file("told"), file("verdict"));
    assert!(wait_until(Duration::from_secs(20), || started.exists()), "{}", target.output());
    let images = target.images("about");
    target.processes();
    tool.dump(target.pid(), &images).run().expect_success();
    target.await_gone();
    tool.restore(&images).arg("-d").run().expect_success();
    fs::write(told, "").expect("write");
    assert!(wait_until(Duration::from_secs(20), || verdict.exists()), "{}", target.output());
    assert_eq!(fs::read_to_string(verdict).expect("read"), "well");
}
