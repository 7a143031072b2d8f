//! Types shared between the parasite side and userspace.
#![no_std]
