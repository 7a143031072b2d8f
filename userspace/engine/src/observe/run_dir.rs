//! Where trackers and dumps leave what others may find: gone after a reboot, and no loss.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::Path,
};

/// Readable and writable for its owner only: the pids and sizes of others are nobody's business.
pub(crate) const PATH: &str = "/run/standstill";

/// Makes the directory, which nobody else may enter: what is in it is believed.
pub(crate) fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(io::Error::other("it is there, but not a directory for its owner only"));
    }
    Ok(())
}

/// Listens on a socket for its owner only. One that is there already must be that of a dead process, or of one that ends.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    Ok(listener)
}
