//! VFIO's container: the address space of the door of groups (Documentation/driver-api/vfio.rst).

#![allow(unsafe_code, reason = "gives memory to devices")]

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Mutex,
};

use iommufd::{
    domain::{HostAddr, Prot},
    iova::{Iova, IovaRange},
    kernel::calls::{self, Bare, Plain, Window},
};
use uapi::vfio::{
    VFIO_API_VERSION, VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_info, vfio_iova_range,
};
use zerocopy::FromBytes;

use super::{
    KernelError,
    host::{Found, Host},
    open,
};
use crate::{Errno, Result, capabilities::Chain, eventfd::lock};

/// An open `/dev/vfio/vfio`, whose IOMMU is of type 1.
pub(super) struct Container {
    file: File,
    /// Those that are in it, by number. With the first it gets its IOMMU.
    groups: Mutex<BTreeMap<u32, File>>,
}

/// More than this no container tells.
const MAX_INFO: usize = 64 << 10;

impl Container {
    /// One without groups.
    ///
    /// # Errors
    /// The node cannot be opened, or is another interface.
    pub(super) fn new() -> Result<Self, KernelError> {
        let file = open(Host::default().container())?;
        if calls::bare(file.as_fd(), Bare::ApiVersion, 0) != Ok(VFIO_API_VERSION.cast_signed()) {
            return Err(KernelError::Unknown("is of another version"));
        }
        if calls::bare(file.as_fd(), Bare::CheckExtension, VFIO_TYPE1v2_IOMMU).unwrap_or(0) == 0 {
            return Err(KernelError::Unknown("has no IOMMU of type 1: `modprobe vfio_iommu_type1`"));
        }
        Ok(Self { file, groups: Mutex::default() })
    }

    /// Opens a device, whose group joins the container.
    pub(super) fn open_device(&self, host: &Host, found: &Found) -> Result<OwnedFd, KernelError> {
        let address = found.address;
        let refused = |what| move |source| KernelError::Refused { what, address, source };
        let mut groups = lock(&self.groups);
        if !groups.contains_key(&found.group) {
            let group = open(host.group(found.group))?;
            let mut status = vfio_group_status::default();
            calls::fixed(group.as_fd(), Plain::GroupStatus, &mut status)
                .map_err(refused("tell the group of"))?;
            if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
                let others = host.others(found);
                return Err(KernelError::NotViable { address, group: found.group, others });
            }
            calls::set_container(group.as_fd(), self.file.as_fd())
                .map_err(refused("give a container to the group of"))?;
            if groups.is_empty() {
                calls::bare(self.file.as_fd(), Bare::SetIommu, VFIO_TYPE1v2_IOMMU)
                    .map_err(refused("translate for"))?;
            }
            groups.insert(found.group, group);
        }
        let group = groups.get(&found.group).ok_or(KernelError::Absent(address))?;
        let name = std::ffi::CString::new(address.to_string()).map_err(|_| KernelError::Absent(address))?;
        calls::device_of_group(group.as_fd(), &name).map_err(refused("open"))
    }

    /// The addresses that its devices can use, in order.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn ranges(&self) -> Result<Vec<IovaRange>> {
        let mut bytes = vec![0; 4096];
        let info = loop {
            calls::sized(self.file.as_fd(), Plain::ContainerInfo, &mut bytes)?;
            let (info, _) = vfio_iommu_type1_info::read_from_prefix(&bytes).map_err(|_| Errno::PROTO)?;
            let needed = usize::try_from(info.argsz).unwrap_or(usize::MAX);
            if needed <= bytes.len() {
                break info;
            }
            if needed > MAX_INFO {
                return Err(Errno::OVERFLOW);
            }
            bytes = vec![0; needed];
        };
        let start = if info.flags & VFIO_IOMMU_INFO_CAPS == 0 { 0 } else { info.cap_offset };
        for capability in Chain::new(&bytes, start) {
            let (id, body) = capability?;
            if u32::from(id) == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
                let ([count, _], mut rest) = <[u32; 2]>::read_from_prefix(body).map_err(|_| Errno::PROTO)?;
                let mut ranges = Vec::new();
                for _ in 0..count {
                    let (range, after) = vfio_iova_range::read_from_prefix(rest).map_err(|_| Errno::PROTO)?;
                    ranges.push(IovaRange::new(Iova(range.start), Iova(range.end))?);
                    rest = after;
                }
                return Ok(ranges);
            }
        }
        // A kernel that is too old to tell.
        Ok(vec![IovaRange::ALL])
    }

    /// Enters memory of this process.
    ///
    /// # Errors
    /// The kernel's: ENOMEM when more memory would be locked than is allowed, ENOSPC when there are as many mappings as a
    /// container has, EEXIST where something is mapped, EINVAL for what cannot be translated.
    ///
    /// # Safety
    /// As for [`calls::container_map`].
    pub(super) unsafe fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        // SAFETY: the caller's word.
        unsafe { calls::container_map(self.file.as_fd(), Window::new(iova, host, length, prot)) }
    }

    /// Takes out what was entered in `range`: whole mappings only.
    ///
    /// # Errors
    /// EINVAL when the range cuts a mapping.
    pub(super) fn unmap(&self, range: IovaRange) -> Result<()> {
        let length = range.length().ok_or(Errno::OVERFLOW)?;
        calls::container_unmap(self.file.as_fd(), range.start().0, length).map(drop)
    }
}
