//! What a server says that its device is, checked.

use std::os::fd::OwnedFd;

use rustix::fs::fstat;
use uapi::vfio::{VFIO_PCI_ROM_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, vfio_irq_info, vfio_region_info};
use zerocopy::IntoBytes;

use super::wire_length;
use crate::capabilities::RegionCapabilities;
use crate::device::{Area, DeviceFlags, DeviceInfo, Mappable, RegionFlags, RegionInfo};
use crate::irq::{IrqFlags, IrqInfo};
use crate::user::connection::Connection;
use crate::user::wire::{self, Command};
use crate::user::{Errno, Result};

/// Regions, and kinds of interrupts, that a device may have here.
const MAX_INDICES: u32 = 64;
/// Vectors of a kind: what MSI-X can have.
const MAX_VECTORS: u32 = 2048;
/// Bytes of region information that are asked for at first.
const REGION_INFO: usize = 4096;
/// Bytes that it may have.
const MAX_REGION_INFO: usize = 64 << 10;

/// One region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) info: RegionInfo,
    /// What can be mapped, and where in it the region begins.
    pub(super) file: Option<(OwnedFd, u64)>,
}

impl Region {
    /// One that the device does not have.
    pub(super) fn absent() -> Self {
        Self { info: RegionInfo::default(), file: None }
    }
}

pub(super) fn device(main: &Connection) -> Result<DeviceInfo> {
    let argsz = wire_length(size_of::<wire::DeviceInfo>());
    let asked = wire::DeviceInfo { argsz, ..Default::default() };
    let reply = main.request(Command::DeviceGetInfo, &[asked.as_bytes()], &[])?;
    let (info, _) = wire::split::<wire::DeviceInfo>(&reply.payload)?;
    if info.num_regions > MAX_INDICES || info.num_irqs > MAX_INDICES {
        return Err(Errno::PROTO);
    }
    Ok(DeviceInfo {
        flags: DeviceFlags::from_bits_truncate(info.flags),
        regions: info.num_regions,
        irqs: info.num_irqs,
        atomic_completer: None,
    })
}

pub(super) fn irq(main: &Connection, index: u32) -> Result<IrqInfo> {
    let asked = vfio_irq_info { argsz: wire_length(size_of::<vfio_irq_info>()), index, ..Default::default() };
    let reply = main.request(Command::DeviceGetIrqInfo, &[asked.as_bytes()], &[])?;
    let (info, _) = wire::split::<vfio_irq_info>(&reply.payload)?;
    if info.index != index || info.count > MAX_VECTORS {
        return Err(Errno::PROTO);
    }
    Ok(IrqInfo { flags: IrqFlags::from_bits_truncate(info.flags), count: info.count })
}

pub(super) fn region(main: &Connection, index: u32, device: DeviceFlags) -> Result<Region> {
    let ask = |argsz: usize| {
        let asked = vfio_region_info { argsz: wire_length(argsz), index, ..Default::default() };
        let reply = main.request(Command::DeviceGetRegionInfo, &[asked.as_bytes()], &[])?;
        let (info, _) = wire::split::<vfio_region_info>(&reply.payload)?;
        Ok::<_, Errno>((info, reply))
    };
    let (mut info, mut reply) = ask(REGION_INFO)?;
    let needed = usize::try_from(info.argsz).unwrap_or(usize::MAX);
    if needed > MAX_REGION_INFO {
        return Err(Errno::PROTO);
    }
    if needed > REGION_INFO {
        (info, reply) = ask(needed)?;
    }
    if info.index != index {
        return Err(Errno::PROTO);
    }
    let found = RegionCapabilities::read(&info, &reply.payload)?;
    let mut file = None;
    let mut mappable = Mappable::No;
    if info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
        let fd = reply.fds.into_iter().next().ok_or(Errno::PROTO)?;
        mappable = found.sparse.map_or(Mappable::All, Mappable::Areas);
        check_file(&fd, info.offset, &mappable.areas(info.size), info.size)?;
        file = Some((fd, info.offset));
    }
    let flags = RegionFlags::from_bits_truncate(info.flags);
    let registers = device.contains(DeviceFlags::PCI)
        && index < VFIO_PCI_ROM_REGION_INDEX
        && !flags.is_empty()
        && mappable != Mappable::All;
    Ok(Region {
        info: RegionInfo {
            flags,
            size: info.size,
            mappable,
            registers,
            msix_mappable: found.msix_mappable,
            kind: found.kind,
        },
        file,
    })
}

/// What is to be mapped must be in the region and in the file: a mapping beyond its end is a trap.
fn check_file(file: &OwnedFd, offset: u64, areas: &[Area], size: u64) -> Result<()> {
    let length = u64::try_from(fstat(file)?.st_size).map_err(|_| Errno::PROTO)?;
    for area in areas {
        let end = area.offset.checked_add(area.size).filter(|end| *end <= size).ok_or(Errno::PROTO)?;
        let end = offset.checked_add(end).ok_or(Errno::PROTO)?;
        if end > length {
            return Err(Errno::PROTO);
        }
    }
    Ok(())
}
