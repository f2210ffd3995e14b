//! The door of a group: `/dev/vfio/N`.

use std::sync::{Arc, Mutex};

use iommufd::{Context, process::UserAddr};
use uapi::vfio::{VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE, vfio_group_status};
use zerocopy::IntoBytes;

#[cfg(feature = "container")]
use super::container::{Container, Membership};
use super::{
    Caller, Opened, System,
    device_file::{Bound, DeviceFile, Way},
    dma::IommuDma,
    structure,
    system::{GroupState, Slot},
    table::{self, Call},
    token::{self, Uuid},
};
use crate::{Errno, Result, eventfd::lock};

/// The longest name of a device that is looked at, with what follows it.
const MOST_NAME: usize = 128;

/// What a group was given as its container.
#[derive(Debug, Default)]
enum Translates {
    #[default]
    Nothing,
    Iommufd(Arc<Context>),
    #[cfg(feature = "container")]
    Container(Membership),
}

/// A group in use: by the file of its node, and by the devices that it gave out. When the last of them goes it can be
/// opened again.
#[derive(Debug)]
pub(super) struct GroupUse {
    group: Arc<GroupState>,
    system: Arc<System>,
    translates: Mutex<Translates>,
}

impl Drop for GroupUse {
    fn drop(&mut self) {
        *self.translates.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner) = Translates::Nothing;
        self.group.release();
    }
}

/// An open group.
#[derive(Debug)]
pub struct GroupFile(Arc<GroupUse>);

impl System {
    /// Opens the node of group `number`.
    ///
    /// # Errors
    /// ENODEV when there is no such group, EBUSY when it or one of its devices is open, EPERM when its devices have no IOMMU
    /// and the caller has not the capability for them.
    pub fn open_group(self: &Arc<Self>, caller: &dyn Caller, number: u32) -> Result<Arc<GroupFile>> {
        let group = self.group(number)?;
        if group.no_iommu && !caller.capable(iommufd::caller::Capability::SysRawio) {
            return Err(Errno::PERM);
        }
        group.claim()?;
        let system = Arc::clone(self);
        Ok(Arc::new(GroupFile(Arc::new(GroupUse { group, system, translates: Mutex::default() }))))
    }
}

impl GroupFile {
    /// The group's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.0.group.number
    }

    fn slots(&self) -> Vec<Arc<Slot>> {
        self.0.system.slots(|slot| slot.group.number == self.number())
    }

    /// `ioctl`: what it returns.
    ///
    /// # Errors
    /// ENOTTY for what there is not; and what the call documents.
    pub fn ioctl(self: &Arc<Self>, caller: &dyn Caller, cmd: u32, arg: UserAddr) -> Result<i32> {
        let found = table::GROUP.iter().find(|ioctl| ioctl.command == cmd);
        (found.ok_or(Errno::NOTTY)?.run)(&Call { file: self, caller, arg })
    }
}

/// `VFIO_GROUP_GET_STATUS`.
pub(super) fn status(call: &Call<'_, GroupFile>) -> Result<i32> {
    let mut args: vfio_group_status =
        structure::get(call.process(), call.arg, size_of::<vfio_group_status>())?;
    args.flags = VFIO_GROUP_FLAGS_VIABLE;
    if !matches!(*lock(&call.file.0.translates), Translates::Nothing) {
        args.flags |= VFIO_GROUP_FLAGS_CONTAINER_SET;
    }
    call.process().write(call.arg, args.as_bytes())?;
    Ok(0)
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(super) fn set_container(call: &Call<'_, GroupFile>) -> Result<i32> {
    let mut fd = 0i32;
    call.process().read(call.arg, fd.as_mut_bytes())?;
    let mut translates = lock(&call.file.0.translates);
    if !matches!(*translates, Translates::Nothing) {
        return Err(Errno::INVAL);
    }
    let no_iommu = call.file.0.group.no_iommu;
    *translates = match call.caller.opened(fd)? {
        Opened::Iommufd(context) if cfg!(feature = "iommufd") => {
            if no_iommu {
                context.set_no_iommu();
            } else {
                context.compat_ioas_or_new()?;
            }
            Translates::Iommufd(context)
        }
        #[cfg(feature = "container")]
        Opened::Container(container) => Translates::Container(Container::join(
            &container,
            call.file.number(),
            no_iommu,
            call.file.slots(),
        )?),
        _ => return Err(Errno::BADFD),
    };
    Ok(0)
}

/// `VFIO_GROUP_UNSET_CONTAINER`.
pub(super) fn unset_container(call: &Call<'_, GroupFile>) -> Result<i32> {
    let mut translates = lock(&call.file.0.translates);
    match &*translates {
        Translates::Nothing => return Err(Errno::INVAL),
        // As in the kernel: devices that are open stay attached.
        Translates::Iommufd(_) => {}
        #[cfg(feature = "container")]
        Translates::Container(_) => {
            if call.file.slots().iter().any(|slot| lock(&slot.in_use).files > 0) {
                return Err(Errno::BUSY);
            }
        }
    }
    *translates = Translates::Nothing;
    Ok(0)
}

/// `VFIO_GROUP_GET_DEVICE_FD`.
pub(super) fn device_fd(call: &Call<'_, GroupFile>) -> Result<i32> {
    let text = name(call)?;
    let translates = lock(&call.file.0.translates);
    match &*translates {
        Translates::Nothing => return Err(Errno::INVAL),
        #[cfg(feature = "container")]
        Translates::Container(membership) if !membership.has_iommu() => return Err(Errno::INVAL),
        _ => {}
    }
    let (name, options) = text.split_once(' ').unwrap_or((&text, ""));
    let slot = call.file.slots().into_iter().find(|slot| slot.name == name).ok_or(Errno::NODEV)?;
    let token = vf_token(options)?;
    let file = DeviceFile {
        slot: Arc::clone(&slot),
        way: Way::Group(Arc::clone(&call.file.0)),
        opening: Default::default(),
        #[cfg(feature = "device-cdev")]
        binding: Mutex::default(),
    };
    file.open(token, true, || bind(&slot, &translates, call.caller))?;
    drop(translates);
    call.caller.install_device(Arc::new(file))
}

/// The device's memory: by whatever translates for the group.
fn bind(slot: &Slot, translates: &Translates, caller: &dyn Caller) -> Result<Bound> {
    let _ = caller;
    match translates {
        Translates::Nothing => Err(Errno::INVAL),
        Translates::Iommufd(context) => {
            let Some(hardware) = slot.hardware.clone() else {
                return no_iommu(caller);
            };
            let bound = Arc::new(context.bind(hardware)?);
            bound.attach(None, context.compat_ioas_or_new()?)?;
            let dma = Arc::new(IommuDma(bound.dma()));
            Ok((Some(bound), dma))
        }
        #[cfg(feature = "container")]
        Translates::Container(membership) => {
            if slot.hardware.is_none() {
                return no_iommu(caller);
            }
            let bound = membership.device(slot.number)?;
            let dma = Arc::new(IommuDma(bound.dma()));
            Ok((Some(bound), dma))
        }
    }
}

/// A device without an IOMMU reaches memory by the program's own addresses.
fn no_iommu(caller: &dyn Caller) -> Result<Bound> {
    #[cfg(feature = "noiommu")]
    return Ok((None, Arc::new(super::dma::ProcessDma(Arc::clone(caller.process())))));
    #[cfg(not(feature = "noiommu"))]
    {
        let _ = caller;
        Err(Errno::INVAL)
    }
}

/// The string that `VFIO_GROUP_GET_DEVICE_FD` gives, up to its end. EFAULT; EINVAL when it is too long, or no text.
fn name(call: &Call<'_, GroupFile>) -> Result<String> {
    let mut bytes = Vec::new();
    while bytes.len() < MOST_NAME {
        // Byte by byte: what follows the end may not be memory.
        let mut byte = [0];
        call.process().read(structure::plus(call.arg, bytes.len())?, &mut byte)?;
        if byte == [0] {
            return String::from_utf8(bytes).map_err(|_| Errno::INVAL);
        }
        bytes.extend(byte);
    }
    Err(Errno::INVAL)
}

/// What follows a device's name: `vf_token=UUID`, or nothing. EINVAL for anything else.
fn vf_token(options: &str) -> Result<Option<Uuid>> {
    let mut found = None;
    for option in options.split(' ').filter(|option| !option.is_empty()) {
        let value = option.strip_prefix("vf_token=").ok_or(Errno::INVAL)?;
        found = Some(token::parse(value)?);
    }
    Ok(found)
}
