//! A tree that does random things to itself, in several threads and processes, until it is killed.

use super::victim::say;
use std::{ffi::CString, ptr, sync::Mutex, thread, time::Duration};

/// A small, quick generator (xorshift64*): what a thread does depends on its seed only.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Threads in each process, processes, and operations of each thread before it rests for a while.
const THREADS: u64 = 3;
const PROCESSES: u64 = 3;
const BURST: u64 = 5;

/// `script`: seed, and how many operations each thread does.
pub(super) fn act(script: &str) {
    let (seed, operations) = script.split_once(' ').unwrap();
    let (seed, operations): (u64, u64) = (seed.parse().unwrap(), operations.parse().unwrap());
    let mut member = 0;
    for n in 1..PROCESSES {
        // SAFETY: there is one thread yet, as far as this program's own go; the child goes on alone.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).unwrap();
                member = n;
                break;
            }
            nix::unistd::ForkResult::Parent { child } => println!("pid: {child}"),
        }
    }
    for n in 0..THREADS {
        let mut dice = Dice(seed * 1000 + member * 10 + n + 1);
        thread::spawn(move || {
            // What the test sets up must be there before anything happens.
            thread::sleep(Duration::from_millis(300));
            let mut own = Own::default();
            for done in 0..operations {
                own.operate(&mut dice);
                if done % BURST == BURST - 1 {
                    thread::sleep(Duration::from_micros(500 + dice.below(20_000)));
                }
            }
        });
    }
    if member != 0 {
        super::victim::stand_still();
    }
    say("restless");
}

/// A process whose child, with the same descriptors and handlers, changes both all the time.
pub(super) fn share() {
    let flags = libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_VM | libc::SIGCHLD;
    let stack = Box::leak(vec![0u8; 64 * PAGE].into_boxed_slice());
    // SAFETY: the child runs on a stack of its own, makes system calls only, and touches no memory of its parent.
    let child = unsafe { libc::clone(sharer, stack.as_mut_ptr_range().end.cast(), flags, ptr::null_mut()) };
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    println!("pid: {child}");
}

/// A process that changes what its mappings are called all the time, and never the mappings.
pub(super) fn rename() {
    let mut own = Own::default();
    // A mapped file, and memory that can be taken for a stack.
    own.memory(34, 1, 0, None);
    own.memory(0, 1, 0, None);
    let before = memory_map();
    let mut moved = before;
    moved[STACK] = own.areas[1].0 as u64;
    thread::spawn(move || {
        for n in 0.. {
            match n % 4 {
                // SAFETY: the names outlive the calls.
                0 => _ = unsafe { libc::rename(file(0).as_ptr(), file(1).as_ptr()) },
                1 => set_memory_map(&moved),
                // SAFETY: as above.
                2 => _ = unsafe { libc::rename(file(1).as_ptr(), file(0).as_ptr()) },
                _ => set_memory_map(&before),
            }
            thread::sleep(Duration::from_millis(4));
        }
    });
    say("renaming");
}

extern "C" fn sharer(_: *mut libc::c_void) -> i32 {
    let mut open = -1;
    // SAFETY: system calls on descriptors of its own, without memory but for zeros and constants.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        loop {
            open = if open < 0 { libc::open(c"/".as_ptr(), libc::O_DIRECTORY) } else { libc::close(open) - 1 };
            libc::syscall(libc::SYS_rt_sigaction, libc::SIGUSR1, &raw const ACTIONS[(open >= 0) as usize], 0, 8);
            libc::usleep(300);
        }
    }
}

/// SIG_DFL and SIG_IGN as the kernel takes them.
static ACTIONS: [[usize; 4]; 2] = [[0; 4], [1, 0, 0, 0]];

/// What a thread made.
#[derive(Default)]
struct Own {
    areas: Vec<(usize, usize)>,
    fds: Vec<i32>,
}

const PAGE: usize = 4096;
/// Kinds of operations; see [`Own::operate`].
pub(super) const KINDS: u64 = 36;

impl Own {
    /// Does one thing. All results are ignored: failures are things that happen, too.
    fn operate(&mut self, dice: &mut Dice) {
        let kind = dice.below(KINDS);
        let pages = 1 + dice.below(8) as usize;
        let at = dice.below(1 << 30) as usize;
        let area = (!self.areas.is_empty()).then(|| self.areas[at % self.areas.len()]);
        let fd = (!self.fds.is_empty()).then(|| self.fds[at % self.fds.len()]);
        let new = self.memory(kind, pages, at, area).then_some(-1).or_else(|| self.descriptors(kind, at, fd));
        match new {
            Some(fd) if fd >= 0 => self.fds.push(fd),
            Some(_) => {}
            None => others(kind, at),
        }
        // Room for more.
        if self.fds.len() > 60 {
            // SAFETY: the descriptor is one that this thread made.
            unsafe { libc::close(self.fds.swap_remove(at % 60)) };
        }
        if self.areas.len() > 60 {
            let (start, len) = self.areas.swap_remove(at % 60);
            // SAFETY: the range is one that this thread mapped, and nothing refers to it.
            unsafe { libc::munmap(start as *mut _, len) };
        }
    }

    fn memory(&mut self, kind: u64, pages: usize, at: usize, area: Option<(usize, usize)>) -> bool {
        let map = |len: usize, flags: i32| {
            // SAFETY: the kernel chooses where nothing is mapped.
            let start = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            (start != libc::MAP_FAILED).then_some((start as usize, len))
        };
        let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        let (start, len) = area.unwrap_or((0, 0));
        let (start, part) = (start as *mut libc::c_void, len / 2 / PAGE * PAGE);
        // SAFETY: `start` and `len` are memory that this thread mapped and that nothing refers to, or nothing.
        unsafe {
            match kind {
                0 => self.areas.extend(map(pages * PAGE, anonymous)),
                1 => self.areas.extend(map(pages * PAGE, libc::MAP_ANONYMOUS | libc::MAP_SHARED)),
                2 => {
                    libc::munmap(start, len);
                    self.areas.retain(|a| a.0 != start as usize);
                }
                3 => {
                    libc::mprotect(start, part.max(PAGE).min(len), [1, 3, 0][at % 3]);
                }
                4 if len != 0 => {
                    let new = libc::mremap(start, len, len + pages * PAGE, libc::MREMAP_MAYMOVE);
                    if new != libc::MAP_FAILED {
                        self.areas.retain(|a| a.0 != start as usize);
                        self.areas.push((new as usize, len + pages * PAGE));
                    }
                }
                5 => {
                    libc::madvise(
                        start,
                        len,
                        [libc::MADV_DONTFORK, libc::MADV_NOHUGEPAGE, libc::MADV_DONTDUMP][at % 3],
                    );
                }
                6 => {
                    libc::mlock(start, part);
                }
                7 => {
                    // The heap is everybody's: it only grows.
                    libc::syscall(libc::SYS_brk, libc::sbrk(0) as usize + pages * PAGE);
                }
                8 => {
                    let name = c"restless";
                    libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, start, len, name.as_ptr());
                }
                9 => grow_stack(),
                34 => {
                    let fd = libc::open(file(at).as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC, 0o600);
                    let new = libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0);
                    if new != libc::MAP_FAILED {
                        self.areas.push((new as usize, PAGE));
                    }
                    libc::close(fd);
                }
                35 => {
                    libc::rename(file(at).as_ptr(), file(at / 8).as_ptr());
                }
                _ => return false,
            }
        }
        true
    }

    /// A new descriptor or -1; `None` if the operation is none on descriptors.
    fn descriptors(&mut self, kind: u64, at: usize, fd: Option<i32>) -> Option<i32> {
        let fd = fd.unwrap_or(-1);
        let cloexec = if at & 1 == 0 { libc::O_CLOEXEC } else { 0 };
        // SAFETY: descriptors are those that this thread made or -1, and pointers are to memory of this function.
        Some(unsafe {
            match kind {
                10 => libc::open(c"/etc/passwd".as_ptr(), cloexec),
                11 => libc::open(c"/".as_ptr(), libc::O_DIRECTORY),
                12 => libc::dup(fd),
                13 => {
                    let target = 500 + (at % 200) as i32;
                    libc::dup3(fd, target, cloexec);
                    -1
                }
                14 => {
                    libc::close(fd);
                    self.fds.retain(|&f| f != fd);
                    -1
                }
                15 => {
                    let mut pair = [0; 2];
                    libc::pipe2(pair.as_mut_ptr(), cloexec);
                    self.fds.push(pair[0]);
                    pair[1]
                }
                16 => libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0),
                17 => libc::eventfd(1, 0),
                18 => libc::timerfd_create(libc::CLOCK_MONOTONIC, 0),
                19 => libc::epoll_create1(0),
                20 => libc::inotify_init1(0),
                21 => libc::memfd_create(c"restless".as_ptr(), 0),
                22 => {
                    libc::fcntl(fd, libc::F_SETFD, at as i32 & 1);
                    -1
                }
                23 => libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100),
                24 => {
                    libc::ioctl(fd, if at & 1 == 0 { libc::FIOCLEX } else { libc::FIONCLEX });
                    -1
                }
                25 => receive_descriptor(),
                26 => libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32,
                27 => {
                    libc::syscall(libc::SYS_close_range, 600, 600 + at as u32 % 100, 0);
                    -1
                }
                _ => return None,
            }
        })
    }
}

/// Sends a descriptor to itself.
fn receive_descriptor() -> i32 {
    use nix::sys::socket::{AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType};
    use std::{io::IoSlice, io::IoSliceMut, os::fd::AsRawFd};
    let (a, b) =
        nix::sys::socket::socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::empty()).unwrap();
    let fds = [a.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    nix::sys::socket::sendmsg::<()>(a.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
    let (mut byte, mut space) = ([0u8], nix::cmsg_space!([i32; 1]));
    let mut parts = [IoSliceMut::new(&mut byte)];
    let got = nix::sys::socket::recvmsg::<()>(b.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    got.cmsgs()
        .unwrap()
        .find_map(|c| if let ControlMessageOwned::ScmRights(fds) = c { Some(fds[0]) } else { None })
        .unwrap()
}

/// One of the names of files that are mapped and renamed.
fn file(n: usize) -> CString {
    CString::new(format!("restless-{}", n % 8)).unwrap()
}

/// The addresses of the program as PR_SET_MM_MAP takes them; [`STACK`] is where the first stack begins, which decides
/// which mapping the kernel calls by that name.
fn memory_map() -> [u64; 13] {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<u64> = fields.split(' ').map(|n| n.parse().unwrap_or(0)).collect();
    // Fields of proc(5), of which the third is the first here.
    let at = |n: usize| fields[n - 3];
    // SAFETY: takes no memory.
    let brk = unsafe { libc::syscall(libc::SYS_brk, 0) } as u64;
    // No new auxiliary vector, and no new program: -1 for its descriptor.
    let last = [0, 0xffff_ffff << 32];
    let (code, data, args, env) = ([at(26), at(27)], [at(45), at(46)], [at(48), at(49)], [at(50), at(51)]);
    [&code[..], &data, &[at(47), brk, at(28)], &args, &env, &last].concat().try_into().unwrap()
}

const STACK: usize = 6;

fn set_memory_map(map: &[u64; 13]) {
    const PR_SET_MM_MAP: libc::c_ulong = 14;
    // SAFETY: the kernel reads a prctl_mm_map, which has this size.
    unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP, map.as_ptr(), size_of_val(map), 0usize) };
}

/// Touches deeper parts of the stack each time.
#[inline(never)]
fn grow_stack() {
    let room = [1u8; 64 * PAGE / 4];
    std::hint::black_box(&room);
}

/// Only one thread of a process waits for children at a time.
static CHILDREN: Mutex<()> = Mutex::new(());

/// What changes neither memory nor descriptors of this process for long.
fn others(kind: u64, at: usize) {
    // SAFETY: pointers are to memory of this function; a child does nothing but end or begin another program.
    unsafe {
        match kind {
            28 => {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = if at & 1 == 0 { libc::SIG_IGN } else { libc::SIG_DFL };
                libc::sigaction(libc::SIGUSR1 + (at % 2) as i32 * 2, &raw const action, ptr::null_mut());
            }
            29 => {
                libc::umask(0o22 + (at as u32 & 1));
            }
            30 => {
                let _turn = CHILDREN.lock();
                let child = libc::fork();
                if child == 0 {
                    libc::_exit(0);
                }
                libc::waitpid(child, ptr::null_mut(), 0);
            }
            31 => {
                let _turn = CHILDREN.lock();
                let child = libc::fork();
                if child == 0 {
                    let (program, none) = (c"/bin/true".as_ptr(), ptr::null());
                    libc::execv(program, [program, none].as_ptr());
                    libc::_exit(0);
                }
                libc::waitpid(child, ptr::null_mut(), 0);
            }
            32 => {
                let _ = thread::spawn(|| thread::sleep(Duration::from_micros(300))).join();
            }
            _ => {
                let _ = std::fs::read("/proc/self/stat");
            }
        }
    }
}
