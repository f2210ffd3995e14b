//! Builds what runs elsewhere, for `include_bytes!`: `guest-init`, the first process of a Linux guest, statically
//! linked, and `pvm-guest`, the kernel that checks the PVM guest ABI; and `shim`, the library that `ring3 shim` has loaded
//! before a program of the host.
//!
//! A nested cargo builds each into a target directory below `OUT_DIR`: a second cargo on the outer target
//! directory would wait for the lock that the outer one holds. What the outer cargo put into the environment
//! for its own compiler runs (flags, wrappers such as clippy's, coverage, profile overrides) is taken out.
//!
//! And collects the tags beside system calls, of which the filters of user-mode networking are made.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program or a library: a package of the workspace.
struct Program {
    package: &'static str,
    /// What cargo builds of it, and the name of the file.
    target: &'static [&'static str],
    file: &'static str,
    /// What it is optimized for.
    optimize: &'static str,
    /// What it is made from, below the workspace's `crates`.
    inputs: &'static [&'static str],
    features: &'static str,
    rustflags: &'static str,
    /// The variable that tells the crate where the file is.
    variable: &'static str,
}

const PROGRAMS: [Program; 3] = [
    Program {
        package: "guest-init",
        target: &["--bin", "guest-init"],
        file: "guest-init",
        optimize: "z",
        inputs: &["guest-init/src", "guest-init/Cargo.toml"],
        features: "",
        rustflags: "-Ctarget-feature=+crt-static -Crelocation-model=static -Cstrip=symbols",
        variable: "RING3_GUEST_INIT",
    },
    Program {
        package: "pvm-guest",
        target: &["--bin", "pvm-guest"],
        file: "pvm-guest",
        optimize: "z",
        inputs: &["pvm-guest", "pvm/src", "pvm/Cargo.toml"],
        features: "kernel",
        rustflags: "-Cstrip=symbols",
        variable: "RING3_PVM_GUEST",
    },
    Program {
        package: "shim",
        target: &["--lib"],
        file: "libring3_shim.so",
        optimize: "3",
        inputs: &["shim", "vfio", "disk", "iommufd", "pci", "uapi"],
        features: "",
        rustflags: "-Cstrip=symbols",
        variable: "RING3_SHIM_LIBRARY",
    },
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for program in &PROGRAMS {
        let binary = build(program);
        println!("cargo::rustc-env={}={}", program.variable, binary.display());
    }
    collect_tags();
}

/// Where system calls are tagged, below the workspace's `crates`.
const TAGGED: [&str; 3] = ["usernet/src", "taps/src", "ring3/src/net"];

/// How a tag begins, after the comment's slashes.
const TAG: &str = "syscalls";

/// Writes `syscall_tags.rs`: a table of modes, names and numbers, from comments as `ring3::net::isolation::calls` describes
/// them.
fn collect_tags() {
    let crates = path("CARGO_MANIFEST_DIR").join("..");
    let mut tags = BTreeSet::new();
    for directory in TAGGED.map(|directory| crates.join(directory)) {
        println!("cargo::rerun-if-changed={}", directory.display());
        tags_below(&directory, &mut tags);
    }
    let mut text =
        String::from("/// What the tags say: a mode, or \"\" for all; a call's name; its number.\n");
    text += "const TAGS: &[(&str, &str, c_long)] = &[\n";
    for (mode, name) in tags {
        text += &format!("    ({mode:?}, {name:?}, libc::SYS_{name}),\n");
    }
    text += "];\n";
    let file = path("OUT_DIR").join("syscall_tags.rs");
    fs::write(&file, text).unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", file.display())));
}

fn tags_below(directory: &Path, tags: &mut BTreeSet<(String, String)>) {
    let mut read = || -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?.path();
            if entry.is_dir() {
                tags_below(&entry, tags);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                fs::read_to_string(&entry)?.lines().for_each(|line| tags.extend(tags_of(line)));
            }
        }
        Ok(())
    };
    read().unwrap_or_else(|error| fail(&format!("cannot read {}: {error}", directory.display())));
}

/// The modes and names that a line tags.
fn tags_of(line: &str) -> Vec<(String, String)> {
    let tag = line.trim_start().strip_prefix("// ").and_then(|comment| comment.strip_prefix(TAG));
    let Some((modes, names)) = tag.and_then(|tag| tag.split_once(':')) else { return Vec::new() };
    let modes = match modes {
        "" => vec![""],
        _ => match modes.strip_prefix('(').and_then(|modes| modes.strip_suffix(')')) {
            Some(modes) => modes.split(' ').collect(),
            None => return Vec::new(),
        },
    };
    let names: Vec<&str> = names.split_whitespace().collect();
    modes.iter().flat_map(|mode| names.iter().map(|name| ((*mode).to_owned(), (*name).to_owned()))).collect()
}

/// A path that cargo tells by a variable.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env::var_os(name).unwrap_or_else(|| fail(&format!("{name} is not set"))))
}

/// Builds a program; returns the file.
fn build(program: &Program) -> PathBuf {
    let workspace = path("CARGO_MANIFEST_DIR").join("../..");
    let package = program.package;
    let target_dir = path("OUT_DIR").join(package);
    println!("cargo::rerun-if-changed={}", workspace.join("Cargo.lock").display());
    for input in program.inputs {
        println!("cargo::rerun-if-changed={}", workspace.join("crates").join(input).display());
    }

    let mut cargo = Command::new(path("CARGO"));
    for (name, _) in env::vars_os().filter(|(name, _)| is_outer(name)) {
        cargo.env_remove(name);
    }
    cargo
        .current_dir(&workspace)
        .args(["build", "--quiet", "--locked", "--package", package])
        .args(program.target)
        .args(["--features", program.features])
        // With a target named, RUSTFLAGS leaves build scripts and procedural macros alone.
        .args(["--release", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTFLAGS", program.rustflags)
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", program.optimize)
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    if env::var_os("CARGO_NET_OFFLINE").is_some_and(|v| v == "true") {
        cargo.arg("--offline");
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("building {package} for {TARGET} failed: {status}")),
        Err(error) => fail(&format!("cannot run cargo to build {package}: {error}")),
    }
    [&target_dir, Path::new(TARGET), Path::new("release"), Path::new(program.file)].iter().collect()
}

/// Whether a variable belongs to the outer cargo's own run, not to the user's set-up (which mirrors, proxies,
/// registries and tool chains live in).
fn is_outer(name: &OsString) -> bool {
    const WHOLE: [&str; 12] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC",
        "RUSTDOC",
        "RUSTC_LINKER",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
        "TARGET",
        "LLVM_PROFILE_FILE",
        "MAKEFLAGS",
        "NUM_JOBS",
    ];
    const STARTS: [&str; 9] = [
        "CARGO_ENCODED_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_PROFILE_",
        "CARGO_BUILD_",
        "CARGO_TARGET_",
        "DEP_",
    ];
    let Some(name) = name.to_str() else { return false };
    WHOLE.contains(&name) || STARTS.iter().any(|start| name.starts_with(start))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
