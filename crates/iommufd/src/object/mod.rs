//! The objects of a context.
//!
//! ```text
//!   DEVICE ──attached to──► HWPT (paging) ──► IOAS ◄── ACCESS
//!     ▲  └──attached to──► HWPT (nested) ──► HWPT (nesting parent)
//!     │                       │    └──► VIOMMU ──┘
//!     │                       └──► FAULT
//!  VDEVICE ──► VIOMMU ◄── VEVENTQ
//!                ▲
//!             HW_QUEUE ──► HW_QUEUE of the index below
//! ```
//!
//! An arrow is a use ([`table::Use`]): what it points at cannot be destroyed. The one between VDEVICE and DEVICE is none:
//! the device may go first.

pub(crate) mod access;
pub(crate) mod device;
pub(crate) mod fault;
pub(crate) mod group;
pub(crate) mod hw_queue;
pub(crate) mod hwpt;
pub(crate) mod ioas;
pub(crate) mod readiness;
pub(crate) mod table;
#[cfg(test)]
mod tests;
pub(crate) mod vdevice;
pub(crate) mod veventq;
pub(crate) mod viommu;

use core::any::Any;
use std::sync::Arc;

pub use access::Access;
pub use device::{BoundDevice, DeviceDma, DevicePort};
pub use fault::{PageRequest, PageRequestFlags, PageResponse, ResponseCode};
pub use hw_queue::QueueMemory;
pub use hwpt::HwptOptions;
pub use viommu::{Published, ViommuPort};

use table::{Kind, Reservation, Use};

/// An object of any kind.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    Ioas(Arc<ioas::IoasObject>),
    Paging(Arc<hwpt::PagingHwpt>),
    Nested(Arc<hwpt::NestedHwpt>),
    Device(Arc<device::Device>),
    Access(Arc<access::AccessObject>),
    Fault(Arc<fault::FaultQueue>),
    Viommu(Arc<viommu::Viommu>),
    Vdevice(Arc<vdevice::Vdevice>),
    EventQueue(Arc<veventq::EventQueue>),
    HwQueue(Arc<hw_queue::HwQueue>),
    Foreign(Arc<Foreign>),
}

macro_rules! kinds {
    ($($variant:ident($type:ty),)*) => {
        $(
            impl Kind for $type {
                fn of(object: &Object) -> Option<&Arc<Self>> {
                    match object {
                        Object::$variant(object) => Some(object),
                        _ => None,
                    }
                }

                fn wrap(this: Arc<Self>) -> Object {
                    Object::$variant(this)
                }
            }
        )*
    };
}

kinds! {
    Ioas(ioas::IoasObject),
    Paging(hwpt::PagingHwpt),
    Nested(hwpt::NestedHwpt),
    Device(device::Device),
    Access(access::AccessObject),
    Fault(fault::FaultQueue),
    Viommu(viommu::Viommu),
    Vdevice(vdevice::Vdevice),
    EventQueue(veventq::EventQueue),
    HwQueue(hw_queue::HwQueue),
    Foreign(Foreign),
}

/// An object that an extension of the ioctls ([`crate::Extension`]) keeps in the table.
#[derive(Debug)]
pub(crate) struct Foreign(
    #[cfg_attr(not(any(test, feature = "mock")), allow(dead_code, reason = "only extensions look into it"))]
    pub(crate) Arc<dyn AnyDebug>,
);

/// Anything that can be shown.
pub(crate) trait AnyDebug: Any + Send + Sync + core::fmt::Debug {}

impl<T: Any + Send + Sync + core::fmt::Debug> AnyDebug for T {}

/// An object that is made but that nobody finds yet. Dropping it destroys it.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    // Dropped before its id is free.
    object: Arc<T>,
    reservation: Reservation,
}

impl<T: Kind> Pending<T> {
    pub(crate) fn new(reservation: Reservation, object: T) -> Self {
        Self { object: Arc::new(object), reservation }
    }

    pub(crate) fn id(&self) -> u32 {
        self.reservation.id()
    }

    pub(crate) fn object(&self) -> &Arc<T> {
        &self.object
    }

    /// From now on it is found by its id, which this returns.
    pub(crate) fn finish(self) -> u32 {
        let id = self.reservation.id();
        self.reservation.finish(T::wrap(self.object));
        id
    }

    /// As [`Self::finish`], and the caller uses it.
    pub(crate) fn finish_used(self) -> Use<T> {
        self.reservation.finish_used(self.object)
    }
}
