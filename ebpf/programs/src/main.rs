//! BPF iterators over the descriptors, threads and mappings of the processes in the map `TREE`.
//!
//! They only look: no program changes anything in the kernel. Fields of kernel structures are loaded through pointers
//! whose type the verifier knows, at offsets from the running kernel's BTF (see `abi/src/layout.rs`); where the type is
//! lost, with bpf_probe_read_kernel, which fails instead of faulting.
#![no_std]
#![no_main]

mod access;
mod kernel;
mod name;
mod runtime;
mod socket;
mod task;
mod task_file;
mod task_vma;
