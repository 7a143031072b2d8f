//! Time namespaces (time_namespaces(7)).

use std::ffi::CStr;
use std::io;

/// `CLONE_NEWTIME`
const NEWTIME: i32 = 0x80;

/// Enters a new time namespace, whose clocks differ from the machine's by these `offsets`: lines as
/// `/proc/self/timens_offsets` takes them. Only for a process that has a single thread; allocates nothing.
pub fn enter(offsets: &CStr) -> io::Result<()> {
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) };
    // SAFETY: all pointers are to strings that live longer than the calls; the descriptors are closed once each.
    unsafe {
        check(libc::unshare(NEWTIME).into())?;
        let file = check(libc::open(c"/proc/self/timens_offsets".as_ptr(), libc::O_WRONLY).into())?;
        let written = check(libc::write(file, offsets.as_ptr().cast(), offsets.count_bytes()) as libc::c_long);
        libc::close(file);
        written?;
        let namespace = check(libc::open(c"/proc/self/ns/time_for_children".as_ptr(), libc::O_RDONLY).into())?;
        let entered = check(libc::setns(namespace, NEWTIME).into());
        libc::close(namespace);
        entered.map(drop)
    }
}
