//! What devices of the host reach: an address space that devices share, and the memory in it.

#![allow(unsafe_code, reason = "gives memory to devices")]

use core::{any::Any, fmt};
use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex},
};

use iommufd::{
    domain::{HostAddr, Prot},
    iova::{Iova, IovaRange},
    kernel::{
        HostIoas, HostIommu,
        calls::{self, Bare, Plain, Window},
    },
};
use uapi::vfio::{
    VFIO_API_VERSION, VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_info, vfio_iova_range,
};
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion, MmapRegion, bitmap::Bitmap};
use zerocopy::FromBytes;

use super::{
    Door, KernelError, MapError, PciAddress,
    host::{Found, Host},
};
use crate::{Errno, Result, capabilities::Chain, eventfd::lock};

/// An address space of the host's IOMMU, for the devices that are in it.
pub struct AddressSpace {
    way: Way,
    /// What is mapped, by its first address. Dropped after `way`: a mapping holds its memory.
    held: Mutex<BTreeMap<u64, Held>>,
}

enum Way {
    Device(HostIoas),
    Group(Container),
}

/// Memory that is mapped.
struct Held {
    length: u64,
    _memory: Arc<dyn Any + Send + Sync>,
}

/// VFIO's container: `/dev/vfio/vfio`.
struct Container {
    file: File,
    /// Those that are in it, by number. With the first it gets its IOMMU.
    groups: Mutex<BTreeMap<u32, File>>,
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("door", &self.door())
            .field("mappings", &lock(&self.held).len())
            .finish_non_exhaustive()
    }
}

fn open(path: impl Into<std::path::PathBuf>) -> Result<File, KernelError> {
    let path = path.into();
    File::options().read(true).write(true).open(&path).map_err(|source| KernelError::Open { path, source })
}

impl AddressSpace {
    /// A new one, for devices that come by this door.
    ///
    /// # Errors
    /// The node of the door cannot be opened, or is another interface.
    pub fn new(door: Door) -> Result<Arc<Self>, KernelError> {
        let way = match door {
            Door::Device => {
                let refused = |source| KernelError::Open { path: "/dev/iommu".into(), source };
                let ioas = HostIommu::open().map_err(refused)?.ioas();
                Way::Device(ioas.map_err(|errno| refused(errno.into()))?)
            }
            Door::Group => {
                let file = open(Host::default().container())?;
                if calls::bare(file.as_fd(), Bare::ApiVersion, 0) != Ok(VFIO_API_VERSION.cast_signed()) {
                    return Err(KernelError::Unknown("is of another version"));
                }
                if calls::bare(file.as_fd(), Bare::CheckExtension, VFIO_TYPE1v2_IOMMU).unwrap_or(0) == 0 {
                    return Err(KernelError::Unknown("has no IOMMU of type 1: `modprobe vfio_iommu_type1`"));
                }
                Way::Group(Container { file, groups: Mutex::default() })
            }
        };
        Ok(Arc::new(Self { way, held: Mutex::default() }))
    }

    /// The door by which its devices come.
    #[must_use]
    pub fn door(&self) -> Door {
        match self.way {
            Way::Device(_) => Door::Device,
            Way::Group(_) => Door::Group,
        }
    }

    /// The addresses that its devices can use, in order. Without a device these may be more than with one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ranges(&self) -> Result<Vec<IovaRange>> {
        match &self.way {
            Way::Device(ioas) => ioas.ranges(),
            Way::Group(container) => container.ranges(),
        }
    }

    /// Lets the devices use `memory` from `iova` on, until it is unmapped or this is dropped. The host locks it.
    ///
    /// # Errors
    /// A [`MapError`].
    pub fn map<B: Bitmap + Send + Sync + 'static>(
        &self,
        iova: Iova,
        memory: &Arc<MmapRegion<B>>,
        prot: Prot,
    ) -> Result<(), MapError> {
        let host = HostAddr(memory.as_ptr() as u64);
        // SAFETY: memory of vm-memory is accessed as one that others change at any time, never by a reference, and it is held
        // for as long as it is mapped.
        unsafe { self.enter(iova, host, memory.size() as u64, prot, Arc::clone(memory) as _) }
    }

    /// Lets the devices use all of a guest's memory, at the addresses where the guest has it. Nothing is mapped when it
    /// fails.
    ///
    /// # Errors
    /// A [`MapError`].
    pub fn map_guest<B: Bitmap + Send + Sync + 'static>(
        &self,
        memory: &Arc<GuestMemoryMmap<B>>,
    ) -> Result<(), MapError> {
        use vm_memory::GuestMemory;

        let mut done = Vec::new();
        for region in memory.iter() {
            let iova = Iova(region.start_addr().0);
            let host = HostAddr(region.as_ptr() as u64);
            // SAFETY: as in `map`.
            let mapped = unsafe {
                self.enter(iova, host, region.len(), Prot::READ | Prot::WRITE, Arc::clone(memory) as _)
            };
            if let Err(error) = mapped {
                for range in done {
                    let _ = self.unmap(range);
                }
                return Err(error);
            }
            done.extend(IovaRange::with_length(iova, region.len()));
        }
        Ok(())
    }

    /// # Safety
    /// As for [`calls::ioas_map`], for as long as `memory` is held.
    unsafe fn enter(
        &self,
        iova: Iova,
        host: HostAddr,
        length: u64,
        prot: Prot,
        memory: Arc<dyn Any + Send + Sync>,
    ) -> Result<(), MapError> {
        let mut held = lock(&self.held);
        let done = match &self.way {
            // SAFETY: the caller's word.
            Way::Device(ioas) => unsafe { ioas.map(iova, host, length, prot) },
            Way::Group(container) => {
                let window = Window::new(iova, host, length, prot);
                // SAFETY: the caller's word.
                unsafe { calls::container_map(container.file.as_fd(), window) }
            }
        };
        match done {
            Ok(()) => {
                held.insert(iova.0, Held { length, _memory: memory });
                Ok(())
            }
            Err(source) => {
                let locked = held.values().map(|held| held.length).fold(length, u64::saturating_add);
                Err(self.explain(iova, length, locked, source))
            }
        }
    }

    /// What a refusal means.
    fn explain(&self, iova: Iova, length: u64, needed: u64, source: Errno) -> MapError {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let over = limit.is_some_and(|limit| limit < needed);
        if source == Errno::NOMEM && over {
            return MapError::Locked { needed, limit };
        }
        let ranges = self.ranges().unwrap_or_default();
        let range = IovaRange::with_length(iova, length);
        if let Ok(range) = range
            && !ranges.is_empty()
            && !ranges.iter().any(|usable| usable.covers(range))
        {
            let usable =
                ranges.iter().map(|range| format!("{:#x} to {:#x}", range.start().0, range.last().0));
            let usable = usable.collect::<Vec<_>>().join(", ");
            return MapError::Reserved { start: iova.0, last: range.last().0, usable };
        }
        MapError::Refused { start: iova.0, length, source }
    }

    /// Takes memory away again: all that lies in `range`, in whole mappings. No device uses it when this returns.
    ///
    /// # Errors
    /// EINVAL when the range cuts a mapping, ENOENT when it has none.
    pub fn unmap(&self, range: IovaRange) -> Result<()> {
        let mut held = lock(&self.held);
        let (start, last) = (range.start().0, range.last().0);
        let before = held.range(..start).next_back();
        let cut = |(at, held): (&u64, &Held)| at + (held.length - 1);
        let cuts_first = before.is_some_and(|part| cut(part) >= start);
        let inside: Vec<_> =
            held.range(start..=last).map(|(at, part)| (*at, part.length, cut((at, part)))).collect();
        if cuts_first || inside.last().is_some_and(|(.., end)| *end > last) {
            return Err(Errno::INVAL);
        }
        if inside.is_empty() {
            return Err(Errno::NOENT);
        }
        for (at, length, _) in inside {
            match &self.way {
                Way::Device(ioas) => ioas.unmap(IovaRange::with_length(Iova(at), length)?)?,
                Way::Group(container) => {
                    calls::container_unmap(container.file.as_fd(), at, length)?;
                }
            }
            held.remove(&at);
        }
        Ok(())
    }

    /// The address space of a door with nodes of devices.
    pub(super) fn ioas(&self) -> Option<&HostIoas> {
        match &self.way {
            Way::Device(ioas) => Some(ioas),
            Way::Group(_) => None,
        }
    }

    /// Opens a device of a group, which joins the container.
    pub(super) fn open_in_group(&self, host: &Host, found: &Found) -> Result<OwnedFd, KernelError> {
        let address = found.address;
        let refused = |what| move |source| KernelError::Refused { what, address, source };
        let Way::Group(container) = &self.way else {
            return Err(KernelError::NoDoor {
                address,
                door: Door::Group,
                why: "the address space is of the other door",
            });
        };
        let mut groups = lock(&container.groups);
        if !groups.contains_key(&found.group) {
            let group = open(host.group(found.group))?;
            let mut status = vfio_group_status::default();
            calls::fixed(group.as_fd(), Plain::GroupStatus, &mut status)
                .map_err(refused("tell the group of"))?;
            if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
                let others = host.others(found);
                return Err(KernelError::NotViable { address, group: found.group, others });
            }
            calls::set_container(group.as_fd(), container.file.as_fd())
                .map_err(refused("give a container to the group of"))?;
            if groups.is_empty() {
                calls::bare(container.file.as_fd(), Bare::SetIommu, VFIO_TYPE1v2_IOMMU)
                    .map_err(refused("translate for"))?;
            }
            groups.insert(found.group, group);
        }
        let group = groups.get(&found.group).ok_or(KernelError::Absent(address))?;
        let name = std::ffi::CString::new(address.to_string()).map_err(|_| KernelError::Absent(address))?;
        calls::device_of_group(group.as_fd(), &name).map_err(refused("open"))
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // A descriptor of the container's or the iommufd's may live on in a child.
        if let Ok(range) = IovaRange::new(Iova(0), Iova(u64::MAX)) {
            let _ = self.unmap(range);
        }
    }
}

/// More than this no container tells.
const MAX_INFO: usize = 64 << 10;

impl Container {
    fn ranges(&self) -> Result<Vec<IovaRange>> {
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
}

/// Binds a device's node to an iommufd: the descriptor, and the device's number there.
pub(super) fn open_node(iommu: &HostIommu, found: &Found) -> Result<(OwnedFd, u32), KernelError> {
    let address = found.address;
    let refused = |what| move |source| KernelError::Refused { what, address, source };
    let path = found.node.clone().ok_or(KernelError::NoDoor {
        address,
        door: Door::Device,
        why: "it has no node in /dev/vfio/devices",
    })?;
    let file = open(path)?;
    let id = calls::bind(file.as_fd(), iommu.as_fd()).map_err(refused("bind to an iommufd"))?;
    tracing::debug!(%address, fd = file.as_raw_fd(), id, "bound to the host's iommufd");
    Ok((file.into(), id))
}

/// For messages about a device in a space.
pub(super) fn refused_attach(address: PciAddress) -> impl FnOnce(Errno) -> KernelError {
    move |source| KernelError::Refused { what: "attach to an address space", address, source }
}
