//! The machine: what it is made of, how it starts, how it ends.
//!
//! # Theory of operation
//! [`Machine::new`] makes memory, interrupt controllers, clock, bus and the PCI root. Devices are added, a
//! kernel is loaded, and [`Machine::run`] starts one thread for each vCPU and one for timers and waits for the
//! first [`PowerEvent`]: the guest powers off, resets, panics, triple-faults, or somebody calls
//! [`MachineHandle::stop`]. Then every vCPU is kicked out of the engine and the threads are joined.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use cpu::state::seg;
use cpu::{CpuState, Cpuid, GuestRam, Ram, Vcpu, VcpuConfig, VcpuStats, attention};
use iommufd::Errno;
use mmu::Gpa;
use vfio::device::Device;
use vfio::kernel::HostDevice;
use virtio::device::VirtioDevice;
use virtio::iommu::Faults;
use virtio::pci::VirtioPci;

use crate::acpi::{self, AcpiConfig, AcpiError};
use crate::apic::{self, ApicBus, ApicBusConfig, IOAPIC_BASE, IOAPIC_SIZE, IoApic};
use crate::assigned::{AssignError, AssignedFunction, Reach, Seat};
use crate::boot;
use crate::bus::{Bus, BusError, MmioDevice, Unclaimed};
use crate::clock::Clock;
use crate::dma::DeviceMemory;
use crate::guest_abi::GuestAbi;
use crate::iommu::vtd::{self, Vtd};
use crate::iommu::{Endpoint, GuestIommu, HostEndpoint, IommuStats, PAGE_SIZES};
use crate::kvm::{KvmVcpu, KvmVm};
use crate::layout;
use crate::loader::{self, BootProtocol, BootRequest, BootState, KernelImage, LoadError};
use crate::memory::{self, MemoryError};
use crate::pci::intx::Wires;
use crate::pci::{PciError, PciRoot};
use crate::power::{self, PowerEvent, PowerSignal, Shutdown};
use crate::rtc::Rtc;
use crate::serial::{InterruptLine, Serial};
use crate::signals::Signals;
use crate::vcpu::{VcpuPlatform, VcpuThread, lock};
use crate::virtio_pci::{Msi, VirtioFunction};
use crate::writes::{Exposed, What};

/// What a machine is made of.
pub struct MachineConfig {
    /// Bytes of RAM, from [`layout::MIN_RAM`] to [`layout::MAX_RAM`], a multiple of 4 KiB.
    pub memory: u64,
    /// Virtual processors, 1 to [`MAX_VCPUS`].
    pub cpus: u32,
    /// Where the serial port's output goes.
    pub serial: Box<dyn Write + Send>,
    /// What the kernel is offered.
    pub guest_abi: GuestAbi,
    /// What IOMMU devices are behind, which the guest drives.
    pub iommu: Option<IommuKind>,
}

/// An IOMMU that the guest drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuKind {
    /// The virtio IOMMU.
    Virtio,
    /// Intel VT-d.
    Intel,
}

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u32 = 64;

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// RAM of a size that the layout has no room for.
    #[error(
        "{0} bytes of memory are not possible: from {min} MiB to {max} MiB, in steps of 4 KiB",
        min = layout::MIN_RAM >> 20,
        max = layout::MAX_RAM >> 20
    )]
    MemorySize(u64),
    /// Too many vCPUs, or none.
    #[error("{0} vCPUs are not possible: from 1 to {MAX_VCPUS}")]
    Cpus(u32),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Two devices in one place.
    #[error("cannot lay out the machine")]
    Bus(#[from] BusError),
    /// The ACPI tables do not fit.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] AcpiError),
    /// There is no memory at the reset vector.
    #[error("cannot write the reset vector")]
    ResetVector(#[source] vm_memory::GuestMemoryError),
    /// A PCI function could not be added.
    #[error("cannot add a PCI device")]
    Pci(#[from] PciError),
    /// A virtio device could not be made.
    #[error("cannot add a virtio device")]
    Virtio(#[from] virtio::pci::PciError),
    /// The IOMMU could not be made.
    #[error("cannot make an IOMMU")]
    Iommu(#[source] io::Error),
    /// A device could not be given to the guest.
    #[error("cannot give the guest a device")]
    Assign(#[from] AssignError),
    /// The host refused a thread or executable memory.
    #[error("cannot start a vCPU")]
    Vcpu(#[source] io::Error),
    /// A thread of the machine, of this name, panicked, which ended the machine. (A release build aborts instead.)
    #[error("the thread {0} failed: this is a mistake in ring3")]
    Panicked(String),
}

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself.
    Guest(PowerEvent),
    /// By [`MachineHandle::stop`].
    Stopped,
}

/// What a machine counted.
#[derive(Clone, Debug, Default)]
pub struct MachineStats {
    /// By vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// The state that each vCPU ended in, to see where a guest hangs.
    pub states: Vec<CpuState>,
    /// The vCPUs that a triple fault shut down.
    pub shutdowns: Vec<Shutdown>,
    /// What the kernel was offered.
    pub guest_abi: GuestAbi,
    /// What PVM counted, by vCPU; empty unless it was offered.
    pub pvm: Vec<pvm::Stats>,
    /// Port accesses that nothing answered.
    pub unclaimed_ports: Unclaimed,
    /// Memory accesses that nothing answered.
    pub unclaimed_mmio: Unclaimed,
    /// What the IOMMU counted, if there was one.
    pub iommu: Option<IommuStats>,
}

/// A place to wait for the end.
#[derive(Default)]
struct End {
    why: Mutex<Option<Ended>>,
    changed: Condvar,
}

impl End {
    fn set(&self, why: Ended) {
        lock(&self.why).get_or_insert(why);
        self.changed.notify_all();
    }

    fn wait(&self) -> Ended {
        let mut why = lock(&self.why);
        loop {
            if let Some(why) = *why {
                return why;
            }
            why = self.changed.wait(why).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// Ends the machine if the thread that holds this panics: nobody else would.
struct EndOnPanic(Arc<End>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.set(Ended::Stopped);
        }
    }
}

/// Ends a running machine from another thread.
#[derive(Clone)]
pub struct MachineHandle {
    end: Arc<End>,
}

impl MachineHandle {
    /// Waits until the machine has ended. [`Machine::run`] may return later: devices write out what they have.
    pub fn wait(&self) {
        self.end.wait();
    }

    /// Ends the machine as if its power were cut.
    pub fn stop(&self) {
        self.end.set(Ended::Stopped);
    }
}

/// A machine that has not started yet.
pub struct Machine {
    config: Shape,
    memory: Arc<GuestRam>,
    bus: Bus,
    pci: PciRoot,
    wires: Arc<Wires>,
    apics: Arc<ApicBus>,
    signals: Arc<Signals>,
    kvm: Arc<KvmVm>,
    clock: Arc<Clock>,
    serial: Arc<Serial>,
    power: Arc<PowerSignal>,
    end: Arc<End>,
    boot: Option<BootState>,
    iommu: Option<Iommu>,
}

/// The IOMMU.
enum Iommu {
    Virtio {
        iommu: Arc<Mutex<GuestIommu>>,
        /// Where it is.
        slot: usize,
        /// Who is behind it.
        behind: Vec<usize>,
    },
    Intel(Vtd),
}

impl Iommu {
    /// Puts the function in a slot behind it.
    fn add(&mut self, slot: usize) -> Result<Endpoint, MachineError> {
        match self {
            Self::Virtio { iommu, behind, .. } => {
                behind.push(slot);
                lock(iommu).add_endpoint(endpoint(slot))
            }
            Self::Intel(unit) => unit.add_endpoint(endpoint(slot) as u16),
        }
        .map_err(|errno| MachineError::Iommu(errno.into()))
    }

    /// Puts a device of the host behind it.
    fn add_host(&mut self, slot: usize, device: HostEndpoint) -> Result<Arc<Exposed>, Errno> {
        match self {
            Self::Virtio { iommu, behind, .. } => {
                behind.push(slot);
                lock(iommu).add_host_endpoint(endpoint(slot), device)
            }
            Self::Intel(unit) => unit.add_host_endpoint(endpoint(slot) as u16, device),
        }
    }

    fn describe(&self) -> acpi::Iommu {
        match self {
            Self::Virtio { slot, behind, .. } => acpi::Iommu::Virtio { slot: *slot, behind: behind.clone() },
            Self::Intel(_) => acpi::Iommu::Intel,
        }
    }

    fn stats(&self) -> IommuStats {
        match self {
            Self::Virtio { iommu, .. } => lock(iommu).stats(),
            Self::Intel(unit) => unit.stats(),
        }
    }
}

/// The number that an IOMMU knows the function in a slot by: its bus, device and function number.
fn endpoint(slot: usize) -> u32 {
    (slot as u32) << 3
}

/// What is left of a [`MachineConfig`] once the devices are made.
#[derive(Clone, Copy)]
struct Shape {
    memory: u64,
    cpus: u32,
    guest_abi: GuestAbi,
}

impl Machine {
    /// A machine with its built-in devices.
    ///
    /// # Errors
    /// [`MachineError`]: impossible sizes, or a host without room.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let bytes = config.memory;
        if !(layout::MIN_RAM..=layout::MAX_RAM).contains(&bytes) || !bytes.is_multiple_of(4096) {
            return Err(MachineError::MemorySize(bytes));
        }
        if !(1..=MAX_VCPUS).contains(&config.cpus) {
            return Err(MachineError::Cpus(config.cpus));
        }
        let memory = Arc::new(memory::create(&layout::ram_regions(bytes))?);
        let clock = Arc::new(Clock::start());
        let signals = Signals::new(config.cpus as usize);
        let apics = ApicBus::new(
            &ApicBusConfig {
                ids: (0..config.cpus).collect(),
                physical_bits: layout::PHYS_BITS as u8,
                extended_ids: false,
            },
            &clock,
            Arc::clone(&signals) as _,
        );
        let kvm = KvmVm::new(Arc::clone(&clock), Arc::clone(&apics));
        let end = Arc::new(End::default());
        let power = {
            let end = Arc::clone(&end);
            PowerSignal::new(move |event| end.set(Ended::Guest(event)))
        };

        let mut bus = Bus::new();
        let io_apic = IoApic::new(&apics);
        bus.add_mmio(
            "I/O APIC",
            Gpa(IOAPIC_BASE),
            IOAPIC_SIZE,
            Arc::new(IoApicRegisters(Arc::clone(&io_apic))),
        )?;
        let wires = Wires::new(Arc::clone(&io_apic));
        let line = Box::new(Pin { io_apic, pin: layout::SERIAL_GSI as usize });
        let serial = Arc::new(Serial::new(line, config.serial));
        bus.add_ports("serial port", layout::SERIAL_PORT, 8, Arc::clone(&serial) as _)?;
        bus.add_ports("real-time clock", layout::RTC_PORT, 2, Arc::new(Rtc::new()))?;
        power::attach(&mut bus, &power)?;
        let pci = PciRoot::new(layout::MMIO32, layout::mmio64_window(bytes));

        let mut machine = Self {
            config: Shape { memory: bytes, cpus: config.cpus, guest_abi: config.guest_abi },
            memory,
            bus,
            pci,
            wires,
            apics,
            signals,
            kvm,
            clock,
            serial,
            power,
            end,
            boot: None,
            iommu: None,
        };
        match config.iommu {
            None => {}
            Some(IommuKind::Virtio) => machine.add_virtio_iommu()?,
            Some(IommuKind::Intel) => machine.add_vtd()?,
        }
        Ok(machine)
    }

    fn add_virtio_iommu(&mut self) -> Result<(), MachineError> {
        let faults = Faults::new().map_err(MachineError::Iommu)?;
        let iommu = GuestIommu::new(&self.memory, Arc::clone(&faults));
        let iommu = Arc::new(Mutex::new(iommu.map_err(|errno| MachineError::Iommu(errno.into()))?));
        let device = virtio::iommu::Iommu::new(Arc::clone(&iommu) as _, faults, PAGE_SIZES);
        let msi = Arc::new(Msi(Arc::clone(&self.apics)));
        let wire = Box::new(self.wires.wire(self.pci.next_slot()?, 0));
        let function = VirtioPci::new(Box::new(device), DeviceMemory::whole(&self.memory), msi, Some(wire))?;
        let slot = self.pci.add_next(Arc::new(Mutex::new(VirtioFunction(function))))?;
        self.iommu = Some(Iommu::Virtio { iommu, slot, behind: Vec::new() });
        Ok(())
    }

    fn add_vtd(&mut self) -> Result<(), MachineError> {
        let msi = Arc::new(Msi(Arc::clone(&self.apics)));
        let unit = Vtd::new(&self.memory, msi).map_err(|errno| MachineError::Iommu(errno.into()))?;
        self.bus.add_mmio("VT-d", layout::VTD, vtd::SIZE, unit.registers())?;
        self.iommu = Some(Iommu::Intel(unit));
        Ok(())
    }

    /// Guest RAM, for devices.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// The serial port, for input.
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// What ends the machine from another thread.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle { end: Arc::clone(&self.end) }
    }

    /// Adds a virtio device in the next free PCI slot, behind the IOMMU if there is one.
    ///
    /// # Errors
    /// When the slots are taken, or the host is out of descriptors.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice<DeviceMemory>>) -> Result<(), MachineError> {
        let msi = Arc::new(Msi(Arc::clone(&self.apics)));
        let slot = self.pci.next_slot()?;
        let wire = Box::new(self.wires.wire(slot, 0));
        let memory = self.reached_from(slot)?;
        let mut function = VirtioPci::new(device, memory, msi, Some(wire))?;
        if self.iommu.is_some() {
            function = function.behind_iommu();
        }
        self.pci.add(slot, Arc::new(Mutex::new(VirtioFunction(function))))?;
        Ok(())
    }

    /// Guest memory as a device in this slot reaches it: behind the IOMMU if there is one.
    fn reached_from(&mut self, slot: usize) -> Result<DeviceMemory, MachineError> {
        let Some(iommu) = &mut self.iommu else { return Ok(DeviceMemory::whole(&self.memory)) };
        let (port, remapper) = iommu.add(slot)?;
        Ok(DeviceMemory::translated(&self.memory, port, remapper))
    }

    /// Adds a device of any other kind, which must be a PCI function, in the next free PCI slot, and opens it. `reach`
    /// says whether it accesses guest memory by the way that it is given here, or knows another. By the first it is
    /// behind the IOMMU if there is one; by the other it cannot be.
    ///
    /// # Errors
    /// When the slots are taken, or the device makes no sense as a PCI function, or fails.
    pub fn add_device(&mut self, device: Arc<dyn Device>, reach: Reach) -> Result<(), MachineError> {
        let slot = self.pci.next_slot()?;
        let (reached, exposed) = match reach {
            Reach::Called => (self.reached_from(slot)?, None),
            Reach::Direct if self.iommu.is_some() => return Err(AssignError::Outside.into()),
            Reach::Direct => (DeviceMemory::whole(&self.memory), Some(Exposed::new(&self.memory, What::All))),
        };
        self.assign(slot, device, reached, exposed)
    }

    /// Adds a device of the host, in the next free PCI slot, and opens it. Behind an IOMMU it must have been opened for a context
    /// ([`HostDevice::for_context`]): what the guest maps is carried over to the host's. Without one the caller has
    /// mapped the guest's memory in the device's address space.
    ///
    /// # Errors
    /// As [`Self::add_device`]; and when the host does not map guest memory for it.
    pub fn add_host_device(&mut self, device: Arc<HostDevice>) -> Result<(), MachineError> {
        let slot = self.pci.next_slot()?;
        let exposed = match &mut self.iommu {
            None => return self.add_device(device, Reach::Direct),
            Some(iommu) => {
                let hardware = HostEndpoint::new(&device);
                hardware.and_then(|it| iommu.add_host(slot, it)).map_err(AssignError::Behind)?
            }
        };
        self.assign(slot, device, DeviceMemory::whole(&self.memory), Some(exposed))
    }

    fn assign(
        &mut self,
        slot: usize,
        device: Arc<dyn Device>,
        reached: DeviceMemory,
        exposed: Option<Arc<Exposed>>,
    ) -> Result<(), MachineError> {
        let msi = Arc::new(Msi(Arc::clone(&self.apics)));
        let seat = Seat { reached, exposed, msi, wires: Arc::clone(&self.wires), slot };
        let function = AssignedFunction::new(device, seat)?;
        self.pci.add(slot, Arc::new(Mutex::new(function)))?;
        Ok(())
    }

    /// Loads a kernel, and with it the tables that describe the machine. All devices have been added.
    ///
    /// # Errors
    /// [`LoadError`] when it does not fit.
    pub fn load(
        &mut self,
        kernel: &KernelImage,
        protocol: BootProtocol,
        initramfs: Option<&[u8]>,
        cmdline: &str,
    ) -> Result<(), MachineError> {
        let iommu = self.iommu.as_ref().map(Iommu::describe);
        let mmio64 = layout::mmio64_window(self.config.memory);
        let acpi_config = AcpiConfig { cpus: self.config.cpus, mmio64, iommu };
        let rsdp = acpi::write(&*self.memory, &acpi_config)?;
        power::write_reset_vector(&*self.memory).map_err(MachineError::ResetVector)?;
        let memory_map = layout::memory_map(self.config.memory);
        let request = BootRequest { protocol, initramfs, cmdline, memory_map: &memory_map, rsdp };
        self.boot = Some(loader::load(&*self.memory, kernel, &request)?);
        Ok(())
    }

    /// Runs until the machine ends.
    ///
    /// # Errors
    /// When the host refuses threads or executable memory, or a thread panics.
    pub fn run(mut self) -> Result<(Ended, MachineStats), MachineError> {
        self.pci.assign_bars()?;
        let pci = std::mem::replace(&mut self.pci, PciRoot::new(layout::MMIO32, 0..0));
        Arc::new(pci).attach(&mut self.bus, &self.power)?;
        let ram = Arc::new(Ram::new((*self.memory).clone()));
        let bus = Arc::new(std::mem::take(&mut self.bus));
        let mut threads = Vec::new();
        for (index, attention) in self.signals.attentions().iter().enumerate() {
            let Some(apic) = self.apics.local(index) else { continue };
            let kvm = Arc::new(Mutex::new(KvmVcpu::new(Arc::clone(&self.kvm), Arc::clone(&self.memory))));
            let platform = VcpuPlatform {
                apic: Arc::clone(apic),
                bus: Arc::clone(&bus),
                kvm: Arc::clone(&kvm),
                clock: Arc::clone(&self.clock),
            };
            let cpuid = self.cpuid(index as u32);
            let config = VcpuConfig { pvm: self.config.guest_abi.vcpu_config(index as u16, &cpuid), cpuid };
            let mut vcpu = Vcpu::new(config, Arc::clone(&ram), Box::new(platform), Arc::clone(attention))
                .map_err(MachineError::Vcpu)?;
            match &self.boot {
                Some(boot) if index == 0 => boot::apply(&mut vcpu, boot),
                _ => vcpu.wait_for_sipi(),
            }
            threads.push(VcpuThread { vcpu, apic: Arc::clone(apic), kvm, power: Arc::clone(&self.power) });
        }

        let mut stats = MachineStats { guest_abi: self.config.guest_abi, ..MachineStats::default() };
        let ended = thread::scope(|scope| {
            let signals = &self.signals;
            let end_on_panic = || EndOnPanic(Arc::clone(&self.end));
            let ends = end_on_panic();
            let timers = thread::Builder::new()
                .name("timers".into())
                .spawn_scoped(scope, || {
                    let _ends = ends;
                    signals.timers.serve(&self.apics)
                })
                .map_err(MachineError::Vcpu);
            let running: Result<Vec<_>, _> = threads
                .into_iter()
                .enumerate()
                .map(|(index, vcpu)| {
                    let ends = end_on_panic();
                    thread::Builder::new()
                        .name(format!("vcpu{index}"))
                        .spawn_scoped(scope, move || {
                            let _ends = ends;
                            vcpu.run()
                        })
                        .map_err(MachineError::Vcpu)
                })
                .collect();
            // Whatever failed: the threads that did start are ended before the scope waits for them.
            let ended = match (&timers, &running) {
                (Ok(_), Ok(_)) => self.end.wait(),
                _ => Ended::Stopped,
            };
            signals.raise_all(attention::KICK);
            signals.timers.stop();
            // All threads are joined, whatever the others ended with.
            let timers = join(timers?);
            let vcpus: Vec<_> = running?.into_iter().map(join).collect();
            timers?;
            for (vcpu, end) in vcpus.into_iter().enumerate() {
                let end = end?;
                if end.shut_down {
                    let cs = end.state.segments[usize::from(seg::CS)].selector;
                    let (vector, rip) = (end.counted.undelivered, end.state.rip());
                    stats.shutdowns.push(Shutdown { vcpu, vector, cs, rip });
                }
                stats.vcpus.push(end.counted);
                stats.states.push(end.state);
                stats.pvm.extend(end.pvm);
            }
            Ok::<_, MachineError>(ended)
        });
        self.serial.flush();
        let ended = ended?;
        stats.unclaimed_ports = bus.unclaimed_ports();
        stats.unclaimed_mmio = bus.unclaimed_mmio();
        stats.iommu = self.iommu.as_ref().map(Iommu::stats);
        Ok((ended, stats))
    }

    /// What CPUID answers on vCPU `index`.
    fn cpuid(&self, index: u32) -> Cpuid {
        let mut cpuid = Cpuid::new(index, self.config.cpus, layout::PHYS_BITS as u8, self.clock.tsc_khz());
        for leaf in self.kvm.cpuid_leaves() {
            cpuid.set_leaf(leaf.leaf, leaf.subleaf, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        }
        if self.config.guest_abi == GuestAbi::Pvm {
            cpuid.offer_pvm();
        }
        cpuid
    }
}

/// What `thread` returned.
fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> Result<T, MachineError> {
    let name = thread.thread().name().unwrap_or_default().to_owned();
    thread.join().map_err(|_| MachineError::Panicked(name))
}

/// A device's edge-triggered line to an I/O APIC pin.
struct Pin {
    io_apic: Arc<IoApic>,
    pin: usize,
}

impl InterruptLine for Pin {
    fn trigger(&self) {
        self.io_apic.pulse(self.pin);
    }
}

/// The I/O APIC's registers on the bus. They are 32 bits wide; other widths read or write a part.
struct IoApicRegisters(Arc<IoApic>);

impl MmioDevice for IoApicRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        apic::read_part(self.0.mmio_read(offset & !3), offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        self.0.mmio_write(offset, u32::from_le_bytes(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(memory: u64, cpus: u32) -> Result<Machine, MachineError> {
        with_abi(memory, cpus, GuestAbi::default())
    }

    fn with_abi(memory: u64, cpus: u32, guest_abi: GuestAbi) -> Result<Machine, MachineError> {
        Machine::new(MachineConfig { memory, cpus, serial: Box::new(io::sink()), guest_abi, iommu: None })
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for memory in [0, 4096, layout::MIN_RAM - 4096, layout::MIN_RAM + 1, layout::MAX_RAM + 4096, 1 << 62]
        {
            assert!(
                matches!(with(memory, 1), Err(MachineError::MemorySize(m)) if m == memory),
                "{memory:#x}"
            );
        }
        for cpus in [0, MAX_VCPUS + 1, u32::MAX] {
            assert!(matches!(with(layout::MIN_RAM, cpus), Err(MachineError::Cpus(c)) if c == cpus), "{cpus}");
        }
        assert!(with(layout::MIN_RAM, MAX_VCPUS).is_ok());
    }

    #[test]
    fn a_panic_of_a_vcpu_ends_the_run() {
        struct Broken;

        impl crate::bus::PortDevice for Broken {
            fn read(&self, _offset: u16, _data: &mut [u8]) {}

            fn write(&self, _offset: u16, _data: &[u8]) {
                panic!("on purpose");
            }
        }

        let mut machine = with(layout::MIN_RAM, 2).unwrap();
        machine.bus.add_ports("broken", 0x80, 1, Arc::new(Broken)).unwrap();
        // A start-up IPI to `out 0x80, al`.
        vm_memory::Bytes::write_slice(&*machine.memory, &[0xe6, 0x80], vm_memory::GuestAddress(0x5000))
            .unwrap();
        machine.signals.attentions()[1].raise_sipi(5);
        match machine.run() {
            Err(MachineError::Panicked(thread)) => assert_eq!(thread, "vcpu1"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_machine_without_kernel_can_be_stopped() {
        let machine = with(layout::MIN_RAM, 2).unwrap();
        machine.handle().stop();
        let (ended, stats) = machine.run().unwrap();
        assert_eq!(ended, Ended::Stopped);
        assert_eq!(stats.vcpus.len(), 2);
        assert_eq!((stats.guest_abi, stats.pvm.len()), (GuestAbi::X86, 0));
    }

    #[test]
    fn pvm_is_offered_to_every_vcpu_or_to_none() {
        use pvm::abi::cpuid::{PVM, SIGNATURE, VENDOR_FEATURES};
        let vendor = |machine: &Machine| machine.cpuid(0).leaf(VENDOR_FEATURES, 0).map(|leaf| leaf.ebx);
        assert_eq!(vendor(&with(layout::MIN_RAM, 1).unwrap()), None);
        let machine = with_abi(layout::MIN_RAM, 3, GuestAbi::Pvm).unwrap();
        assert_eq!(vendor(&machine), Some(PVM));
        let cpuid = machine.cpuid(2);
        assert!(cpuid.leaf(SIGNATURE, 0).is_some_and(|leaf| leaf.eax >= VENDOR_FEATURES));
        assert!(!cpuid.has("SMEP") && !cpuid.has("SMAP"));
        let config = GuestAbi::Pvm.vcpu_config(2, &cpuid).unwrap();
        assert_eq!((config.cpu, config.ranges), (2, pvm::AddressRanges::usual(cpuid.has("LA57"))));
        machine.handle().stop();
        let (_, stats) = machine.run().unwrap();
        assert_eq!((stats.guest_abi, stats.pvm), (GuestAbi::Pvm, vec![pvm::Stats::default(); 3]));
    }
}
