//! Pipes with content, of several sizes and modes.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use standstill_tests::workload::{Checker, Pattern};

use super::{Group, name_of, status_flags};

/// A pipe, what lies in it (one packet after the other), and its capacity.
struct Pipe {
    output: File,
    input: Option<File>,
    packets: Vec<Vec<u8>>,
    capacity: i32,
    flags: i32,
    direct: bool,
}

impl Pipe {
    fn new(flags: OFlag, capacity: i32, packets: Vec<Vec<u8>>) -> Self {
        let (output, input) = pipe2(flags).expect("pipe");
        let (output, input) = (File::from(output), File::from(input));
        let capacity = fcntl(&input, FcntlArg::F_SETPIPE_SZ(capacity)).expect("capacity of a pipe");
        for packet in &packets {
            (&input).write_all(packet).expect("fill a pipe");
        }
        let direct = flags.contains(OFlag::O_DIRECT);
        Self { flags: status_flags(&output), output, input: Some(input), packets, capacity, direct }
    }

    fn waiting(&self) -> usize {
        let mut bytes = 0_i32;
        // SAFETY: FIONREAD writes an int.
        let result = unsafe { libc::ioctl(self.output.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        if result == 0 { bytes as usize } else { usize::MAX }
    }

    fn look(&self, checker: &Checker) {
        let length: usize = self.packets.iter().map(Vec::len).sum();
        checker.equal("bytes in a pipe", &self.waiting(), &length);
        let capacity = fcntl(&self.output, FcntlArg::F_GETPIPE_SZ);
        checker.equal("capacity of a pipe", &capacity, &Ok(self.capacity));
        checker.equal("flags of a pipe", &status_flags(&self.output), &self.flags);
        if let Some(input) = &self.input {
            checker.equal("name of a pipe's other end", &name_of(input), &name_of(&self.output));
        }
    }

    /// Takes everything out and puts it back.
    fn exercise(&mut self, checker: &Checker) {
        if self.direct {
            for packet in &self.packets {
                let mut buffer = vec![0; 4096];
                let length = checker.works("read a packet", self.output.read(&mut buffer)).unwrap_or(0);
                checker.equal("a packet", &&buffer[..length], &packet.as_slice());
            }
        } else {
            let want = self.packets.concat();
            let mut content = vec![0; want.len()];
            checker.works("read a pipe", self.output.read_exact(&mut content));
            checker.that(content == want, || format!("{} bytes in a pipe are wrong", want.len()));
        }
        match &mut self.input {
            Some(input) => {
                for packet in &self.packets {
                    checker.works("write a pipe", input.write_all(packet));
                }
            }
            // Without a writer a pipe can be emptied once; then it is at its end for ever.
            None => {
                self.packets.clear();
                let end = checker.works("read at the end of a pipe", self.output.read(&mut [0]));
                checker.equal("bytes at the end of a pipe", &end, &Some(0));
            }
        }
    }
}

pub(crate) struct Pipes {
    pipes: Vec<Pipe>,
    /// Input of a pipe that nobody can read.
    broken: File,
}

impl Pipes {
    /// Some pipes; with `packets` one of them keeps the boundaries between what is written.
    pub(crate) fn new(packets: bool) -> Self {
        let bytes = |seed, length| Pattern::new(seed).bytes(length);
        let none = OFlag::empty();
        let mut ended = Pipe::new(none, 65536, vec![bytes(5, 10)]);
        ended.input = None;
        let mut pipes = vec![
            Pipe::new(none, 65536, vec![]),
            Pipe::new(OFlag::O_CLOEXEC, 65536, vec![bytes(1, 5000)]),
            Pipe::new(OFlag::O_NONBLOCK, 4096, vec![bytes(2, 4096)]),
            Pipe::new(none, 1 << 20, vec![bytes(3, 1 << 20)]),
            ended,
        ];
        if packets {
            pipes.push(Pipe::new(OFlag::O_DIRECT, 65536, vec![bytes(4, 10), bytes(5, 4096), bytes(6, 1)]));
        }
        let (_, broken) = pipe2(OFlag::O_NONBLOCK).expect("pipe");
        Self { pipes, broken: File::from(broken) }
    }
}

impl Group for Pipes {
    fn look(&self, checker: &Checker) {
        for pipe in &self.pipes {
            pipe.look(checker);
        }
    }

    fn exercise(&mut self, checker: &Checker) {
        for pipe in &mut self.pipes {
            pipe.exercise(checker);
        }
        let result = self.broken.write(b"x").map_err(|error| error.kind());
        checker.equal("write to a pipe that nobody reads", &result, &Err(ErrorKind::BrokenPipe));
    }
}
