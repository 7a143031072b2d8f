//! Descriptors from procfs.
use super::{FdEntry, FileId, ObserveError};
use std::{collections::HashMap, fs, os::unix::fs::MetadataExt};

/// All descriptors of the processes.
pub fn files(pids: &[i32]) -> Result<Vec<FdEntry>, ObserveError> {
    let mut all: Vec<FdEntry> = vec![];
    let mut groups: HashMap<(u64, u64, u32, i64), Vec<usize>> = HashMap::new();
    let mut next = 0;
    for &pid in pids {
        let mut fds: Vec<i32> = fs::read_dir(format!("/proc/{pid}/fd"))
            .map_err(ObserveError::io("read procfs"))?
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        fds.sort_unstable();
        for fd in fds {
            let info =
                fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).map_err(ObserveError::io("read procfs"))?;
            let field = |n: &str| info.lines().find_map(|l| l.strip_prefix(n)?.strip_prefix(':').map(str::trim));
            let flags = u32::from_str_radix(field("flags").unwrap_or("0"), 8).unwrap_or(0);
            let pos = field("pos").and_then(|v| v.parse().ok()).unwrap_or(0);
            let link = format!("/proc/{pid}/fd/{fd}");
            let path = fs::read_link(&link).map_err(ObserveError::io("read procfs"))?;
            let meta = fs::metadata(&link).map_err(ObserveError::io("read procfs"))?;
            let cloexec = flags & libc::O_CLOEXEC as u32 != 0;
            let flags = flags & !(libc::O_CLOEXEC as u32);
            let key = (meta.dev(), meta.ino(), flags, pos);
            let candidates = groups.entry(key).or_default();
            let mut file = None;
            for &c in candidates.iter() {
                let other: &FdEntry = &all[c];
                // SAFETY: no memory is passed.
                let r = unsafe { libc::syscall(libc::SYS_kcmp, pid, other.tgid, 0, fd, other.fd) };
                if r == 0 {
                    file = Some(other.file);
                    break;
                }
            }
            let file = file.unwrap_or_else(|| {
                next += 1;
                candidates.push(all.len());
                FileId(next - 1)
            });
            all.push(FdEntry {
                tgid: pid,
                fd,
                cloexec,
                file,
                flags,
                pos,
                ino: meta.ino(),
                dev: meta.dev(),
                mode: meta.mode(),
                rdev: meta.rdev(),
                size: meta.size(),
                mtime: (meta.mtime(), meta.mtime_nsec() as u32),
                nlink: meta.nlink() as u32,
                path,
            });
        }
    }
    Ok(all)
}
