//! The iterators of a build without the feature `ebpf`: there are none.

use super::{
    AioContext, FdEntry, Lineage, ObserveError, ProcessState, Result, SharedMapping, SocketEntry, Space, ThreadState,
    VmaEntry,
};

/// Reader of a tree's state through BPF iterators; cannot exist in this build.
#[derive(Debug)]
pub enum Iterators {}

impl Iterators {
    /// Loads the programs.
    ///
    /// # Errors
    /// Always [`ObserveError::NotBuilt`].
    pub fn load() -> Result<Self> {
        Err(ObserveError::NotBuilt)
    }

    /// Reads the paths of all open files ahead.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn prefetch_paths(&mut self, _tgids: &[i32]) -> Result<()> {
        match *self {}
    }

    /// All descriptors of the processes, by process and number.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn files(&mut self, _tgids: &[i32]) -> Result<Vec<FdEntry>> {
        match *self {}
    }

    /// The processes with their threads.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn processes(&mut self, _tgids: &[i32]) -> Result<Vec<ProcessState>> {
        match *self {}
    }

    /// Every task that there is.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn lineage(&mut self) -> Result<Vec<Lineage>> {
        match *self {}
    }

    /// The threads of the processes.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn threads(&mut self, _tgids: &[i32]) -> Result<Vec<ThreadState>> {
        match *self {}
    }

    /// The sockets of the processes, by process and descriptor.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn sockets(&mut self, _tgids: &[i32]) -> Result<Vec<SocketEntry>> {
        match *self {}
    }

    /// The mappings of the processes, by process and address.
    ///
    /// # Errors
    /// Cannot be called.
    pub fn vmas(&mut self, _tgids: &[i32]) -> Result<Vec<VmaEntry>> {
        match *self {}
    }

    /// Shared mappings of files on a device.
    ///
    /// # Errors
    /// Cannot be called.
    pub(crate) fn shared_mappings(&mut self, _tgids: &[i32], _dev: u64) -> Result<Vec<SharedMapping>> {
        match *self {}
    }
}

/// Sees when memory is mapped a second time; cannot exist in this build.
#[derive(Debug)]
pub(crate) enum Aliases {}

impl Aliases {
    /// Loads the program: always [`ObserveError::NotBuilt`].
    pub(crate) fn load() -> Result<Self> {
        Err(ObserveError::NotBuilt)
    }

    /// Cannot be called.
    pub(crate) fn watch(&mut self, _iterators: &mut Iterators, _pids: &[i32]) -> Result<()> {
        match *self {}
    }

    /// Cannot be called.
    pub(crate) fn of(&self, _pid: i32) -> Result<Option<Space>> {
        match *self {}
    }
}

/// Contexts of io_setup(2); cannot exist in this build.
pub(crate) enum AioContexts {}

impl AioContexts {
    /// Loads the program: always [`ObserveError::NotBuilt`].
    pub(crate) fn load() -> Result<Self> {
        Err(ObserveError::NotBuilt)
    }

    /// Cannot be called.
    pub(crate) fn read(&mut self, _pids: &[i32]) -> Result<Vec<AioContext>> {
        match *self {}
    }
}
