//! IOMMU groups: devices that are attached together.
//!
//! # Theory of operation
//!
//! Devices that an IOMMU cannot keep apart form a group, and all of them must be attached to the same page table: the
//! first device of a group that is attached decides, and the others can only join it. Replacing moves them all at once.
//! For most devices the group is the device alone. Page tables of PASIDs are kept in the same way, each PASID for itself.
//!
//! PASIDs and plain DMA depend on each other: some IOMMUs keep the tables of all PASIDs of a device in a table of their
//! own. So a page table must have been made for PASIDs ([`super::HwptOptions::pasid`]) to be attached to one, or to plain
//! DMA while a PASID is attached.
//!
//! What a device cannot reach through a page table (MSI windows) is reserved in the IOAS behind the table for as long as
//! plain DMA of the device is attached to it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    device::Device,
    hwpt::{PagingHwpt, Target},
    ioas::IoasObject,
    table::{Table, Use},
};
use crate::{Errno, Result, inject};

/// Plain DMA, or a PASID.
pub(super) type Pasid = Option<u32>;

/// Devices that share a page table, for plain DMA or for one PASID.
#[derive(Debug)]
struct Attached {
    target: Target,
    /// By their ids; at least one.
    devices: BTreeMap<u32, Arc<Device>>,
}

/// An IOMMU group.
///
/// Its lock is held while drivers are called and IOASes change: it comes before theirs.
#[derive(Debug, Default)]
pub(crate) struct Group {
    attached: Mutex<BTreeMap<Pasid, Attached>>,
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Pasid, Attached>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `pasid` of `device` is attached to.
    pub(super) fn target(&self, device: &Device, pasid: Pasid) -> Option<Target> {
        let attached = self.lock();
        attached
            .get(&pasid)
            .filter(|attached| attached.devices.contains_key(&device.id))
            .map(|found| found.target.clone())
    }

    /// Attaches `pasid` of `device` to `target`.
    ///
    /// EBUSY when it is attached already; EINVAL when the rest of the group is attached to something else, or the page table
    /// does not fit the device; EADDRINUSE when something is mapped that is reserved for the device.
    pub(super) fn attach(&self, device: &Arc<Device>, pasid: Pasid, target: Target) -> Result<()> {
        inject::check()?;
        let mut group = self.lock();
        check_pasid(&group, device, pasid, &target)?;
        if let Some(attached) = group.get(&pasid) {
            if attached.devices.contains_key(&device.id) {
                return Err(Errno::BUSY);
            }
            if !attached.target.is(&target) {
                return Err(Errno::INVAL);
            }
        }
        if pasid.is_none() {
            device.reserve(&target.paging().ioas)?;
        }
        if let Err(error) = device.attach_hardware(pasid, Some(&target)) {
            if pasid.is_none() {
                target.paging().ioas.space.unreserve(device.owner);
            }
            return Err(error);
        }
        let attached = group.entry(pasid).or_insert_with(|| Attached { target, devices: BTreeMap::new() });
        attached.devices.insert(device.id, device.clone());
        Ok(())
    }

    /// Attaches `pasid` of all the group's devices to `target` instead of what they are attached to. What they were
    /// attached to is the result; none when that was `target` already.
    ///
    /// EINVAL when `device` is not attached, or the page table does not fit.
    pub(super) fn replace(
        &self,
        device: &Arc<Device>,
        pasid: Pasid,
        target: Target,
    ) -> Result<Option<Target>> {
        inject::check()?;
        let mut group = self.lock();
        check_pasid(&group, device, pasid, &target)?;
        let attached = group.get_mut(&pasid).ok_or(Errno::INVAL)?;
        if !attached.devices.contains_key(&device.id) {
            return Err(Errno::INVAL);
        }
        if attached.target.is(&target) {
            return Ok(None);
        }
        let (old_ioas, new_ioas) = (&attached.target.paging().ioas, &target.paging().ioas);
        let reserves = pasid.is_none() && !old_ioas.is(new_ioas);
        let devices: Vec<_> = attached.devices.values().collect();
        let unreserve =
            |ioas: &Use<IoasObject>| devices.iter().for_each(|device| ioas.space.unreserve(device.owner));
        if reserves {
            for device in &devices {
                device.reserve(new_ioas).inspect_err(|_| unreserve(new_ioas))?;
            }
        }
        for (done, device) in devices.iter().enumerate() {
            if let Err(error) = device.attach_hardware(pasid, Some(&target)) {
                for device in devices.iter().take(done + 1) {
                    // The driver took it before; there is nothing better to do when it does not now.
                    let _ = device.attach_hardware(pasid, Some(&attached.target));
                }
                if reserves {
                    unreserve(new_ioas);
                }
                return Err(error);
            }
        }
        if reserves {
            unreserve(old_ioas);
        }
        Ok(Some(core::mem::replace(&mut attached.target, target)))
    }

    /// Attaches `pasid` of `device` to nothing: what it was attached to.
    pub(super) fn detach(&self, device: &Device, pasid: Pasid) -> Option<Target> {
        let mut group = self.lock();
        let attached = group.get_mut(&pasid)?;
        attached.devices.remove(&device.id)?;
        let target = attached.target.clone();
        let left = attached.devices.len();
        // Taking a translation away cannot fail.
        let _ = device.attach_hardware(pasid, None);
        if pasid.is_none() {
            target.paging().ioas.space.unreserve(device.owner);
        }
        if left == 0 {
            group.remove(&pasid);
        }
        Some(target)
    }

    /// Which PASIDs of `device` are attached, plain DMA among them.
    pub(super) fn attachments(&self, device: &Device) -> Vec<Pasid> {
        let of_it = |(pasid, attached): (&Pasid, &Attached)| {
            attached.devices.contains_key(&device.id).then_some(*pasid)
        };
        self.lock().iter().filter_map(of_it).collect()
    }
}

/// EINVAL when a page table does not go with PASIDs, or with what is attached already.
fn check_pasid(
    group: &BTreeMap<Pasid, Attached>,
    device: &Device,
    pasid: Pasid,
    target: &Target,
) -> Result<()> {
    let fits = match pasid {
        None => target.takes_pasids() || !group.keys().any(Option::is_some),
        Some(pasid) => {
            let plain = group.get(&None).is_none_or(|plain| plain.target.takes_pasids());
            let width = u32::from(device.hardware.max_pasid_log2());
            target.takes_pasids() && plain && width > 0 && pasid.checked_shr(width).unwrap_or(0) == 0
        }
    };
    if fits && target.iommu() == device.hardware.iommu() { Ok(()) } else { Err(Errno::INVAL) }
}

/// Calls `attach` with each page table that `ioas` has made for devices, until one fits, and with a new one then: the
/// result of the call, and the page table.
pub(super) fn with_automatic<T>(
    table: &Arc<Table>,
    device: &Arc<Device>,
    ioas: &Use<IoasObject>,
    mut attach: impl FnMut(Target) -> Result<T>,
) -> Result<(T, Target)> {
    let mut hwpts = ioas.lock_hwpts();
    for hwpt in hwpts.iter().filter_map(std::sync::Weak::upgrade).filter(|hwpt| hwpt.automatic) {
        // One that is just being destroyed is not in the table any more.
        let Some(found) = table.find(hwpt.id, &hwpt) else { continue };
        let target = Target::Paging(found);
        match attach(target.clone()) {
            // It is of another IOMMU: the next may fit.
            Err(Errno::INVAL) => {}
            result => return result.map(|done| (done, target)),
        }
    }
    let pending = PagingHwpt::automatic(table, device, ioas.clone())?;
    let hwpt = Arc::downgrade(pending.object());
    let used = pending.finish_used();
    let target = Target::Paging(used.clone());
    match attach(target.clone()) {
        Ok(done) => {
            hwpts.push(hwpt);
            Ok((done, target))
        }
        Err(error) => {
            drop(target);
            table.destroy_owned(used);
            Err(error)
        }
    }
}
