//! What a region is: DEVICE_GET_REGION_INFO and DEVICE_GET_REGION_IO_FDS.

use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use uapi::vfio::{
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, vfio_info_cap_header, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use zerocopy::IntoBytes;

use super::session::{Reply, Session, check_argsz, length_u32};
use crate::device::{IoEventFd, Mappable, RegionInfo};
use crate::user::wire::{self, IO_FD_TYPE_IOEVENTFD, RegionIoFds, SubRegion};
use crate::user::{Errno, Result};

/// `KVM_IOEVENTFD_FLAG_DATAMATCH` of `<linux/kvm.h>`.
const DATAMATCH: u32 = 1;

/// DEVICE_GET_REGION_INFO.
pub(super) fn region(session: &Session, payload: &[u8]) -> Result<Reply> {
    let (asked, _) = wire::split::<vfio_region_info>(payload)?;
    let head = size_of::<vfio_region_info>();
    check_argsz(asked.argsz, head)?;
    let region = session.device.region(asked.index)?;
    let file = if region.mappable == Mappable::No { None } else { session.device.region_file(asked.index) };
    let file = file.filter(|_| session.client_fds > 0);
    let chain = capabilities(&region, file.is_some(), head);
    let mut info = vfio_region_info {
        argsz: length_u32(head + chain.len()),
        flags: region.flags.bits(),
        index: asked.index,
        cap_offset: 0,
        size: region.size,
        offset: 0,
    };
    let mut fds = Vec::new();
    if let Some(file) = file {
        info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
        info.offset = file.offset;
        fds.push(rustix::io::fcntl_dupfd_cloexec(file.file, 0)?);
    }
    let fits = check_argsz(asked.argsz, head + chain.len()).is_ok();
    if !chain.is_empty() {
        info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
        // Also when the chain does not fit: QEMU takes the flag without a place for a lie, and asks again for more.
        info.cap_offset = length_u32(head);
    }
    let mut payload = info.as_bytes().to_vec();
    if fits {
        payload.extend_from_slice(&chain);
    }
    Ok(Reply { payload, fds })
}

/// The chain of capabilities, which begins `at` bytes after the beginning of the structure.
fn capabilities(region: &RegionInfo, mapped: bool, at: usize) -> Vec<u8> {
    let mut all: Vec<(u32, Vec<u8>)> = Vec::new();
    if let (Mappable::Areas(areas), true) = (&region.mappable, mapped) {
        let mut body = [length_u32(areas.len()), 0].as_bytes().to_vec();
        for area in areas {
            let area = vfio_region_sparse_mmap_area { offset: area.offset, size: area.size };
            body.extend_from_slice(area.as_bytes());
        }
        all.push((VFIO_REGION_INFO_CAP_SPARSE_MMAP, body));
    }
    if let Some((kind, subtype)) = region.kind {
        all.push((VFIO_REGION_INFO_CAP_TYPE, [kind, subtype].as_bytes().to_vec()));
    }
    if region.msix_mappable {
        all.push((VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, Vec::new()));
    }
    let mut chain = Vec::new();
    let last = all.len().saturating_sub(1);
    for (number, (id, body)) in all.into_iter().enumerate() {
        let length = size_of::<vfio_info_cap_header>() + body.len();
        let next = if number == last { 0 } else { length_u32(at + chain.len() + length) };
        // Their numbers are small.
        let header = vfio_info_cap_header { id: u16::try_from(id).unwrap_or(0), version: 1, next };
        chain.extend_from_slice(header.as_bytes());
        chain.extend_from_slice(&body);
    }
    chain
}

/// DEVICE_GET_REGION_IO_FDS: an eventfd for each place where the device offers one.
pub(super) fn io_fds(session: &mut Session, payload: &[u8]) -> Result<Reply> {
    let (asked, _) = wire::split::<RegionIoFds>(payload)?;
    let head = size_of::<RegionIoFds>();
    check_argsz(asked.argsz, head)?;
    if asked.flags != 0 || asked.count != 0 {
        return Err(Errno::INVAL);
    }
    let spots = session.device.io_event_spots(asked.index)?;
    let spots = spots.get(..session.client_fds).unwrap_or(&spots);
    let needed = head + spots.len() * size_of::<SubRegion>();
    let count = length_u32(spots.len());
    let info = RegionIoFds { argsz: length_u32(needed), flags: 0, index: asked.index, count };
    let mut payload = info.as_bytes().to_vec();
    let mut fds: Vec<OwnedFd> = Vec::new();
    if check_argsz(asked.argsz, needed).is_ok() {
        for (number, spot) in spots.iter().enumerate() {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let ours = rustix::io::fcntl_dupfd_cloexec(&event, 0)?;
            let set = |eventfd| IoEventFd {
                region: asked.index,
                offset: spot.offset,
                width: spot.width,
                data: spot.data,
                eventfd,
            };
            match session.device.ioeventfd(set(Some(ours))) {
                // A client that asks again gets new ones.
                Err(Errno::EXIST) => {
                    session.device.ioeventfd(set(None))?;
                    let again = rustix::io::fcntl_dupfd_cloexec(&event, 0)?;
                    session.device.ioeventfd(set(Some(again)))?;
                }
                other => other?,
            }
            let sub = SubRegion {
                offset: spot.offset,
                size: spot.width.into(),
                fd_index: length_u32(number),
                kind: IO_FD_TYPE_IOEVENTFD,
                flags: DATAMATCH,
                padding: 0,
                datamatch: spot.data,
            };
            payload.extend_from_slice(sub.as_bytes());
            fds.push(event);
        }
    }
    Ok(Reply { payload, fds })
}
