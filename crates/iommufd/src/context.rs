//! One open `/dev/iommu`.

use core::fmt;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    Errno, Result,
    account::Accounting,
    caller::{Caller, Capability},
    mapping::Regions,
    object::{
        Pending,
        group::Group,
        hwpt::{NestedHwpt, PagingHwpt},
        ioas::IoasObject,
        table::{Short, Table},
    },
    process::UserAddr,
};

/// Ioctls that a context has beside the kernel's: the mock driver's (`IOMMU_TEST_CMD`).
pub trait Extension: Send + Sync + fmt::Debug {
    /// The result of ioctl `cmd`; none when it has no such.
    fn ioctl(
        &self,
        context: &Arc<Context>,
        caller: &dyn Caller,
        cmd: u32,
        arg: UserAddr,
    ) -> Option<Result<i32>>;
}

/// One open `/dev/iommu`: the objects that were made through it, and what they have in common. Dropping it destroys them;
/// devices that are bound to it, and files that it gave out, keep it.
#[derive(Debug)]
pub struct Context {
    table: Arc<Table>,
    regions: Arc<Regions>,
    /// The IOMMU groups of its devices, by their numbers.
    groups: Mutex<HashMap<u64, Weak<Group>>>,
    accounting: Mutex<Accounting>,
    /// The IOAS that VFIO's ioctls mean: its id, and itself in case that the id means something else meanwhile.
    compat: Mutex<Option<(u32, Weak<IoasObject>)>>,
    /// VFIO's ioctls are for devices without an IOMMU.
    no_iommu: AtomicBool,
    extension: Option<Box<dyn Extension>>,
}

impl Context {
    /// One without objects, as `open` of `/dev/iommu` gives.
    pub fn new() -> Arc<Self> {
        Self::build(Accounting::User, None)
    }

    /// One as `open` of `/dev/vfio/vfio` gives, where that is an iommufd: pinned memory is counted by process, as VFIO does.
    pub fn for_container() -> Arc<Self> {
        Self::build(Accounting::Process, None)
    }

    /// One with more ioctls than the kernel's own.
    pub fn with_extension(extension: Box<dyn Extension>) -> Arc<Self> {
        Self::build(Accounting::User, Some(extension))
    }

    fn build(accounting: Accounting, extension: Option<Box<dyn Extension>>) -> Arc<Self> {
        Arc::new(Self {
            table: Table::new(),
            regions: Arc::default(),
            groups: Mutex::default(),
            accounting: Mutex::new(accounting),
            compat: Mutex::default(),
            no_iommu: AtomicBool::new(false),
            extension,
        })
    }

    pub(crate) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    pub(crate) fn regions(&self) -> &Arc<Regions> {
        &self.regions
    }

    pub(crate) fn extension(&self) -> Option<&dyn Extension> {
        self.extension.as_deref()
    }

    /// The IOMMU group of a number.
    pub(crate) fn group(&self, number: u64) -> Arc<Group> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(&number).and_then(Weak::upgrade) {
            return group;
        }
        groups.retain(|_, group| group.strong_count() > 0);
        let group = Arc::default();
        groups.insert(number, Arc::downgrade(&group));
        group
    }

    /// The IOAS `id`. ENOENT when there is none.
    pub(crate) fn ioas(&self, id: u32) -> Result<Short<IoasObject>> {
        self.table.get(id)
    }

    /// The paging HWPT `id`. ENOENT when there is none.
    pub(crate) fn hwpt(&self, id: u32) -> Result<Short<PagingHwpt>> {
        self.table.get(id)
    }

    /// The nested HWPT `id`. ENOENT when there is none.
    #[cfg_attr(not(any(test, feature = "mock")), allow(dead_code, reason = "for extensions"))]
    pub(crate) fn nested_hwpt(&self, id: u32) -> Result<Short<NestedHwpt>> {
        self.table.get(id)
    }

    /// How memory that `caller` maps is counted.
    pub(crate) fn accounting_of(&self, caller: &dyn Caller) -> Accounting {
        if caller.capable(Capability::IpcLock) { Accounting::None } else { self.accounting() }
    }

    /// How pinned memory is counted (`IOMMU_OPTION_RLIMIT_MODE`).
    pub fn accounting(&self) -> Accounting {
        *self.accounting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes how pinned memory is counted. EBUSY when there are objects already.
    pub fn set_accounting(&self, accounting: Accounting) -> Result<()> {
        if !self.table.is_empty() {
            return Err(Errno::BUSY);
        }
        *self.accounting.lock().unwrap_or_else(PoisonError::into_inner) = accounting;
        Ok(())
    }

    /// Destroys an object. ENOENT when there is none of this id, EBUSY while it is in use.
    pub fn destroy(&self, id: u32) -> Result<()> {
        self.table.destroy(id)
    }

    /// The IOAS that VFIO's ioctls mean, if there is one. ENODEV otherwise.
    pub(crate) fn compat(&self) -> Result<(u32, Short<IoasObject>)> {
        let (id, ioas) =
            self.compat.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Errno::NODEV)?;
        let found = self.table.get::<IoasObject>(id).map_err(|_| Errno::NODEV)?;
        if Weak::as_ptr(&ioas) == Arc::as_ptr(found.as_arc()) { Ok((id, found)) } else { Err(Errno::NODEV) }
    }

    /// The id of the IOAS that VFIO's ioctls mean (`IOMMU_VFIO_IOAS`). ENODEV when there is none.
    pub fn compat_ioas(&self) -> Result<u32> {
        Ok(self.compat()?.0)
    }

    /// Chooses the IOAS that VFIO's ioctls mean; none for none. ENOENT when there is no such IOAS.
    pub fn set_compat_ioas(&self, id: Option<u32>) -> Result<()> {
        let ioas = id.map(|id| Ok((id, Arc::downgrade(self.ioas(id)?.as_arc())))).transpose()?;
        *self.compat.lock().unwrap_or_else(PoisonError::into_inner) = ioas;
        Ok(())
    }

    /// The id of the IOAS that VFIO's ioctls mean, which is made when there is none: what a VFIO group does that is added to
    /// this context as its container.
    pub fn compat_ioas_or_new(&self) -> Result<u32> {
        if let Ok(id) = self.compat_ioas() {
            return Ok(id);
        }
        let pending: Pending<IoasObject> = self.prepare_ioas()?;
        let mut compat = self.compat.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((id, ioas)) = compat.as_ref()
            && ioas.strong_count() > 0
        {
            return Ok(*id);
        }
        let ioas = Arc::downgrade(pending.object());
        let id = pending.finish();
        *compat = Some((id, ioas));
        Ok(id)
    }

    /// Whether VFIO's ioctls are for devices without an IOMMU: then `VFIO_SET_IOMMU` takes no other kind.
    pub fn no_iommu(&self) -> bool {
        self.no_iommu.load(Ordering::Relaxed)
    }

    /// Changes it: a VFIO group without an IOMMU was added to this context as its container.
    pub fn set_no_iommu(&self) {
        self.no_iommu.store(true, Ordering::Relaxed);
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.table.clear();
    }
}
