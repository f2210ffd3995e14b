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

use support::kernels::kernels;
use support::process::{PATIENCE, Running, finish, ring3};
use support::qemu::Guests;
use support::{skip, temp_dir};

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
    "if=none,id=disk,driver=null-co,size=16M",
    "-net",
    "none",
];

/// Gives the devices to vfio-pci, as a user would, and runs a part of this program.
fn script(part: &str, program: &Path) -> String {
    let program = program.file_name().unwrap().to_str().unwrap();
    format!(
        "mount -t tmpfs tmp /tmp
for card in 0000:00:05.0 0000:00:06.0; do
    echo vfio-pci >/sys/bus/pci/devices/$card/driver_override
    [ ! -e /sys/bus/pci/devices/$card/driver ] || echo $card >/sys/bus/pci/devices/$card/driver/unbind
    echo $card >/sys/bus/pci/drivers_probe
done
ulimit -l unlimited
RING3_IN_A_GUEST=1 /bin/{program} --ignored --exact --nocapture --test-threads=1 guest::{part}
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
    let guests =
        match Guests::of(kernels.newer(), &["vfio_pci", "vfio_iommu_type1"], "intel_iommu=on loglevel=1") {
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
    let guests = match Guests::of(&kernel, &[], "intel_iommu=on no_timer_check loglevel=1") {
        Ok(guests) => guests,
        Err(why) => return skip(&why),
    };
    let said = in_a_guest(&guests, "by_the_own_node");
    has(&said, &["door         own node", "DMA          0x0 to 0xfedfffff"]);
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

#[test]
fn what_a_host_without_the_device_is_told() {
    let mut info = ring3();
    info.args(["vfio", "info", "vfio-pci=ffff:ff:1f.7"]);
    finish(info, PATIENCE).expect_error("ffff:ff:1f.7 is not on this host's PCI bus");
}
