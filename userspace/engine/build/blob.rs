//! Compiles `parasite/blob` and flattens it to the bytes that are copied into a task.

use object::{Object, ObjectSection, ObjectSymbol};
use std::{env, fs, path::Path, process::Command};

pub(crate) fn build() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../..");
    let out = env::var("OUT_DIR").unwrap();
    let blob = root.join("parasite/blob");
    for dir in [blob.join("src"), blob.join("restorer.ld"), blob.join("Cargo.toml"), root.join("parasite/abi/src")] {
        println!("cargo::rerun-if-changed={}", dir.display());
    }
    let target = format!("{}-unknown-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH").unwrap());
    let script = blob.join("restorer.ld").canonicalize().unwrap();
    let flags = [
        // Position independent executable: whatever is not PC-relative shows up as a dynamic relocation.
        "-Crelocation-model=pic".to_string(),
        "-Clink-args=-nostdlib -nostartfiles -static-pie -Wl,--no-dynamic-linker,--build-id=none,--gc-sections".into(),
        format!("-Clink-arg=-Wl,-T,{}", script.display()),
    ];
    // A cargo of its own: the blob has other flags than the host program, and clippy must not stand in for rustc.
    let status = Command::new(env::var("CARGO").unwrap())
        .args(["build", "--release", "--quiet", "--manifest-path"])
        .arg(blob.join("Cargo.toml"))
        .args(["--target", &target, "--target-dir"])
        .arg(Path::new(&out).join("blob"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "parasite/blob does not build: see the messages above");
    let elf =
        fs::read(Path::new(&out).join("blob").join(&target).join("release/restorer")).expect("the blob's ELF file");
    fs::write(Path::new(&out).join("restorer.bin"), flatten(&elf)).expect("OUT_DIR is writable");
}

/// The blob's bytes, `start` first. Relocations, writable data and undefined symbols fail the build by name.
fn flatten(elf: &[u8]) -> Vec<u8> {
    let file = object::File::parse(elf).expect("the blob is an ELF file");
    if let Some((offset, relocation)) = file.dynamic_relocations().into_iter().flatten().next() {
        let at = file.symbols().filter(|s| s.address() <= offset).max_by_key(|s| s.address());
        let name = at.as_ref().and_then(|s| s.name().ok()).unwrap_or("?");
        panic!("parasite/blob: {name} needs a relocation ({:?}): it must be position independent", relocation.kind());
    }
    for symbol in file.symbols() {
        let name = symbol.name().unwrap_or("?");
        assert!(!symbol.is_undefined() || name.is_empty(), "parasite/blob: undefined symbol {name}");
    }
    for section in file.sections() {
        let name = section.name().unwrap_or("?");
        assert!(
            name != ".writable" || section.size() == 0,
            "parasite/blob: {} bytes of writable data or GOT entries",
            section.size()
        );
        assert!(!name.starts_with(".rela") || section.size() == 0, "parasite/blob: {name} is not empty");
    }
    let blob = file.section_by_name(".blob").expect("the linker script makes .blob");
    let start = file.symbols().find(|s| s.name() == Ok("start")).expect("symbol start");
    assert_eq!(start.address(), blob.address(), "parasite/blob: start must come first");
    blob.data().expect("bytes of .blob").to_vec()
}
