//! Builds what the engine embeds: the restorer blob and the eBPF programs.

#[path = "build/blob.rs"]
mod blob;
#[cfg(feature = "ebpf")]
#[path = "build/ebpf.rs"]
mod ebpf;

fn main() {
    blob::build();
    #[cfg(feature = "ebpf")]
    ebpf::build();
}
