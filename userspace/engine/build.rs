//! Builds what the engine embeds: the restorer blob and the eBPF programs.

fn main() {}
