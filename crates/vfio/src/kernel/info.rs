//! What the kernel says that a device is.

use std::{fs::File, os::fd::AsFd};

use iommufd::kernel::calls::{self, Plain};
use uapi::vfio::{
    VFIO_DEVICE_FLAGS_CAPS, VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, VFIO_PCI_ROM_REGION_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP, vfio_device_info, vfio_irq_info, vfio_region_info,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    Errno, Result,
    capabilities::{Chain, RegionCapabilities},
    device::{DeviceFlags, DeviceInfo, Mappable, RegionFlags, RegionInfo},
    irq::{IrqFlags, IrqInfo},
};

/// One region.
#[derive(Debug, Default)]
pub(super) struct Region {
    pub(super) info: RegionInfo,
    /// Where it begins in the device's descriptor.
    pub(super) start: u64,
}

/// Bytes of information that are asked for at first, and those that it may have.
const ROOM: (usize, usize) = (1024, 64 << 10);

/// Asks with a structure that begins with `head`, and that capabilities may follow.
fn ask(device: &File, call: Plain, head: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; ROOM.0];
    loop {
        bytes.get_mut(..head.len()).ok_or(Errno::INVAL)?.copy_from_slice(head);
        let given = bytes.len();
        calls::sized(device.as_fd(), call, &mut bytes)?;
        // How much it would take.
        let (needed, _) = u32::read_from_prefix(&bytes).map_err(|_| Errno::PROTO)?;
        let needed = usize::try_from(needed).map_err(|_| Errno::OVERFLOW)?;
        if needed <= given {
            return Ok(bytes);
        }
        if needed > ROOM.1 {
            return Err(Errno::OVERFLOW);
        }
        bytes = vec![0; needed];
    }
}

pub(super) fn device(device: &File) -> Result<DeviceInfo> {
    let bytes = ask(device, Plain::DeviceInfo, vfio_device_info::default().as_bytes())?;
    let (info, _) = vfio_device_info::read_from_prefix(&bytes).map_err(|_| Errno::PROTO)?;
    let start = if info.flags & VFIO_DEVICE_FLAGS_CAPS == 0 { 0 } else { info.cap_offset };
    let mut atomic_completer = None;
    for capability in Chain::new(&bytes, start) {
        let (id, body) = capability?;
        if u32::from(id) == VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP {
            atomic_completer = u32::read_from_prefix(body).ok().map(|(flags, _)| flags);
        }
    }
    Ok(DeviceInfo {
        flags: DeviceFlags::from_bits_truncate(info.flags),
        regions: info.num_regions,
        irqs: info.num_irqs,
        atomic_completer,
    })
}

/// A region; one without a size for an index that is counted but not there.
pub(super) fn region(device: &File, index: u32, flags: DeviceFlags) -> Result<Region> {
    let head = vfio_region_info { index, ..Default::default() };
    let bytes = match ask(device, Plain::RegionInfo, head.as_bytes()) {
        Err(Errno::INVAL) => return Ok(Region::default()),
        bytes => bytes?,
    };
    let (info, _) = vfio_region_info::read_from_prefix(&bytes).map_err(|_| Errno::PROTO)?;
    let found = RegionCapabilities::read(&info, &bytes)?;
    let mappable = match found.sparse {
        _ if info.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 => Mappable::No,
        Some(areas) => Mappable::Areas(areas),
        None => Mappable::All,
    };
    let start = info.offset;
    let access = RegionFlags::from_bits_truncate(info.flags);
    let bar = flags.contains(DeviceFlags::PCI) && index < VFIO_PCI_ROM_REGION_INDEX;
    let info = RegionInfo {
        flags: access,
        size: info.size,
        registers: bar && !access.is_empty(),
        mappable,
        msix_mappable: found.msix_mappable,
        kind: found.kind,
    };
    Ok(Region { info, start })
}

pub(super) fn irq(device: &File, index: u32) -> Result<IrqInfo> {
    let mut info = vfio_irq_info { index, ..Default::default() };
    match calls::fixed(device.as_fd(), Plain::IrqInfo, &mut info) {
        // A kind that is counted but not there: error interrupts of a device that is not PCI Express.
        Err(Errno::INVAL) => return Ok(IrqInfo::default()),
        done => done?,
    };
    Ok(IrqInfo { flags: IrqFlags::from_bits_truncate(info.flags), count: info.count })
}
