# shellcheck shell=bash
# What the scripts share: where the repository is, which cargo is taken, which compiler makes eBPF objects.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=$(basename "$0")
export DEBIAN_FRONTEND=noninteractive

say() { printf '%s: %s\n' "$me" "$*"; }
die() { printf '%s: error: %s\n' "$me" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# at_least WANTED FOUND: is version FOUND at least WANTED?
at_least() { [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# Runs a command as root: directly, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else die "must be root (there is no sudo) to run: $*"
    fi
}

# The oldest Rust that the workspace builds with.
rust_needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml")

# Puts a new enough cargo first on PATH, and cargo's own bin folder (bpf-linker, cargo-deny) behind everything.
# Fails if there is none.
use_rust() {
    local cargo dir
    dir=${CARGO_HOME:-$HOME/.cargo}/bin
    case ":$PATH:" in *":$dir:"*) ;; *) PATH=$PATH:$dir ;; esac
    for cargo in "$(command -v cargo || true)" "$dir/cargo" /usr/bin/cargo; do
        [ -x "$cargo" ] || continue
        at_least "$rust_needed" "$(cd "$root" && "$cargo" --version 2>/dev/null | cut -d' ' -f2)" || continue
        dir=$(dirname "$cargo")
        [ "$(command -v cargo || true)" = "$cargo" ] || PATH=$dir:$PATH
        export PATH
        return 0
    done
    export PATH
    return 1
}

# Finds a compiler that can make eBPF objects: sets bpf_rustc, and bpf_std to `prebuilt` (the target's core is in its
# sysroot) or `source` (core is compiled from rust-src). The order is the one of the engine's build script.
find_bpf_rustc() {
    local active nightly
    active=$(command -v rustc || true)
    for bpf_std in prebuilt source; do
        nightly=''
        [ $bpf_std = prebuilt ] || nightly=$(rustup which --toolchain nightly rustc 2>/dev/null || true)
        for bpf_rustc in ${STANDSTILL_BPF_RUSTC:-"$nightly" "$active" /usr/bin/rustc}; do
            bpf_core "$bpf_rustc" $bpf_std && return 0
        done
    done
    return 1
}

# bpf_core RUSTC prebuilt|source: does its sysroot hold the core?
bpf_core() {
    local lib
    [ -x "$1" ] && lib=$("$1" --print sysroot 2>/dev/null)/lib/rustlib || return 1
    case $2 in
        prebuilt) [ -d "$lib/bpfel-unknown-none" ] ;;
        source) [ -d "$lib/src/rust/library/core" ] ;;
    esac
}
