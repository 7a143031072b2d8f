//! Eventfds, timerfds and the epoll instances that watch them.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{pipe, read};
use standstill_tests::workload::Checker;

use super::Group;

const PERIOD: Duration = Duration::from_millis(50);
const HOUR: u64 = 3600;

pub(crate) struct Events {
    counter: EventFd,
    semaphore: EventFd,
    periodic: TimerFd,
    far: TimerFd,
    watch: Epoll,
    watched: EventFd,
    edge: (File, File),
}

impl Events {
    pub(crate) fn new() -> Self {
        let counter = EventFd::from_value_and_flags(5, EfdFlags::EFD_NONBLOCK).expect("eventfd");
        let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let semaphore = EventFd::from_value_and_flags(3, flags).expect("eventfd");
        let timer = |expiration, flags| {
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).expect("timerfd");
            timer.set(expiration, TimerSetTimeFlags::empty()).expect("set a timerfd");
            timer
        };
        let periodic = timer(Expiration::Interval(TimeSpec::from_duration(PERIOD)), TimerFlags::TFD_NONBLOCK);
        let hour = TimeSpec::from_duration(Duration::from_secs(HOUR));
        let far = timer(Expiration::OneShot(hour), TimerFlags::TFD_CLOEXEC);
        let watched = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
        let (edge_out, edge_in) = pipe().expect("pipe");
        let watch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
        let add = |fd: &dyn std::os::fd::AsFd, flags, data| {
            watch.add(fd.as_fd(), EpollEvent::new(flags, data)).expect("add to epoll");
        };
        add(&watched, EpollFlags::EPOLLIN, u64::MAX - 1);
        add(&edge_out, EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 2);
        add(&far, EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 3);
        Self { counter, semaphore, periodic, far, watch, watched, edge: (edge_out.into(), edge_in.into()) }
    }

    /// Events that are waiting now, as data.
    fn waiting(&self) -> Result<Vec<u64>, Errno> {
        let mut events = [EpollEvent::empty(); 8];
        let count = self.watch.wait(&mut events, EpollTimeout::ZERO)?;
        Ok(events[..count].iter().map(EpollEvent::data).collect())
    }
}

impl Group for Events {
    fn look(&self, checker: &Checker) {
        let periodic = self.periodic.get();
        let interval = matches!(periodic, Ok(Some(Expiration::IntervalDelayed(_, every)))
            if Duration::from(every) == PERIOD);
        checker.that(interval, || format!("periodic timerfd is {periodic:?}"));
        let far = self.far.get();
        let in_time = matches!(far, Ok(Some(Expiration::OneShot(rest)))
            if (HOUR - 900..=HOUR).contains(&Duration::from(rest).as_secs()));
        checker.that(in_time, || format!("timerfd in an hour is {far:?}"));
    }

    fn exercise(&mut self, checker: &Checker) {
        checker.equal("value of an eventfd", &self.counter.read(), &Ok(5));
        checker.equal("empty eventfd", &self.counter.read(), &Err(Errno::EAGAIN));
        checker.works("write an eventfd", self.counter.write(5));
        for _ in 0..3 {
            checker.equal("eventfd as a semaphore", &self.semaphore.read(), &Ok(1));
        }
        checker.equal("empty semaphore", &self.semaphore.read(), &Err(Errno::EAGAIN));
        checker.works("write a semaphore", self.semaphore.write(3));

        std::thread::sleep(PERIOD * 2);
        let mut count = [0; 8];
        checker.equal("read of a periodic timerfd", &read(&self.periodic, &mut count), &Ok(8));
        checker.that(u64::from_ne_bytes(count) >= 1, || "a periodic timerfd does not run".to_owned());

        checker.equal("events at rest", &self.waiting(), &Ok(vec![]));
        checker.works("write a watched eventfd", self.watched.write(1));
        checker.equal("event of an eventfd", &self.waiting(), &Ok(vec![u64::MAX - 1]));
        checker.equal("value of a watched eventfd", &self.watched.read(), &Ok(1));
        checker.works("write a watched pipe", self.edge.1.write_all(b"x"));
        checker.equal("edge of a pipe", &self.waiting(), &Ok(vec![2]));
        checker.equal("no second edge", &self.waiting(), &Ok(vec![]));
        let mut byte = [0; 1];
        checker.equal("read of a watched pipe", &read(&self.edge.0, &mut byte), &Ok(1));
    }
}
