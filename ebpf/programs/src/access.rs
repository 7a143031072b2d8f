//! Looking into kernel structures.
#![allow(dead_code, reason = "each binary uses a part of it")]

use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use core::{mem, ptr};
use standstill_ebpf_abi::Plain;

/// A value of zeros: layouts before the loader fills them.
pub const fn zero<T: Plain>() -> T {
    // SAFETY: any bytes are a value of a Plain type.
    unsafe { mem::zeroed() }
}

/// An address in the kernel, with its type where the verifier knows it.
pub type Address = *const u8;

/// A field of a layout.
///
/// A plain read would let the compiler take the zeros of the object file for the values.
#[inline(always)]
pub fn known(field: &'static u32) -> u32 {
    // SAFETY: a reference is valid for reads.
    unsafe { ptr::read_volatile(field) }
}

/// Loads a field.
///
/// # Safety
/// The verifier knows the type of what `base` points to, and `offset` is that of a field of type `T` there.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: Address, offset: u32) -> T {
    // SAFETY: the caller's promise; the verifier checks it again, and a bad address reads as zero (BPF_PROBE_MEM).
    unsafe { ptr::read_volatile(base.add(offset as usize).cast()) }
}

/// Reads from any kernel address into `to`; zeros if the address is not readable.
#[inline(always)]
pub fn probe<T: Plain>(to: &mut T, from: Address, offset: u32) {
    probe_bytes(ptr::from_mut(to).cast(), mem::size_of::<T>() as u32, from, offset);
}

/// Reads `len` bytes from any kernel address to `to`; zeros if the address is not readable.
#[inline(always)]
fn probe_bytes(to: *mut u8, len: u32, from: Address, offset: u32) {
    // SAFETY: `to` is a mutable reference to `len` bytes in both callers; the helper checks the other address.
    unsafe { bpf_probe_read_kernel(to.cast(), len, from.wrapping_add(offset as usize).cast()) };
}

/// A number at any kernel address; 0 if the address is not readable.
#[inline(always)]
pub fn probe_word<T: Plain>(from: Address, offset: u32) -> T {
    let mut word = zero::<T>();
    probe_bytes(ptr::from_mut(&mut word).cast(), mem::size_of::<T>() as u32, from, offset);
    word
}

/// A pointer at any kernel address; null if the address is not readable.
#[inline(always)]
pub fn pointer(from: Address, offset: u32) -> Address {
    probe_word::<u64>(from, offset) as Address
}

/// Address as a number, for the verifier too, to whom pointers of a known type are no numbers.
///
/// `room` is in a map: storing there and reading again loses the type.
#[inline(always)]
pub fn number(room: &mut u64, address: Address) -> u64 {
    let room = ptr::from_mut(room);
    // SAFETY: `room` is a valid reference.
    unsafe {
        ptr::write_volatile(room.cast::<Address>(), address);
        ptr::read_volatile(room)
    }
}

/// A field of one bit.
#[inline(always)]
pub fn bit(from: Address, byte: u32, bit: u32) -> u32 {
    (u32::from(probe_word::<u8>(from, byte)) >> (bit & 7)) & 1
}

/// Arguments of the tracepoint mmap_lock_acquire_returned (CONFIG_TRACING, Linux 5.11).
#[repr(C)]
pub struct Locked {
    mm: Address,
    write: u64,
    success: u64,
}

impl Locked {
    /// The address space, if it was locked for writing.
    #[inline(always)]
    pub fn for_writing(&self) -> Option<u64> {
        // The kernel passes both as bool, of whose word only the lowest byte counts.
        (self.write as u8 != 0 && self.success as u8 != 0).then_some(self.mm as u64)
    }
}
