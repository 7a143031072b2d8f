//! Sockets, without the data that wait in them.

use super::output::text;
use serde_json::{Value, json};
use standstill_images::types::Socket;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A description for people, and everything else.
pub(super) fn describe(socket: &Socket) -> (String, Value) {
    let family = family(socket.family);
    let kind = kind(socket.kind);
    let waiting: usize = socket.pair.iter().flat_map(|p| &p.queue).map(Vec::len).sum();
    let mut parts = vec![format!("{family} {kind}")];
    if let Some(local) = address(&socket.local) {
        parts.push(local);
    }
    if let Some(backlog) = socket.backlog {
        parts.push(format!("listening, backlog {backlog}"));
    }
    if let Some(peer) = address(&socket.peer) {
        parts.push(format!("to {peer}"));
    }
    if let Some(pair) = &socket.pair {
        parts.push(pair.peer.map_or("peer closed".into(), |id| format!("connected to file {id}")));
        parts.push(format!("{waiting} bytes waiting"));
    }
    let pair = socket.pair.as_ref().map(|pair| {
        json!({
            "peer": pair.peer,
            "waiting_bytes": waiting,
            "messages": pair.queue.len(),
            "shutdown": pair.shutdown,
        })
    });
    let details = json!({
        "family": family,
        "type": kind,
        "protocol": socket.protocol,
        "local": address(&socket.local),
        "peer": address(&socket.peer),
        "backlog": socket.backlog,
        "options": socket.options,
        "bound_file": socket.bound_file,
        "pair": pair,
    });
    (parts.join(", "), details)
}

fn family(family: i32) -> String {
    match family {
        libc::AF_UNIX => "unix".into(),
        libc::AF_INET => "ipv4".into(),
        libc::AF_INET6 => "ipv6".into(),
        libc::AF_NETLINK => "netlink".into(),
        libc::AF_PACKET => "packet".into(),
        other => format!("family {other}"),
    }
}

fn kind(kind: i32) -> String {
    match kind {
        libc::SOCK_STREAM => "stream".into(),
        libc::SOCK_DGRAM => "datagram".into(),
        libc::SOCK_SEQPACKET => "seqpacket".into(),
        libc::SOCK_RAW => "raw".into(),
        other => format!("type {other}"),
    }
}

/// A `struct sockaddr` of any family; `None`: no address.
fn address(raw: &[u8]) -> Option<String> {
    let (family, rest) = raw.split_first_chunk::<2>()?;
    let port = || rest.first_chunk::<2>().map(|p| u16::from_be_bytes(*p));
    let known = match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_UNIX => match rest.split_first() {
            None => return None,
            Some((0, name)) => Some(format!("@{}", text(name))),
            Some(_) => Some(text(rest.split(|&b| b == 0).next().unwrap_or_default())),
        },
        libc::AF_INET => {
            let ip = rest.get(2..6).and_then(|b| <[u8; 4]>::try_from(b).ok());
            port().zip(ip).map(|(port, ip)| format!("{}:{port}", Ipv4Addr::from(ip)))
        }
        libc::AF_INET6 => {
            let ip = rest.get(6..22).and_then(|b| <[u8; 16]>::try_from(b).ok());
            port().zip(ip).map(|(port, ip)| format!("[{}]:{port}", Ipv6Addr::from(ip)))
        }
        _ => None,
    };
    Some(known.unwrap_or_else(|| raw.iter().map(|b| format!("{b:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(family: i32, rest: &[u8]) -> Vec<u8> {
        [&(family as u16).to_ne_bytes()[..], rest].concat()
    }

    #[test]
    fn addresses_of_all_families() {
        assert_eq!(address(&[]), None);
        assert_eq!(address(&raw(libc::AF_UNIX, &[])), None);
        assert_eq!(address(&raw(libc::AF_UNIX, b"/run/x\0\0")).unwrap(), "/run/x");
        assert_eq!(address(&raw(libc::AF_UNIX, b"\0a\0b")).unwrap(), "@a\0b");
        assert_eq!(address(&raw(libc::AF_INET, &[31, 144, 127, 0, 0, 1, 0, 0])).unwrap(), "127.0.0.1:8080");
        let v6 = [&[0, 80, 0, 0, 0, 0][..], &[0; 15], &[1, 0, 0, 0, 0]].concat();
        assert_eq!(address(&raw(libc::AF_INET6, &v6)).unwrap(), "[::1]:80");
        assert_eq!(address(&raw(libc::AF_INET, &[1])).unwrap(), "020001", "too short: as it is");
    }
}
