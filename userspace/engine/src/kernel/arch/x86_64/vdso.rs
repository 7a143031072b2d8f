//! x86-64: what takes the place of a vdso function.

/// Functions of a vdso may have a second name without this.
pub(crate) const VDSO_PREFIX: &str = "__vdso_";

/// Goes on at `address`; no register and no flag changes.
pub(crate) fn jump(address: u64) -> Vec<u8> {
    let mut code = vec![0xff, 0x25, 0, 0, 0, 0]; // jmp [rip + 0]
    code.extend_from_slice(&address.to_le_bytes());
    code
}

/// Does without a vdso what its function (without [`VDSO_PREFIX`]) does; `None` if that is not known.
pub(crate) fn vdso_substitute(function: &str) -> Option<Vec<u8>> {
    let nr = match function {
        "clock_gettime" => libc::SYS_clock_gettime,
        "gettimeofday" => libc::SYS_gettimeofday,
        "time" => libc::SYS_time,
        "clock_getres" => libc::SYS_clock_getres,
        "getcpu" => libc::SYS_getcpu,
        "getrandom" => libc::SYS_getrandom,
        // No image holds an enclave, so nobody has one to enter.
        "sgx_enter_enclave" => return Some(fail(libc::ENOSYS)),
        _ => return None,
    };
    // The arguments are those of the system call, and a failure is a negated errno in either case.
    let mut call = vec![0xb8]; // mov eax, imm32
    call.extend_from_slice(&(nr as u32).to_le_bytes());
    call.extend_from_slice(&[0x0f, 0x05, 0xc3]); // syscall; ret
    if function == "getrandom" {
        // With this length in the fifth argument it only says how much state it wants (vgetrandom(3)): it wants nothing.
        let refusal = fail(libc::ENOSYS);
        let mut code = vec![0x49, 0x83, 0xf8, 0xff, 0x75, refusal.len() as u8]; // cmp r8, -1; jne
        code.extend(refusal);
        code.extend(call);
        return Some(code);
    }
    Some(call)
}

fn fail(errno: i32) -> Vec<u8> {
    let mut code = vec![0x48, 0xc7, 0xc0]; // mov rax, simm32
    code.extend_from_slice(&(-errno).to_le_bytes());
    code.push(0xc3); // ret
    code
}
