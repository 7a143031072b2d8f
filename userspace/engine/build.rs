//! Builds what the engine embeds: the restorer blob and the eBPF programs.

#[path = "build/blob.rs"]
mod blob;

fn main() {
    blob::build();
}
