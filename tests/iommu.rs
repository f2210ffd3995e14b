//! Devices of a guest behind an IOMMU that the guest's own kernel drives.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;
#[path = "iommu/vfio.rs"]
mod vfio;

use std::fs;
use std::io::{Read, Seek, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;

use support::kernels::kernels;
use support::net::free_port;
use support::process::{PATIENCE, Running, boot, run, run_the_guests_side};
use support::{Noise, temp_dir, write};

/// Tells the guest's side where to listen.
const PORT: &str = "RING3_TEST_PORT";
/// Tells it that the IOMMU is VT-d, and the type of domains: invalidations are put off and come in batches, or each unmapping waits
/// for its own.
const VTD: &str = "RING3_TEST_VTD";
const LAZY: &str = "RING3_TEST_VTD=DMA-FQ";
const STRICT: &str = "RING3_TEST_VTD=DMA";

const DISK: usize = 8 << 20;
const TALK: usize = 1 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Noise(seed).fill(&mut bytes);
    bytes
}

/// The number at the end of the line of `--stats` that begins with `name`.
fn counted(stats: &str, name: &str) -> Option<u64> {
    stats.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// A guest with this kernel and these options copies by disk, network and files: what `--stats` say at the end.
fn disk_network_and_files(kernel: &Path, options: &[&str]) -> String {
    let dir = temp_dir();
    let disk = write(dir.path(), "disk", &noise(1, DISK));
    let port = free_port().to_string();
    let all = [
        "--stats",
        "--disk",
        disk.to_str().unwrap(),
        "-p",
        &format!("127.0.0.1:{port}:{port}"),
        "--env",
        &format!("{PORT}={port}"),
    ];
    let options = [options, &all].concat();
    let (guest, mut output) = Running::boot_with_output(run_the_guests_side(kernel, &options));
    output.wait_for("the guest listens");
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    let talk = noise(2, TALK);
    let mut writer = stream.try_clone().unwrap();
    let theirs = talk.clone();
    let sender = std::thread::spawn(move || {
        writer.write_all(&theirs).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    assert!(back == talk, "{} of {} bytes came back, or others", back.len(), talk.len());
    output.rest();
    let end = guest.finish(PATIENCE);
    end.expect(0);
    assert!(fs::read(&disk).unwrap() == noise(3, DISK), "the disk has something else than the guest wrote");
    end.stderr
}

/// None of these counts is 0, and there were no faults.
fn check(stats: &str, counts: &[&str]) {
    for name in counts {
        assert!(counted(stats, name).is_some_and(|count| count > 0), "{name}: {stats}");
    }
    assert_eq!(counted(stats, "IOMMU: faults"), Some(0), "{stats}");
}

#[test]
fn disk_network_and_files_go_through_a_virtio_iommu() {
    let Some(kernels) = kernels() else { return };
    let options = ["--iommu", "virtio", "--append", "iommu.passthrough=0"];
    let stats = disk_network_and_files(kernels.newer(), &options);
    check(&stats, &["IOMMU: translations", "IOMMU: mappings made", "IOMMU: mappings removed"]);
}

const INTEL: [&str; 2] = ["IOMMU: translations", "IOMMU: attachments to the guest's tables"];

#[test]
fn disk_network_and_files_go_through_vt_d() {
    let Some(kernels) = kernels() else { return };
    check(&disk_network_and_files(kernels.newer(), &["--iommu", "intel", "--env", LAZY]), &INTEL);
}

#[test]
fn vt_d_takes_an_invalidation_for_each_unmapping() {
    let Some(kernels) = kernels() else { return };
    let options = ["--iommu", "intel", "--cpus", "2", "--append", "iommu.strict=1", "--env", STRICT];
    check(&disk_network_and_files(kernels.newer(), &options), &INTEL);
}

#[test]
fn the_older_kernel_drives_vt_d() {
    let Some(kernels) = kernels() else { return };
    let options = ["--iommu", "intel", "--cpus", "2", "--env", LAZY];
    check(&disk_network_and_files(kernels.older(), &options), &INTEL);
}

#[test]
#[ignore = "what runs in the guest"]
fn the_guests_side() {
    // The console, the file system, the disk, the entropy device and the network card, each in a group that translates.
    let groups: Vec<_> =
        fs::read_dir("/sys/kernel/iommu_groups").unwrap().map(|e| e.unwrap().path()).collect();
    assert!(groups.len() >= 5, "{groups:?}");
    for group in &groups {
        let kind = fs::read_to_string(group.join("type")).unwrap();
        assert!(kind.trim().starts_with("DMA"), "{}: {kind}", group.display());
        if let Ok(expected) = std::env::var(VTD) {
            assert_eq!(kind.trim(), expected, "{}", group.display());
            assert!(fs::exists("/sys/class/iommu/dmar0/devices").unwrap());
        }
    }
    // The file system: this program, which has run until here by page faults, in large pieces.
    let program = std::env::current_exe().unwrap();
    assert_eq!(fs::read(&program).unwrap().len() as u64, fs::metadata(&program).unwrap().len());
    // The disk.
    let mut disk = fs::File::options().read(true).write(true).open("/dev/vda").unwrap();
    let mut bytes = Vec::new();
    disk.read_to_end(&mut bytes).unwrap();
    assert!(bytes == noise(1, DISK), "the disk reads as something else");
    disk.rewind().unwrap();
    disk.write_all(&noise(3, DISK)).unwrap();
    disk.sync_all().unwrap();
    // The network.
    let port: u16 = std::env::var(PORT).unwrap().parse().unwrap();
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    println!("the guest listens");
    let (mut stream, _) = listener.accept().unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
}

#[test]
fn a_guest_without_an_iommu_has_no_groups() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &["--stats"], &["ls", "/sys/kernel/iommu_groups"]));
    end.expect(0);
    assert_eq!(end.text(), "");
    assert_eq!(counted(&end.stderr, "IOMMU: translations"), None);
}

#[test]
fn a_kernel_without_the_driver_is_refused_before_it_boots() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.older(), &["--iommu", "virtio"], &["true"]));
    end.expect_error("virtio_iommu");
}
