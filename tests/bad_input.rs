//! Bad input on the command line: each gets a message that says what is wrong, status 125, and no panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use support::kernels::kernels;
use support::process::{Finished, finish, other_user, ring3};
use support::{Noise, skip, temp_dir, write};

/// Refusals come before the guest starts, or soon after.
const SOON: Duration = Duration::from_secs(60);

/// Runs `ring3 run` with these options; the command would end with 0.
fn refuse(options: &[&str]) -> Finished {
    let mut command = ring3();
    command.arg("run").args(options).args(["--timeout", "30", "--", "/bin/true"]);
    let end = finish(command, SOON);
    end.expect(125);
    assert!(end.text().is_empty(), "{}", end.text());
    // What was wanted, and the chain of causes.
    assert!(end.stderr.lines().count() <= 5, "not clear: {}", end.stderr);
    end
}

/// Refuses a kernel file with this content.
fn refuse_kernel(dir: &Path, bytes: &[u8], words: &str) {
    let path = write(dir, "kernel", bytes);
    let end = refuse(&["--kernel", path.to_str().unwrap()]);
    end.expect_error(words);
    assert!(end.stderr.contains(path.to_str().unwrap()), "the file is not named: {}", end.stderr);
}

#[test]
fn files_that_are_no_kernels() {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    refuse(&["--kernel", &path("missing")]).expect_error("No such file");
    refuse(&["--kernel", dir.path().to_str().unwrap()]).expect_error("directory");
    refuse(&["--kernel", "/dev/zero"]).expect_error("file too large");
    refuse_kernel(dir.path(), b"", "empty");
    refuse_kernel(dir.path(), b"#!/bin/sh\necho no kernel\n", "a script");
    let mut noise = vec![0; 1 << 20];
    Noise(7).fill(&mut noise);
    refuse_kernel(dir.path(), &noise, "unknown kind");

    let mut arm_image = vec![0; 4096];
    arm_image[56..60].copy_from_slice(b"ARM\x64");
    refuse_kernel(dir.path(), &arm_image, "arm64 Image");
    let mut arm_elf = vec![0; 4096];
    arm_elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
    refuse_kernel(dir.path(), &arm_elf, "aarch64");

    if other_user().is_some() || !rustix::process::geteuid().is_root() {
        let secret = write(dir.path(), "secret", b"\x7fELF");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
        refuse(&["--kernel", secret.to_str().unwrap()]).expect_error("Permission denied");
    } else {
        skip("an unreadable kernel: root reads everything");
    }
}

#[test]
fn damaged_kernels() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    // With the modules beside it, so that the kernel is what is found wrong.
    let modules = kernels.older().parent().unwrap().join("modules");
    std::os::unix::fs::symlink(modules, dir.path().join("modules")).unwrap();
    let whole = fs::read(kernels.older()).unwrap();
    for length in [600, 20_000, 1 << 20, whole.len() - 100_000] {
        refuse_kernel(dir.path(), &whole[..length], "truncated");
    }
    let mut corrupt = whole.clone();
    let middle = whole.len() / 2;
    for byte in &mut corrupt[middle..middle + 4096] {
        *byte ^= 0x5a;
    }
    refuse_kernel(dir.path(), &corrupt, "cannot boot");
    let mut garbage = whole;
    Noise(9).fill(&mut garbage[20_000..28_000]);
    refuse_kernel(dir.path(), &garbage, "cannot boot");
}

#[test]
fn a_kernel_without_virtio() {
    let dir = temp_dir();
    let path = write(dir.path(), "kernel", b"\x7fELF Linux version 5.0-none x virtio_console");
    refuse(&["--kernel", path.to_str().unwrap()]).expect_error("has no virtio_pci built in");
}

#[test]
fn roots_disks_and_directories_that_cannot_be_used() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    let file = write(dir.path(), "file", &[0; 1000]);
    let kernel = kernels.newer().to_str().unwrap();
    let refuse = |options: &[&str]| refuse(&[&["--kernel", kernel], options].concat());
    refuse(&["--root", "/no/such/root"]).expect_error("as the guest's root");
    refuse(&["--root", file.to_str().unwrap()]).expect_error("as the guest's root");
    refuse(&["--workdir", "/no/such/dir"]).expect_error("no such directory below the guest's root");
    refuse(&["--disk", "/no/such/disk"]).expect_error("as a disk");
    refuse(&["--disk", dir.path().to_str().unwrap()]).expect_error("as a disk");
    refuse(&["--disk", file.to_str().unwrap()]).expect_error("1000 bytes");
    if other_user().is_some() || !rustix::process::geteuid().is_root() {
        let closed = dir.path().join("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        refuse(&["--root", closed.to_str().unwrap()]).expect_error("Permission denied");
        let disk = write(dir.path(), "disk", &[0; 4096]);
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).unwrap();
        refuse(&["--disk", disk.to_str().unwrap()]).expect_error("Permission denied");
    } else {
        skip("an unreadable root and disk: root reads everything");
    }
}

#[test]
fn impossible_sizes_and_values() {
    for (options, words) in [
        (["--memory", "1M"], "64M to 1T"),
        (["--memory", "2048"], "512M or 2G"),
        (["--memory", "lots"], "a whole number"),
        (["--memory", "18446744073709551615G"], "64M"),
        (["--cpus", "0"], "1..=64"),
        (["--cpus", "1000000"], "1..=64"),
        (["--timeout", "never"], "seconds"),
        (["--engine", "magic"], "interpret"),
        (["--env", "=x"], "needs a name"),
        (["--no-such-option", "x"], "--no-such-option"),
    ] {
        let mut command = ring3();
        command.arg("run").args(options).args(["--", "/bin/true"]);
        finish(command, SOON).expect_error(words);
    }
}

/// A size that the command line takes but no host may be able to give.
#[test]
fn more_memory_than_there_is() {
    let Some(kernels) = kernels() else { return };
    refuse(&["--kernel", kernels.newer().to_str().unwrap(), "--memory", "1T"]).expect_error("memory");
}

#[test]
fn no_home_for_a_cache() {
    let mut command = ring3();
    command.env_remove("HOME").args(["kernel", "fetch"]);
    finish(command, SOON).expect_error("XDG_CACHE_HOME");
    let dir = temp_dir();
    let file = write(dir.path(), "file", b"");
    let mut command = ring3();
    command.env("XDG_CACHE_HOME", &file).args(["kernel", "fetch"]);
    finish(command, SOON).expect_error(file.to_str().unwrap());
}
