//! What differs between processor architectures.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("Standstill runs on x86-64; another architecture is one more module here and in parasite/blob/src/arch");
