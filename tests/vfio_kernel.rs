//! Devices of a real kernel, by its own VFIO: in a virtual machine of QEMU's with an emulated IOMMU, whose kernel hands over
//! emulated devices.
//!
//! The program that uses them there is this test program itself: [`guest`] has what it does. The same program runs without a
//! virtual machine under `ring3 shim`, whose devices are ring3's own.
//!
//! Debian's kernels have no iommufd, so the doors that need one are tried under the shim; and on a real kernel too, where
//! `RING3_ORACLE_KERNEL` names one that has everything built in (tests/selftests/build-oracle.sh makes it).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

#[path = "vfio_kernel/guest.rs"]
mod guest;
mod support;

use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use support::kernels::kernels;
use support::process::{PATIENCE, Running, boot, finish, privileged, ring3, run};
use support::qemu::Guests;
use support::{Noise, skip, temp_dir, write};

/// A machine with an IOMMU, and devices behind it. One processor: with two, invalidations of the emulated IOMMU can stall.
const MACHINE: [&str; 14] = [
    "-machine",
    "q35,kernel-irqchip=split",
    "-m",
    "768M",
    "-device",
    "intel-iommu,intremap=on,caching-mode=on",
    "-device",
    "edu,addr=05.0",
    "-device",
    "nvme,addr=06.0,serial=handed-over,drive=disk",
    "-drive",
    "if=none,id=disk,driver=null-co,size=16M,read-zeroes=on",
    "-net",
    "none",
];

/// The kernel uses the IOMMU, does not find that a timer of a busy host's machine does not work, and is quiet about the accesses
/// that are meant to fail.
const WORDS: &str = "intel_iommu=on no_timer_check loglevel=1";

/// VFIO, where it is in modules.
const MODULES: [&str; 2] = ["vfio_pci", "vfio_iommu_type1"];

/// Gives the devices to vfio-pci, as a user would.
const HAND_OVER: &str = "mount -t tmpfs tmp /tmp
for card in 0000:00:05.0 0000:00:06.0; do
    device=/sys/bus/pci/devices/$card
    echo vfio-pci >$device/driver_override
    [ ! -e $device/driver ] || echo $card >$device/driver/unbind
    echo $card >/sys/bus/pci/drivers_probe
done
ulimit -l unlimited
";

/// Runs a part of this program with the devices.
fn script(part: &str, program: &Path) -> String {
    let program = program.file_name().unwrap().to_str().unwrap();
    format!(
        "{HAND_OVER}RING3_IN_A_GUEST=1 /bin/{program} --ignored --exact --nocapture --test-threads=1 guest::{part}
echo ENDED $?"
    )
}

/// What a part of this program says in a guest with this kernel.
fn in_a_guest(guests: &Guests, part: &str) -> String {
    let dir = temp_dir();
    let program = std::env::current_exe().unwrap();
    let mut qemu = guests.command_with(dir.path(), &script(part, &program), &[&program]);
    qemu.args(MACHINE);
    let end = Running::boot(qemu).finish(PATIENCE);
    let text = end.text();
    assert!(text.contains("ENDED 0"), "{text}\n{}", end.stderr);
    text
}

fn has(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|said| said.starts_with(line)), "no `{line}` in {text}");
    }
}

#[test]
fn devices_by_their_group() {
    let Some(kernels) = kernels() else { return };
    let guests = match Guests::of(kernels.newer(), &MODULES, WORDS) {
        Ok(guests) => guests,
        Err(why) => return skip(&why),
    };
    let said = in_a_guest(&guests, "by_the_group");
    // As `ring3 vfio info` prints it.
    has(
        &said,
        &[
            "device       PCI 1234:11e8",
            "BAR0         0x100000 bytes: read, write, mappable",
            "INTx         1: eventfd, maskable, automasked",
            "MSI          1: eventfd, all at once",
            "door         group",
            "DMA          0x0 to 0xfedfffff",
        ],
    );
}

#[test]
fn devices_by_their_own_nodes() {
    let Some(kernel) = std::env::var_os("RING3_ORACLE_KERNEL").map(PathBuf::from) else {
        return skip("no kernel with iommufd: Debian has none, and RING3_ORACLE_KERNEL names none");
    };
    let guests = match Guests::of(&kernel, &[], WORDS) {
        Ok(guests) => guests,
        Err(why) => return skip(&why),
    };
    let said = in_a_guest(&guests, "by_the_own_node");
    has(&said, &["door         own node", "DMA          0x0 to 0xfedfffff"]);
}

/// All files below a directory: their names below `to`, and where they are.
fn tree(from: &Path, to: &str, into: &mut Vec<(String, PathBuf)>) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{to}/{}", path.file_name().unwrap().display());
        if path.is_dir() {
            tree(&path, &name, into);
        } else {
            into.push((name, path));
        }
    }
}

/// Stock Linux in a machine of ring3's, in a stock Linux, in a machine of QEMU's: its disk is a controller of the outermost, behind
/// the IOMMUs of both. QEMU's machine has no TSC that is fit for a clock.
#[test]
fn a_guest_of_ring3_has_a_device_of_the_host() {
    let Some(kernels) = kernels() else { return };
    let guests = match Guests::of(kernels.newer(), &MODULES, WORDS) {
        Ok(guests) => guests,
        Err(why) => return skip(&why),
    };
    let dir = temp_dir();
    let mut files = vec![("/kernel/vmlinuz".to_owned(), kernels.newer().to_owned())];
    tree(&kernels.newer().parent().unwrap().join("modules"), "/kernel/modules", &mut files);
    let script = format!(
        "{HAND_OVER}export HOME=/tmp
ring3 run --kernel /kernel/vmlinuz --memory 256M --net none --iommu virtio --device vfio-pci=0000:00:06.0 -- /bin/busybox sh -c '
while [ ! -b /dev/nvme0n1 ]; do sleep 0.1; done
echo SERIAL $(cat /sys/class/nvme/nvme0/serial) $(cat /sys/class/nvme/nvme0/device/iommu_group/type)
dd if=/dev/nvme0n1 bs=1M count=4 2>/dev/null | md5sum
echo VECTORS $(grep -c PCI-MSIX.*nvme /proc/interrupts)' 2>/tmp/said || {{ cat /tmp/said; false; }}
echo ENDED $?"
    );
    let ring3 = Path::new(env!("CARGO_BIN_EXE_ring3"));
    let mut qemu = guests.command_with_files(dir.path(), &script, &[ring3], &files);
    qemu.args(MACHINE).args(["-m", "2G"]);
    let end = Running::boot(qemu).finish(PATIENCE);
    let text = end.text();
    assert!(text.contains("ENDED 0"), "{text}\n{}", end.stderr);
    // The controller's disk is all zeros.
    has(&text, &["SERIAL handed-over DMA-FQ", "b5cfa9d6c8febd618f91ac2843d50a1c", "VECTORS 2"]);
}

/// The devices of `ring3 shim`: what is tried there are the calls, not the hardware.
fn under_the_shim(part: &str) -> String {
    let mut command = ring3();
    command.args(["shim", "--device", "test,addr=0000:00:05.0", "--"]).arg(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", "--test-threads=1"]).arg(format!("guest::{part}"));
    command.env("RING3_IN_A_GUEST", "1");
    let end = finish(command, PATIENCE);
    end.expect(0);
    end.text()
}

#[test]
fn ring3s_own_devices_by_both_doors() {
    under_the_shim("the_test_device");
}

/// Bytes of a disk.
const DISK: usize = 8 << 20;

/// A stock guest reads and writes by a host's controller, which is behind the IOMMU that the guest drives: the host is the
/// shim, in whose iommufd the guest's mappings are.
#[test]
fn a_device_of_the_host_is_behind_the_guests_iommu() {
    let Some(kernels) = kernels() else { return };
    let most = getrlimit(Resource::Memlock).current;
    let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if !may && most.is_some_and(|most| most < 256 << 20) {
        return skip("as all of the guest's memory is locked, `ulimit -l` must be 262144 at least");
    }
    for kind in ["virtio", "intel"] {
        let dir = temp_dir();
        let mut bytes = vec![0; DISK];
        Noise(5).fill(&mut bytes);
        let disk = write(dir.path(), "disk", &bytes);
        let script = "set -e
while [ ! -b /dev/nvme0n1 ]; do sleep 0.1; done
dd if=/dev/nvme0n1 of=/tmp/half bs=1M count=4 iflag=direct 2>/dev/null
dd if=/tmp/half of=/dev/nvme0n1 bs=1M seek=4 oflag=direct 2>/dev/null
echo TYPE $(cat /sys/class/nvme/nvme0/device/iommu_group/type)";
        let options = [
            "--iommu",
            kind,
            "--append",
            "iommu.passthrough=0",
            "--memory",
            "256M",
            "--net",
            "none",
            // It takes that right away, with the others.
            "--isolation",
            "off",
            "--device",
            "vfio-pci=0000:00:06.0,door=cdev",
        ];
        let guest = run(kernels.newer(), &options, &["sh", "-c", script]);
        // Who has CAP_IPC_LOCK may lock as much as he likes.
        let mut command = privileged();
        command.env("HOME", "/nonexistent").current_dir("/");
        let device = format!("nvme,file={},addr=0000:00:06.0", disk.display());
        command.args(["shim", "--device", &device, "--"]).arg(guest.get_program()).args(guest.get_args());
        let end = boot(command);
        end.expect(0);
        assert!(end.text().contains("TYPE DMA"), "{}", end.text());
        let after = std::fs::read(&disk).unwrap();
        let (first, second) = after.split_at(DISK / 2);
        assert!(first == &bytes[..DISK / 2] && second == first, "{kind}: the disk has something else");
    }
}

#[test]
fn what_a_host_without_the_device_is_told() {
    let mut info = ring3();
    info.args(["vfio", "info", "vfio-pci=ffff:ff:1f.7"]);
    finish(info, PATIENCE).expect_error("ffff:ff:1f.7 is not on this host's PCI bus");
}
