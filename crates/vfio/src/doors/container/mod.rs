//! The container: `/dev/vfio/vfio`, VFIO's own, with versions 1 and 2 of its type 1.
//!
//! # Theory of operation
//!
//! A container is given groups, then a type, and translates for all their devices from then on. Beneath, it is an iommufd
//! of its own with one address space, to which it attaches every device of its groups. What is mapped where and in which
//! pieces is kept here once more (`mappings`), because the rules of type 1 are about the pieces: version 2 never cuts
//! one, version 1 unmaps the whole piece that begins where it is asked to.

mod dirty;
mod mappings;
mod type1;

use core::fmt;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use iommufd::{BoundDevice, Context, caller::Capability, process::UserAddr};
use uapi::vfio::{
    VFIO_API_VERSION, VFIO_DMA_CC_IOMMU, VFIO_NOIOMMU_IOMMU, VFIO_TYPE1_IOMMU,
    VFIO_TYPE1v2_IOMMU as VFIO_TYPE1V2_IOMMU, VFIO_UNMAP_ALL, VFIO_UPDATE_VADDR,
};

pub(super) use dirty::dirty_pages;
pub(super) use type1::{get_info, map_dma, unmap_dma};

use self::mappings::Mappings;
use super::{
    Caller, System,
    system::Slot,
    table::{self, Call},
};
use crate::{Errno, Result, eventfd::lock};

/// Which version of type 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Version {
    One,
    Two,
}

/// A container that has a type.
struct Type1 {
    version: Version,
    context: Arc<Context>,
    ioas: u32,
    mappings: Mappings,
    /// Whether writes are noted.
    dirty: bool,
}

/// The devices of a group, and what they are bound to when there is something.
struct Member {
    slots: Vec<Arc<Slot>>,
    bound: BTreeMap<u32, Arc<BoundDevice>>,
}

impl Member {
    /// Binds and attaches all devices, or none.
    fn attach(&mut self, type1: &Type1) -> Result<()> {
        let mut bound = BTreeMap::new();
        for slot in &self.slots {
            let hardware = slot.hardware.clone().ok_or(Errno::INVAL)?;
            let device = type1.context.bind(hardware)?;
            device.attach(None, type1.ioas)?;
            bound.insert(slot.number, Arc::new(device));
        }
        self.bound = bound;
        Ok(())
    }
}

#[derive(Default)]
enum Kind {
    #[default]
    None,
    Type1(Box<Type1>),
    /// Nothing is translated.
    NoIommu,
}

#[derive(Default)]
struct State {
    kind: Kind,
    /// By the groups' numbers.
    members: BTreeMap<u32, Member>,
    /// The groups have no IOMMU.
    no_iommu: bool,
}

/// An open container.
#[derive(Default)]
pub struct Container(Mutex<State>);

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container").finish_non_exhaustive()
    }
}

/// That a group is in a container. Dropping it takes the group out.
#[derive(Debug)]
pub(super) struct Membership {
    container: Arc<Container>,
    group: u32,
}

impl System {
    /// Opens `/dev/vfio/vfio`.
    #[must_use]
    pub fn open_container(&self) -> Arc<Container> {
        Arc::default()
    }
}

impl Container {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Adds a group. EINVAL when some groups here have an IOMMU and others have none, and what attaching its devices says.
    pub(super) fn join(
        this: &Arc<Self>,
        group: u32,
        no_iommu: bool,
        slots: Vec<Arc<Slot>>,
    ) -> Result<Membership> {
        let mut state = this.state();
        if !state.members.is_empty() && state.no_iommu != no_iommu {
            return Err(Errno::INVAL);
        }
        let mut member = Member { slots, bound: BTreeMap::new() };
        if let Kind::Type1(type1) = &state.kind {
            member.attach(type1)?;
        }
        state.no_iommu = no_iommu;
        state.members.insert(group, member);
        Ok(Membership { container: Arc::clone(this), group })
    }

    /// `ioctl`: what it returns.
    ///
    /// # Errors
    /// EINVAL for what needs a type before there is one; ENOTTY for what there is not; and what the call documents.
    pub fn ioctl(self: &Arc<Self>, caller: &dyn Caller, cmd: u32, arg: UserAddr) -> Result<i32> {
        match table::CONTAINER.iter().find(|ioctl| ioctl.command == cmd) {
            Some(found) => (found.run)(&Call { file: self, caller, arg }),
            None => Err(if matches!(self.state().kind, Kind::None) { Errno::INVAL } else { Errno::NOTTY }),
        }
    }

    /// Does something with a container of type 1. EINVAL when it has no type, ENOTTY when it has another.
    fn type1<R>(&self, with: impl FnOnce(&mut Type1) -> Result<R>) -> Result<R> {
        match &mut self.state().kind {
            Kind::None => Err(Errno::INVAL),
            Kind::NoIommu => Err(Errno::NOTTY),
            Kind::Type1(type1) => with(type1),
        }
    }
}

impl Membership {
    /// Whether the container has a type.
    pub(super) fn has_iommu(&self) -> bool {
        !matches!(self.container.state().kind, Kind::None)
    }

    /// What a device of the group is bound to. EINVAL without a type, ENODEV for a device that has come later.
    pub(super) fn device(&self, number: u32) -> Result<Arc<BoundDevice>> {
        let state = self.container.state();
        if matches!(state.kind, Kind::None) {
            return Err(Errno::INVAL);
        }
        let member = state.members.get(&self.group).ok_or(Errno::INVAL)?;
        member.bound.get(&number).cloned().ok_or(Errno::NODEV)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.container.state();
        state.members.remove(&self.group);
        if state.members.is_empty() {
            // The type goes with the last group, and all that is mapped.
            state.kind = Kind::None;
        }
    }
}

/// `VFIO_GET_API_VERSION`.
pub(super) fn api_version(_: &Call<'_, Container>) -> Result<i32> {
    Ok(VFIO_API_VERSION as i32)
}

/// The third argument of a call that takes a number.
fn number(arg: UserAddr) -> u32 {
    u32::try_from(arg.0).unwrap_or(u32::MAX)
}

/// `VFIO_CHECK_EXTENSION`.
pub(super) fn check_extension(call: &Call<'_, Container>) -> Result<i32> {
    let state = call.file.state();
    let typed = matches!(state.kind, Kind::Type1(_));
    let yes = match number(call.arg) {
        VFIO_TYPE1_IOMMU | VFIO_TYPE1V2_IOMMU | VFIO_UNMAP_ALL => !state.no_iommu,
        // All memory here is coherent; only who translates can say so.
        VFIO_DMA_CC_IOMMU | VFIO_UPDATE_VADDR => typed,
        VFIO_NOIOMMU_IOMMU => {
            cfg!(feature = "noiommu") && state.no_iommu && call.caller.capable(Capability::SysRawio)
        }
        _ => false,
    };
    Ok(yes.into())
}

/// `VFIO_SET_IOMMU`.
pub(super) fn set_iommu(call: &Call<'_, Container>) -> Result<i32> {
    let mut state = call.file.state();
    if state.members.is_empty() || !matches!(state.kind, Kind::None) {
        return Err(Errno::INVAL);
    }
    let version = match number(call.arg) {
        VFIO_TYPE1_IOMMU if !state.no_iommu => Version::One,
        VFIO_TYPE1V2_IOMMU if !state.no_iommu => Version::Two,
        VFIO_NOIOMMU_IOMMU if state.no_iommu => {
            if !call.caller.capable(Capability::SysRawio) {
                return Err(Errno::PERM);
            }
            state.kind = Kind::NoIommu;
            return Ok(0);
        }
        _ => return Err(Errno::NODEV),
    };
    let context = Context::for_container();
    let ioas = context.ioas_alloc()?;
    let type1 = Type1 { version, context, ioas, mappings: Mappings::default(), dirty: false };
    for member in state.members.values_mut() {
        if let Err(errno) = member.attach(&type1) {
            for member in state.members.values_mut() {
                member.bound.clear();
            }
            return Err(errno);
        }
    }
    state.kind = Kind::Type1(Box::new(type1));
    Ok(0)
}

/// A call that is not type 1's. EINVAL before there is a type, ENOTTY then.
pub(super) fn refused(call: &Call<'_, Container>) -> Result<i32> {
    Err(if matches!(call.file.state().kind, Kind::None) { Errno::INVAL } else { Errno::NOTTY })
}
