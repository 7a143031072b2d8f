//! Types shared between the ebpf side and userspace.
#![no_std]
