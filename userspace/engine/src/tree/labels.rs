//! Labels of security modules: SELinux, Smack; profiles of AppArmor (`/proc/pid/attr`, proc_pid_attr(5)).
//!
//! They are read only where this process has one, that is, where such a module is enabled. A process whose label is that of
//! the restoring process gets it by birth; otherwise it writes its own, before it has threads: SELinux lets no process with
//! several ones change its label freely.

use super::process::write_own;
use crate::{
    error::{Context, Error, Result},
    restore::program::Program,
    task::FrozenProcess,
};
use standstill_images::types::{Bytes, Label};
use std::{fs, io, path::Path};

/// What the objects of a process will be labelled with, besides its own label.
const OTHERS: [&str; 4] = ["exec", "fscreate", "keycreate", "sockcreate"];

/// The label of this process; `None`: no security module has labels.
pub(crate) fn own() -> Option<Bytes> {
    read(Path::new("/proc/self"), "current").ok().flatten()
}

/// The labels of processes, where there are any.
pub(crate) fn collect(processes: &[FrozenProcess]) -> Result<Vec<Label>> {
    if own().is_none() {
        return Ok(Vec::new());
    }
    processes
        .iter()
        .map(|p| {
            let threads: Vec<i32> = p.threads.iter().map(|(tid, _)| *tid).collect();
            of(Path::new("/proc"), p.id(), p.pid, &threads)
        })
        .collect()
}

/// The label of process `id`, which is to be found under `pid` in `procfs`.
fn of(procfs: &Path, id: i32, pid: i32, threads: &[i32]) -> Result<Label> {
    let all = |tid: i32| -> Result<(Bytes, Vec<Option<Bytes>>)> {
        let dir = procfs.join(format!("{pid}/task/{tid}"));
        let get = |file| read(&dir, file).context(|| format!("read the security label of thread {tid}"));
        let current = get("current")?.unwrap_or_default();
        Ok((current, OTHERS.into_iter().map(get).collect::<Result<_>>()?))
    };
    let (current, others) = all(pid)?;
    for &tid in threads.iter().filter(|tid| **tid != pid) {
        let (own, its) = all(tid)?;
        if own != current || its.iter().any(Option::is_some) {
            let object = format!("thread {tid}, which has a security label of its own,");
            return Err(Error::unsupported(id, object, "let it end before the dump"));
        }
    }
    let others = OTHERS.iter().zip(others).filter_map(|(file, label)| Some((Bytes::from(file.as_bytes()), label?)));
    Ok(Label { pid: id, current, others: others.collect() })
}

/// What a file says; `None`: nothing, or no security module has it.
fn read(process: &Path, file: &str) -> io::Result<Option<Bytes>> {
    match fs::read(process.join("attr").join(file)) {
        Ok(text) => {
            let end = text.iter().rposition(|b| !matches!(b, b'\0' | b'\n')).map_or(0, |last| last + 1);
            Ok((end > 0).then(|| Bytes::from(&text[..end])))
        }
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Gives a process that has one thread its label, by way of the lowest free descriptor `fd`. `own`: that of the restorer.
pub(crate) fn restore(label: &Label, own: Option<&Bytes>, fd: i32, program: &mut Program) -> Result<()> {
    let current = label.current.lossy();
    let Some(own) = own else {
        return Err(Error::Missing {
            what: format!("the security module that gave process {} the label {current}", label.pid),
            remedy: "restore it on a machine where that module is enabled".into(),
        });
    };
    if label.current != *own {
        // AppArmor shows profiles with their mode, and takes no such text.
        if current == "unconfined" || current.ends_with(')') || own.0 == b"unconfined" || own.0.ends_with(b")") {
            return Err(Error::Target(format!(
                "process {} had the AppArmor profile {current}, and this process has {}: restore it under that profile (aa-exec)",
                label.pid,
                own.lossy()
            )));
        }
        write_own("attr/current", &current, fd, program);
    }
    for (file, text) in &label.others {
        write_own(&format!("attr/{}", file.lossy()), &text.lossy(), fd, program);
    }
    Ok(())
}

/// Whether these are files that [`restore`] may write.
pub(crate) fn is_whole(label: &Label) -> bool {
    label.others.iter().all(|(file, _)| OTHERS.iter().any(|known| known.as_bytes() == file.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A procfs with a process 7, whose threads have these labels.
    fn procfs(threads: &[(i32, &str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (tid, current, fscreate) in threads {
            let attr = dir.path().join(format!("7/task/{tid}/attr"));
            fs::create_dir_all(&attr).unwrap();
            fs::write(attr.join("current"), current).unwrap();
            fs::write(attr.join("fscreate"), fscreate).unwrap();
        }
        dir
    }

    fn label(current: &str, others: &[(&str, &str)]) -> Label {
        let others = others.iter().map(|(file, text)| (Bytes::from(file.as_bytes()), Bytes::from(text.as_bytes())));
        Label { pid: 7, current: Bytes::from(current.as_bytes()), others: others.collect() }
    }

    #[test]
    fn labels_as_the_kernel_shows_them() {
        let dir = procfs(&[(7, "u:r:a_t:s0\0", "u:object_r:b_t:s0\n"), (8, "u:r:a_t:s0", "")]);
        let found = of(dir.path(), 7, 7, &[7, 8]).unwrap();
        assert_eq!(found, label("u:r:a_t:s0", &[("fscreate", "u:object_r:b_t:s0")]));
    }

    #[test]
    fn threads_with_labels_of_their_own() {
        for (current, fscreate) in [("u:r:c_t:s0", ""), ("u:r:a_t:s0", "u:object_r:b_t:s0")] {
            let dir = procfs(&[(7, "u:r:a_t:s0", ""), (8, current, fscreate)]);
            let refused = of(dir.path(), 7, 7, &[7, 8]).unwrap_err().to_string();
            assert!(refused.contains("thread 8"), "{refused}");
        }
    }

    #[test]
    fn what_a_restore_does() {
        let texts = |label: &Label, own: Option<&str>| {
            let mut program = Program::default();
            let own = own.map(|text| Bytes::from(text.as_bytes()));
            restore(label, own.as_ref(), 3, &mut program).map(|()| program.listing().collect::<Vec<_>>().join("\n"))
        };
        assert_eq!(texts(&label("u:r:a_t:s0", &[]), Some("u:r:a_t:s0")).unwrap(), "");
        let written = texts(&label("u:r:a_t:s0", &[("exec", "u:r:x_t:s0")]), Some("u:r:b_t:s0")).unwrap();
        let places = ["write u:r:a_t:s0 to attr/current", "write u:r:x_t:s0 to attr/exec"].map(|w| written.find(w));
        assert!(places[0].is_some() && places[0] < places[1], "{written}");
        for (label, own, words) in [
            (label("u:r:a_t:s0", &[]), None, "security module"),
            (label("p (enforce)", &[]), Some("unconfined"), "aa-exec"),
            (label("unconfined", &[]), Some("p (enforce)"), "aa-exec"),
        ] {
            let refused = texts(&label, own).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn only_known_files_are_written() {
        assert!(is_whole(&label("a", &[("exec", "b")])));
        assert!(!is_whole(&label("a", &[("../../../x", "b")])));
    }
}
