//! Contexts of io_setup(2). Programs know one by the address of its ring, a mapping in which the kernel leaves the events of
//! completed requests and the program, or io_getevents(2), takes them out.
//!
//! The kernel keeps its own place in the ring. So a restore makes as many requests as it takes to bring both to where they
//! were: reads of `/dev/null`, which are complete at once. Then the ring's events are written over theirs.

use super::map;
use crate::{
    error::{Context, Error, Result},
    kernel::proc,
    observe::{AioContext, AioContexts},
    restore::{files::Numbers, program::Program},
};
use standstill_images::types::{AddressSpace, Backing, Vma};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

/// Bytes of `struct aio_ring` before its events, and of `struct io_event`.
const HEADER: u64 = 32;
const EVENT: u64 = 32;
const MAGIC: u32 = 0xa10a_10a1;
/// What a ring has the protection of when it is made.
const PROT: u8 = (libc::PROT_READ | libc::PROT_WRITE) as u8;
/// Requests that are made at once.
const BATCH: usize = 64;
/// How long requests may take to come to their end.
const PATIENCE: Duration = Duration::from_millis(200);

/// Whether a mapping of this name is a ring.
pub(super) fn is_ring(name: &[u8]) -> bool {
    name.starts_with(b"/[aio]")
}

/// Events that there is room for.
fn capacity(vma: &Vma) -> u64 {
    (vma.end - vma.start - HEADER) / EVENT
}

/// Whether what was recorded of a ring can be in it.
pub(crate) fn fits(vma: &Vma, head: u32, tail: u32, events: usize) -> bool {
    u64::from(head.max(tail)) < capacity(vma) && events as u64 <= capacity(vma)
}

/// Whether a machine with so many processors makes rings as small as those of an address space.
pub(crate) fn has_room(space: &AddressSpace, cpus: usize) -> bool {
    // The kernel gives each context four requests for each of them, and doubles that.
    rings(space).all(|ring| HEADER + EVENT * (8 * cpus as u64 + 2) <= ring.vma.end - ring.vma.start)
}

/// What io_setup(2) must be asked for to make a ring of this length.
fn requests(vma: &Vma) -> u64 {
    (capacity(vma) - 2) / 2
}

/// A recorded ring.
struct Ring<'a> {
    vma: &'a Vma,
    slot: u32,
    head: usize,
    tail: usize,
    events: &'a [[u64; 4]],
}

fn rings(space: &AddressSpace) -> impl Iterator<Item = Ring<'_>> {
    space.vmas.iter().filter_map(|vma| match &vma.backing {
        Backing::AioRing { slot, head, tail, events } => {
            Some(Ring { vma, slot: *slot, head: *head as usize, tail: *tail as usize, events })
        }
        _ => None,
    })
}

/// Loads what tells of requests in flight while the tree runs, if it may have contexts: that takes longer than all else.
pub(crate) fn read_ahead(pids: &[i32]) -> Option<AioContexts> {
    let used = proc::number::<u64>(std::path::Path::new("/proc/sys/fs/aio-nr")).is_ok_and(|n| n > 0);
    let has_ring = |pid: &i32| proc::maps(*pid).is_ok_and(|maps| maps.iter().any(|map| is_ring(map.name.as_bytes())));
    // What keeps it from being loaded is told when there is a ring under the freeze.
    (used && pids.iter().any(has_ring)).then(|| AioContexts::load().ok())?
}

/// Reads the rings in some address spaces, each by way of a process that has it. Requests in flight are waited for. `reader`:
/// loaded before the freeze.
pub(crate) fn collect(pids: &[i32], spaces: &mut [AddressSpace], reader: Option<&mut AioContexts>) -> Result<()> {
    if spaces.iter().all(|space| rings(space).next().is_none()) {
        return Ok(());
    }
    let contexts = settled(pids, spaces, reader)?;
    for (&pid, space) in pids.iter().zip(spaces).filter(|(_, space)| rings(space).next().is_some()) {
        let own = |vma: &Vma| contexts.iter().any(|c| c.pid == pid && c.id == vma.start);
        let memory = File::open(proc::path(pid, "mem")).context(|| format!("open the memory of {pid}"))?;
        for vma in &mut space.vmas {
            if !matches!(vma.backing, Backing::AioRing { .. }) {
                continue;
            }
            if !own(vma) {
                let why = "its context is that of another process: unmap it, or run another program, before the dump";
                return Err(refuse(pid, vma.start, why));
            }
            vma.backing =
                read(&memory, vma).context(|| format!("read the AIO ring of {pid} at {:x}", vma.start))?.ok_or_else(
                    || refuse(pid, vma.start, "it is mapped in part, or overwritten: end its use before the dump"),
                )?;
        }
    }
    Ok(())
}

/// The contexts, once nothing is in flight.
fn settled(pids: &[i32], spaces: &[AddressSpace], reader: Option<&mut AioContexts>) -> Result<Vec<AioContext>> {
    let first = || pids.iter().zip(spaces).find_map(|(pid, space)| Some((*pid, rings(space).next()?.vma.start)));
    let unseen = |e| {
        let (pid, at) = first().unwrap_or_default();
        let why =
            format!("whether requests are in flight cannot be seen ({e}): end the use of io_setup before the dump");
        refuse(pid, at, &why)
    };
    let mut own = None;
    let reader = match reader {
        Some(reader) => reader,
        None => own.insert(AioContexts::load().map_err(unseen)?),
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let contexts = reader.read(pids).map_err(unseen)?;
        let Some(busy) = contexts.iter().find(|c| c.in_flight != 0) else { return Ok(contexts) };
        if Instant::now() > deadline {
            let object = format!("the AIO context {:x} with {} requests in flight", busy.id, busy.in_flight);
            return Err(Error::unsupported(busy.pid, object, "wait for them, or cancel them, before the dump"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn refuse(pid: i32, at: u64, why: &str) -> Error {
    Error::unsupported(pid, format!("the AIO ring at {at:x}"), why)
}

/// `None`: it is not as the kernel makes it.
fn read(memory: &File, vma: &Vma) -> std::io::Result<Option<Backing>> {
    let mut header = [0; HEADER as usize];
    memory.read_exact_at(&mut header, vma.start)?;
    let word = |n: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| header[4 * n + i]));
    let (slot, capacity, head, tail) = (word(0), word(1), word(2), word(3));
    if word(4) != MAGIC
        || u64::from(word(7)) != HEADER
        || u64::from(capacity) != self::capacity(vma)
        || tail >= capacity
    {
        return Ok(None);
    }
    // The program may write the head, and the kernel takes it like this.
    let head = head % capacity;
    let mut bytes = vec![0; (EVENT * u64::from(capacity)) as usize];
    memory.read_exact_at(&mut bytes, vma.start + HEADER)?;
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    let event = |bytes: &[u8]| [0, 8, 16, 24].map(|at| word(&bytes[at..at + 8]));
    let mut events: Vec<[u64; 4]> = bytes.chunks_exact(EVENT as usize).map(event).collect();
    events.truncate(events.iter().rposition(|event| *event != [0; 4]).map_or(0, |last| last + 1));
    Ok(Some(Backing::AioRing { slot, head, tail, events }))
}

/// Makes the contexts of process `pid`, which forks no more: a child has no use for the ring of its parent.
pub(crate) fn restore(pid: i32, space: &AddressSpace, numbers: &mut Numbers, program: &mut Program) {
    let mut rings: Vec<Ring<'_>> = rings(space).collect();
    // The kernel gives a new context the first free place.
    rings.sort_by_key(|ring| ring.slot);
    for ring in rings {
        let vma = ring.vma;
        let (at, len) = (vma.start, vma.end - vma.start);
        let id = program.data(&[0; 8]);
        program.call("set up an AIO context", libc::SYS_io_setup, &[requests(vma).into(), id]);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let place = [len.into(), len.into(), flags.into(), at.into()];
        program.call_with(format!("move the AIO ring to {at:x}"), libc::SYS_mremap, id, &place, Some(at));
        let capacity = capacity(vma) as usize;
        let left = (ring.tail + capacity - ring.head) % capacity;
        if ring.head + left > 0 {
            turn(vma, ring.head, left, numbers, program);
        }
        // Over those of the requests just made, too.
        let mut events = ring.events.to_vec();
        events.resize(events.len().max(capacity.min(ring.head + left)), [0; 4]);
        if !events.is_empty() {
            write(pid, vma, &events, program);
        }
        if vma.prot != PROT {
            map::protect(vma, vma.prot, program);
        }
        map::advise(vma, program);
    }
}

/// Makes requests that are complete at once: so many that are reaped, and then some that are not.
fn turn(vma: &Vma, reaped: usize, left: usize, numbers: &mut Numbers, program: &mut Program) {
    let fd = numbers.lowest();
    let path = program.string(b"/dev/null");
    let args = [libc::AT_FDCWD.into(), path, libc::O_RDONLY.into()];
    program.call_expecting("open /dev/null", libc::SYS_openat, &args, fd);
    // struct iocb: IOCB_CMD_PREAD is 0, and the descriptor is the upper half of the third word.
    let iocb = [0, 0, (fd as u64) << 32, vma.start, 1, 0, 0, 0];
    let count = BATCH.min(reaped.max(left));
    let iocbs = program.words(&iocb.repeat(count));
    let pointers = program.words(&vec![0; count]);
    for n in 0..count as u64 {
        program.point(pointers, 8 * n, iocbs.byte(64 * n));
    }
    let events = program.data(&vec![0; EVENT as usize * count]);
    let mut submit = |total: usize, reap: bool| {
        for n in (0..total).step_by(BATCH).map(|done| BATCH.min(total - done)) {
            let args = [vma.start.into(), n.into(), pointers];
            program.call_expecting("make AIO requests", libc::SYS_io_submit, &args, n);
            if reap {
                let args = [vma.start.into(), n.into(), n.into(), events, 0.into()];
                program.call_expecting("reap AIO events", libc::SYS_io_getevents, &args, n);
            }
        }
    };
    submit(reaped, true);
    submit(left, false);
    program.call("close /dev/null", libc::SYS_close, &[fd.into()]);
    numbers.release(fd);
}

/// Writes events to the beginning of the ring.
fn write(pid: i32, vma: &Vma, events: &[[u64; 4]], program: &mut Program) {
    let len = EVENT * events.len() as u64;
    let words = program.words(&events.concat());
    let local = program.words(&[0, len]);
    program.point(local, 0, words);
    let remote = program.words(&[vma.start + HEADER, len]);
    let args = [pid.into(), local, 1.into(), remote, 1.into(), 0.into()];
    program.call_expecting("write AIO events", libc::SYS_process_vm_writev, &args, len);
}

#[cfg(all(test, feature = "ebpf"))]
mod tests {
    use super::*;
    use standstill_images::types::VmaFlags;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    #[test]
    fn rings_are_as_large_as_they_were() {
        for pages in [1, 2, 9] {
            let backing = Backing::AioRing { slot: 0, head: 0, tail: 0, events: Vec::new() };
            let vma = Vma { start: 0, end: 4096 * pages, prot: 3, backing, flags: VmaFlags::default() };
            // As in fs/aio.c, on a machine with one processor.
            let made = HEADER + EVENT * (2 * requests(&vma).max(4) + 2);
            assert_eq!(made.next_multiple_of(4096), vma.end);
            assert!(fits(&vma, 0, capacity(&vma) as u32 - 1, 0) && !fits(&vma, capacity(&vma) as u32, 0, 0));
        }
    }

    /// A request that waits for an eventfd.
    #[test]
    fn requests_in_flight_are_counted() {
        const POLL: u64 = 5;
        let Ok(mut reader) = AioContexts::load() else { return };
        let pid = std::process::id() as i32;
        let mut id = 0u64;
        // SAFETY: the calls read and write the words given to them, and the descriptor is owned by nobody else.
        let event = unsafe {
            assert_eq!(libc::syscall(libc::SYS_io_setup, 8, &raw mut id), 0);
            OwnedFd::from_raw_fd(libc::eventfd(0, 0))
        };
        let mut in_flight = || reader.read(&[pid]).unwrap().into_iter().find(|c| c.id == id).map(|c| c.in_flight);
        assert_eq!(in_flight(), Some(0));
        for n in 1..=3 {
            let request = [n, 0, (event.as_raw_fd() as u64) << 32 | POLL, libc::POLLIN as u64, 0, 0, 0, 0];
            let requests = [&raw const request];
            // SAFETY: as above.
            assert_eq!(unsafe { libc::syscall(libc::SYS_io_submit, id, 1, requests.as_ptr()) }, 1);
            assert_eq!(in_flight(), Some(n as u32));
        }
        nix::unistd::write(&event, &1u64.to_ne_bytes()).unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        while in_flight() != Some(0) {
            assert!(Instant::now() < end, "{:?} are in flight", in_flight());
        }
        // SAFETY: as above.
        assert_eq!(unsafe { libc::syscall(libc::SYS_io_destroy, id) }, 0);
        assert_eq!(in_flight(), None);
    }
}
