//! The configuration space that a guest sees of an assigned device.
//!
//! A read gives what the device has, with the bytes on top that are kept here. A write goes to the device and to what is
//! kept here: devices, too, want to know whether they are bus master and whether MSI-X is on.

use std::collections::BTreeMap;

use pci::config::{Bar, BarKind, PciConfig, PciIds};
use pci::msi::{self, MsiLayout};
use uapi::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio::device::Device;

use super::interrupts::{Control, Kinds, MsixPart};
use super::{AssignError, device_config};

/// Registers of the header (PCI Local Bus 3.0, figure 6-1).
const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const BARS_END: u16 = 0x28;
const ROM: u16 = 0x30;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;
/// What PCI Express adds: no such capability is shown.
const EXTENDED: u16 = 0x100;

/// Capabilities that mean the same in the guest (PCI 3.0, appendix H): power management, MSI, vendor's own, PCI Express, MSI-X.
const SHOWN: [u8; 5] = [0x01, msi::CAPABILITY_ID, 0x09, 0x10, MSIX];
const MSIX: u8 = 0x11;
/// MSI-X's control word: enable, mask, and how many vectors less one.
const MSIX_KEPT: u16 = 0xc000;
const MSIX_VECTORS: u16 = 0x07ff;

/// Where a device has its MSI-X structures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MsixPlace {
    /// The capability's offset.
    capability: u16,
    /// How many vectors it has.
    pub(super) vectors: u16,
    /// BAR and offset.
    table: (usize, u64),
    /// BAR and offset.
    pending: (usize, u64),
}

impl MsixPlace {
    fn table_size(&self) -> u64 {
        16 * u64::from(self.vectors)
    }

    fn pending_size(&self) -> u64 {
        8 * u64::from(self.vectors.div_ceil(64))
    }
}

/// The space of one device.
#[derive(Debug)]
pub(super) struct Space {
    /// BARs and command register.
    header: PciConfig,
    /// Bytes that the guest sees in place of the device's: the list of capabilities without those that are left out,
    /// and no interrupt pin where VFIO has none.
    instead: BTreeMap<u16, u8>,
    intx: Option<u8>,
    /// MSI's capability and its form.
    msi: Option<(u16, MsiLayout)>,
    msix: Option<MsixPlace>,
    msix_control: u16,
}

impl Space {
    /// Reads the device's.
    ///
    /// # Errors
    /// It makes no sense.
    pub(super) fn new(device: &dyn Device) -> Result<Self, AssignError> {
        let mut bytes = [0; EXTENDED as usize];
        let read = device.read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut bytes);
        let read = read.map_err(|source| AssignError::Device { what: "for its configuration", source })?;
        if read != bytes.len() {
            return Err(AssignError::Space("it is shorter than 256 bytes"));
        }
        let word = |at: u16| u16::from_le_bytes([byte(&bytes, at), byte(&bytes, at + 1)]);
        if word(0) == 0xffff {
            return Err(AssignError::Space("there is no function"));
        }
        if byte(&bytes, HEADER_TYPE) & 0x7f != 0 {
            return Err(AssignError::Space("it is a bridge"));
        }
        let mut header = PciConfig::new(PciIds::default());
        add_bars(&mut header, device, &bytes)?;
        let mut space =
            Self { header, instead: BTreeMap::new(), intx: None, msi: None, msix: None, msix_control: 0 };
        // INTA# is 1.
        space.intx = byte(&bytes, INTERRUPT_PIN).checked_sub(1).filter(|pin| *pin < 4);
        if vectors(device, VFIO_PCI_INTX_IRQ_INDEX)? == 0 || space.intx.is_none() {
            space.intx = None;
            space.instead.insert(INTERRUPT_PIN, 0);
        }
        if word(STATUS) & 1 << 4 != 0 {
            space.list_capabilities(device, &bytes)?;
        }
        Ok(space)
    }

    /// Finds MSI and MSI-X, and leaves out what is not [`SHOWN`].
    fn list_capabilities(&mut self, device: &dyn Device, bytes: &[u8]) -> Result<(), AssignError> {
        let (mut at, mut link) = (u16::from(byte(bytes, CAPABILITIES) & !3), CAPABILITIES);
        // The list cannot be longer, unless it is a ring.
        for _ in 0..EXTENDED / 4 {
            if at < 0x40 {
                self.instead.insert(link, 0);
                return Ok(());
            }
            let id = byte(bytes, at);
            if id == MSIX {
                self.msix = Some(msix_place(device, bytes, at)?);
            }
            let mut shown = SHOWN.contains(&id);
            if id == msi::CAPABILITY_ID {
                self.msi = msi_place(device, bytes, at)?;
                shown = self.msi.is_some();
            }
            if shown {
                self.instead.insert(link, at as u8);
                link = at + 1;
            }
            at = u16::from(byte(bytes, at + 1) & !3);
        }
        Err(AssignError::Space("its list of capabilities has no end"))
    }

    /// Which interrupts the device has.
    pub(super) fn interrupts(&self) -> Kinds {
        Kinds {
            intx: self.intx.is_some(),
            msi: self.msi.map(|(_, layout)| layout),
            msix: self.msix.map_or(0, |place| place.vectors),
        }
    }

    /// The device's wire, INTA# (0) to INTD# (3).
    pub(super) fn intx(&self) -> Option<u8> {
        self.intx
    }

    /// How the guest wants to be interrupted.
    pub(super) fn control(&self) -> Control {
        Control {
            msix: self.msix_control,
            bus_master: self.header.bus_master(),
            intx_disabled: self.header.intx_disabled(),
        }
    }

    /// Where an access begins in MSI's capability.
    pub(super) fn msi_part(&self, offset: u16) -> Option<u16> {
        let (capability, layout) = self.msi?;
        offset.checked_sub(capability).filter(|within| *within < layout.size())
    }

    /// The memory BARs.
    pub(super) fn bars(&self) -> impl Iterator<Item = Bar> + '_ {
        self.header.bars()
    }

    /// Whether an access begins in one of MSI-X's structures.
    pub(super) fn msix_part(&self, bar: usize, offset: u64) -> Option<MsixPart> {
        let place = self.msix?;
        let within = |(its_bar, start): (usize, u64), size| {
            offset.checked_sub(start).filter(|within| bar == its_bar && *within < size)
        };
        let table = within(place.table, place.table_size()).map(MsixPart::Table);
        table.or_else(|| within(place.pending, place.pending_size()).map(MsixPart::Pending))
    }

    /// A read by the guest.
    pub(super) fn read(&self, device: &dyn Device, offset: u16, data: &mut [u8]) {
        if offset >= EXTENDED {
            return data.fill(0);
        }
        device_config(device, offset, data);
        for (at, byte) in (offset..).zip(data) {
            let mut kept = [0];
            match at {
                COMMAND..STATUS | BAR0..BARS_END | INTERRUPT_LINE => {
                    self.header.read(at, &mut kept);
                    [*byte] = kept;
                }
                // No ROM: nothing of the machine runs it.
                ROM..CAPABILITIES => *byte = 0,
                _ => {}
            }
            if let Some(instead) = self.instead.get(&at) {
                *byte = *instead;
            }
            if let Some(place) = self.msix {
                let [low, high] = (self.msix_control | (place.vectors - 1)).to_le_bytes();
                match at.wrapping_sub(place.capability) {
                    2 => *byte = low,
                    3 => *byte = high,
                    _ => {}
                }
            }
        }
    }

    /// A write by the guest.
    pub(super) fn write(&mut self, device: &dyn Device, offset: u16, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if matches!(at, COMMAND..STATUS | BAR0..BARS_END | INTERRUPT_LINE) {
                self.header.write(at, &[*byte]);
            }
            if self.msix.is_some_and(|place| at == place.capability + 3) {
                self.msix_control = u16::from(*byte) << 8 & MSIX_KEPT;
            }
        }
        // Where the guest sees the device is no business of it.
        if !matches!(offset, BAR0..BARS_END | ROM..CAPABILITIES | EXTENDED..)
            && let Err(errno) = device.write(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data)
        {
            tracing::debug!(offset, %errno, "the assigned device does not take a configuration write");
        }
    }
}

fn byte(bytes: &[u8], at: u16) -> u8 {
    bytes.get(usize::from(at)).copied().unwrap_or(0)
}

fn dword(bytes: &[u8], at: u16) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| byte(bytes, at + i as u16)))
}

/// Gives the guest the device's memory BARs, in their places. Those of ports are left out: the machine routes none.
fn add_bars(header: &mut PciConfig, device: &dyn Device, bytes: &[u8]) -> Result<(), AssignError> {
    let mut index = 0;
    while index < 6 {
        let register = dword(bytes, BAR0 + 4 * index);
        let wide = register & 0b111 == 0b100;
        let region = device.region(index.into());
        let size = region.map_err(|source| AssignError::Device { what: "for its regions", source })?.size;
        if size != 0 && register & 1 == 0 {
            let prefetchable = register & 8 != 0;
            let kind = if wide { BarKind::Memory64 { prefetchable } } else { BarKind::Memory32 };
            header.add_bar(index.into(), kind, size)?;
        }
        index += if wide { 2 } else { 1 };
    }
    Ok(())
}

/// How many vectors of a kind VFIO says that there are.
fn vectors(device: &dyn Device, index: u32) -> Result<u32, AssignError> {
    let irq = device.irq(index).map_err(|source| AssignError::Device { what: "for its vectors", source })?;
    Ok(irq.count)
}

/// Takes MSI's capability apart (PCI 3.0, section 6.8.1). None when VFIO does not offer it.
fn msi_place(
    device: &dyn Device,
    bytes: &[u8],
    capability: u16,
) -> Result<Option<(u16, MsiLayout)>, AssignError> {
    let control = dword(bytes, capability) >> 16;
    let layout = MsiLayout::from_control(control as u16);
    let layout = layout.ok_or(AssignError::Space("MSI has a number of vectors that there is not"))?;
    if capability + layout.size() > EXTENDED {
        return Err(AssignError::Space("MSI's capability does not fit"));
    }
    let offered = vectors(device, VFIO_PCI_MSI_IRQ_INDEX)?;
    Ok((offered >= layout.vectors.into()).then_some((capability, layout)))
}

/// Takes MSI-X's capability apart (PCI 3.0, section 6.8.2).
fn msix_place(device: &dyn Device, bytes: &[u8], capability: u16) -> Result<MsixPlace, AssignError> {
    let control = dword(bytes, capability) >> 16;
    let place = |at| {
        let register = dword(bytes, at);
        ((register & 7) as usize, u64::from(register & !7))
    };
    let count = vectors(device, VFIO_PCI_MSIX_IRQ_INDEX)?;
    let found = MsixPlace {
        capability,
        vectors: (control as u16 & MSIX_VECTORS) + 1,
        table: place(capability + 4),
        pending: place(capability + 8),
    };
    if u32::from(found.vectors) != count {
        return Err(AssignError::Space("MSI-X has another number of vectors than VFIO says"));
    }
    Ok(found)
}
