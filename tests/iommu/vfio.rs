//! A program in a guest has a device by VFIO.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::vfio::device::Device;
use ::vfio::dma::NoDma;
use ::vfio::kernel::{AddressSpace, Door, HostDevice};
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::counted;
use super::support::kernels::kernels;
use super::support::process::{boot, run};

#[test]
fn vt_d_lets_a_program_of_the_guest_have_a_device() {
    let Some(kernels) = kernels() else { return };
    for kernel in &kernels.images {
        let this = std::env::current_exe().unwrap();
        let options = ["--iommu", "intel", "--stats", "--module", "vfio-pci", "--module", "vfio_iommu_type1"];
        let part = "vfio::the_guests_program_drives_a_device";
        let command = [this.to_str().unwrap(), "--ignored", "--exact", part, "--nocapture"];
        let end = boot(run(kernel, &options, &command));
        end.expect(0);
        assert!(counted(&end.stderr, "IOMMU: faults").is_some_and(|count| count > 0), "{}", end.stderr);
    }
}

/// The entropy device of a machine, as a program has it by VFIO: Linux's own drivers on both sides of it, and ours on neither.
#[test]
#[ignore = "what runs in the guest"]
fn the_guests_program_drives_a_device() {
    let address = entropy_for_vfio();
    let space = AddressSpace::new(Door::Group).unwrap();
    let host = HostDevice::open_in(address.parse().unwrap(), &space).unwrap();
    let device: &dyn Device = &host;
    device.open(Arc::new(NoDma)).unwrap();

    const RINGS: u64 = 0x7000_0000;
    const BUFFER: u64 = 0x1_2345_6000;
    let rings: Arc<MmapRegion<()>> = Arc::new(MmapRegion::new(4096).unwrap());
    let buffer: Arc<MmapRegion<()>> = Arc::new(MmapRegion::new(4096).unwrap());
    space.map(Iova(RINGS), &rings, Prot::READ | Prot::WRITE).unwrap();
    space.map(Iova(BUFFER), &buffer, Prot::READ | Prot::WRITE).unwrap();
    let mut entropy = Entropy::start(device, RINGS, Arc::clone(&rings));

    // It fills the page that is mapped.
    entropy.request(BUFFER, 4096);
    entropy.wait(|entropy| entropy.used() == 1);
    let bytes = |region: &MmapRegion<()>| {
        let mut bytes = vec![0; 4096];
        region.as_volatile_slice().read_slice(&mut bytes, 0).unwrap();
        bytes
    };
    let first = bytes(&buffer);
    assert!(first.iter().filter(|byte| **byte == 0).count() < 1024, "no entropy came");

    // Not any more: the kernel is told, and the device breaks.
    space.unmap(IovaRange::with_length(Iova(BUFFER), 4096).unwrap()).unwrap();
    entropy.request(BUFFER, 4096);
    entropy.wait(|entropy| entropy.status() & NEEDS_RESET != 0);
    assert!(bytes(&buffer) == first, "a page was written to that is not mapped");
    let log = kernel_log_until(&format!("fault addr {BUFFER:#x}"));
    assert!(log.contains("DMAR: [DMA Write"), "{log}");
    device.close();
}

/// Takes the entropy device from its driver, and gives it to vfio-pci: where it is.
fn entropy_for_vfio() -> String {
    let devices = fs::read_dir("/sys/bus/pci/devices").unwrap().map(|entry| entry.unwrap().path());
    let is_entropy = |path: &PathBuf| fs::read_to_string(path.join("device")).unwrap().trim() == "0x1044";
    let found = { devices }.find(is_entropy).unwrap();
    let address = found.file_name().unwrap().to_str().unwrap().to_owned();
    // There is no interrupt remapping, so this has to be said.
    fs::write("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y").unwrap();
    fs::write(found.join("driver_override"), "vfio-pci").unwrap();
    fs::write(found.join("driver/unbind"), &address).unwrap();
    fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    address
}

/// What the kernel has said, up to the line in which this is.
fn kernel_log_until(what: &str) -> String {
    let mut log = BufReader::new(fs::File::open("/dev/kmsg").unwrap());
    let mut said = String::new();
    while !said.contains(what) {
        log.read_line(&mut said).unwrap();
    }
    said
}

/// A bit of the device's status: it has met something that it cannot go on with (virtio 1.3, section 2.1).
const NEEDS_RESET: u8 = 0x40;

/// A driver of virtio's entropy device with one queue of one buffer at a time (virtio 1.3, sections 2.7, 4.1.4 and 5.4).
struct Entropy<'a> {
    device: &'a dyn Device,
    rings: Arc<MmapRegion<()>>,
    common: (u32, u64),
    doorbell: (u32, u64),
    requests: u16,
}

/// Where the parts of the queue are in its page.
const AVAILABLE: usize = 0x200;
const USED: usize = 0x400;

impl<'a> Entropy<'a> {
    fn start(device: &'a dyn Device, at: u64, rings: Arc<MmapRegion<()>>) -> Self {
        const CONFIG: u32 = 7;
        let config = |offset: u64| {
            let mut word = [0; 4];
            assert_eq!(device.read(CONFIG, offset, &mut word), Ok(4));
            word
        };
        // Memory and bus master.
        assert_eq!(device.write(CONFIG, 4, &[6, 0]), Ok(2));
        let (mut common, mut doorbell, mut multiplier) = (None, None, 0);
        let mut capability = u64::from(config(0x34)[0]);
        while capability != 0 {
            let [id, next, _, kind] = config(capability);
            let part =
                (u32::from(config(capability + 4)[0]), u32::from_le_bytes(config(capability + 8)).into());
            match (id, kind) {
                (9, 1) => common = Some(part),
                (9, 2) => {
                    doorbell = Some(part);
                    multiplier = u32::from_le_bytes(config(capability + 16));
                }
                _ => {}
            }
            capability = next.into();
        }
        let (common, doorbell) = (common.unwrap(), doorbell.unwrap());
        let mut entropy = Self { device, rings, common, doorbell, requests: 0 };
        entropy.set(0x14, &[0]);
        entropy.wait(|entropy| entropy.status() == 0);
        entropy.set(0x14, &[1 | 2]);
        // Version 1, and addresses that are translated.
        entropy.set(0x08, &1u32.to_le_bytes());
        entropy.set(0x0c, &3u32.to_le_bytes());
        entropy.set(0x14, &[1 | 2 | 8]);
        assert_eq!(entropy.status(), 1 | 2 | 8);
        entropy.set(0x16, &[0, 0]);
        entropy.set(0x18, &8u16.to_le_bytes());
        for (register, offset) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
            let [low, high] = [at + offset as u64, at >> 32].map(|word| (word as u32).to_le_bytes());
            entropy.set(register, &low);
            entropy.set(register + 4, &high);
        }
        let mut offset = [0; 2];
        assert_eq!(device.read(common.0, common.1 + 0x1e, &mut offset), Ok(2));
        entropy.doorbell.1 += u64::from(u16::from_le_bytes(offset)) * u64::from(multiplier);
        entropy.set(0x1c, &[1, 0]);
        entropy.set(0x14, &[1 | 2 | 8 | 4]);
        entropy
    }

    fn set(&mut self, register: u64, value: &[u8]) {
        assert_eq!(self.device.write(self.common.0, self.common.1 + register, value), Ok(value.len()));
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        assert_eq!(self.device.read(self.common.0, self.common.1 + 0x14, &mut status), Ok(1));
        status[0]
    }

    /// How many requests the device has answered.
    fn used(&self) -> u16 {
        self.rings.as_volatile_slice().load(USED + 2, Ordering::Acquire).unwrap()
    }

    /// Asks for `length` bytes at `at`.
    fn request(&mut self, at: u64, length: u32) {
        const WRITE: u32 = 2;
        let rings = self.rings.as_volatile_slice();
        rings.write_obj(at, 0).unwrap();
        rings.write_obj([length, WRITE], 8).unwrap();
        rings.write_obj(0u16, AVAILABLE + 4 + usize::from(self.requests) * 2).unwrap();
        self.requests += 1;
        rings.store(self.requests, AVAILABLE + 2, Ordering::Release).unwrap();
        assert_eq!(self.device.write(self.doorbell.0, self.doorbell.1, &[0, 0]), Ok(2));
    }

    fn wait(&self, until: impl Fn(&Self) -> bool) {
        while !until(self) {
            std::thread::yield_now();
        }
    }
}
