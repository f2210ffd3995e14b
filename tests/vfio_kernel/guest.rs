//! What is done with devices that a kernel hands over: each a test that runs where the devices are, and nowhere else.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use iommufd::domain::{HostAddr, Prot};
use iommufd::hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData};
use iommufd::iova::{Iova, IovaRange};
use iommufd::process::{LocalProcess, Process};
use iommufd::{Context, Errno};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Resource, Rlimit, setrlimit};
use vfio::device::{Area, Device};
use vfio::devices::test::registers as test_device;
use vfio::dma::NoDma;
use vfio::irq::{IrqAction, IrqData, IrqSet};
use vfio::kernel::{AddressSpace, Door, HostDevice, MapError, PciAddress, Registers};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const CONFIG: u32 = 7;
const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;
/// The command register: memory and bus master (PCI Local Bus 3.0, section 6.2.2).
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;
/// What a device of a machine on a busy host may take.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Whether this is where the devices are; said aloud if not.
fn here() -> bool {
    let here = std::env::var_os("RING3_IN_A_GUEST").is_some();
    if !here {
        super::skip("it is a part of another test, which runs it where the devices are");
    }
    here
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// QEMU's card for students, and its NVMe controller.
fn edu() -> PciAddress {
    address("0000:00:05.0")
}

fn nvme() -> PciAddress {
    address("0000:00:06.0")
}

/// Memory of `pages` pages.
fn memory(pages: usize) -> Arc<MmapRegion<()>> {
    Arc::new(MmapRegion::new(pages * 4096).unwrap())
}

fn fill(memory: &MmapRegion<()>, byte: u8) {
    memory.as_volatile_slice().write_slice(&vec![byte; memory.size()], 0).unwrap();
}

fn bytes(memory: &MmapRegion<()>, at: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.as_volatile_slice().read_slice(&mut bytes, at).unwrap();
    bytes
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::with_length(Iova(start), length).unwrap()
}

fn read(device: &dyn Device, region: u32, offset: u64) -> u32 {
    let mut word = [0; 4];
    assert_eq!(device.read(region, offset, &mut word), Ok(4), "{region} {offset:#x}");
    u32::from_le_bytes(word)
}

fn write(device: &dyn Device, region: u32, offset: u64, value: u32) {
    assert_eq!(device.write(region, offset, &value.to_le_bytes()), Ok(4), "{region} {offset:#x}");
}

fn enable(device: &dyn Device) {
    assert_eq!(device.write(CONFIG, COMMAND, &MEMORY_AND_MASTER.to_le_bytes()), Ok(2));
}

/// An interrupt's eventfd.
struct Interrupt(OwnedFd);

impl Interrupt {
    /// Sets up the first vector of a kind.
    fn new(device: &dyn Device, index: u32) -> Self {
        let ours = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let theirs = ours.try_clone().unwrap();
        let data = IrqData::EventFd(vec![Some(theirs)]);
        device.set_irqs(IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data }).unwrap();
        Self(ours)
    }

    fn count(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            Err(Errno::AGAIN) => 0,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for it: how often it came.
    fn wait(&self) -> u64 {
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)), Ok(1), "no interrupt came");
        self.count()
    }
}

fn ask(device: &dyn Device, index: u32, action: IrqAction) {
    device.set_irqs(IrqSet { index, start: 0, count: 1, action, data: IrqData::None }).unwrap();
}

fn disable(device: &dyn Device, index: u32) {
    let action = IrqAction::Trigger;
    device.set_irqs(IrqSet { index, start: 0, count: 0, action, data: IrqData::None }).unwrap();
}

/// Registers of edu's BAR 0 (QEMU, docs/specs/edu.rst).
mod edu_register {
    pub(super) const ID: u64 = 0x00;
    pub(super) const LIVENESS: u64 = 0x04;
    pub(super) const INTERRUPT_STATUS: u64 = 0x24;
    pub(super) const RAISE: u64 = 0x60;
    pub(super) const ACKNOWLEDGE: u64 = 0x64;
    pub(super) const SOURCE: u64 = 0x80;
    pub(super) const TARGET: u64 = 0x88;
    pub(super) const LENGTH: u64 = 0x90;
    pub(super) const START: u64 = 0x98;
    /// Where its own memory begins: a page of it.
    pub(super) const BUFFER: u32 = 0x40000;
    /// What is copied at a time: older QEMUs do not take the whole page.
    pub(super) const COPIED: usize = 2048;
}

/// To the device, from it.
#[derive(Clone, Copy)]
enum Direction {
    In = 0b101,
    Out = 0b111,
}

/// Has edu copy, and waits until it has: it interrupts.
fn transfer(device: &dyn Device, interrupt: &Interrupt, iova: u32, direction: Direction) {
    let (source, target) = match direction {
        Direction::In => (iova, edu_register::BUFFER),
        Direction::Out => (edu_register::BUFFER, iova),
    };
    write(device, 0, edu_register::SOURCE, source);
    write(device, 0, edu_register::TARGET, target);
    write(device, 0, edu_register::LENGTH, edu_register::COPIED as u32);
    write(device, 0, edu_register::START, direction as u32);
    assert_eq!(interrupt.wait(), 1);
    assert_eq!(read(device, 0, edu_register::INTERRUPT_STATUS), 0x100);
    write(device, 0, edu_register::ACKNOWLEDGE, 0x100);
}

/// Registers, interrupts and DMA of edu.
fn drive_edu(space: &Arc<AddressSpace>) {
    let device = HostDevice::open_in(edu(), space).unwrap();
    let device: &dyn Device = &device;
    device.open(Arc::new(NoDma)).unwrap();
    assert_eq!(read(device, CONFIG, 0), 0x11e8_1234);
    enable(device);
    assert_eq!(read(device, 0, edu_register::ID), 0x0100_00ed);
    write(device, 0, edu_register::LIVENESS, 0x1234_5678);
    assert_eq!(read(device, 0, edu_register::LIVENESS), !0x1234_5678);
    for (region, offset) in [(0, 1 << 20 | 1), (1, 0), (9, 0), (u32::MAX, 0)] {
        let refused = device.read(region, offset, &mut [0; 4]);
        assert_eq!(refused, Err(Errno::INVAL), "{region} {offset:#x}");
    }

    intx(device);

    let message = Interrupt::new(device, MSI);
    write(device, 0, edu_register::RAISE, 1);
    assert_eq!(message.wait(), 1);
    write(device, 0, edu_register::ACKNOWLEDGE, 1);

    // Its DMA reaches 28 bits of addresses.
    let ram = memory(3);
    fill(&ram, 0x11);
    ram.as_volatile_slice().write_slice(&[0xa5; 4096], 0).unwrap();
    space.map(Iova(0x10_0000), &ram, Prot::READ | Prot::WRITE).unwrap();
    transfer(device, &message, 0x10_0000, Direction::In);
    transfer(device, &message, 0x10_1000, Direction::Out);
    let arrived = [vec![0xa5; edu_register::COPIED], vec![0x11; 8192 - edu_register::COPIED]].concat();
    assert!(bytes(&ram, 4096, 8192) == arrived, "the device's memory has not arrived, or elsewhere");

    // What is not mapped is not reached: behind the mapping, where only reading is allowed, where it was.
    let read_only = memory(1);
    fill(&read_only, 0x22);
    space.map(Iova(0x20_0000), &read_only, Prot::READ).unwrap();
    transfer(device, &message, 0x10_3000, Direction::Out);
    transfer(device, &message, 0x20_0000, Direction::Out);
    assert!(bytes(&read_only, 0, 4096) == [0x22; 4096], "a page for reading was written to");
    assert_eq!(space.unmap(range(0x10_0000, 4096)), Err(Errno::INVAL));
    space.unmap(range(0x10_0000, 3 * 4096)).unwrap();
    space.unmap(range(0x20_0000, 4096)).unwrap();
    fill(&ram, 0x33);
    transfer(device, &message, 0x10_0000, Direction::Out);
    assert!(bytes(&ram, 0, 3 * 4096) == [0x33; 3 * 4096], "a page was written to that is not mapped");
    assert_eq!(space.unmap(range(0x10_0000, 3 * 4096)), Err(Errno::NOENT));
    disable(device, MSI);
    device.close();
}

/// The line interrupt masks itself, and comes again when it is unmasked while the device asks for it.
fn intx(device: &dyn Device) {
    let line = Interrupt::new(device, INTX);
    write(device, 0, edu_register::RAISE, 1);
    assert_eq!(line.wait(), 1);
    ask(device, INTX, IrqAction::Unmask);
    assert_eq!(line.wait(), 1);
    write(device, 0, edu_register::ACKNOWLEDGE, 1);
    ask(device, INTX, IrqAction::Unmask);

    ask(device, INTX, IrqAction::Mask);
    write(device, 0, edu_register::RAISE, 2);
    assert_eq!(line.count(), 0, "it is masked");
    ask(device, INTX, IrqAction::Unmask);
    assert_eq!(line.wait(), 1);
    write(device, 0, edu_register::ACKNOWLEDGE, 2);
    disable(device, INTX);
}

/// Registers of an NVMe controller, and where its queues lie in memory (NVM Express 1.4, section 3.1).
mod nvme_register {
    pub(super) const VERSION: usize = 0x08;
    pub(super) const CONFIGURATION: usize = 0x14;
    pub(super) const STATUS: usize = 0x1c;
    pub(super) const ADMIN_SIZES: usize = 0x24;
    pub(super) const SUBMISSION: usize = 0x28;
    pub(super) const COMPLETION: usize = 0x30;
    pub(super) const DOORBELL: usize = 0x1000;
    /// 64-byte and 16-byte entries, enabled.
    pub(super) const ENABLE: u32 = 4 << 20 | 6 << 16 | 1;
}

/// Waits for the controller to be ready, or not to be.
fn until_ready(registers: &Registers, ready: u32) {
    // Each look leaves the machine's processor, so it does not depend on how fast this one is.
    let seen = (0..1_000_000).any(|_| registers.read::<u32>(nvme_register::STATUS).unwrap() & 1 == ready);
    assert!(seen, "the controller does not become {}", if ready == 1 { "ready" } else { "idle" });
}

/// An NVMe controller by its mapped registers: identify, with the completion told by a message; then a reset.
fn drive_nvme(space: &Arc<AddressSpace>) {
    let host = HostDevice::open_in(nvme(), space).unwrap();
    let device: &dyn Device = &host;
    device.open(Arc::new(NoDma)).unwrap();
    enable(device);
    let registers = host.map_registers(0, Area { offset: 0, size: 0x2000 }).unwrap();
    assert_eq!(registers.read::<u32>(0x2000), Err(Errno::INVAL));
    assert_eq!(registers.read::<u32>(2), Err(Errno::INVAL));
    assert_eq!(registers.read::<u16>(nvme_register::VERSION + 2), Ok(1));
    assert!(host.map_registers(0, Area { offset: 0, size: 1 << 40 }).is_err());

    // Submission queue, completion queue, answer.
    let ram = memory(3);
    let at = 0x1_0000_0000;
    space.map(Iova(at), &ram, Prot::READ | Prot::WRITE).unwrap();
    let completion = Interrupt::new(device, MSIX);
    registers.write(nvme_register::CONFIGURATION, 0u32).unwrap();
    until_ready(&registers, 0);
    registers.write(nvme_register::ADMIN_SIZES, 1u32 << 16 | 1).unwrap();
    for (register, address) in [(nvme_register::SUBMISSION, at), (nvme_register::COMPLETION, at + 0x1000)] {
        registers.write(register, address as u32).unwrap();
        registers.write(register + 4, (address >> 32) as u32).unwrap();
    }
    registers.write(nvme_register::CONFIGURATION, nvme_register::ENABLE).unwrap();
    until_ready(&registers, 1);
    let slice = ram.as_volatile_slice();
    // Identify, command 7, of the controller.
    slice.write_obj(0x0007_0006u32, 0).unwrap();
    slice.write_obj(at + 0x2000, 24).unwrap();
    slice.write_obj(1u32, 40).unwrap();
    registers.write(nvme_register::DOORBELL, 1u32).unwrap();
    completion.wait();
    let entry: u32 = slice.read_obj(0x1000 + 12).unwrap();
    assert_eq!(entry, 1 << 16 | 7, "status, phase and number of the command");
    assert_eq!(bytes(&ram, 0x2004, 20), *b"handed-over         ");

    device.reset().unwrap();
    enable(device);
    assert_eq!(registers.read::<u32>(nvme_register::CONFIGURATION).unwrap() & 1, 0);
    drop(registers);
    device.close();
    space.unmap(range(at, 3 * 4096)).unwrap();
}

/// Addresses that devices cannot use, and memory that may not be locked.
fn limits(space: &Arc<AddressSpace>) {
    let usable = space.ranges().unwrap();
    assert!(!usable.iter().any(|usable| usable.contains(Iova(0xfee0_0000))), "{usable:?}");
    let page = memory(1);
    let refused = space.map(Iova(0xfee0_0000), &page, Prot::READ).unwrap_err();
    assert!(matches!(refused, MapError::Reserved { .. }), "{refused}");
    assert!(refused.to_string().contains("usable are 0x0 to 0xfedfffff"), "{refused}");

    let space = Arc::clone(space);
    let user = std::thread::spawn(move || {
        // Of this thread only. With it go the capabilities.
        rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534)).unwrap();
        let limit = Rlimit { current: Some(64 << 10), maximum: Some(64 << 10) };
        setrlimit(Resource::Memlock, limit).unwrap();
        let refused = space.map(Iova(0x100_0000), &memory(256), Prot::READ).unwrap_err();
        assert_eq!(refused.errno(), Errno::NOMEM);
        assert!(refused.to_string().contains("1048576 bytes of memory locked"), "{refused}");
        let node = HostDevice::connect(edu(), Some(space.door())).unwrap_err();
        let text = format!("{node}");
        assert!(text.contains("cannot open /dev/") && text.contains("be root"), "{text}");
    });
    user.join().unwrap();
}

/// What `ring3 vfio info` prints.
fn info(door: &str) {
    let name = format!("0000:00:05.0,door={door}").parse().unwrap();
    let device = Some(ring3::cli::NamedDevice::VfioPci(name));
    ring3::vfio::run(ring3::cli::VfioTask::Info { device, socket: None }).unwrap();
}

/// Both devices in one address space.
fn all(door: Door) {
    assert_eq!(HostDevice::door(edu(), Some(door)).unwrap(), door);
    let space = AddressSpace::new(door).unwrap();
    assert_eq!(space.door(), door);
    drive_edu(&space);
    drive_nvme(&space);
    let holder = HostDevice::open_in(edu(), &space).unwrap();
    // A device has one user.
    let second = HostDevice::connect(edu(), Some(door)).unwrap_err();
    assert!(
        second.to_string().contains("0000:00:05.0") || second.to_string().contains("another program"),
        "{second}"
    );
    limits(&space);
    drop(holder);
}

#[test]
#[ignore = "a part of devices_by_their_group"]
fn by_the_group() {
    if !here() {
        return;
    }
    let wanted = HostDevice::door(edu(), Some(Door::Device)).unwrap_err().to_string();
    assert!(wanted.contains("CONFIG_VFIO_DEVICE_CDEV"), "{wanted}");
    println!();
    info("group");
    all(Door::Group);
    context_above_the_hosts(Door::Group, copying_with_edu);
}

#[test]
#[ignore = "a part of devices_by_their_own_nodes"]
fn by_the_own_node() {
    if !here() {
        return;
    }
    println!();
    info("cdev");
    all(Door::Device);
    all(Door::Group);
    context_above_the_hosts(Door::Device, copying_with_edu);
}

fn copying_with_edu(device: &dyn Device, run: &dyn Fn(Copy<'_>)) {
    let message = Interrupt::new(device, MSI);
    run(&|from, to| {
        transfer(device, &message, from as u32, Direction::In);
        transfer(device, &message, to as u32, Direction::Out);
    });
}

/// Has a device copy [`edu_register::COPIED`] bytes from one address to another, and waits until it has tried.
type Copy<'a> = &'a dyn Fn(u64, u64);

/// A device of the host that an iommufd of ring3's own has: its address space, the host's page table, or a container.
fn context_above_the_hosts(door: Door, copying: impl FnOnce(&dyn Device, &dyn Fn(Copy<'_>))) {
    let host = HostDevice::for_context(edu(), door, &mut None).unwrap();
    // SAFETY: what is mapped below is memory of a file, which the context pins, or of vm-memory, which stays until it is
    // unmapped; both are read and written by calls only.
    let hardware = unsafe { host.hardware() }.unwrap();
    let device: &dyn Device = &host;
    device.open(Arc::new(NoDma)).unwrap();
    enable(device);
    copying(device, &|copy| {
        through_a_context(&hardware, copy);
        through_a_domain(&hardware, copy);
    });
    device.close();
}

fn through_a_context(hardware: &Arc<dyn Hardware>, copy: Copy<'_>) {
    let context = Context::new();
    let process: Arc<dyn Process> = LocalProcess::get();
    let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4 * 4096).unwrap();
    rustix::io::pwrite(&file, &[0x5a; 4096], 0).unwrap();
    let ioas = context.ioas_alloc().unwrap();
    let both = Prot::READ | Prot::WRITE;
    context.ioas_map_file(ioas, &process, &file, 0, 2 * 4096, Some(Iova(0x10_0000)), both).unwrap();
    let bound = context.bind(Arc::clone(hardware)).unwrap();
    bound.attach(None, ioas).unwrap();
    let at = Some(Iova(0x20_0000));
    context.ioas_map_file(ioas, &process, &file, 2 * 4096, 4096, at, both).unwrap();
    let window = Some(Iova(0xfee0_0000));
    let refused = context.ioas_map_file(ioas, &process, &file, 0, 4096, window, both);
    assert_eq!(refused, Err(Errno::INVAL), "messages of interrupts go there");

    let page = |at| {
        let mut page = [0; 4096];
        rustix::io::pread(&file, &mut page, at).unwrap();
        page
    };
    copy(0x10_0000, 0x20_0000);
    let arrived = [[0x5a; edu_register::COPIED], [0; edu_register::COPIED]].concat();
    assert!(page(2 * 4096) == arrived[..], "the device's memory has not arrived");
    context.ioas_unmap(ioas, range(0x10_0000, 2 * 4096)).unwrap();
    copy(0x20_0000, 0x10_1000);
    assert!(page(4096) == [0; 4096], "a page was written to that is not mapped");
}

/// What a context does not do by itself: a part of a mapping goes. And what it writes to is noted, where the IOMMU can.
fn through_a_domain(hardware: &Arc<dyn Hardware>, copy: Copy<'_>) {
    let tracks = hardware.capabilities().contains(Capabilities::DIRTY_TRACKING);
    let options = DomainOptions { dirty_tracking: tracks, ..Default::default() };
    let domain = hardware.alloc_paging(None, options, UserData::default()).unwrap();
    let ram = memory(4);
    fill(&ram, 0x44);
    ram.as_volatile_slice().write_slice(&[0x99; 4096], 0).unwrap();
    let host = |page: u64| HostAddr(ram.as_ptr() as u64 + page * 4096);
    domain.map(Iova(0x10_0000), host(0), 4 * 4096, Prot::READ | Prot::WRITE).unwrap();
    hardware.attach(None, Some(&Attachment::Paging(Arc::clone(&domain)))).unwrap();
    let set = domain.set_dirty_tracking(true);
    assert_eq!(set, if tracks { Ok(()) } else { Err(Errno::OPNOTSUPP) });
    domain.unmap(range(0x10_1000, 4096));
    domain.sync();
    assert_eq!(domain.lookup(Iova(0x10_0fff)), Some(HostAddr(host(0).0 + 0xfff)));
    assert_eq!((domain.lookup(Iova(0x10_1000)), domain.lookup(Iova(0x10_2000))), (None, Some(host(2))));

    copy(0x10_0000, 0x10_3000);
    let arrived = [[0x99; edu_register::COPIED], [0x44; edu_register::COPIED]].concat();
    assert!(bytes(&ram, 0x3000, 4096) == arrived, "the device's memory has not arrived");
    copy(0x10_0000, 0x10_1000);
    assert!(bytes(&ram, 0x1000, 4096) == [0x44; 4096], "a page was written to that is not mapped");
    let mut written = Written::default();
    let read = domain.read_and_clear_dirty(range(0x10_2000, 2 * 4096), false, &mut written);
    if tracks {
        assert_eq!((read, written.0), (Ok(()), vec![(0x10_3000, 4096)]));
    } else {
        assert_eq!(read, Err(Errno::OPNOTSUPP));
    }
    hardware.attach(None, None).unwrap();
    domain.unmap(IovaRange::ALL);
}

/// The test device of `ring3 shim`, which has what QEMU's devices have not: migration and a log of DMA.
#[test]
#[ignore = "a part of ring3s_own_devices_by_both_doors"]
fn the_test_device() {
    if !here() {
        return;
    }
    for door in [Door::Device, Door::Group] {
        let space = AddressSpace::new(door).unwrap();
        let host = HostDevice::open_in(edu(), &space).unwrap();
        let device: &dyn Device = &host;
        device.open(Arc::new(NoDma)).unwrap();
        enable(device);
        assert_eq!(read(device, 0, test_device::ID), test_device::ID_VALUE);

        let ram = memory(4);
        ram.as_volatile_slice().write_slice(&[0xc3; 4096], 0).unwrap();
        space.map(Iova(0x10_0000), &ram, Prot::READ | Prot::WRITE).unwrap();
        let log = device.dma_logging().unwrap();
        assert_eq!(log.start(4096, &[range(0x10_0000, 4 * 4096)]), Ok(4096));
        copy(device, 0x10_0000, 0x10_2000, 4096);
        assert_eq!(read(device, 0, test_device::STATUS), test_device::STATUS_DONE);
        assert!(bytes(&ram, 0x2000, 4096) == [0xc3; 4096], "nothing has arrived");
        let mut written = Written::default();
        log.report(range(0x10_0000, 4 * 4096), &mut written).unwrap();
        log.stop();
        assert_eq!(written.0, [(0x10_2000, 4096)]);

        for (index, raise) in [(MSIX, (test_device::RAISE, 0)), (INTX, (test_device::INTX, 1))] {
            let interrupt = Interrupt::new(device, index);
            write(device, 0, raise.0, raise.1);
            assert_eq!(interrupt.wait(), 1);
            write(device, 0, test_device::INTX, 0);
            disable(device, index);
        }
        migrate(device);
        device.close();
        space.unmap(range(0x10_0000, 4 * 4096)).unwrap();
    }
    for door in [Door::Device, Door::Group] {
        context_above_the_hosts(door, |device, run| {
            run(&|from, to| copy(device, from as u32, to as u32, edu_register::COPIED as u32));
        });
    }
}

/// Has the test device copy memory.
fn copy(device: &dyn Device, from: u32, to: u32, length: u32) {
    for (register, value) in [
        (test_device::SOURCE, from),
        (test_device::TARGET, to),
        (test_device::LENGTH, length),
        (test_device::COMMAND, test_device::COMMAND_COPY),
    ] {
        write(device, 0, register, value);
    }
}

#[derive(Default)]
struct Written(Vec<(u64, u64)>);

impl iommufd::domain::DirtySink for Written {
    fn dirty(&mut self, iova: Iova, length: u64) {
        self.0.push((iova.0, length));
    }
}

/// Saves the device's state, changes it, and brings it back.
fn migrate(device: &dyn Device) {
    use vfio::migration::State;

    write(device, 0, test_device::SCRATCH, 0x600d_f00d);
    let migration = device.migration().unwrap();
    assert_eq!(migration.state(), Ok(State::Running));
    let saving = migration.set_state(State::StopCopy).unwrap().unwrap();
    let mut state = Vec::new();
    let mut part = [0; 1000];
    loop {
        match saving.read(&mut part).unwrap() {
            0 => break,
            count => state.extend_from_slice(&part[..count]),
        }
    }
    drop(saving);
    migration.set_state(State::Running).unwrap();
    write(device, 0, test_device::SCRATCH, 0);
    let resuming = migration.set_state(State::Resuming).unwrap().unwrap();
    let mut rest = &state[..];
    while !rest.is_empty() {
        let count = resuming.write(rest).unwrap();
        rest = &rest[count..];
    }
    drop(resuming);
    migration.set_state(State::Running).unwrap();
    assert_eq!(read(device, 0, test_device::SCRATCH), 0x600d_f00d);
}
