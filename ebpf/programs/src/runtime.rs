//! What every object of programs has.

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses programs with a reachable loop without end, so what panics does not load.
    loop {}
}

// bpf_probe_read_kernel, bpf_d_path, bpf_seq_write and others are for programs under a licence compatible with the GPL only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
