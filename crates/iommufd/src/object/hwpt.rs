//! HWPT: an I/O page table as an object, the host's (paging) or a guest's (nested).

use core::fmt;
use std::sync::Arc;

use super::{
    Pending,
    device::Device,
    fault::FaultQueue,
    ioas::IoasObject,
    table::{Short, ShortAny, Table, Use},
    viommu::Viommu,
};
use crate::{
    Context, Errno, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Attachment, DomainOptions, Nested, UserData},
    inject,
};

/// What is asked of a new page table (`IOMMU_HWPT_ALLOC_*`).
#[derive(Clone, Copy, Default, Debug)]
pub struct HwptOptions {
    /// It will be the parent of nested ones.
    pub nest_parent: bool,
    /// It must be able to note writes.
    pub dirty_tracking: bool,
    /// It will be attached to PASIDs.
    pub pasid: bool,
    /// The fault queue that gets the page requests of devices that are attached to it.
    pub fault_queue: Option<u32>,
}

/// A page table of the host's: the areas of an IOAS as an IOMMU reads them.
pub(crate) struct PagingHwpt {
    pub(super) id: u32,
    pub(crate) domain: Arc<dyn Domain>,
    pub(crate) ioas: Use<IoasObject>,
    /// Of the device that it was made for.
    pub(crate) iommu: u64,
    pub(crate) options: DomainOptions,
    /// Made when a device was attached to the IOAS: it goes with the last device.
    pub(crate) automatic: bool,
    faults: Option<Use<FaultQueue>>,
}

impl PagingHwpt {
    /// A domain of `device`, into which all areas of `ioas` are entered.
    #[allow(clippy::too_many_arguments, reason = "each is another part of one ioctl")]
    fn new(
        id: u32,
        caller: Option<&dyn Caller>,
        device: &Device,
        ioas: Use<IoasObject>,
        options: DomainOptions,
        faults: Option<Use<FaultQueue>>,
        data: UserData,
        automatic: bool,
    ) -> Result<Self> {
        inject::check()?;
        let domain = device.hardware.alloc_paging(caller, options, data)?;
        ioas.space.attach_domain(&domain)?;
        Ok(Self { id, domain, ioas, iommu: device.hardware.iommu(), options, automatic, faults })
    }

    /// One for a device that is being attached to `ioas`. The caller holds the lock of its HWPTs.
    pub(super) fn automatic(
        table: &Arc<Table>,
        device: &Device,
        ioas: Use<IoasObject>,
    ) -> Result<Pending<Self>> {
        let reservation = table.reserve()?;
        let (options, data) = (DomainOptions::default(), UserData::default());
        let hwpt = Self::new(reservation.id(), None, device, ioas, options, None, data, true)?;
        Ok(Pending::new(reservation, hwpt))
    }

    /// EOPNOTSUPP unless it was made for it.
    pub(crate) fn require_dirty_tracking(&self) -> Result<()> {
        if self.options.dirty_tracking { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }
}

impl Drop for PagingHwpt {
    fn drop(&mut self) {
        self.ioas.space.detach_domain(&self.domain);
    }
}

impl fmt::Debug for PagingHwpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagingHwpt")
            .field("domain", &self.domain)
            .field("ioas", &self.ioas)
            .finish_non_exhaustive()
    }
}

/// A page table of a guest's, above one of the host's.
pub(crate) struct NestedHwpt {
    pub(crate) nested: Arc<dyn Nested>,
    parent: Use<PagingHwpt>,
    /// The vIOMMU that it was made of.
    _viommu: Option<Use<Viommu>>,
    iommu: u64,
    pasid: bool,
    faults: Option<Use<FaultQueue>>,
}

impl fmt::Debug for NestedHwpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NestedHwpt")
            .field("nested", &self.nested)
            .field("parent", &self.parent)
            .finish_non_exhaustive()
    }
}

/// What a device is attached to.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Paging(Use<PagingHwpt>),
    Nested(Use<NestedHwpt>),
}

impl Target {
    /// EINVAL when it is no page table.
    pub(super) fn of(object: ShortAny) -> Result<Self> {
        match object.downcast::<PagingHwpt>() {
            Ok(hwpt) => Ok(Self::Paging(hwpt.hold())),
            Err(other) => Ok(Self::Nested(other.downcast::<NestedHwpt>().map_err(|_| Errno::INVAL)?.hold())),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        match self {
            Self::Paging(hwpt) => hwpt.id(),
            Self::Nested(hwpt) => hwpt.id(),
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Paging(one), Self::Paging(other)) => one.is(other),
            (Self::Nested(one), Self::Nested(other)) => one.is(other),
            _ => false,
        }
    }

    /// It as the hardware takes it.
    pub(super) fn attachment(&self) -> Attachment {
        match self {
            Self::Paging(hwpt) => Attachment::Paging(hwpt.domain.clone()),
            Self::Nested(hwpt) => Attachment::Nested(hwpt.nested.clone()),
        }
    }

    /// The host's page table at the bottom of it.
    pub(crate) fn paging(&self) -> &Use<PagingHwpt> {
        match self {
            Self::Paging(hwpt) => hwpt,
            Self::Nested(hwpt) => &hwpt.parent,
        }
    }

    /// Whether it was made for PASIDs.
    pub(super) fn takes_pasids(&self) -> bool {
        match self {
            Self::Paging(hwpt) => hwpt.options.pasid,
            Self::Nested(hwpt) => hwpt.pasid,
        }
    }

    /// Which IOMMU it was made for.
    pub(super) fn iommu(&self) -> u64 {
        match self {
            Self::Paging(hwpt) => hwpt.iommu,
            Self::Nested(hwpt) => hwpt.iommu,
        }
    }

    pub(super) fn faults(&self) -> Option<&Use<FaultQueue>> {
        match self {
            Self::Paging(hwpt) => hwpt.faults.as_ref(),
            Self::Nested(hwpt) => hwpt.faults.as_ref(),
        }
    }
}

/// A page table that is made but that nobody finds yet.
#[derive(Debug)]
pub(crate) enum PendingHwpt {
    Paging(Pending<PagingHwpt>),
    Nested(Pending<NestedHwpt>),
}

impl PendingHwpt {
    pub(crate) fn id(&self) -> u32 {
        match self {
            Self::Paging(hwpt) => hwpt.id(),
            Self::Nested(hwpt) => hwpt.id(),
        }
    }

    pub(crate) fn finish(self) -> u32 {
        match self {
            Self::Paging(hwpt) => hwpt.finish(),
            Self::Nested(hwpt) => hwpt.finish(),
        }
    }
}

impl Context {
    pub(crate) fn prepare_hwpt(
        &self,
        caller: &dyn Caller,
        device: u32,
        parent: u32,
        options: HwptOptions,
        data: UserData,
    ) -> Result<PendingHwpt> {
        let device = self.table().get::<Device>(device)?;
        // That there is no such parent is EINVAL too, as if it were of a wrong kind.
        let parent = self.table().get_any(parent).map_err(|_| Errno::INVAL)?;
        let faults = || {
            let queue = options.fault_queue.map(|id| self.table().get::<FaultQueue>(id)).transpose()?;
            Ok(queue.map(|queue| queue.hold()))
        };
        let parent = match parent.downcast::<IoasObject>() {
            Ok(ioas) => {
                // Page requests for a parent would not say which of the two levels misses the page.
                if options.nest_parent && options.fault_queue.is_some() {
                    return Err(Errno::OPNOTSUPP);
                }
                return self
                    .paging(caller, &device, &ioas, options, faults()?, data)
                    .map(PendingHwpt::Paging);
            }
            Err(other) => other,
        };
        // A nested page table can neither be a parent nor note writes.
        let nested_only = || {
            let refused = options.nest_parent || options.dirty_tracking || data.length == 0;
            if refused { Err(Errno::OPNOTSUPP) } else { Ok(()) }
        };
        inject::check()?;
        let (nested, parent, viommu) = match parent.downcast::<PagingHwpt>() {
            Ok(parent) => {
                nested_only()?;
                if parent.automatic || !parent.options.nest_parent || parent.iommu != device.hardware.iommu()
                {
                    return Err(Errno::INVAL);
                }
                (device.hardware.alloc_nested(caller, &parent.domain, data)?, parent.hold(), None)
            }
            Err(other) => {
                let viommu = other.downcast::<Viommu>().map_err(|_| Errno::INVAL)?;
                nested_only()?;
                if viommu.iommu != device.hardware.iommu() {
                    return Err(Errno::INVAL);
                }
                (viommu.driver.alloc_nested(caller, data)?, viommu.parent.clone(), Some(viommu.hold()))
            }
        };
        let faults = faults()?;
        let reservation = self.table().reserve()?;
        let iommu = device.hardware.iommu();
        let hwpt = NestedHwpt { nested, parent, _viommu: viommu, iommu, pasid: options.pasid, faults };
        Ok(PendingHwpt::Nested(Pending::new(reservation, hwpt)))
    }

    fn paging(
        &self,
        caller: &dyn Caller,
        device: &Device,
        ioas: &Short<IoasObject>,
        options: HwptOptions,
        faults: Option<Use<FaultQueue>>,
        data: UserData,
    ) -> Result<Pending<PagingHwpt>> {
        let HwptOptions { nest_parent, dirty_tracking, pasid, .. } = options;
        let options = DomainOptions { nest_parent, dirty_tracking, pasid };
        let mut hwpts = ioas.lock_hwpts();
        let reservation = self.table().reserve()?;
        let hwpt = PagingHwpt::new(
            reservation.id(),
            Some(caller),
            device,
            ioas.hold(),
            options,
            faults,
            data,
            false,
        )?;
        let pending = Pending::new(reservation, hwpt);
        hwpts.push(Arc::downgrade(pending.object()));
        Ok(pending)
    }
}
