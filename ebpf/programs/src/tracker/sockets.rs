//! States of TCP sockets.

use crate::{
    LAYOUT, PROCESSES,
    access::{Address, known, load},
    add, current, process_of,
};
use standstill_ebpf_abi::track::count;

/// Arguments of the tracepoint inet_sock_set_state, the first of them.
#[repr(C)]
struct State {
    sock: Address,
}

/// A socket has another state. What arrives for it changes it at any time, whoever runs then; while a process holds its
/// lock, that process does: it listens, connects or closes.
#[unsafe(link_section = "tp_btf/inet_sock_set_state")]
#[unsafe(no_mangle)]
extern "C" fn socket_state(ctx: &State) -> i32 {
    // SAFETY: the tracepoint passes a sock, the field is of the type loaded, and `current` gives a task.
    let (owned, process): (u32, u32) = unsafe { (load(ctx.sock, known(&LAYOUT.sock_owned)), process_of(current())) };
    if owned != 0 && PROCESSES.get_ptr(process).is_some() {
        add(count::CONNECTIONS);
    }
    0
}
