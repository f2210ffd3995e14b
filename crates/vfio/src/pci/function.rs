//! A PCI function around a model.

use core::fmt;
use std::{
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use iommufd::{
    domain::Prot,
    iova::{Iova, IovaRange},
};
use pci::{
    access::natural,
    config::{BarKind, ConfigError, PciConfig},
};
use uapi::vfio::{
    VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_PCI_ROM_REGION_INDEX,
};

use super::{
    interrupts::{Enabled, Interrupts},
    ioeventfd::IoEventFds,
    layout::{self, BarLayout, Capabilities, Layout},
    logging::DirtyLog,
    memory::Memory,
    model::Model,
};
use crate::{
    Errno, Result,
    device::{
        Device, DeviceFlags, DeviceInfo, DmaLogging, IoEventFd, LowPower, Mappable, RegionFile, RegionFlags,
        RegionInfo,
    },
    dma::{Dma, DmaFault, NoDma},
    eventfd::{EventFd, lock},
    irq::{IrqInfo, IrqSet},
    migration::Migration,
};

/// A function that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Its parts do not fit the configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no memory for a BAR.
    #[error("the memory of a BAR cannot be had: {0}")]
    Memory(Errno),
}

/// What a model has of its function: memory, interrupts, and the memory of its own BARs.
pub struct Link {
    interrupts: Arc<Interrupts>,
    /// The user's memory. An access holds the lock, so that closing waits for it.
    dma: RwLock<Arc<dyn Dma>>,
    bus_master: AtomicBool,
    log: DirtyLog,
    memory: [Option<Memory>; 6],
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("interrupts", &self.interrupts).finish_non_exhaustive()
    }
}

impl Link {
    /// The function's interrupts.
    #[must_use]
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// The memory in BAR `bar`, addressed as the BAR is. None where the layout has none.
    #[must_use]
    pub fn memory(&self, bar: u8) -> Option<&Memory> {
        self.memory.get(usize::from(bar))?.as_ref()
    }

    fn with<R>(&self, access: impl FnOnce(&dyn Dma) -> Result<R, DmaFault>) -> Result<R, DmaFault> {
        if !self.bus_master.load(Ordering::Acquire) {
            return Err(DmaFault::Disabled);
        }
        access(&**self.dma.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives the model other memory, and waits until what was begun on the present one has ended.
    fn set_dma(&self, dma: Arc<dyn Dma>) {
        *self.dma.write().unwrap_or_else(PoisonError::into_inner) = dma;
    }
}

/// As the function may use it: not unless it is bus master, and what is written is logged.
impl Dma for Link {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        self.with(|dma| dma.read(iova, to))
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        self.with(|dma| {
            let result = dma.write(iova, from);
            // Also what fails may have been done in part.
            self.log.note(iova, from.len() as u64);
            result
        })
    }

    fn translate(&self, range: IovaRange, access: Prot) -> Result<(), DmaFault> {
        self.with(|dma| dma.translate(range, access))
    }

    fn pasid(&self, pasid: u32) -> Option<Arc<dyn Dma>> {
        self.with(|dma| Ok(dma.pasid(pasid))).ok().flatten()
    }

    fn fill(
        &self,
        iova: Iova,
        length: u64,
        file: std::os::fd::BorrowedFd<'_>,
        at: u64,
    ) -> Result<(), DmaFault> {
        self.with(|dma| {
            let result = dma.fill(iova, length, file, at);
            self.log.note(iova, length);
            result
        })
    }

    fn drain(
        &self,
        iova: Iova,
        length: u64,
        file: std::os::fd::BorrowedFd<'_>,
        at: u64,
    ) -> Result<(), DmaFault> {
        self.with(|dma| dma.drain(iova, length, file, at))
    }
}

#[derive(Debug, Default)]
struct Power {
    low: bool,
    wakeup: Option<EventFd>,
}

/// The part of a function that eventfds reach, too.
#[derive(Debug)]
struct Core<M> {
    layout: Layout,
    at: Capabilities,
    config: Mutex<PciConfig>,
    /// MSI-X's table: storage only, since each vector is an eventfd.
    table: Mutex<Vec<u8>>,
    link: Arc<Link>,
    model: M,
}

/// A PCI function in software.
#[derive(Debug)]
pub struct Function<M> {
    core: Arc<Core<M>>,
    power: Mutex<Power>,
    ioeventfds: IoEventFds,
}

impl<M: Model + 'static> Function<M> {
    /// A function with this layout, around what `model` makes.
    ///
    /// # Errors
    /// [`FunctionError`].
    pub fn new(layout: Layout, model: impl FnOnce(Arc<Link>) -> M) -> Result<Self, FunctionError> {
        let (config, at) = layout::config(&layout)?;
        let mut memory = [const { None }; 6];
        for bar in &layout.bars {
            if bar.memory != Mappable::No
                && let Some(slot) = memory.get_mut(usize::from(bar.index))
            {
                *slot = Some(Memory::new(bar.size).map_err(FunctionError::Memory)?);
            }
        }
        let link = Arc::new(Link {
            interrupts: Interrupts::new(layout.interrupts),
            dma: RwLock::new(Arc::new(NoDma)),
            bus_master: AtomicBool::new(false),
            log: DirtyLog::default(),
            memory,
        });
        let table = Mutex::new(vec![0; usize::from(layout.interrupts.msix) * 16]);
        let model = model(Arc::clone(&link));
        let core = Core { layout, at, config: Mutex::new(config), table, link, model };
        Ok(Self { core: Arc::new(core), power: Mutex::default(), ioeventfds: IoEventFds::default() })
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.core.model
    }

    /// How many virtual functions its SR-IOV capability says there are.
    pub fn set_num_vfs(&self, count: u16) {
        if let Some(at) = self.core.at.sriov {
            lock(&self.core.config).set(at + layout::SRIOV_NUM_VFS, &count.to_le_bytes());
        }
    }

    fn wake(&self) {
        let mut power = lock(&self.power);
        if power.low {
            power.low = false;
            if let Some(wakeup) = power.wakeup.take() {
                wakeup.signal();
            }
        }
    }
}

impl<M: Model> Core<M> {
    fn bar(&self, index: u32) -> Option<&BarLayout> {
        self.layout.bars.iter().find(|bar| u32::from(bar.index) == index)
    }

    fn size(&self, index: u32) -> u64 {
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => lock(&self.config).size() as u64,
            VFIO_PCI_ROM_REGION_INDEX => self.layout.rom.len() as u64,
            _ => self.bar(index).map_or(0, |bar| bar.size),
        }
    }

    /// How much of an access at `offset` is in region `index`; only when the function answers.
    fn check(&self, index: u32, offset: u64, length: usize) -> Result<usize> {
        let size = self.size(index);
        if offset >= size {
            return Err(Errno::INVAL);
        }
        let config = lock(&self.config);
        let ports = self.bar(index).is_some_and(|bar| bar.kind == BarKind::Io);
        let decoding = if ports { config.io_enabled() } else { config.memory_enabled() };
        if !decoding || self.sleeping(&config) {
            return Err(Errno::IO);
        }
        Ok(usize::try_from(size - offset).unwrap_or(usize::MAX).min(length))
    }

    /// Whether the function is in D3hot, where it answers to nothing but its configuration space.
    fn sleeping(&self, config: &PciConfig) -> bool {
        self.at.power_management.is_some_and(|at| {
            let mut state = [0];
            config.read(at + layout::POWER_CONTROL, &mut state);
            state[0] & 3 == 3
        })
    }

    /// What one natural access of a BAR reaches.
    fn place(&self, bar: &BarLayout, offset: u64) -> Place {
        if let Some(msix) = self.layout.msix
            && msix.bar == bar.index
        {
            let table = u64::from(msix.table);
            let vectors = u64::from(self.layout.interrupts.msix);
            if (table..table + vectors * 16).contains(&offset) {
                return Place::Table((offset - table) as usize);
            }
            let pba = u64::from(msix.pba);
            if (pba..pba + vectors.div_ceil(64) * 8).contains(&offset) {
                return Place::Pending;
            }
        }
        let in_area = |area: &crate::device::Area| offset >= area.offset && offset - area.offset < area.size;
        match &bar.memory {
            Mappable::All => Place::Memory,
            Mappable::Areas(areas) if areas.iter().any(in_area) => Place::Memory,
            _ => Place::Registers,
        }
    }

    fn bar_read(&self, bar: &BarLayout, offset: u64, to: &mut [u8]) {
        match self.place(bar, offset) {
            Place::Table(at) => {
                let table = lock(&self.table);
                for (i, byte) in to.iter_mut().enumerate() {
                    *byte = table.get(at + i).copied().unwrap_or(0);
                }
            }
            Place::Pending => to.fill(0),
            Place::Memory => {
                if let Some(memory) = self.link.memory(bar.index) {
                    memory.read(offset, to);
                }
            }
            Place::Registers => self.model.read(bar.index, offset, to),
        }
    }

    fn bar_write(&self, bar: &BarLayout, offset: u64, from: &[u8]) {
        match self.place(bar, offset) {
            Place::Table(at) => {
                let mut table = lock(&self.table);
                for (slot, byte) in table.iter_mut().skip(at).zip(from) {
                    *slot = *byte;
                }
            }
            Place::Pending => {}
            Place::Memory => {
                if let Some(memory) = self.link.memory(bar.index) {
                    memory.write(offset, from);
                }
            }
            Place::Registers => self.model.write(bar.index, offset, from),
        }
    }

    /// Takes over what the configuration space says now.
    fn apply(&self, config: &PciConfig) {
        self.link.bus_master.store(config.bus_master() && !self.sleeping(config), Ordering::Release);
        self.link.interrupts.set_intx_disabled(config.intx_disabled());
    }

    fn reset(&self) {
        self.model.reset();
        self.link.interrupts.set_intx(false);
        for memory in self.link.memory.iter().flatten() {
            memory.clear();
        }
        lock(&self.table).fill(0);
    }

    /// Shows in the configuration space which messages are enabled.
    fn show_messages(&self) {
        let enabled = self.link.interrupts.enabled();
        let mut config = lock(&self.config);
        let mut control = |at: Option<u16>, mask: u16, value: u16| {
            if let Some(at) = at {
                let mut bytes = [0; 2];
                config.read(at + layout::MESSAGE_CONTROL, &mut bytes);
                let word = u16::from_le_bytes(bytes) & !mask | value;
                config.set(at + layout::MESSAGE_CONTROL, &word.to_le_bytes());
            }
        };
        let msi = match enabled {
            Enabled::Msi(count) => {
                let multiple = count.next_power_of_two().trailing_zeros() as u16;
                layout::MSI_ENABLE | multiple << layout::MSI_MULTIPLE_SHIFT
            }
            _ => 0,
        };
        control(self.at.msi, layout::MSI_ENABLE | 7 << layout::MSI_MULTIPLE_SHIFT, msi);
        let msix = if enabled == Enabled::Msix { layout::MSIX_ENABLE } else { 0 };
        control(self.at.msix, layout::MSIX_ENABLE, msix);
    }
}

/// What an access of a BAR reaches.
enum Place {
    Table(usize),
    Pending,
    Memory,
    Registers,
}

/// The widest access of a register, in bytes.
const WIDEST: usize = 8;

impl<M: Model + 'static> Device for Function<M> {
    fn info(&self) -> Result<DeviceInfo> {
        let reset = if self.core.layout.express { DeviceFlags::RESET } else { DeviceFlags::empty() };
        Ok(DeviceInfo {
            flags: DeviceFlags::PCI | reset,
            regions: VFIO_PCI_NUM_REGIONS,
            irqs: VFIO_PCI_NUM_IRQS,
            atomic_completer: self.core.layout.atomic_completer,
        })
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        // There is no VGA region: asking for it is an error, as with a kernel that has none.
        if index > VFIO_PCI_CONFIG_REGION_INDEX {
            return Err(Errno::INVAL);
        }
        let size = self.core.size(index);
        if size == 0 {
            return Ok(RegionInfo::default());
        }
        let read_only = index == VFIO_PCI_ROM_REGION_INDEX;
        let flags = if read_only { RegionFlags::READ } else { RegionFlags::READ | RegionFlags::WRITE };
        let bar = self.core.bar(index);
        let msix = self.core.layout.msix.filter(|_| self.core.layout.interrupts.msix > 0);
        Ok(RegionInfo {
            flags,
            size,
            mappable: bar.map_or(Mappable::No, |bar| bar.memory.clone()),
            registers: bar.is_some_and(|bar| bar.kind != BarKind::Io),
            msix_mappable: msix.is_some_and(|msix| u32::from(msix.bar) == index),
            kind: None,
        })
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.wake();
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let mut config = lock(&self.core.config);
                let at = config_offset(&config, offset, to.len())?;
                config.set_interrupt_status(self.core.link.interrupts.intx());
                config.read(at, to);
                Ok(to.len())
            }
            VFIO_PCI_ROM_REGION_INDEX => {
                let count = self.core.check(index, offset, to.len())?;
                let rom = self.core.layout.rom.get(offset as usize..).unwrap_or_default();
                for (to, byte) in to.iter_mut().zip(rom) {
                    *to = *byte;
                }
                Ok(count)
            }
            _ => {
                let bar = self.core.bar(index).ok_or(Errno::INVAL)?;
                let count = self.core.check(index, offset, to.len())?;
                for (at, range) in natural(offset, count, WIDEST) {
                    self.core.bar_read(bar, at, to.get_mut(range).unwrap_or_default());
                }
                Ok(count)
            }
        }
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.wake();
        if index == VFIO_PCI_CONFIG_REGION_INDEX {
            let reset = {
                let mut config = lock(&self.core.config);
                let at = config_offset(&config, offset, from.len())?;
                config.write(at, from);
                self.core.apply(&config);
                self.core.at.express.is_some_and(|express| initiates_reset(express, at, from))
            };
            if reset {
                self.core.reset();
            }
            return Ok(from.len());
        }
        let bar = self.core.bar(index).ok_or(Errno::INVAL)?;
        let count = self.core.check(index, offset, from.len())?;
        for (at, range) in natural(offset, count, WIDEST) {
            self.core.bar_write(bar, at, from.get(range).unwrap_or_default());
        }
        Ok(count)
    }

    fn region_file(&self, index: u32) -> Option<RegionFile<'_>> {
        let memory = self.core.link.memory(u8::try_from(index).ok()?)?;
        Some(RegionFile { file: memory.as_fd(), offset: 0 })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.core.link.interrupts.info(index)
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        let result = self.core.link.interrupts.set(set);
        self.core.show_messages();
        result
    }

    fn reset(&self) -> Result<()> {
        if !self.core.layout.express {
            return Err(Errno::INVAL);
        }
        self.core.reset();
        Ok(())
    }

    fn open(&self, dma: Arc<dyn Dma>) -> Result<()> {
        self.core.reset();
        let mut config = lock(&self.core.config);
        config.reset();
        config.enable_decoding();
        self.core.apply(&config);
        self.core.link.set_dma(dma);
        Ok(())
    }

    fn close(&self) {
        self.ioeventfds.clear();
        self.core.link.bus_master.store(false, Ordering::Release);
        self.core.link.set_dma(Arc::new(NoDma));
        self.core.reset();
        self.core.link.interrupts.clear();
        self.core.show_messages();
        self.core.link.log.stop();
        *lock(&self.power) = Power::default();
    }

    fn ioeventfd(&self, ioeventfd: IoEventFd) -> Result<()> {
        if ioeventfd.region > VFIO_PCI_BAR5_REGION_INDEX {
            return Err(Errno::INVAL);
        }
        let width = u64::from(ioeventfd.width);
        let end = ioeventfd.offset.checked_add(width).ok_or(Errno::INVAL)?;
        if end > self.core.size(ioeventfd.region) {
            return Err(Errno::INVAL);
        }
        let bar = self.core.bar(ioeventfd.region).ok_or(Errno::INVAL)?;
        if (ioeventfd.offset..end)
            .any(|at| matches!(self.core.place(bar, at), Place::Table(_) | Place::Pending))
        {
            return Err(Errno::INVAL);
        }
        let core = Arc::clone(&self.core);
        let (index, offset) = (ioeventfd.region, ioeventfd.offset);
        self.ioeventfds.set(ioeventfd, move |bytes| {
            let Some(bar) = core.bar(index) else { return };
            for (at, range) in natural(offset, bytes.len(), WIDEST) {
                if core.check(index, offset, bytes.len()).is_ok() {
                    core.bar_write(bar, at, bytes.get(range).unwrap_or_default());
                }
            }
        })
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.core.model.migration()
    }

    fn dma_logging(&self) -> Option<&dyn DmaLogging> {
        self.core.layout.dma_logging.then_some(&self.core.link.log)
    }

    fn has_low_power(&self) -> bool {
        self.core.layout.power_management
    }

    fn low_power(&self, state: LowPower) -> Result<()> {
        if !self.has_low_power() {
            return Err(Errno::NOTTY);
        }
        let mut power = lock(&self.power);
        let wakeup = match state {
            LowPower::Exit => {
                *power = Power::default();
                return Ok(());
            }
            LowPower::Enter | LowPower::EnterWithWakeup(_) if power.low => return Err(Errno::INVAL),
            LowPower::Enter => None,
            LowPower::EnterWithWakeup(fd) => Some(EventFd::new(fd)?),
        };
        *power = Power { low: true, wakeup };
        Ok(())
    }
}

/// The offset of an access of the configuration space. EFAULT when not all of it is inside: the kernel's answer.
fn config_offset(config: &PciConfig, offset: u64, length: usize) -> Result<u16> {
    let inside = offset.checked_add(length as u64).is_some_and(|end| end <= config.size() as u64);
    u16::try_from(offset).ok().filter(|_| inside).ok_or(Errno::FAULT)
}

/// Whether a write of the configuration space sets the bit that resets the function.
fn initiates_reset(express: u16, offset: u16, from: &[u8]) -> bool {
    let at = usize::from(express + layout::DEVICE_CONTROL + 1);
    let byte = at.checked_sub(usize::from(offset)).and_then(|at| from.get(at));
    byte.is_some_and(|byte| byte & layout::INITIATE_RESET.to_le_bytes()[1] != 0)
}

#[cfg(test)]
mod tests;
