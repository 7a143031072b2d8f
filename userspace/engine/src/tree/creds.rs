//! Credentials: ids, groups, capabilities, securebits, no_new_privs (credentials(7), capabilities(7)).

use crate::{
    error::Result,
    kernel::proc::Status,
    restore::program::{Arg, Program},
    task::Remote,
};
use standstill_images::types::Creds;

const PR_CAP_AMBIENT_RAISE: i32 = 2;
const CAPABILITY_VERSION_3: u64 = 0x2008_0522;
/// Securebits that let ids change without touching capabilities.
pub(crate) const SECBIT_NO_SETUID_FIXUP: i32 = 1 << 2;

/// Securebits: only the thread itself can tell.
pub(crate) fn ask_securebits(tid: i32, remote: &mut Remote) -> Result<u32> {
    Ok(remote.syscall(tid, libc::SYS_prctl, [libc::PR_GET_SECUREBITS as u64, 0, 0, 0, 0, 0])? as u32)
}

/// Credentials of a thread.
pub(crate) fn of(status: &Status, securebits: u32) -> Creds {
    Creds {
        uids: status.uids,
        gids: status.gids,
        groups: status.groups.clone(),
        caps: status.caps,
        securebits,
        no_new_privs: status.no_new_privs,
    }
}

/// Takes on the credentials. `own` are those the restorer has: what is the same is left alone. Must come after
/// everything that needs privileges.
pub(crate) fn restore(creds: &Creds, own: &Creds, program: &mut Program) {
    if creds == own {
        return;
    }
    let words = |list: &[u32]| list.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
    if creds.groups != own.groups {
        let list = program.data(&words(&creds.groups));
        program.call("set the groups", libc::SYS_setgroups, &[creds.groups.len().into(), list]);
    }
    for cap in (0..64).filter(|c| own.caps[3] & !creds.caps[3] & (1 << c) != 0) {
        program.call("drop a bounding capability", libc::SYS_prctl, &[libc::PR_CAPBSET_DROP.into(), cap.into()]);
    }
    let prctl = |program: &mut Program, label: &str, args: &[Arg]| program.call(label, libc::SYS_prctl, args);
    if creds.uids != own.uids || creds.gids != own.gids {
        prctl(program, "keep capabilities", &[libc::PR_SET_SECUREBITS.into(), SECBIT_NO_SETUID_FIXUP.into()]);
        let id = |n: u32| Arg::Value(n.into());
        let [real, effective, saved, fs] = creds.gids;
        program.call("set the group ids", libc::SYS_setresgid, &[id(real), id(effective), id(saved)]);
        program.call("set the file system group id", libc::SYS_setfsgid, &[id(fs)]);
        let [real, effective, saved, fs] = creds.uids;
        program.call("set the user ids", libc::SYS_setresuid, &[id(real), id(effective), id(saved)]);
        program.call("set the file system user id", libc::SYS_setfsuid, &[id(fs)]);
    }
    prctl(program, "set the securebits", &[libc::PR_SET_SECUREBITS.into(), u64::from(creds.securebits).into()]);
    let header = program.words(&[CAPABILITY_VERSION_3]);
    let [inheritable, permitted, effective, _, ambient] = creds.caps;
    let mut data = Vec::new();
    for shift in [0, 32] {
        data.extend([effective, permitted, inheritable].map(|set| (set >> shift) as u32));
    }
    let data = program.data(&words(&data));
    program.call("set the capabilities", libc::SYS_capset, &[header, data]);
    for cap in (0..64).filter(|c| ambient & (1 << c) != 0) {
        let args = [libc::PR_CAP_AMBIENT.into(), PR_CAP_AMBIENT_RAISE.into(), cap.into(), 0.into(), 0.into()];
        prctl(program, "raise an ambient capability", &args);
    }
    if creds.no_new_privs && !own.no_new_privs {
        prctl(program, "set no_new_privs", &[libc::PR_SET_NO_NEW_PRIVS.into(), 1.into(), 0.into(), 0.into(), 0.into()]);
    }
}
