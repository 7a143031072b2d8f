//! Other kernels' vdsos, made from this machine's, and called.

use super::*;
use crate::{
    kernel::{PAGE, sys::Mapping},
    restore::environment::{kernel_mappings, vdso},
};
use libc::{c_int, c_long, clockid_t, timespec, timeval};
use proptest::prelude::*;

type ClockCall = unsafe extern "C" fn(clockid_t, *mut timespec) -> c_int;
type GetTimeOfDay = unsafe extern "C" fn(*mut timeval, *mut u64) -> c_int;
type Time = unsafe extern "C" fn(*mut i64) -> i64;
type GetCpu = unsafe extern "C" fn(*mut u32, *mut u32, *mut u8) -> c_long;
type GetRandom = unsafe extern "C" fn(*mut u8, usize, u32, *mut u8, usize) -> isize;

const CLOCKS: [clockid_t; 4] =
    [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_MONOTONIC_COARSE, libc::CLOCK_BOOTTIME];

fn own() -> (Vec<u8>, u64) {
    // SAFETY: getauxval only looks at memory that the kernel left at the start of the program.
    let at = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    (vdso(std::process::id() as i32).unwrap(), at)
}

/// The vdso of a kernel that has this one's functions and one page more.
fn longer(own: &[u8]) -> Vec<u8> {
    let mut old = own.to_vec();
    old.resize(own.len() + PAGE as usize, 0);
    old
}

fn renamed(vdso: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = vdso.to_vec();
    while let Some(at) = bytes.windows(from.len()).position(|w| w == from.as_bytes()) {
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    bytes
}

/// A proxy in this process, with nothing left of the old code.
struct Mapped {
    memory: Mapping,
    functions: Vec<Function>,
}

impl Mapped {
    fn new(proxy: &Proxy) -> Self {
        let functions = exports(&proxy.bytes, "the proxy").unwrap();
        let mut bytes = proxy.bytes.clone();
        for f in &functions {
            bytes[f.offset + proxy.patches[&f.offset].len()..f.offset + f.size].fill(0xcc);
        }
        let memory = Mapping::anonymous(bytes.len() as u64).unwrap();
        memory.bytes_mut().copy_from_slice(&bytes);
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: the range is the mapping just made, and its slice is gone.
        assert_eq!(unsafe { libc::mprotect(memory.start() as *mut _, bytes.len(), prot) }, 0);
        Self { memory, functions }
    }

    fn address(&self, name: &str) -> *const () {
        let f = self.functions.iter().find(|f| f.name == name).unwrap();
        (self.memory.start() + f.offset as u64) as *const ()
    }

    fn clock_call(&self, name: &str) -> ClockCall {
        // SAFETY: the code there is a vdso function of this type.
        unsafe { std::mem::transmute::<*const (), ClockCall>(self.address(name)) }
    }
}

fn nanoseconds(t: timespec) -> i128 {
    i128::from(t.tv_sec) * 1_000_000_000 + i128::from(t.tv_nsec)
}

fn ask(call: ClockCall, clock: clockid_t) -> i128 {
    let mut t = timespec { tv_sec: -1, tv_nsec: -1 };
    // SAFETY: `t` is writable, and `call` is clock_gettime or clock_getres.
    assert_eq!(unsafe { call(clock, &raw mut t) }, 0);
    nanoseconds(t)
}

/// Compares every function with the C library's.
fn check(mapped: &Mapped) {
    for prefix in ["__vdso_", ""] {
        let name = |plain: &str| format!("{prefix}{plain}");
        for clock in CLOCKS {
            let before = ask(libc::clock_gettime, clock);
            let here = ask(mapped.clock_call(&name("clock_gettime")), clock);
            assert!((before..=ask(libc::clock_gettime, clock)).contains(&here), "clock {clock}");
            assert_eq!(ask(mapped.clock_call(&name("clock_getres")), clock), ask(libc::clock_getres, clock));
        }
        let before = ask(libc::clock_gettime, libc::CLOCK_REALTIME) / 1000;
        let mut tv = timeval { tv_sec: -1, tv_usec: -1 };
        let mut coarse = -1;
        let (mut cpu, mut node) = (u32::MAX, u32::MAX);
        let mut random = [0u8; 64];
        // SAFETY: the code there has these types, and all pointers are to variables of this function.
        unsafe {
            let call = std::mem::transmute::<*const (), GetTimeOfDay>(mapped.address(&name("gettimeofday")));
            assert_eq!(call(&raw mut tv, std::ptr::null_mut()), 0);
            let call = std::mem::transmute::<*const (), Time>(mapped.address(&name("time")));
            assert_eq!(call(&raw mut coarse), coarse);
            let call = std::mem::transmute::<*const (), GetCpu>(mapped.address(&name("getcpu")));
            assert_eq!(call(&raw mut cpu, &raw mut node, std::ptr::null_mut()), 0);
            let call = std::mem::transmute::<*const (), GetRandom>(mapped.address(&name("getrandom")));
            assert_eq!(call(random.as_mut_ptr(), random.len(), 0, std::ptr::null_mut(), 0), 64);
        }
        let after = ask(libc::clock_gettime, libc::CLOCK_REALTIME) / 1000;
        let micros = i128::from(tv.tv_sec) * 1_000_000 + i128::from(tv.tv_usec);
        assert!((before..=after).contains(&micros), "gettimeofday: {micros}");
        // Coarse time is that of the last tick.
        assert!((before / 1_000_000 - 1..=after / 1_000_000).contains(&i128::from(coarse)), "time: {coarse}");
        // SAFETY: sysconf takes no memory.
        assert!(i64::from(cpu) < unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) }, "getcpu: {cpu}");
        assert_ne!((node, random), (u32::MAX, [0; 64]));
    }
}

#[test]
fn the_functions_lead_to_this_kernels() {
    let (own, at) = own();
    let proxy = Proxy::new(&longer(&own), &own, at).unwrap();
    assert!(proxy.patches.len() >= 5);
    check(&Mapped::new(&proxy));
}

#[test]
fn without_a_counterpart_they_make_system_calls() {
    let (own, at) = own();
    let mapped = Mapped::new(&Proxy::new(&own, &[], 0).unwrap());
    check(&mapped);
    let mut random = [0u8; 64];
    // SAFETY: the code there has this type, and the buffer the length given.
    let query = unsafe {
        let call = std::mem::transmute::<*const (), GetRandom>(mapped.address("__vdso_getrandom"));
        call(std::ptr::null_mut(), 0, 0, random.as_mut_ptr(), usize::MAX)
    };
    assert_eq!((query, random), (-(libc::ENOSYS as isize), [0; 64]));
    // One function may be missing as well as all.
    let proxy = Proxy::new(&own, &renamed(&own, "getcpu", "getxxx"), at).unwrap();
    let alone: Vec<_> = proxy.patches.values().filter(|code| arch::find_syscall(code).is_some()).collect();
    assert_eq!(alone, [&arch::vdso_substitute("getcpu").unwrap()]);
    check(&Mapped::new(&proxy));
}

#[test]
fn a_function_that_nobody_knows_is_refused_by_name() {
    let (own, at) = own();
    let old = renamed(&own, "getcpu", "getxxx");
    let reason = Proxy::new(&old, &own, at).map(|_| ()).unwrap_err();
    assert!(reason.contains("getxxx"), "{reason}");
}

#[test]
fn symbols_are_found_by_either_hash_table() {
    let (own, _) = own();
    let names = |bytes: &[u8]| exports(bytes, "it").map(|all| all.into_iter().map(|f| f.name).collect::<Vec<_>>());
    let all = names(&own).unwrap();
    let header = FileHeader64::<LittleEndian>::parse(&own[..]).unwrap();
    let segments = header.program_headers(LittleEndian, &own[..]).unwrap();
    let dynamic = segments.iter().find(|s| s.p_type(LittleEndian) == elf::PT_DYNAMIC).unwrap().p_offset(LittleEndian);
    let without = |bytes: &[u8], tag: i64| {
        let mut bytes = bytes.to_vec();
        let mut entries = bytes[dynamic as usize..].chunks_exact_mut(16);
        if let Some(entry) = entries.find(|e| e[..8] == tag.to_le_bytes()) {
            entry[0] ^= 0x80;
        }
        bytes
    };
    let (sysv, gnu) = (without(&own, elf::DT_GNU_HASH), without(&own, elf::DT_HASH));
    assert!(names(&sysv).or_else(|_| names(&gnu)).is_ok_and(|names| names == all));
    assert!(names(&gnu).or_else(|_| names(&sysv)).is_ok_and(|names| names == all));
    assert!(names(&without(&sysv, elf::DT_HASH)).is_err());
}

/// The fate of a thread that was inside the old vdso at the dump.
#[test]
fn old_code_over_zero_pages_makes_system_calls() {
    let (own, at) = own();
    let mappings = kernel_mappings(std::process::id() as i32).unwrap();
    let first = mappings[0].start;
    let room = Mapping::anonymous(mappings.iter().map(|m| m.start + m.len - first).max().unwrap()).unwrap();
    let place = room.start() + (at - first);
    room.bytes_mut()[(at - first) as usize..][..own.len()].copy_from_slice(&own);
    // SAFETY: the range is part of the mapping just made, and its slice is gone.
    assert_eq!(unsafe { libc::mprotect(place as *mut _, own.len(), libc::PROT_READ | libc::PROT_EXEC) }, 0);
    let function = exports(&own, "it").unwrap().into_iter().find(|f| f.plain_name() == "clock_gettime").unwrap();
    // SAFETY: the code there is a vdso function of this type, with readable data at the right distance.
    let call = unsafe { std::mem::transmute::<u64, ClockCall>(place + function.offset as u64) };
    for clock in [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
        let before = ask(libc::clock_gettime, clock);
        let here = ask(call, clock);
        assert!((before..=ask(libc::clock_gettime, clock)).contains(&here), "clock {clock}: {here}");
    }
}

/// What decides about time is the vdso's distance to its data.
#[test]
fn moved_as_a_block_this_kernels_vdso_still_works() {
    let (own, at) = own();
    let mappings = kernel_mappings(std::process::id() as i32).unwrap();
    let first = mappings[0].start;
    let room = Mapping::anonymous(mappings.iter().map(|m| m.start + m.len - first).max().unwrap()).unwrap();
    let proxy = Proxy::new(&longer(&own), &own, room.start() + (at - first)).unwrap();
    let call = Mapped::new(&proxy);
    let function = call.clock_call("__vdso_clock_gettime");
    // SAFETY: the child of this threaded program only makes system calls and calls the code under test.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            let time = |t: &mut timespec| libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, t);
            let mut t = [timespec { tv_sec: 0, tv_nsec: 0 }; 3];
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let mut right = true;
            for m in &mappings {
                let to = room.start() + (m.start - first);
                right &= libc::syscall(libc::SYS_mremap, m.start, m.len, m.len, flags, to) == to as c_long;
            }
            time(&mut t[0]);
            right &= function(libc::CLOCK_MONOTONIC, &raw mut t[1]) == 0;
            time(&mut t[2]);
            let t = t.map(nanoseconds);
            libc::_exit(i32::from(!right || t[1] < t[0] || t[1] > t[2]));
        }
        child
    };
    let mut status = -1;
    // SAFETY: `status` is writable; the child is ours.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
}

#[test]
fn only_bytes_behind_an_entry_count_as_overwritten() {
    let (own, at) = own();
    let proxy = Proxy::new(&own, &own, at).unwrap();
    let (&entry, code) = proxy.patches.first_key_value().unwrap();
    let (entry, len) = (entry as u64, code.len() as u64);
    assert!(!proxy.is_overwritten(entry) && proxy.is_overwritten(entry + 1));
    assert!(proxy.is_overwritten(entry + len - 1) && !proxy.is_overwritten(entry + len));
    assert!(!proxy.is_overwritten(0) && !proxy.is_overwritten(u64::MAX));
}

proptest! {
    /// An image can hold anything.
    #[test]
    fn nonsense_is_refused_or_patched_within_bounds(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), prop::bool::ANY), 0..40),
        len in any::<prop::sample::Index>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let (own, at) = own();
        let mut old = own.clone();
        for (index, byte, anywhere) in changes {
            // Most of what matters is at the start.
            let range = if anywhere { old.len() } else { 0x600 };
            old[index.index(range)] = byte;
        }
        if cut {
            old.truncate(len.index(own.len()));
        }
        if let Ok(proxy) = Proxy::new(&old, &own, at) {
            prop_assert_eq!(proxy.bytes.len(), old.len());
        }
    }
}
