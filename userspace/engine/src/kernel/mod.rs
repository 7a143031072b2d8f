//! Every system call that nix does not wrap, one thin safe function each.

pub(crate) mod arch;
pub(crate) mod hugetlb;
pub(crate) mod letter;
pub(crate) mod pagemap;
pub(crate) mod peek;
pub(crate) mod proc;
pub(crate) mod procmap;
pub(crate) mod ptrace;
pub(crate) mod shm;
pub(crate) mod sock_diag;
pub(crate) mod sys;
pub(crate) mod urgent;
pub(crate) mod userfaultfd;

/// Page size of the images. The kernel's is checked once, by [`sys::page_size_is_supported`].
pub(crate) const PAGE: u64 = 4096;
