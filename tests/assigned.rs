//! Devices given to a guest of ring3: every kind of interrupt, and memory through the guest's IOMMU.
//!
//! The test device is driven by VFIO in the guest, which is the kernel's own: so what ring3 makes of the device has to be what a
//! stock driver takes for a PCI function, and the program that uses it is crate `vfio`'s client of a kernel.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use iommufd::domain::Prot;
use iommufd::iova::Iova;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use support::kernels::kernels;
use support::process::{PATIENCE, Running, boot, ring3, run, run_the_guests_side};
use support::{Noise, temp_dir, write};
use uapi::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio::device::Device;
use vfio::devices::test::registers as reg;
use vfio::irq::{IrqAction, IrqData, IrqSet};
use vfio::kernel::{Door, HostDevice};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Bytes of a disk.
const SIZE: usize = 16 << 20;

fn serve(dir: &Path, what: &[&str]) -> (Running, String) {
    let socket = dir.join("socket");
    let mut command = ring3();
    command.args(["vfio", "serve"]).args(what).args(["--once", "--socket"]).arg(&socket);
    let running = Running::start_quiet(command);
    running.wait_until(|| socket.exists());
    assert!(socket.exists(), "it ended early: {:?}", running.finish(PATIENCE));
    (running, format!("vfio-user={}", socket.display()))
}

/// `ring3 vfio serve nvme` with a disk of noise.
fn serve_disk(dir: &Path) -> (Running, String) {
    let mut bytes = vec![0; SIZE];
    Noise(4).fill(&mut bytes);
    let disk = write(dir, "disk", &bytes);
    serve(dir, &["nvme", "--file", disk.to_str().unwrap()])
}

/// Copies the first half of the disk to the second, and compares.
const COPY: &str = "set -e
while [ ! -b /dev/nvme0n1 ]; do sleep 0.1; done
dd if=/dev/nvme0n1 of=/tmp/half bs=1M count=8 iflag=direct 2>/dev/null
dd if=/tmp/half of=/dev/nvme0n1 bs=1M seek=8 oflag=direct 2>/dev/null
dd if=/dev/nvme0n1 bs=1M skip=8 iflag=direct 2>/dev/null | cmp - /tmp/half
";

fn copied(dir: &Path) {
    let after = fs::read(dir.join("disk")).unwrap();
    let (first, second) = after.split_at(SIZE / 2);
    assert!(first == second, "the file has something else");
}

/// Without messages the disk and every device of ring3's own interrupt by wires, which they share.
#[test]
fn a_disk_interrupts_by_its_wire() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    let (server, device) = serve_disk(dir.path());
    let script = format!("{COPY}cat /proc/interrupts");
    let end =
        boot(run(kernels.newer(), &["--append", "pci=nomsi", "--device", &device], &["sh", "-c", &script]));
    end.expect(0);
    server.finish(PATIENCE).expect(0);
    copied(dir.path());
    let said = end.text();
    let line = said.lines().find(|line| line.contains("nvme0q0")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("IO-APIC") && line.contains("fasteoi"), "{said}");
    assert!(!said.contains("PCI-MSI"), "{said}");
}

#[test]
fn a_disk_is_behind_the_guests_iommu() {
    let Some(kernels) = kernels() else { return };
    for (kind, kernel) in [("virtio", kernels.newer()), ("intel", kernels.older())] {
        copies_a_disk_behind(kind, kernel);
    }
}

fn copies_a_disk_behind(kind: &str, kernel: &Path) {
    let dir = temp_dir();
    let (server, device) = serve_disk(dir.path());
    let script = format!(
        "{COPY}grep -c nvme0q /proc/interrupts
device=$(readlink -f /sys/class/nvme/nvme0/device)
echo TYPE $(cat $device/iommu_group/type)"
    );
    let options =
        ["--cpus", "2", "--iommu", kind, "--append", "iommu.passthrough=0", "--stats", "--device", &device];
    let end = boot(run(kernel, &options, &["sh", "-c", &script]));
    end.expect(0);
    server.finish(PATIENCE).expect(0);
    copied(dir.path());
    let said = end.text();
    assert!(said.contains("TYPE DMA"), "{said}");
    assert!(said.starts_with('3'), "an interrupt for each queue: {said}");
    let faults = end.stderr.lines().find_map(|line| line.strip_prefix("IOMMU: faults"));
    assert_eq!(faults.map(str::trim), Some("0"), "{}", end.stderr);
}

#[test]
fn the_guests_own_vfio_gives_the_device_away_again() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    let (server, device) = serve(dir.path(), &["test"]);
    let options = [
        "--iommu",
        "virtio",
        "--append",
        "iommu.passthrough=0",
        "--module",
        "vfio_pci",
        "--module",
        "vfio_iommu_type1",
        "--device",
        &device,
    ];
    boot(run_the_guests_side(kernels.newer(), &options)).expect(0);
    server.finish(PATIENCE).expect(0);
}

/// The test device on the guest's bus, with vfio-pci as its driver.
fn bind() -> String {
    let bus = Path::new("/sys/bus/pci");
    let is_ours = |path: &Path| fs::read_to_string(path.join("device")).is_ok_and(|id| id.trim() == "0x7e57");
    let devices = fs::read_dir(bus.join("devices")).unwrap().map(|entry| entry.unwrap().path());
    let device = devices.into_iter().find(|path| is_ours(path)).expect("the test device");
    let name = device.file_name().unwrap().to_str().unwrap().to_owned();
    fs::write(device.join("driver_override"), "vfio-pci").unwrap();
    fs::write(bus.join("drivers_probe"), &name).unwrap();
    name
}

struct Guest {
    device: HostDevice,
}

impl Guest {
    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        assert_eq!(self.device.read(VFIO_PCI_BAR0_REGION_INDEX, register, &mut word), Ok(4));
        u32::from_le_bytes(word)
    }

    fn write(&self, register: u64, value: u32) {
        assert_eq!(self.device.write(VFIO_PCI_BAR0_REGION_INDEX, register, &value.to_le_bytes()), Ok(4));
    }

    fn trigger(&self, index: u32, data: IrqData) {
        let count = if let IrqData::EventFd(fds) = &data { fds.len() as u32 } else { 0 };
        let set = IrqSet { index, start: 0, count, action: IrqAction::Trigger, data };
        self.device.set_irqs(set).unwrap();
    }

    fn set_up(&self, index: u32, count: usize) -> Vec<OwnedFd> {
        let events: Vec<OwnedFd> = (0..count).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect();
        let theirs = events.iter().map(|event| Some(event.try_clone().unwrap())).collect();
        self.trigger(index, IrqData::EventFd(theirs));
        events
    }

    /// A copy of `length` bytes, and how it ended.
    fn copy(&self, from: u64, to: u64, length: u32) -> u32 {
        let half = |address: u64, high: u32| (address >> (32 * high)) as u32;
        self.write(reg::SOURCE, half(from, 0));
        self.write(reg::SOURCE_HIGH, half(from, 1));
        self.write(reg::TARGET, half(to, 0));
        self.write(reg::TARGET_HIGH, half(to, 1));
        self.write(reg::LENGTH, length);
        self.write(reg::COMMAND, reg::COMMAND_COPY);
        self.read(reg::STATUS)
    }
}

/// Waits until it is signalled.
fn wait(event: &OwnedFd) {
    let second = Timespec { tv_sec: 20, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&second)).unwrap();
    assert_eq!(ready, 1, "no interrupt");
    rustix::io::read(event, &mut [0; 8]).unwrap();
}

fn is_quiet(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]) == Err(rustix::io::Errno::AGAIN)
}

#[test]
#[ignore = "what runs in the guest"]
fn the_guests_side() {
    // No interrupt is remapped here.
    fs::write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "1").unwrap();
    let device = HostDevice::connect(bind().parse().unwrap(), Some(Door::Group)).unwrap();
    // Memory decoding and bus mastering, with INTx enabled.
    device.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
    let it = Guest { device };
    assert_eq!(it.read(reg::ID), reg::ID_VALUE);

    // Memory: what is mapped in the guest's VFIO, which maps it in ring3's IOMMU.
    let memory = Arc::new(MmapRegion::<()>::new(0x20000).unwrap());
    let space = Arc::clone(it.device.space().unwrap());
    let at = 0x12_3450_0000;
    space.map(Iova(at), &memory, Prot::READ | Prot::WRITE).unwrap();
    let mut noise = vec![0; 0x10000];
    Noise(7).fill(&mut noise);
    let slice = memory.get_slice(0, 0x20000).unwrap();
    slice.write_slice(&noise, 0).unwrap();
    assert_eq!(it.copy(at, at + 0x10000, 0x10000), reg::STATUS_DONE);
    let mut copied = vec![0; 0x10000];
    slice.read_slice(&mut copied, 0x10000).unwrap();
    assert!(copied == noise, "the device has copied something else");
    assert_eq!(it.copy(at + 0x1f000, at, 0x2000), reg::STATUS_FAULT, "half of it is not mapped");

    // INTx: a level that signals once until it is unmasked.
    let unmask = || {
        let (index, action, data) = (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask, IrqData::None);
        it.device.set_irqs(IrqSet { index, start: 0, count: 1, action, data }).unwrap();
    };
    let intx = it.set_up(VFIO_PCI_INTX_IRQ_INDEX, 1);
    for _ in 0..3 {
        it.write(reg::INTX, 1);
        wait(&intx[0]);
        unmask();
        wait(&intx[0]);
        it.write(reg::INTX, 0);
        assert_eq!(it.read(reg::INTX), 0);
        unmask();
    }
    it.trigger(VFIO_PCI_INTX_IRQ_INDEX, IrqData::None);
    assert!(is_quiet(&intx[0]));

    // Messages, each to the vector that it is for.
    for (index, count) in
        [(VFIO_PCI_MSI_IRQ_INDEX, 1), (VFIO_PCI_MSIX_IRQ_INDEX, 16), (VFIO_PCI_MSIX_IRQ_INDEX, 3)]
    {
        let events = it.set_up(index, count);
        for vector in (0..count).rev() {
            it.write(reg::RAISE, vector as u32);
            wait(&events[vector]);
            assert!(events.iter().all(is_quiet), "{index}: {vector}");
        }
        it.trigger(index, IrqData::None);
    }

    // And back to the wire.
    let intx = it.set_up(VFIO_PCI_INTX_IRQ_INDEX, 1);
    it.write(reg::INTX, 1);
    wait(&intx[0]);
    it.write(reg::INTX, 0);
    println!("all kinds");
}
