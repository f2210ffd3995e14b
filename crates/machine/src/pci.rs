//! PCI Express: one root complex, one bus, functions with memory BARs.
//!
//! There are two ways to configuration space: the ECAM, where each function has 4 KiB of memory (PCI Express Base
//! Specification, 7.2.2), and the ports 0xcf8 and 0xcfc (PCI Local Bus Specification 3.0, 3.2.2.3), which reach
//! the first 256 bytes and are what a kernel uses before it knows of the ECAM. Both end in
//! [`PciRoot`], which gives a function accesses of 1, 2 or 4 bytes inside one aligned double
//! word, whatever the guest's access was.
//!
//! A function says where its BARs are ([`PciFunction::bars`]). The root turns them into a sorted table of
//! routes, rebuilt when the guest writes a function's command register or BARs, and looks memory
//! accesses up there under a read lock. What a guest can do with a BAR is bounded:
//! - Only the two MMIO windows are routed. A BAR outside of them, or partly so, is not routed: it shadows
//!   neither RAM nor other devices.
//! - BARs that overlap: the one of the lower slot, then of the lower index, is routed and the others are
//!   not, until one moves.
//!
//! What is routed nowhere reads as all ones and ignores writes, as does configuration space of functions that
//! are not there.
//!
//! Lock order: `layout`, then one function, never two; `routes` is only held for a lookup or a
//! store. Functions must not call into the root.

pub(crate) mod intx;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use ::pci::access::natural;
use ::pci::config::{Bar, BarKind};

use crate::bus::{Bus, BusError, MmioDevice, PortDevice};
use crate::layout;
use crate::power::{PowerSignal, ResetControl};

/// Slots of the bus. Slot 0 is the host bridge.
pub const SLOTS: usize = 32;
/// BARs of a function.
pub const BARS: usize = 6;

/// Configuration space: the command register, whose bit 1 turns memory BARs on.
pub const COMMAND: u16 = 0x04;
/// Configuration space: the first BAR; four bytes each.
pub const BAR0: u16 = 0x10;
/// Configuration space: what follows the last BAR.
const BARS_END: u16 = BAR0 + 4 * BARS as u16;

/// Bytes of a function's configuration space.
const CONFIG_SIZE: u16 = 0x1000;

/// A memory BAR as a function has it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Which of the BARs, 0 to 5. One of 64 bits takes the next one too.
    pub index: usize,
    /// Where the guest (or [`PciRoot::assign_bars`]) has put it.
    pub address: u64,
    /// Its size: a power of two, 16 at least.
    pub size: u64,
    /// Whether it has 64 address bits.
    pub wide: bool,
    /// Whether the function answers: memory space is on in the command register.
    pub enabled: bool,
}

impl From<Bar> for BarInfo {
    fn from(bar: Bar) -> Self {
        let wide = matches!(bar.kind, BarKind::Memory64 { .. });
        Self { index: bar.index, address: bar.address, size: bar.size, wide, enabled: bar.enabled }
    }
}

/// A function of a PCI device: configuration space and what is behind its BARs.
pub trait PciFunction: Send {
    /// Reads configuration space at `offset` (below 4096): 1, 2 or 4 bytes in one aligned double word.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration space at `offset` (below 4096): 1, 2 or 4 bytes in one aligned double word.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The memory BARs, those that are off or unassigned included.
    fn bars(&self) -> Vec<BarInfo>;
    /// Reads `data.len()` bytes at `offset` in a BAR. All of the access is in it.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` in a BAR. All of the access is in it.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
}

/// A function as it is shared with its device's other threads.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Why a function could not be put on the bus, or its BARs in the windows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The slot is taken, or is none.
    #[error("PCI slot {0} is taken or not one of the {SLOTS} of the bus")]
    NoSlot(usize),
    /// All slots are taken.
    #[error("all {SLOTS} PCI slots are taken: use fewer devices")]
    Full,
    /// A BAR is of no possible size or index.
    #[error("PCI slot {slot}: BAR {index} has size {size:#x}")]
    BadBar {
        /// The function's slot.
        slot: usize,
        /// The BAR.
        index: usize,
        /// Its size.
        size: u64,
    },
    /// The window is too small for all BARs.
    #[error("PCI slot {slot}: no room for BAR {index} of {size:#x} bytes in the window up to {end:#x}")]
    WindowFull {
        /// The function's slot.
        slot: usize,
        /// The BAR.
        index: usize,
        /// Its size.
        size: u64,
        /// End of the window.
        end: u64,
    },
}

/// Guest-physical addresses that a BAR answers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    range: Range<u64>,
    slot: usize,
    bar: usize,
}

/// The root complex and its bus.
pub struct PciRoot {
    slots: [Option<SharedFunction>; SLOTS],
    mmio32: Range<u64>,
    mmio64: Range<u64>,
    /// The BARs of each slot as they were at its last configuration write.
    layout: Mutex<[Vec<BarInfo>; SLOTS]>,
    /// Sorted, disjoint.
    routes: RwLock<Vec<Route>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciRoot {
    /// A bus with the host bridge on it and these windows for BARs: one below 4 GiB and one for BARs
    /// of 64 bits, see [`layout::MMIO32`] and [`layout::mmio64_window`].
    pub fn new(mmio32: Range<u64>, mmio64: Range<u64>) -> Self {
        let mut slots: [Option<SharedFunction>; SLOTS] = Default::default();
        if let Some(first) = slots.first_mut() {
            *first = Some(Arc::new(Mutex::new(HostBridge)));
        }
        Self { slots, mmio32, mmio64, layout: Mutex::default(), routes: RwLock::default() }
    }

    /// Puts a function in a slot.
    ///
    /// # Errors
    /// When the slot is taken or there is none of that number.
    pub fn add(&mut self, slot: usize, function: SharedFunction) -> Result<(), PciError> {
        match self.slots.get_mut(slot) {
            Some(place @ None) => {
                *place = Some(function);
                Ok(())
            }
            _ => Err(PciError::NoSlot(slot)),
        }
    }

    /// Puts a function in the first free slot and returns which.
    ///
    /// # Errors
    /// When there is none.
    pub fn add_next(&mut self, function: SharedFunction) -> Result<usize, PciError> {
        let slot = self.next_slot()?;
        self.add(slot, function)?;
        Ok(slot)
    }

    /// Which slot the next function comes into.
    ///
    /// # Errors
    /// When there is none.
    pub fn next_slot(&self) -> Result<usize, PciError> {
        self.slots.iter().position(Option::is_none).ok_or(PciError::Full)
    }

    /// Gives every BAR an address, as firmware does before it starts a kernel: those of 64 bits in the
    /// high window, others in the low one, the largest first, so that none of the space is lost to
    /// alignment. Leaves memory space off; kernels turn it on.
    ///
    /// # Errors
    /// When a window is full or a BAR is of an impossible size.
    pub fn assign_bars(&self) -> Result<(), PciError> {
        let mut bars = Vec::new();
        for (slot, function) in self.functions() {
            bars.extend(lock(function).bars().into_iter().map(|bar| (slot, bar)));
        }
        bars.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
        let mut next = [self.mmio32.clone(), self.mmio64.clone()];
        for (slot, bar) in bars {
            let BarInfo { index, size, wide, .. } = bar;
            let registers = if wide { 2 } else { 1 };
            if !size.is_power_of_two() || size < 16 || index + registers > BARS {
                return Err(PciError::BadBar { slot, index, size });
            }
            let [low, high] = &mut next;
            let window = if wide { high } else { low };
            let full = PciError::WindowFull { slot, index, size, end: window.end };
            let address = window.start.checked_next_multiple_of(size).ok_or(full)?;
            window.start = match address.checked_add(size) {
                Some(end) if end <= window.end => end,
                _ => return Err(PciError::WindowFull { slot, index, size, end: window.end }),
            };
            for (register, half) in
                (BAR0 + 4 * index as u16..).step_by(4).zip([address, address >> 32]).take(registers)
            {
                self.config_write(0, slot as u8, 0, register, &(half as u32).to_le_bytes());
            }
        }
        Ok(())
    }

    fn functions(&self) -> impl Iterator<Item = (usize, &SharedFunction)> {
        self.slots.iter().enumerate().filter_map(|(slot, f)| Some((slot, f.as_ref()?)))
    }

    fn function(&self, bus: u8, slot: u8, function: u8) -> Option<&SharedFunction> {
        if bus != 0 || function != 0 {
            return None;
        }
        self.slots.get(usize::from(slot))?.as_ref()
    }

    /// Reads configuration space. `offset` counts from the function's first byte; what is past its
    /// 4096 bytes reads as all ones.
    pub fn config_read(&self, bus: u8, slot: u8, function: u8, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(bus, slot, function) else {
            data.fill(0xff);
            return;
        };
        data.fill(0xff);
        let mut function = lock(function);
        for (part, range) in parts(offset, data.len()) {
            if let Some(bytes) = data.get_mut(range) {
                function.config_read(part, bytes);
            }
        }
    }

    /// Writes configuration space, and moves routes when that moves BARs.
    pub fn config_write(&self, bus: u8, slot: u8, function: u8, offset: u16, data: &[u8]) {
        let Some(shared) = self.function(bus, slot, function) else { return };
        for (part, range) in parts(offset, data.len()) {
            let Some(bytes) = data.get(range) else { continue };
            match part {
                COMMAND..BARS_END => {
                    // Held throughout, so that two writers store what they see in the order of their writes.
                    let mut layout = lock(&self.layout);
                    let mut function = lock(shared);
                    function.config_write(part, bytes);
                    let bars = function.bars();
                    drop(function);
                    if let Some(place) = layout.get_mut(usize::from(slot))
                        && *place != bars
                    {
                        *place = bars;
                        let routes = self.routes_of(&layout);
                        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
                    }
                }
                _ => lock(shared).config_write(part, bytes),
            }
        }
    }

    /// The routes that follow from where BARs are.
    fn routes_of(&self, layout: &[Vec<BarInfo>; SLOTS]) -> Vec<Route> {
        let mut routes: Vec<Route> = Vec::new();
        for (slot, bars) in layout.iter().enumerate() {
            for bar in bars.iter().filter(|b| b.enabled && b.size != 0) {
                let Some(end) = bar.address.checked_add(bar.size) else { continue };
                let range = bar.address..end;
                let inside = |w: &Range<u64>| w.start <= range.start && range.end <= w.end;
                let at = routes.partition_point(|r| r.range.end <= range.start);
                let free = routes.get(at).is_none_or(|r| range.end <= r.range.start);
                if free && (inside(&self.mmio32) || inside(&self.mmio64)) {
                    routes.insert(at, Route { range, slot, bar: bar.index });
                } else {
                    tracing::debug!(slot, ?bar, "BAR not routed");
                }
            }
        }
        routes
    }

    /// The function, BAR and offset of an access that lies in one BAR.
    fn route(&self, address: u64, length: usize) -> Option<(&SharedFunction, usize, u64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let at = routes.partition_point(|r| r.range.end <= address);
        let route = routes.get(at).filter(|r| r.range.start <= address)?;
        if length as u64 > route.range.end - address {
            return None;
        }
        Some((self.slots.get(route.slot)?.as_ref()?, route.bar, address - route.range.start))
    }

    /// Reads at a guest-physical address in a window.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.route(address, data.len()) {
            Some((function, bar, offset)) => lock(function).bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at a guest-physical address in a window.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.route(address, data.len()) {
            lock(function).bar_write(bar, offset, data);
        }
    }

    /// Puts the windows, the ECAM and the configuration ports on a bus. Port 0xcf9, in the middle of
    /// the latter, is the reset control register and raises its event in `power`.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, bus: &mut Bus, power: &Arc<PowerSignal>) -> Result<(), BusError> {
        for window in [&self.mmio32, &self.mmio64] {
            let device = Window { root: self.clone(), base: window.start };
            let size = window.end.saturating_sub(window.start);
            bus.add_mmio("PCI window", mmu::Gpa(window.start), size, Arc::new(device))?;
        }
        bus.add_mmio("ECAM", layout::ECAM, layout::ECAM_SIZE, Arc::new(Ecam(self.clone())))?;
        let ports = ConfigPorts {
            root: self.clone(),
            address: AtomicU32::new(0),
            reset: ResetControl::new(power.clone()),
        };
        bus.add_ports("PCI configuration", layout::PCI_CONFIG_PORT, 8, Arc::new(ports))
    }
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slots: Vec<usize> = self.functions().map(|(slot, _)| slot).collect();
        f.debug_struct("PciRoot").field("slots", &slots).field("routes", &self.routes).finish_non_exhaustive()
    }
}

/// Takes an access to configuration space apart: pieces that a function takes, as offset and place in
/// the data. A piece is 1, 2 or 4 bytes, aligned to its size. What is past the space is left out.
fn parts(offset: u16, length: usize) -> impl Iterator<Item = (u16, Range<usize>)> {
    let inside = |(at, range)| u16::try_from(at).ok().filter(|at| *at < CONFIG_SIZE).map(|at| (at, range));
    natural(offset.into(), length, 4).map_while(inside)
}

/// A window of PCI memory on the bus.
struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl MmioDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.root.mmio_read(self.base + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.mmio_write(self.base + offset, data);
    }
}

/// The ECAM on the bus.
struct Ecam(Arc<PciRoot>);

/// Bus, slot, function and offset of an ECAM offset.
fn ecam_address(offset: u64) -> (u8, u8, u8, u16) {
    ((offset >> 20) as u8, (offset >> 15) as u8 & 31, (offset >> 12) as u8 & 7, offset as u16 & 0xfff)
}

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bus, slot, function, offset) = ecam_address(offset);
        self.0.config_read(bus, slot, function, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bus, slot, function, offset) = ecam_address(offset);
        self.0.config_write(bus, slot, function, offset, data);
    }
}

/// Ports 0xcf8 to 0xcff.
struct ConfigPorts {
    root: Arc<PciRoot>,
    /// What was written to 0xcf8: bit 31 enables, then bus, slot, function and double word.
    address: AtomicU32,
    reset: ResetControl,
}

/// Offset of the reset control register, 0xcf9, from the first port.
const RESET_CONTROL: u16 = 1;
/// Offset of the data register, 0xcfc, from the first port.
const DATA: u16 = 4;

impl ConfigPorts {
    /// What the data port at `offset` reaches, if it is enabled.
    fn target(&self, offset: u16) -> Option<(u8, u8, u8, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, function, bus, enable] = address.to_le_bytes();
        let within = offset.checked_sub(DATA)?;
        (enable & 0x80 != 0).then_some((
            bus,
            function >> 3,
            function & 7,
            u16::from(register & 0xfc) + within,
        ))
    }
}

impl PortDevice for ConfigPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (RESET_CONTROL, 1) => data.fill(self.reset.read()),
            _ => {
                if let Some((bus, slot, function, register)) = self.target(offset) {
                    self.root.config_read(bus, slot, function, register, data);
                }
            }
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                // Bits 30:24 and 1:0 are reserved.
                let value = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
                self.address.store(value, Ordering::Relaxed);
            }
            (RESET_CONTROL, &[value]) => self.reset.write(value),
            _ => {
                if let Some((bus, slot, function, register)) = self.target(offset) {
                    self.root.config_write(bus, slot, function, register, data);
                }
            }
        }
    }
}

/// The host bridge: there only to be found. The identity is that of QEMU's generic PCI Express
/// host bridge, which no driver binds to.
struct HostBridge;

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        const IDENTITY: [u8; 12] = [
            0x36, 0x1b, 0x08, 0x00, // vendor, device
            0x00, 0x00, 0x00, 0x00, // command, status
            0x00, 0x00, 0x00, 0x06, // revision, class: bridge, host
        ];
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = IDENTITY.get(at).copied().unwrap_or(0);
        }
    }

    fn config_write(&mut self, _offset: u16, _data: &[u8]) {}

    fn bars(&self) -> Vec<BarInfo> {
        Vec::new()
    }

    fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests;
