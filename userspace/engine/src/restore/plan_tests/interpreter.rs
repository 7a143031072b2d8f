//! Runs the programs of a plan on the model, in any order that the stages allow.

use super::{
    BLOB,
    model::{File, OUTSIDE, Origin, PAGE, Page, What, World},
};
use crate::{
    image::Image,
    kernel::sys::CLONE_CLEAR_SIGHAND,
    restore::{
        environment::Environment,
        plan::{Plan, Stage},
        program::{Arg, Layout, Program},
    },
};
use standstill_parasite_abi::{EXPECT, Kind, LOAD, MAY_FAIL};
use std::collections::{BTreeMap, BTreeSet};

/// Calls about what the model does not have.
const OTHERS: [i64; 18] = [
    libc::SYS_capset,
    libc::SYS_ioprio_set,
    libc::SYS_personality,
    libc::SYS_prlimit64,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_set_tid_address,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgroups,
    libc::SYS_setitimer,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_sigaltstack,
    libc::SYS_timer_settime,
    libc::SYS_umask,
];

/// A running program.
struct Running {
    pid: i32,
    program: usize,
    at: usize,
}

pub(super) struct Interpreter<'a> {
    plan: &'a Plan,
    pub world: World,
    running: BTreeMap<i32, Running>,
    /// Those that nobody traces: they run at once.
    untraced: BTreeSet<i32>,
    /// Ids that the kernel has written to the data of programs, by program and place.
    written: BTreeMap<(usize, u64), i32>,
    /// How often each word was posted.
    words: BTreeMap<usize, u64>,
    fd_limit: i32,
    seed: u64,
}

impl<'a> Interpreter<'a> {
    /// The root as the restoring process forks it: with a copy of that one's memory, and descriptors of the page stores
    /// and all shared memory.
    pub(super) fn new(
        plan: &'a Plan,
        image: &Image,
        memory: BTreeMap<u64, Page>,
        env: &Environment,
        seed: u64,
    ) -> Self {
        let root = image.inventory.root;
        let mut world = World::new();
        world.fork(OUTSIDE, root, 0).expect("the number is free");
        let pages = &mut world.space_mut(root).pages;
        *pages = memory;
        let size = Layout::size_for(BLOB, &plan.programs);
        for at in (plan.base..plan.base + size).step_by(PAGE as usize) {
            pages.insert(at, Page::new(Origin::Foreign { stays: true }, 7));
        }
        let whole = |fd| (fd, What::Pages(0, 0..image.pages()));
        let mut handed: Vec<_> = plan.pages.gathered.map(whole).into_iter().collect();
        for (n, fds) in &plan.pages.stores {
            let pages = image.stores[*n].range();
            handed.extend([fds.cached, fds.direct].map(|fd| (fd, What::Pages(pages.start, pages.clone()))));
        }
        handed.extend(plan.shared_fds.iter().map(|(object, fd)| (*fd, What::Memory(*object))));
        for (fd, what) in handed {
            world.files.push(File { what, flags: libc::O_RDWR, pos: 0 });
            let file = world.files.len() - 1;
            world.table(root).insert(fd, (file, false));
        }
        let running = [(root, Running { pid: root, program: 0, at: 0 })].into();
        Self {
            plan,
            world,
            running,
            untraced: BTreeSet::new(),
            written: BTreeMap::new(),
            words: BTreeMap::new(),
            fd_limit: env.fd_limit,
            seed,
        }
    }

    /// Runs everything to the end.
    pub(super) fn run(&mut self) -> Result<(), String> {
        for stage in [Stage::Forked, Stage::Groups, Stage::Joined, Stage::Done] {
            let (dying, living): (Vec<_>, Vec<_>) =
                self.plan.tasks.iter().partition(|t| t.ends && stage == Stage::Done);
            let ends = dying.iter().map(|t| t.pid).collect();
            self.reach(stage, ends)?;
            let tids = living.iter().flat_map(|t| {
                let n = if stage == Stage::Done { t.threads.len() } else { 1 };
                t.threads[..n].iter().map(|t| t.tid)
            });
            self.reach(stage, tids.collect())?;
        }
        Ok(())
    }

    /// Lets tasks run until each has come to a stage, or to its end. Those that are not born yet come later.
    fn reach(&mut self, stage: Stage, mut tids: BTreeSet<i32>) -> Result<(), String> {
        while !tids.is_empty() {
            let ready: Vec<i32> = tids.union(&self.untraced).copied().filter(|t| self.may_run(*t)).collect();
            if ready.is_empty() {
                return Err(format!("tasks {tids:?} do not exist or wait for ever in stage {stage:?}"));
            }
            self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let tid = ready[(self.seed >> 33) as usize % ready.len()];
            if let Some(reached) = self.step(tid)? {
                if self.untraced.remove(&tid) {
                    continue;
                }
                if reached != stage as u64 && reached != ENDED {
                    return Err(format!("task {tid} stops for stage {reached} instead of {stage:?}"));
                }
                tids.remove(&tid);
            }
        }
        Ok(())
    }

    /// Whether a task exists and waits for nobody.
    fn may_run(&self, tid: i32) -> bool {
        self.running.get(&tid).is_some_and(|task| match self.plan.programs[task.program].step(task.at) {
            Some((Kind::Await, _, _, args, _)) => self.posted(args[0]) >= value(args[1]),
            Some((Kind::Syscall, LOAD, nr, args, _)) if nr == libc::SYS_wait4 as u64 => {
                !self.untraced.contains(&self.loaded(task.program, args[0]))
            }
            _ => true,
        })
    }

    /// An id that the kernel has written.
    fn loaded(&self, program: usize, at: Arg) -> i32 {
        let Arg::Data(at) = at else { return 0 };
        self.written.get(&(program, at)).copied().unwrap_or(0)
    }

    fn posted(&self, word: Arg) -> u64 {
        let Arg::Word(word) = word else { return 0 };
        self.words.get(&word).copied().unwrap_or(0)
    }

    /// One step of a task; the stage it stops for.
    fn step(&mut self, tid: i32) -> Result<Option<u64>, String> {
        let task = self.running.get_mut(&tid).expect("only the living run");
        let (pid, index, program) = (task.pid, task.program, &self.plan.programs[task.program]);
        let label = program.label(task.at as u64);
        let (kind, flags, nr, mut args, expected) =
            program.step(task.at).ok_or_else(|| format!("task {tid} runs off the end of its program"))?;
        task.at += 1;
        if flags & LOAD != 0 {
            args[0] = Arg::Value(self.loaded(index, args[0]) as u64);
        }
        let value = |n: usize| value(args[n]);
        let outcome = match kind {
            Kind::Trap => return Ok(Some(value(0))),
            Kind::Exit => {
                self.die(pid, (value(0) as i32) << 8);
                return Ok(Some(ENDED));
            }
            Kind::Syscall if nr == libc::SYS_kill as u64 => {
                self.die(pid, value(1) as i32);
                return Ok(Some(ENDED));
            }
            Kind::Await => Ok(0),
            Kind::Post => {
                let Arg::Word(word) = args[0] else { return Err(format!("{label}: no word")) };
                *self.words.entry(word).or_default() += 1;
                Ok(0)
            }
            Kind::Clone => self.clone_task(pid, index, args),
            Kind::ReadFull => match self.world.file(pid, value(0) as i32).map(|f| f.what.clone()) {
                Ok(What::Pages(origin, pages)) => {
                    let first = origin + value(3) / PAGE;
                    match pages.start <= first && first + value(2) / PAGE <= pages.end {
                        true => self.world.fill(pid, value(1), value(2), first),
                        false => Err(libc::ENODATA),
                    }
                }
                _ => Err(libc::EBADF),
            },
            Kind::WriteFull => {
                let Arg::Data(at) = args[1] else { return Err(format!("{label}: no data")) };
                self.write(pid, value(0) as i32, &program.bytes()[at as usize..][..value(2) as usize])
            }
            Kind::Syscall => self.syscall(pid, nr as i64, program, args, value)?,
        };
        if self.world.fds(pid).last_key_value().is_some_and(|(fd, _)| *fd >= self.fd_limit) {
            return Err(format!("task {tid}: {label}: a descriptor beyond the limit"));
        }
        match outcome {
            Err(errno) if flags & MAY_FAIL == 0 => {
                Err(format!("task {tid}: {label}: {}", std::io::Error::from_raw_os_error(errno)))
            }
            Ok(result) if flags & EXPECT != 0 && result as u64 != expected => {
                Err(format!("task {tid}: {label}: {result} instead of {expected}"))
            }
            _ => Ok(None),
        }
    }

    fn die(&mut self, pid: i32, status: i32) {
        self.world.exit(pid, status);
        self.running.retain(|_, r| r.pid != pid);
    }

    fn clone_task(&mut self, pid: i32, index: usize, args: [Arg; 6]) -> Result<i64, i32> {
        let program = &self.plan.programs[index];
        let (Arg::Data(block), Arg::Program(child)) = (args[0], args[2]) else { return Err(libc::EINVAL) };
        let flags = word(program, block);
        if flags & libc::CLONE_UNTRACED as u64 != 0 {
            let tid = (300..).find(|tid| self.world.fork(pid, *tid, flags as i32).is_ok()).ok_or(libc::EAGAIN)?;
            self.written.insert((index, program.target(block + 24).ok_or(libc::EINVAL)?), tid);
            self.running.insert(tid, Running { pid: tid, program: child, at: 0 });
            self.untraced.insert(tid);
            return Ok(tid.into());
        }
        // The id lies where the clone arguments point to.
        let set_tid = program.target(block + 64).ok_or(libc::EINVAL)?;
        let tid = word(program, set_tid) as i32;
        let thread = flags & libc::CLONE_THREAD as u64 != 0;
        let owner = if thread {
            self.world.thread(pid, tid)?;
            pid
        } else {
            if flags & libc::CLONE_SIGHAND as u64 != 0 && flags & CLONE_CLEAR_SIGHAND != 0 {
                return Err(libc::EINVAL);
            }
            self.world.fork(pid, tid, flags as i32)?;
            if flags & libc::CLONE_PARENT as u64 != 0 {
                if word(program, block + 32) != 0 {
                    return Err(libc::EINVAL); // exit_signal
                }
                self.world.process(tid).ppid = self.world.process(pid).ppid;
            }
            tid
        };
        self.running.insert(tid, Running { pid: owner, program: child, at: 0 });
        Ok(tid.into())
    }

    fn write(&mut self, pid: i32, fd: i32, bytes: &[u8]) -> Result<i64, i32> {
        let file = self.world.file(pid, fd)?;
        if file.flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(libc::EBADF);
        }
        match &mut file.what {
            What::EventFd(count) => *count += u64::from_le_bytes(bytes.try_into().map_err(|_| libc::EINVAL)?),
            &mut What::Pipe(pipe) => self.world.pipes[pipe].extend_from_slice(bytes),
            _ => return Err(libc::EINVAL),
        }
        Ok(bytes.len() as i64)
    }

    fn syscall(
        &mut self,
        pid: i32,
        nr: i64,
        program: &Program,
        args: [Arg; 6],
        value: impl Fn(usize) -> u64,
    ) -> Result<Result<i64, i32>, String> {
        let world = &mut self.world;
        let int = |n: usize| value(n) as i32;
        Ok(match nr {
            libc::SYS_unshare => world.unshare(pid, int(0)),
            libc::SYS_chdir => {
                let Arg::Data(path) = args[0] else { return Err("chdir without a path".into()) };
                let fs = world.process(pid).fs;
                world.directories[fs] = string(program, path);
                Ok(0)
            }
            libc::SYS_setsid => world.setsid(pid),
            libc::SYS_setpgid => world.setpgid(pid, int(1)),
            libc::SYS_wait4 => world.wait(pid, int(0)),
            libc::SYS_openat => {
                let Arg::Data(path) = args[1] else { return Err("openat without a path".into()) };
                open(world, pid, &string(program, path), int(2))
            }
            libc::SYS_eventfd2 => Ok(world.open(pid, What::EventFd(value(0)), int(1) | libc::O_RDWR).into()),
            libc::SYS_pidfd_open if world.processes.contains_key(&int(0)) => {
                Ok(world.open(pid, What::PidFd(int(0)), libc::O_RDWR | libc::O_CLOEXEC | int(1)).into())
            }
            libc::SYS_epoll_create1 => Ok(world.open(pid, What::Epoll(BTreeSet::new()), libc::O_RDWR).into()),
            libc::SYS_pipe2 => {
                world.pipe(pid);
                Ok(0)
            }
            libc::SYS_dup => world.dup(pid, int(0)),
            libc::SYS_dup3 => world.dup3(pid, int(0), int(1), int(2) & libc::O_CLOEXEC != 0),
            libc::SYS_close => world.close(pid, int(0)),
            libc::SYS_close_range => {
                let gone: Vec<i32> = world.fds(pid).range(int(0)..=int(1)).map(|f| *f.0).collect();
                gone.into_iter().try_for_each(|fd| world.close(pid, fd).map(drop)).map(|()| 0)
            }
            libc::SYS_fcntl => fcntl(world, pid, int(0), int(1), int(2)),
            libc::SYS_lseek => world.file(pid, int(0)).map(|f| {
                f.pos = value(1) as i64;
                f.pos
            }),
            libc::SYS_epoll_ctl => world.epoll_add(pid, int(0), int(2)),
            libc::SYS_mmap => world.mmap(pid, std::array::from_fn(&value)),
            libc::SYS_munmap => world.munmap(pid, value(0), value(1)),
            libc::SYS_mprotect => world.mprotect(pid, value(0), value(1), value(2) as u8),
            libc::SYS_mremap => world.mremap(pid, value(0), value(1), value(4)),
            libc::SYS_madvise => madvise(world, pid, value(0), value(1), int(2)),
            libc::SYS_mlock2 => world.change(pid, value(0), value(1), |_, p| p.flags.locked = true),
            libc::SYS_prctl if int(0) == 35 => {
                let Arg::Data(block) = args[2] else { return Err("PR_SET_MM without data".into()) };
                let fd = (word(program, block + 96) >> 32) as i32;
                match world.file(pid, fd).map(|f| f.what.clone()) {
                    Ok(What::Path(path)) => {
                        world.space_mut(pid).exe = path;
                        Ok(0)
                    }
                    _ => Err(libc::EBADF),
                }
            }
            libc::SYS_prctl => Ok(0),
            nr if OTHERS.contains(&nr) => Ok(0),
            nr => return Err(format!("system call {nr} is not in the model")),
        })
    }
}

fn value(arg: Arg) -> u64 {
    if let Arg::Value(v) = arg { v } else { 0 }
}

const ENDED: u64 = u64::MAX;

fn word(program: &Program, at: u64) -> u64 {
    let mut bytes = [0; 8];
    let data = &program.bytes()[at as usize..];
    let len = data.len().min(8);
    bytes[..len].copy_from_slice(&data[..len]);
    u64::from_le_bytes(bytes)
}

fn string(program: &Program, at: u64) -> String {
    let bytes = program.bytes()[at as usize..].split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

fn open(world: &mut World, pid: i32, path: &str, flags: i32) -> Result<i64, i32> {
    match path.strip_prefix("/proc/self/fd/").map(str::parse) {
        Some(Ok(fd)) => world.reopen(pid, fd, flags),
        _ => Ok(world.open(pid, What::Path(path.into()), flags).into()),
    }
}

fn fcntl(world: &mut World, pid: i32, fd: i32, command: i32, value: i32) -> Result<i64, i32> {
    let file = world.file(pid, fd)?;
    match command {
        libc::F_SETFL => {
            file.flags = file.flags & libc::O_ACCMODE | value & super::model::KEPT & !libc::O_ACCMODE;
        }
        libc::F_SETFD => world.table(pid).get_mut(&fd).expect("it is open").1 = value != 0,
        libc::F_SETPIPE_SZ => {}
        _ => return Err(libc::EINVAL),
    }
    Ok(0)
}

fn madvise(world: &mut World, pid: i32, start: u64, len: u64, advice: i32) -> Result<i64, i32> {
    const MADV_GUARD_INSTALL: i32 = 102;
    world.change(pid, start, len, |_, page| match advice {
        libc::MADV_DONTNEED => page.content = None,
        MADV_GUARD_INSTALL => (page.guard, page.content) = (true, None),
        libc::MADV_DONTFORK => page.flags.dontfork = true,
        libc::MADV_WIPEONFORK => page.flags.wipeonfork = true,
        libc::MADV_DONTDUMP => page.flags.dontdump = true,
        libc::MADV_MERGEABLE => page.flags.mergeable = true,
        libc::MADV_HUGEPAGE => page.flags.hugepage = true,
        _ => {}
    })
}
