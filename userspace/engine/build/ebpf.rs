//! Compiles `ebpf/programs` for the BPF target.
//!
//! That takes a compiler with a `core` for `bpfel-unknown-none`, built or as source, and bpf-linker. Neither need be of
//! the toolchain that builds the engine; `scripts/setup` installs both, and looks for them in the same order.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";

pub(crate) fn build() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../..");
    let programs = root.join("ebpf/programs");
    for changed in ["src", "Cargo.toml", "Cargo.lock", "../abi/src", "../abi/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", programs.join(changed).display());
    }
    for changed in ["STANDSTILL_BPF_RUSTC", "STANDSTILL_BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={changed}");
    }
    let compiler = Compiler::find().unwrap_or_else(|| {
        give_up("there is no Rust compiler with a core library for bpfel-unknown-none on this machine")
    });
    let linker = linker().unwrap_or_else(|| give_up("there is no bpf-linker on this machine"));
    let target_dir = Path::new(&env::var("OUT_DIR").unwrap()).join("ebpf");
    let status = compiler
        .cargo(&linker)
        .arg("--manifest-path")
        .arg(programs.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => {
            report("ebpf/programs does not build: see the messages of its compiler");
            // Unlike the errors alone, this makes cargo show those messages.
            std::process::exit(1);
        }
        Err(e) => give_up(&format!("cargo does not run: {e}")),
    }
    for name in ["observers", "tracker", "aliases", "aio"] {
        let object = target_dir.join(TARGET).join("release").join(name);
        fs::copy(object, target_dir.with_file_name(format!("{name}.o")))
            .expect("cargo has written the object into OUT_DIR");
    }
}

/// Fails the build with one message that names the ways out.
fn report(reason: &str) {
    for line in [
        reason,
        "run scripts/setup, which installs what eBPF programs need;",
        "or build without them (longer freezes, same images): cargo build --no-default-features",
    ] {
        println!("cargo::error={line}");
    }
}

/// Fails the build without trying.
fn give_up(reason: &str) -> ! {
    report(reason);
    std::process::exit(0)
}

/// A Rust compiler that can make BPF objects.
struct Compiler {
    rustc: PathBuf,
    core: Core,
}

/// Where its `core` for the BPF target comes from.
#[derive(Clone, Copy)]
enum Core {
    Prebuilt,
    Source,
}

impl Compiler {
    fn find() -> Option<Self> {
        [Core::Prebuilt, Core::Source].into_iter().find_map(|core| {
            let candidates = match env::var_os("STANDSTILL_BPF_RUSTC") {
                Some(rustc) => vec![rustc],
                None => {
                    // Not even asked for unless needed: rustup takes its time.
                    let nightly = match core {
                        Core::Prebuilt => None,
                        Core::Source => nightly(),
                    };
                    nightly.into_iter().chain(env::var_os("RUSTC")).chain([OsString::from("/usr/bin/rustc")]).collect()
                }
            };
            candidates.iter().find_map(|rustc| Self::with(rustc, core))
        })
    }

    /// This compiler, if it has `core` in this form.
    fn with(rustc: &OsString, core: Core) -> Option<Self> {
        let lib = sysroot(rustc)?.join("lib/rustlib");
        let there = match core {
            Core::Prebuilt => lib.join(TARGET),
            Core::Source => lib.join("src/rust/library/core"),
        };
        // A bare `rustc` can be rustup's, which the cargo called below would ask for another toolchain.
        let rustc = PathBuf::from(rustc);
        let rustc = if rustc.is_absolute() { rustc } else { lib.join("../../bin/rustc") };
        there.is_dir().then_some(Self { rustc, core })
    }

    /// A cargo that builds for the BPF target, as far as it does not depend on the crate.
    fn cargo(&self, linker: &Path) -> Command {
        // Building core from source takes the cargo that belongs to it.
        let own = self.rustc.with_file_name("cargo");
        let cargo = match self.core {
            Core::Source if own.exists() => own.into_os_string(),
            _ => env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
        };
        let mut command = Command::new(cargo);
        // What is set for the engine's build (or by clippy) is not meant for this one.
        const OUTER: [&str; 13] = [
            "CARGO_BUILD_",
            "CARGO_CFG_",
            "CARGO_FEATURE_",
            "CARGO_INCREMENTAL",
            "CARGO_MAKEFLAGS",
            "CARGO_PROFILE_",
            "CARGO_TARGET_",
            "CARGO_UNSTABLE_",
            "MAKEFLAGS",
            "RUSTC",
            "RUSTDOC",
            "RUSTFLAGS",
            "RUSTUP_TOOLCHAIN",
        ];
        for (name, _) in env::vars_os() {
            if OUTER.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command
            .args(["build", "--release", "--quiet", "--locked", "--target", TARGET])
            .env("RUSTC", &self.rustc)
            // Empty: none, whatever a configuration file says.
            .env("RUSTC_WRAPPER", "")
            .env("RUSTC_WORKSPACE_WRAPPER", "")
            // aya-ebpf needs unstable features of the compiler, inline assembly for BPF among them.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", format!("-Clinker={}", linker.display()))
            // The machine the programs will run on: aya-ebpf would take the one it is built on.
            .env("AYA_BPF_TARGET_ARCH", env::var("CARGO_CFG_TARGET_ARCH").unwrap());
        if matches!(self.core, Core::Source) {
            command.arg("-Zbuild-std=core");
        }
        command
    }
}

fn sysroot(rustc: &OsString) -> Option<PathBuf> {
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().ok().filter(|o| o.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim_end()))
}

/// The compiler of rustup's nightly toolchain, if there is one.
fn nightly() -> Option<OsString> {
    let output = Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| path.trim_end().into())
}

/// bpf-linker: as the environment says, on PATH, or where cargo installs.
fn linker() -> Option<PathBuf> {
    if let Some(linker) = env::var_os("STANDSTILL_BPF_LINKER") {
        return Some(linker.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let home = |name, below: &str| env::var_os(name).map(|dir| Path::new(&dir).join(below));
    env::split_paths(&path)
        .chain(home("CARGO_HOME", "bin"))
        .chain(home("HOME", ".cargo/bin"))
        .chain([PathBuf::from("/usr/local/bin")])
        .map(|dir| dir.join("bpf-linker"))
        .find(|linker| linker.is_file())
}
