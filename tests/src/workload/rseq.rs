//! Restartable sequences: the area the kernel keeps up to date must still be registered.

use super::Checker;

/// Checks that the kernel still writes the current cpu into this thread's rseq area: a registration that was lost
/// leaves the field at its old value once the thread moves to another cpu.
pub fn check_rseq(checker: &Checker) {
    let Some(cpu_field) = cpu_field() else {
        return;
    };
    let allowed = affinity();
    let cpus: Vec<usize> =
        (0..libc::CPU_SETSIZE.cast_unsigned() as usize).filter(|cpu| is_set(*cpu, &allowed)).collect();
    for cpu in cpus.into_iter().take(2) {
        set_affinity(&only(cpu));
        // SAFETY: `cpu_field` points into this thread's thread control block, which lives as long as the thread; the
        // kernel writes it on return to user mode, hence volatile.
        let seen = unsafe { cpu_field.read_volatile() };
        checker.equal("rseq cpu_id on a pinned thread", &seen, &u32::try_from(cpu).unwrap_or(u32::MAX));
    }
    set_affinity(&allowed);
}

/// Address of `cpu_id` in the area that glibc (2.35 and newer) registered; none when it did not.
fn cpu_field() -> Option<*const u32> {
    // SAFETY: the names are valid C strings, and dlsym only looks symbols up.
    let (offset, size) = unsafe {
        (
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()),
            libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()),
        )
    };
    if offset.is_null() || size.is_null() {
        return None;
    }
    // SAFETY: glibc documents both symbols as a ptrdiff_t and an unsigned int that do not change after start-up.
    let (offset, size) = unsafe { (*offset.cast::<isize>(), *size.cast::<u32>()) };
    if size == 0 {
        return None;
    }
    let thread_pointer: usize;
    // SAFETY: on x86_64 Linux the word at fs:0 holds the thread pointer itself.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread_pointer, options(nostack, readonly, preserves_flags)) };
    // `cpu_id` is the second 32-bit field of struct rseq.
    Some(thread_pointer.wrapping_add_signed(offset + 4) as *const u32)
}

fn affinity() -> libc::cpu_set_t {
    // SAFETY: a cpu set is plain bits, all-zero is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the size given is that of the set.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    assert_eq!(result, 0, "sched_getaffinity");
    set
}

fn set_affinity(set: &libc::cpu_set_t) {
    // SAFETY: the size given is that of the set.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(set), set) };
    assert_eq!(result, 0, "sched_setaffinity");
}

fn is_set(cpu: usize, set: &libc::cpu_set_t) -> bool {
    // SAFETY: `cpu` is below CPU_SETSIZE, the number of bits in the set.
    unsafe { libc::CPU_ISSET(cpu, set) }
}

fn only(cpu: usize) -> libc::cpu_set_t {
    // SAFETY: a cpu set is plain bits, all-zero is valid; `cpu` is below CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        set
    }
}
