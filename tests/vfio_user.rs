//! `ring3 vfio`: a disk for another monitor, which is QEMU's vfio-user client with a stock kernel.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::process::Signal;
use support::process::{PATIENCE, Running, finish, ring3};
use support::qemu::{guests, next};
use support::{Noise, temp_dir, write};

/// Bytes of the disk.
const SIZE: usize = 32 << 20;

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Noise(seed).fill(&mut bytes);
    bytes
}

/// `ring3 vfio serve nvme` when its socket is there.
fn serve(dir: &Path, options: &[&str]) -> Running {
    let socket = dir.join("socket");
    let mut command = ring3();
    command.args(["vfio", "serve", "nvme", "--file"]).arg(dir.join("disk"));
    command.arg("--socket").arg(&socket).args(options);
    let running = Running::start_quiet(command);
    running.wait_until(|| socket.exists());
    assert!(socket.exists(), "it ended early: {:?}", running.finish(PATIENCE));
    running
}

/// What every guest waits for.
const DISK: &str = "while [ ! -b /dev/nvme0n1 ]; do :; done\n";

/// Reads all of the disk, copies its first half to the second, and drives the controller through its resets.
const WORK: &str = "echo SUM $(md5sum </dev/nvme0n1)
dd if=/dev/nvme0n1 of=/dev/nvme0n1 bs=1M count=16 seek=16 conv=fsync 2>/dev/null
echo 1 >/sys/class/nvme/nvme0/reset_controller
device=$(basename $(readlink /sys/class/nvme/nvme0/device))
echo $device >/sys/bus/pci/drivers/nvme/unbind
echo 1 >/sys/bus/pci/devices/$device/reset
echo $device >/sys/bus/pci/drivers/nvme/bind
while [ ! -b /dev/nvme0n1 ]; do :; done
echo BACK $(dd if=/dev/nvme0n1 bs=1M skip=16 2>/dev/null | md5sum)
echo SERIAL $(cat /sys/class/nvme/nvme0/serial)
echo VECTORS $(grep -c nvme0q /proc/interrupts)
";

/// What a guest under QEMU says, with this memory.
fn guest(dir: &Path, memory: &[&str], script: &str) -> Option<String> {
    let (guests, qemu) = (guests()?, next()?);
    let mut qemu = guests.command_of(qemu, dir, &format!("{DISK}{script}"));
    let socket = dir.join("socket");
    qemu.args(memory).arg("-device").arg(format!(
        "{{\"driver\":\"vfio-user-pci\",\"socket\":{{\"type\":\"unix\",\"path\":\"{}\"}}}}",
        socket.display()
    ));
    let end = Running::boot(qemu).finish(PATIENCE);
    end.expect(0);
    Some(end.text())
}

fn line<'a>(text: &'a str, word: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    line.unwrap_or_else(|| panic!("no {word} in {text}")).trim()
}

/// As md5sum of busybox prints it.
fn md5sum(dir: &Path, bytes: &[u8]) -> String {
    let path = write(dir, "bytes", bytes);
    let mut command = std::process::Command::new("busybox");
    command.arg("md5sum").arg(path);
    finish(command, PATIENCE).text().split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_of_qemu_has_the_disk() {
    if guests().is_none() || next().is_none() {
        return;
    }
    let dir = temp_dir();
    let before = noise(1, SIZE);
    write(dir.path(), "disk", &before);
    let server = serve(dir.path(), &["--serial", "ring3-e2e", "-v"]);

    // Memory that the server maps.
    let shared = [
        "-object",
        "memory-backend-memfd,id=m,size=256M,share=on",
        "-machine",
        "q35,memory-backend=m",
        "-smp",
        "2",
    ];
    let said = guest(dir.path(), &shared, WORK).unwrap();
    let half = SIZE / 2;
    assert!(line(&said, "SUM").starts_with(&md5sum(dir.path(), &before)), "{said}");
    assert!(line(&said, "BACK").starts_with(&md5sum(dir.path(), &before[..half])), "{said}");
    assert_eq!((line(&said, "SERIAL"), line(&said, "VECTORS")), ("ring3-e2e", "3"));
    let mut after = vec![0; SIZE];
    File::open(dir.path().join("disk")).unwrap().read_exact_at(&mut after, 0).unwrap();
    assert!(after == [&before[..half], &before[..half]].concat(), "the file has something else");

    // The next guest, whose memory the server has to ask for.
    let script = "echo SUM $(dd if=/dev/nvme0n1 bs=1M count=4 2>/dev/null | md5sum)
dd if=/dev/nvme0n1 of=/dev/nvme0n1 bs=1M skip=1 count=2 seek=20 conv=fsync 2>/dev/null\n";
    let said = guest(dir.path(), &["-machine", "q35"], script).unwrap();
    assert!(line(&said, "SUM").starts_with(&md5sum(dir.path(), &before[..4 << 20])), "{said}");
    File::open(dir.path().join("disk")).unwrap().read_exact_at(&mut after, 0).unwrap();
    assert!(after[20 << 20..22 << 20] == before[1 << 20..3 << 20], "the file has something else");

    server.signal(Signal::TERM);
    let end = server.finish(PATIENCE);
    end.expect(0);
    assert!(!dir.path().join("socket").exists(), "the socket is left behind");
    assert_eq!(end.stderr.matches("a client has come").count(), 2, "{}", end.stderr);
    assert!(end.stderr.contains("isolation: no_new_privs"), "{}", end.stderr);
}

#[test]
fn what_a_server_has_is_printed() {
    let dir = temp_dir();
    write(dir.path(), "disk", &[0; 1 << 20]);
    let server = serve(dir.path(), &["--queues", "3", "--read-only"]);
    let socket = dir.path().join("socket");
    let info = || {
        let mut command = ring3();
        command.args(["vfio", "info", "--socket"]).arg(&socket);
        finish(command, PATIENCE)
    };
    for _ in 0..2 {
        let said = info();
        said.expect(0);
        let said = said.text();
        assert!(line(&said, "device").starts_with("PCI "), "{said}");
        assert!(line(&said, "class").starts_with("010802"), "{said}");
        assert!(line(&said, "BAR0").starts_with("0x4000 bytes: read, write"), "{said}");
        assert_eq!(line(&said, "MSI-X"), "4: eventfd");
        assert_eq!(line(&said, "INTx"), "1: eventfd, maskable, automasked");
        assert_eq!((line(&said, "reset"), line(&said, "twin socket")), ("yes", "yes"));
    }
    // Another server cannot have the same socket, nor anything that is no disk.
    let mut second = ring3();
    second.args(["vfio", "serve", "nvme", "--file", "/dev/tty", "--socket"]).arg(&socket);
    finish(second, PATIENCE).expect_error("/dev/tty");
    let mut second = ring3();
    second
        .args(["vfio", "serve", "nvme", "--file"])
        .arg(dir.path().join("disk"))
        .arg("--socket")
        .arg(&socket);
    finish(second, PATIENCE).expect_error("cannot listen on");
    server.signal(Signal::INT);
    server.finish(PATIENCE).expect(0);
    assert!(!socket.exists(), "the socket is left behind");
    info().expect_error("cannot connect to");
}

#[test]
fn the_test_device_is_served() {
    let dir = temp_dir();
    let socket = dir.path().join("socket");
    let mut command = ring3();
    command.args(["vfio", "serve", "test", "--once", "--socket"]).arg(&socket);
    let server = Running::start_quiet(command);
    server.wait_until(|| socket.exists());
    let mut info = ring3();
    info.args(["vfio", "info", "--socket"]).arg(&socket);
    let said = finish(info, PATIENCE);
    said.expect(0);
    let said = said.text();
    assert!(line(&said, "device").starts_with("PCI 1234:7e57"), "{said}");
    assert!(
        line(&said, "BAR2").contains("mappable") && line(&said, "BAR4").contains("mappable 0x"),
        "{said}"
    );
    assert!(line(&said, "migration").contains("stop-copy"), "{said}");
    server.finish(PATIENCE).expect(0);
}

#[test]
fn a_server_for_one_client() {
    let dir = temp_dir();
    write(dir.path(), "disk", &[0; 1 << 20]);
    let server = serve(dir.path(), &["--once", "--isolation", "off"]);
    let mut info = ring3();
    info.args(["vfio", "info", "--socket"]).arg(dir.path().join("socket"));
    finish(info, PATIENCE).expect(0);
    server.finish(PATIENCE).expect(0);
    assert!(!dir.path().join("socket").exists(), "the socket is left behind");
}
