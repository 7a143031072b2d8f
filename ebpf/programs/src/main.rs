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
mod task;
mod task_file;
mod task_vma;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses programs with a reachable loop without end, so what panics does not load.
    loop {}
}

// bpf_probe_read_kernel, bpf_d_path and bpf_seq_write are for programs under a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
