//! Bits of words in kernel structures that are no types, so that BTF does not tell where they are.

/// Of prctl(2), newer than the libc crate.
const PR_SPEC_DISABLE_NOEXEC: u32 = 16;

/// Where `TIF_NOTSC` of x86 may be in the flags of `thread_info`: up to Linux 6.17, and since. The other bit is something
/// else, and as rare.
pub(super) const TIF_NOTSC: u64 = 1 << 16 | 1 << 21;
/// `MMF_DISABLE_THP*`, `MMF_HAS_MDWE*` and `MMF_VM_MERGE_ANY` in `mm->flags`. Before Linux 6.18 the first of these bits said
/// that the process has had a huge page of zeros.
pub(super) const MMF_UNUSUAL: u64 = 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29 | 1 << 30;

/// What PR_SET_SPECULATION_CTRL was given, from `atomic_flags` (`PFA_SPEC_*`).
pub(super) fn speculation(flags: u64) -> [u32; 2] {
    let set = |bit: u32| flags & 1 << bit != 0;
    let store = match () {
        () if set(4) => libc::PR_SPEC_FORCE_DISABLE,
        () if set(7) => PR_SPEC_DISABLE_NOEXEC,
        () if set(3) => libc::PR_SPEC_DISABLE,
        () => 0,
    };
    let branch = match () {
        () if set(6) => libc::PR_SPEC_FORCE_DISABLE,
        () if set(5) => libc::PR_SPEC_DISABLE,
        () => 0,
    };
    [store, branch]
}
