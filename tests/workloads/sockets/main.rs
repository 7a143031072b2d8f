//! Connected unix sockets, with all that may wait in them.

mod named;
mod pair;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::SockType;
use standstill_tests::workload::{Args, Checker, Control, Meter, Pattern, SelfState, fork_child};

use named::Named;
use pair::{End, Pair};

const EVERY: Duration = Duration::from_millis(50);

fn main() {
    let args = Args::parse();
    let mut control = Control::new("sockets", &args);
    let checker = Arc::clone(&control.checker);
    let (mut pairs, mut named) = (pairs(), vec![Named::new(&args.dir(), "shared")]);
    let shared = Pair::new(SockType::Stream).with(End::B, vec![bytes(20, 3000)]).with(End::A, vec![bytes(21, 7)]);
    let (mut here, there) = UnixStream::pair().expect("socketpair");
    let child = control.for_child("echo");
    let pid = fork_child({
        let shared = shared.try_clone();
        move || {
            there.set_nonblocking(true).expect("set O_NONBLOCK");
            let checker = Arc::clone(&child.checker);
            child.serve(None, EVERY, |_| {
                shared.look(&checker);
                echo(&there, &checker);
            });
        }
    });
    control.adopt(pid, "echo");
    named.push(Named::new(&args.dir(), "own"));
    here.set_read_timeout(Some(Duration::from_secs(10))).expect("set a timeout");
    let meter = Meter::start(Duration::from_millis(1));
    let before = SelfState::of_process().without(&["parent"]);
    let mut number = 0_u32;
    control.ready();
    control.serve(Some(&meter), EVERY, |request| {
        SelfState::of_process().check(&checker, "process", &before);
        for pair in pairs.iter().chain([&shared]) {
            pair.look(&checker);
        }
        named.iter().for_each(|named| named.look(&checker));
        if request.thorough() {
            pairs.iter_mut().for_each(|pair| pair.exercise(&checker));
            named.iter_mut().for_each(|named| named.exercise(&checker));
            number += 1;
            let mut answer = [0; 4];
            checker.works("write to the child", here.write_all(&number.to_ne_bytes()));
            checker.works("read from the child", here.read_exact(&mut answer));
            checker.equal("the child's answer", &u32::from_ne_bytes(answer), &!number);
        }
    });
}

/// Answers what has been asked.
fn echo(mut there: &UnixStream, checker: &Checker) {
    let mut question = [0; 4];
    match there.read(&mut question) {
        Ok(4) => _ = checker.works("answer", there.write_all(&question.map(|byte| !byte))),
        Ok(length) => _ = checker.that(false, || format!("{length} bytes of a question")),
        Err(error) => _ = checker.equal("wait for a question", &error.kind(), &ErrorKind::WouldBlock),
    }
}

fn bytes(seed: u64, length: usize) -> Vec<u8> {
    Pattern::new(seed).bytes(length)
}

fn pairs() -> Vec<Pair> {
    use End::{A, B};
    let all = [SockType::Stream, SockType::Datagram, SockType::SeqPacket];
    let mut pairs = Vec::new();
    for (seed, kind) in (0..).step_by(10).zip(all) {
        let some = |n| vec![bytes(seed + n, 700), bytes(seed + n + 1, 1), bytes(seed + n + 2, 40_000)];
        pairs.extend([
            Pair::new(kind).with_options(),
            Pair::new(kind).with(A, some(1)).with(B, vec![bytes(seed + 4, 10)]),
            Pair::new(kind).with(B, some(5)).signals(),
            Pair::new(kind).with(A, some(2)).shut_down(B, nix::sys::socket::Shutdown::Write),
            Pair::new(kind).with(B, some(3)).shut_down(B, nix::sys::socket::Shutdown::Read),
            Pair::new(kind).shut_down(A, nix::sys::socket::Shutdown::Both),
            Pair::new(kind).with(A, some(4)).widow(),
            Pair::new(kind).widow(),
        ]);
    }
    pairs.extend([
        Pair::of_user(SockType::Stream, 1234, 4321).with(A, vec![bytes(46, 10)]),
        // The peer is closed with something unread.
        Pair::new(SockType::Stream).with(A, vec![bytes(40, 5000)]).with(B, vec![bytes(41, 1)]).widow(),
        Pair::new(SockType::SeqPacket).with(B, vec![bytes(42, 1)]).widow(),
        Pair::new(SockType::Stream).with(A, vec![bytes(43, 100_000)]).peeked(1000),
        Pair::new(SockType::Datagram).with(A, vec![bytes(44, 100), bytes(45, 200)]).peeked(100),
    ]);
    pairs
}
