//! What the restoring process and the restorer blob share.
//!
//! The blob is an interpreter: it runs in the task that is being restored, where nothing else of ours is mapped any
//! more, and executes a list of [`Op`]s, each one system call whose arguments were known when the plan was made. It
//! knows nothing of checkpoints; what has to be done in which order is decided by the engine's plan.
#![no_std]

/// What an [`Op`] does.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The system call `nr` with `args`.
    Syscall = 0,
    /// Stops for the tracer (`int3`), which continues or kills the task. `args[0]` is the [`stage`].
    Trap = 1,
    /// clone3(2): `args[0]`, `args[1]` are its arguments; the child runs the [`Task`] at `args[2]`.
    Clone = 2,
    /// pread64(2) until all bytes are there: fd, address, length, offset. An early end of file is an error.
    ReadFull = 3,
    /// Leaves the thread by exit(2) with status `args[0]`: ends the list without a stop.
    Exit = 4,
    /// write(2) until all bytes are gone: fd, address, length.
    WriteFull = 5,
    /// Adds one to the 32-bit word at `args[0]`, which tasks share, and wakes those that wait for it.
    Post = 6,
    /// Waits until the word at `args[0]` is at least `args[1]`.
    Await = 7,
}

/// Flag of an [`Op`]: a failing system call is not an error.
pub const MAY_FAIL: u32 = 1;
/// Flag of an [`Op`]: any result but [`Op::expected`] is an error (EBADFD).
pub const EXPECT: u32 = 2;
/// Flag of an [`Op`]: `args[0]` is the address of a 64-bit word that holds the argument.
pub const LOAD: u32 = 4;

/// One step of a restorer program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// A [`Kind`].
    pub kind: u32,
    /// [`MAY_FAIL`], [`EXPECT`], [`LOAD`].
    pub flags: u32,
    /// System call number.
    pub nr: u64,
    /// Arguments.
    pub args: [u64; 6],
    /// The result, with [`EXPECT`].
    pub expected: u64,
}

/// A program with the state of its run. Lives in memory shared by all tasks and the restoring process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Address of the first [`Op`].
    pub ops: u64,
    /// Number of operations.
    pub len: u64,
    /// Index of the operation under way; the failed one when `error` is set.
    pub at: u64,
    /// errno of a failed operation, otherwise 0.
    pub error: u64,
    /// Top of the stack the interpreter runs on.
    pub stack: u64,
}

/// Why a task stopped with `int3`: left in [`Trap`](Kind::Trap)'s first argument and in the task's `rax`.
pub mod stage {
    /// An operation failed: see [`Task::error`](super::Task::error).
    pub const FAILED: u64 = u64::MAX;
}
