//! What a PCI function in software consists of, and the configuration space that says so.

use pci::config::{BarKind, ConfigError, PciConfig, PciIds};

use super::interrupts::Kinds;
use crate::device::Mappable;

/// Capability IDs (PCI Code and ID Assignment 1.16, sections 2 and 3).
mod id {
    pub(super) const POWER_MANAGEMENT: u8 = 0x01;
    pub(super) const MSI: u8 = 0x05;
    pub(super) const EXPRESS: u8 = 0x10;
    pub(super) const MSIX: u8 = 0x11;
    pub(super) const EXTENDED_SRIOV: u16 = 0x10;
}

/// One BAR.
#[derive(Clone, Debug)]
pub struct BarLayout {
    /// Its number, 0 to 5.
    pub index: u8,
    /// How it is decoded.
    pub kind: BarKind,
    /// How many bytes it has.
    pub size: u64,
    /// What of it is plain memory: kept by the function, mapped by users, and read and written by the model through
    /// [`Link::memory`](super::function::Link::memory).
    pub memory: Mappable,
}

/// Where MSI-X keeps its table and pending bits.
#[derive(Clone, Copy, Debug)]
pub struct MsixLayout {
    /// The BAR of both.
    pub bar: u8,
    /// Where the table is in it, a multiple of 8.
    pub table: u32,
    /// Where the pending bits are, a multiple of 8.
    pub pba: u32,
}

/// Virtual functions (PCIe 6.0, section 9).
#[derive(Clone, Copy, Debug)]
pub struct SriovLayout {
    /// How many there can be.
    pub total: u16,
    /// The first one's routing ID, counted from the function's own.
    pub offset: u16,
    /// From one to the next.
    pub stride: u16,
    /// Their device ID.
    pub device: u16,
}

/// A PCI function.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Who made it and what it is.
    pub ids: PciIds,
    /// Its BARs.
    pub bars: Vec<BarLayout>,
    /// The expansion ROM's bytes, as many as its size: a power of two from 2 KiB.
    pub rom: Vec<u8>,
    /// Its interrupts.
    pub interrupts: Kinds,
    /// Where MSI-X's structures are; only with vectors.
    pub msix: Option<MsixLayout>,
    /// It is a function of PCI Express: extended configuration space, and function-level reset.
    pub express: bool,
    /// It has power management (D0 and D3hot).
    pub power_management: bool,
    /// Atomic operations that it completes (`VFIO_PCI_ATOMIC_COMP*`).
    pub atomic_completer: Option<u32>,
    /// Its virtual functions.
    pub sriov: Option<SriovLayout>,
    /// What it writes to memory can be logged.
    pub dma_logging: bool,
}

impl Layout {
    /// A function with IDs and nothing else.
    #[must_use]
    pub fn new(ids: PciIds) -> Self {
        Self {
            ids,
            bars: Vec::new(),
            rom: Vec::new(),
            interrupts: Kinds::default(),
            msix: None,
            express: false,
            power_management: false,
            atomic_completer: None,
            sriov: None,
            dma_logging: false,
        }
    }
}

/// Where a function's capabilities are in its configuration space.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Capabilities {
    pub(super) power_management: Option<u16>,
    pub(super) msi: Option<u16>,
    pub(super) msix: Option<u16>,
    pub(super) express: Option<u16>,
    pub(super) sriov: Option<u16>,
}

/// Device control, of the PCI Express capability (PCIe 6.0, section 7.5.3.4).
pub(super) const DEVICE_CONTROL: u16 = 8;
/// Its bit that resets the function; reads as zero.
pub(super) const INITIATE_RESET: u16 = 1 << 15;
/// The control and status register of power management (PCI Power Management 1.2, section 3.2.4).
pub(super) const POWER_CONTROL: u16 = 4;
/// The control words of MSI and MSI-X, and what they say.
pub(super) const MESSAGE_CONTROL: u16 = 2;
pub(super) const MSI_ENABLE: u16 = 1;
pub(super) const MSI_MULTIPLE_SHIFT: u32 = 4;
pub(super) const MSIX_ENABLE: u16 = 1 << 15;
/// How many virtual functions are enabled (PCIe 6.0, section 9.3.3.7).
pub(super) const SRIOV_NUM_VFS: u16 = 0x10;

/// Makes the configuration space.
pub(super) fn config(layout: &Layout) -> Result<(PciConfig, Capabilities), ConfigError> {
    let mut config = if layout.express { PciConfig::express(layout.ids) } else { PciConfig::new(layout.ids) };
    let mut at = Capabilities::default();
    for bar in &layout.bars {
        config.add_bar(usize::from(bar.index), bar.kind, bar.size)?;
    }
    if !layout.rom.is_empty() {
        config.add_rom(layout.rom.len() as u64)?;
    }
    if layout.interrupts.intx {
        config.set_interrupt_pin_a();
    }
    if layout.power_management {
        // Version 3, no PME. The power state is D0 or D3hot, and returning from the latter keeps the state (bit 3).
        let body = [3, 0, 8, 0, 0, 0];
        at.power_management =
            Some(config.add_capability(id::POWER_MANAGEMENT, &body, &[0, 0, 3, 0, 0, 0])?.into());
    }
    if layout.interrupts.msi > 0 {
        // 64-bit addresses. The enabled bits follow from VFIO's own call, the address and the data are nobody's.
        let multiple = u16::try_from(layout.interrupts.msi.trailing_zeros()).unwrap_or(0);
        let control = (1 << 7 | multiple << 1).to_le_bytes();
        let body = [control[0], control[1], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let writable = [0, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        at.msi = Some(config.add_capability(id::MSI, &body, &writable)?.into());
    }
    if let Some(msix) = layout.msix
        && layout.interrupts.msix > 0
    {
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&(layout.interrupts.msix - 1).to_le_bytes());
        body.extend_from_slice(&(msix.table & !7 | u32::from(msix.bar)).to_le_bytes());
        body.extend_from_slice(&(msix.pba & !7 | u32::from(msix.bar)).to_le_bytes());
        at.msix = Some(config.add_capability(id::MSIX, &body, &[])?.into());
    }
    if layout.express {
        at.express = Some(express(&mut config)?);
    }
    if let Some(sriov) = layout.sriov {
        let mut body = [0; 0x3c];
        let mut put = |offset: usize, value: u16| {
            if let Some(bytes) = body.get_mut(offset - 4..offset - 2) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        };
        put(0x0c, sriov.total);
        put(0x0e, sriov.total);
        put(0x14, sriov.offset);
        put(0x16, sriov.stride);
        put(0x1a, sriov.device);
        // Page sizes: 4 KiB, supported and chosen.
        put(0x1c, 1);
        put(0x20, 1);
        at.sriov = Some(config.add_extended_capability(id::EXTENDED_SRIOV, 1, &body, &[])?);
    }
    Ok((config, at))
}

/// The PCI Express capability of an endpoint (PCIe 6.0, section 7.5.3).
fn express(config: &mut PciConfig) -> Result<u16, ConfigError> {
    let mut body = [0; 0x3a];
    // Version 2, endpoint.
    body[0] = 2;
    // Function-level reset, role-based error reporting.
    body[2..6].copy_from_slice(&(1u32 << 28 | 1 << 15).to_le_bytes());
    // A link of 2.5 GT/s and one lane, and the same negotiated.
    body[10..14].copy_from_slice(&0x11u32.to_le_bytes());
    body[16..18].copy_from_slice(&0x11u16.to_le_bytes());
    let mut writable = [0; 0x3a];
    // Device control: payload, extended tags, read requests. The reset is an action and keeps no bit.
    writable[6..8].copy_from_slice(&0x71e0u16.to_le_bytes());
    let offset = config.add_capability(id::EXPRESS, &body, &writable)?;
    // Device status: the errors.
    config.set_clearable(usize::from(offset) + 10, &[0xf]);
    Ok(offset.into())
}
