//! `iter/task_file` once more: the sockets among the descriptors, with what the kernel knows of each.
//!
//! The iterators over TCP, UDP and unix sockets visit all sockets of a machine and see the reader's network namespace
//! only. From a descriptor a socket is three pointers away, in whatever namespace and table it is.

use crate::{
    kernel::{Address, COMMON, Output, known, load, pointer, probe, probe_word, zero},
    task_file::{FILE, TaskFile},
};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use core::ptr;
use standstill_ebpf_abi::{ABSENT, SocketLayout, SocketRecord, UNIX_NAME};

#[unsafe(no_mangle)]
pub static SOCKET: SocketLayout = zero();

/// File system of sockets. An O_PATH descriptor of a unix socket's name is in another.
const SOCKFS: u64 = 0x534f_434b;

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCK_STREAM: u16 = 1;
const SOCK_DGRAM: u16 = 2;
const TCP_LISTEN: u8 = 10;
/// Bytes of a `sockaddr_un` before the name.
const FAMILY_BYTES: u32 = 2;

/// Writes a [`SocketRecord`].
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn sockets(ctx: &TaskFile) -> i32 {
    let file = ctx.file;
    let Some(tgid) = ctx.process() else { return 0 };
    // SAFETY: `ctx` is the iterator's context, and the fields are of the types loaded.
    let (ino, magic) = unsafe {
        let inode: Address = load(file, known(&COMMON.file_inode));
        let sb: Address = load(inode, known(&COMMON.inode_sb));
        (load::<u64>(inode, known(&COMMON.inode_ino)), load::<u64>(sb, known(&FILE.sb_magic)))
    };
    if magic != SOCKFS {
        return 0;
    }
    let sk = pointer(pointer(file, known(&SOCKET.file_private)), known(&SOCKET.socket_sk));
    let Some(mut output) = Output::<SocketRecord>::new() else { return 0 };
    let r = output.record();
    *r = zero();
    r.tgid = tgid;
    r.fd = ctx.fd as i32;
    r.ino = ino;
    r.family = probe_word(sk, known(&SOCKET.family));
    r.sort = probe_word(sk, known(&SOCKET.sort));
    r.protocol = probe_word(sk, known(&SOCKET.protocol));
    r.state = probe_word::<u8>(sk, known(&SOCKET.state)).into();
    match r.family {
        AF_INET | AF_INET6 => internet(r, sk),
        AF_UNIX => unix(r, sk),
        _ => {}
    }
    output.write(ctx.meta, 0);
    0
}

#[inline(always)]
fn internet(r: &mut SocketRecord, sk: Address) {
    r.local_port = probe_word(sk, known(&SOCKET.local_port));
    r.peer_port = u16::from_be(probe_word(sk, known(&SOCKET.peer_port)));
    if r.family == AF_INET {
        let mut ip = [0u8; 4];
        probe(&mut ip, sk, known(&SOCKET.local4));
        r.local[..4].copy_from_slice(&ip);
        probe(&mut ip, sk, known(&SOCKET.peer4));
        r.peer[..4].copy_from_slice(&ip);
    } else if known(&SOCKET.local6) != ABSENT {
        probe(&mut r.local, sk, known(&SOCKET.local6));
        probe(&mut r.peer, sk, known(&SOCKET.peer6));
    }
    let number = |field: &'static u32| probe_word::<u32>(sk, known(field));
    // As /proc/net/tcp and /proc/net/udp count.
    if r.sort == SOCK_STREAM {
        if r.state as u8 == TCP_LISTEN {
            r.receive = number(&SOCKET.backlog);
            return;
        }
        let waiting = number(&SOCKET.rcv_nxt).wrapping_sub(number(&SOCKET.copied_seq));
        r.receive = if (waiting as i32) < 0 { 0 } else { waiting };
        r.send = number(&SOCKET.write_seq).wrapping_sub(number(&SOCKET.snd_una));
    } else {
        let deficit = if r.sort == SOCK_DGRAM { number(&SOCKET.forward_deficit) } else { 0 };
        r.receive = number(&SOCKET.rmem_alloc).wrapping_sub(deficit);
        r.send = number(&SOCKET.wmem_alloc).wrapping_sub(1);
    }
}

#[inline(always)]
fn unix(r: &mut SocketRecord, sk: Address) {
    if known(&SOCKET.unix_addr) == ABSENT {
        return;
    }
    let number = |field: &'static u32| probe_word::<u32>(sk, known(field));
    r.receive = number(&SOCKET.queue_len);
    r.send = number(&SOCKET.wmem_alloc).wrapping_sub(1);
    let peer = pointer(sk, known(&SOCKET.unix_peer));
    if !peer.is_null() {
        let socket = pointer(peer, known(&SOCKET.sk_socket));
        if !socket.is_null() {
            let inode = known(&SOCKET.alloc_inode).wrapping_sub(known(&SOCKET.alloc_socket));
            r.peer_ino = probe_word(socket, inode.wrapping_add(known(&COMMON.inode_ino)));
        }
    }
    let address = pointer(sk, known(&SOCKET.unix_addr));
    if address.is_null() {
        return;
    }
    let len = probe_word::<u32>(address, known(&SOCKET.address_len)).wrapping_sub(FAMILY_BYTES).min(UNIX_NAME as u32);
    if len != 0 {
        // Through the map, so that the verifier sees the mask, which changes nothing.
        r.name_len = len;
        // SAFETY: a reference is valid for reads.
        let len = unsafe { ptr::read_volatile(&raw const r.name_len) } & 127;
        let name = address.wrapping_add(known(&SOCKET.address_name).wrapping_add(FAMILY_BYTES) as usize);
        // SAFETY: `len` is at most the length of a name; the helper checks the other address.
        unsafe { bpf_probe_read_kernel((&raw mut r.name).cast(), len, name.cast()) };
    }
}
