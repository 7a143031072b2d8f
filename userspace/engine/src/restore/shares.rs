//! Who of those that share a descriptor table or a working directory restores it, and when.
//!
//! Numbers of descriptors are known in advance only as long as one task at a time changes a table. So a process that
//! was born into a shared table is waited for by its parent until it has mapped its files, and later those that share a
//! table take turns.

use super::program::Program;
use standstill_images::types::Task;
use std::collections::{BTreeMap, HashMap};

/// One of several processes that have the same object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    /// What they count their turns with.
    word: usize,
    turn: usize,
    /// The last one, who restores the object.
    last: usize,
}

impl Share {
    /// Numbers the members of each group of at least two. `word`: the next free one.
    pub(crate) fn number(groups: impl Iterator<Item = (u32, i32)>, word: &mut usize) -> HashMap<i32, Self> {
        let mut members: BTreeMap<u32, Vec<i32>> = BTreeMap::new();
        groups.for_each(|(group, pid)| members.entry(group).or_default().push(pid));
        let mut shares = HashMap::new();
        for pids in members.into_values().filter(|pids| pids.len() > 1) {
            let last = pids.len() - 1;
            shares.extend(pids.into_iter().enumerate().map(|(turn, pid)| (pid, Self { word: *word, turn, last })));
            *word += 1;
        }
        shares
    }

    /// Whether the object is this process's to restore.
    pub(crate) fn restores(share: Option<&Self>) -> bool {
        share.is_none_or(|s| s.turn == s.last)
    }

    /// Waits for those whose turn is before.
    pub(crate) fn wait(share: Option<&Self>, what: &str, program: &mut Program) {
        if let Some(share) = share {
            program.wait_for(format!("wait for who shares its {what}"), share.word, share.turn);
        }
    }

    /// The next one may go on.
    pub(crate) fn pass(share: Option<&Self>, what: &str, program: &mut Program) {
        if let Some(share) = share {
            program.post(format!("pass the turn with the shared {what}"), share.word);
        }
    }
}

/// Processes by their descriptor tables.
pub(crate) fn tables<'a>(tasks: impl Iterator<Item = &'a Task>) -> impl Iterator<Item = (u32, i32)> {
    tasks.filter_map(|t| Some((t.live.as_ref()?.fd_table, t.pid)))
}
