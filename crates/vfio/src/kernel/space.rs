//! What devices of the host reach: an address space that devices share, and the memory in it.

#![allow(unsafe_code, reason = "gives memory to devices")]

use core::{any::Any, fmt};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex},
};

use iommufd::{
    domain::{HostAddr, Prot},
    iova::{Iova, IovaRange},
    kernel::{HostIoas, HostIommu, calls},
};
use vm_memory::{GuestMemoryMmap, GuestMemoryRegion, MmapRegion, bitmap::Bitmap};

use super::{
    Door, KernelError, MapError, PciAddress,
    container::Container,
    host::{Found, Host},
    open,
};
use crate::{Errno, Result, eventfd::lock};

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

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("door", &self.door())
            .field("mappings", &lock(&self.held).len())
            .finish_non_exhaustive()
    }
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
            Door::Group => Way::Group(Container::new()?),
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
            // SAFETY: the caller's word.
            Way::Group(container) => unsafe { container.map(iova, host, length, prot) },
        };
        match done {
            Ok(()) => {
                held.insert(iova.0, Held { length, _memory: memory });
                Ok(())
            }
            Err(source) => {
                let locked = held.values().map(|held| held.length).fold(length, u64::saturating_add);
                Err(MapError::explain(iova, length, locked, source, &self.ranges().unwrap_or_default()))
            }
        }
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
            let whole = IovaRange::with_length(Iova(at), length)?;
            match &self.way {
                Way::Device(ioas) => ioas.unmap(whole)?,
                Way::Group(container) => container.unmap(whole)?,
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
        match &self.way {
            Way::Group(container) => container.open_device(host, found),
            Way::Device(_) => Err(KernelError::NoDoor {
                address: found.address,
                door: Door::Group,
                why: "the address space is of the other door",
            }),
        }
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
