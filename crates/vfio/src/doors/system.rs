//! The devices that there are, and their groups.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, Weak},
};

use iommufd::{BoundDevice, Context, hardware::Hardware};

use super::{Node, Token};
use crate::{Errno, Result, device::Device, eventfd::lock};

/// A device as it is added to a [`System`].
#[derive(Debug)]
pub struct Registration {
    /// The bus's name of it, by which a group is asked for it: `0000:00:05.0`.
    pub name: String,
    /// Its PCI address: segment, bus, and device and function.
    pub address: Option<(u16, u8, u8)>,
    /// The device.
    pub device: Arc<dyn Device>,
    /// Its IOMMU. None for a device without one, which only a group of its own kind gives away (feature `noiommu`).
    pub hardware: Option<Arc<dyn Hardware>>,
    /// Devices with the same number are reset together by their bus; none for a bus that has no reset.
    pub reset_set: Option<u32>,
    /// What it has to do with tokens.
    pub token: Token,
    /// The number of its node, for who wants the same in several systems; none for the lowest that is free.
    pub number: Option<u32>,
}

/// A device that cannot be added.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SystemError {
    /// The name is taken.
    #[error("there is a device with the name {0:?} already: give each its own address")]
    Name(String),
    /// The number is taken.
    #[error("there is a device with the number {0} already")]
    Number(u32),
    /// It has no IOMMU, and there is no door for that.
    #[error("the device {0:?} has no IOMMU, and this was built without feature `noiommu`")]
    NoIommu(String),
}

/// How a device is in use.
#[derive(Debug, Default)]
pub(super) struct Use {
    /// How many files have it open: at most one bound node, or those that its group gave out.
    pub(super) files: u32,
    /// What it is bound to, while it is open.
    pub(super) bound: Option<Arc<BoundDevice>>,
}

/// A device of a system.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) name: String,
    pub(super) address: Option<(u16, u8, u8)>,
    pub(super) device: Arc<dyn Device>,
    pub(super) hardware: Option<Arc<dyn Hardware>>,
    pub(super) reset_set: Option<u32>,
    pub(super) token: Token,
    pub(super) group: Arc<GroupState>,
    pub(super) in_use: Mutex<Use>,
    pub(super) system: Weak<System>,
}

impl Slot {
    /// Its object in a context, when it is bound to that.
    pub(super) fn id_in(&self, context: &Arc<Context>) -> Option<u32> {
        let in_use = lock(&self.in_use);
        let bound = in_use.bound.as_ref()?;
        Arc::ptr_eq(bound.context(), context).then(|| bound.id())
    }
}

/// By which door the devices of a group are in use.
#[derive(Debug, Default, PartialEq, Eq)]
enum Door {
    #[default]
    Closed,
    /// The group's own, until the group and all that it gave out are closed.
    #[cfg(feature = "group")]
    Group,
    /// So many devices' own.
    #[cfg(feature = "device-cdev")]
    Devices(u32),
}

/// A group.
#[derive(Debug)]
pub(super) struct GroupState {
    pub(super) number: u32,
    pub(super) no_iommu: bool,
    door: Mutex<Door>,
}

impl GroupState {
    /// Uses it by its own door. EBUSY when it is in use.
    #[cfg(feature = "group")]
    pub(super) fn claim(&self) -> Result<()> {
        let mut door = lock(&self.door);
        if *door != Door::Closed {
            return Err(Errno::BUSY);
        }
        *door = Door::Group;
        Ok(())
    }

    #[cfg(feature = "group")]
    pub(super) fn release(&self) {
        *lock(&self.door) = Door::Closed;
    }

    /// Uses it by the door of one of its devices. EBUSY when it is in use by its own.
    #[cfg(feature = "device-cdev")]
    pub(super) fn claim_device(&self) -> Result<()> {
        let mut door = lock(&self.door);
        match &mut *door {
            Door::Closed => *door = Door::Devices(1),
            Door::Devices(count) => *count += 1,
            #[cfg(feature = "group")]
            Door::Group => return Err(Errno::BUSY),
        }
        Ok(())
    }

    #[cfg(feature = "device-cdev")]
    pub(super) fn release_device(&self) {
        let mut door = lock(&self.door);
        match &mut *door {
            Door::Devices(count) if *count > 1 => *count -= 1,
            _ => *door = Door::Closed,
        }
    }
}

#[derive(Debug, Default)]
struct Devices {
    by_number: BTreeMap<u32, Arc<Slot>>,
    /// By the IOMMU's number of them; without an IOMMU each device has one of its own.
    groups: BTreeMap<u32, Arc<GroupState>>,
}

/// The devices that programs can come to.
#[derive(Debug)]
pub struct System {
    /// Whether programs can map registers: whoever serves them catches the accesses.
    pub(super) maps_registers: bool,
    devices: Mutex<Devices>,
}

impl System {
    /// One without devices. `maps_registers`: who serves its files can map what is no memory ([`super::Mapping::Registers`]).
    #[must_use]
    pub fn new(maps_registers: bool) -> Arc<Self> {
        Arc::new(Self { maps_registers, devices: Mutex::default() })
    }

    /// Adds a device: the number of its node.
    ///
    /// # Errors
    /// [`SystemError`].
    pub fn add(self: &Arc<Self>, registration: Registration) -> Result<u32, SystemError> {
        let Registration { name, address, device, hardware, reset_set, token, number } = registration;
        let mut devices = lock(&self.devices);
        if devices.by_number.values().any(|slot| slot.name == name) {
            return Err(SystemError::Name(name));
        }
        if hardware.is_none() && !cfg!(feature = "noiommu") {
            return Err(SystemError::NoIommu(name));
        }
        let number = match number {
            Some(number) if devices.by_number.contains_key(&number) => {
                return Err(SystemError::Number(number));
            }
            Some(number) => number,
            None => (0..).find(|number| !devices.by_number.contains_key(number)).unwrap_or(u32::MAX),
        };
        let group = match &hardware {
            // An IOMMU's numbers are its own, and fit.
            Some(hardware) => u32::try_from(hardware.group()).unwrap_or(u32::MAX),
            None => devices.groups.keys().next_back().map_or(0, |last| last.saturating_add(1)),
        };
        let no_iommu = hardware.is_none();
        let group = devices
            .groups
            .entry(group)
            .or_insert_with(|| Arc::new(GroupState { number: group, no_iommu, door: Mutex::default() }));
        let group = Arc::clone(group);
        let in_use = Mutex::default();
        let system = Arc::downgrade(self);
        let slot = Slot { number, name, address, device, hardware, reset_set, token, group, in_use, system };
        devices.by_number.insert(number, Arc::new(slot));
        Ok(number)
    }

    /// Takes a device away. Who has it open keeps it.
    pub fn remove(&self, number: u32) {
        let mut devices = lock(&self.devices);
        devices.by_number.remove(&number);
        let Devices { by_number, groups, .. } = &mut *devices;
        groups.retain(|number, _| by_number.values().any(|slot| slot.group.number == *number));
    }

    /// The group of device `number`.
    #[must_use]
    pub fn group_of(&self, number: u32) -> Option<u32> {
        lock(&self.devices).by_number.get(&number).map(|slot| slot.group.number)
    }

    /// Device `number`.
    #[must_use]
    pub fn device(&self, number: u32) -> Option<Arc<dyn Device>> {
        lock(&self.devices).by_number.get(&number).map(|slot| Arc::clone(&slot.device))
    }

    /// The device nodes: what is there follows from how this was built, and from the devices.
    ///
    /// | features | `/dev/iommu` | `/dev/vfio/vfio` | `/dev/vfio/N` | `/dev/vfio/devices/vfioN` |
    /// |---|---|---|---|---|
    /// | `group`, `container` | no | VFIO's | yes | no |
    /// | and `iommufd` | yes | VFIO's | yes | no |
    /// | `group`, `iommufd`, `iommufd-container` | yes | an iommufd | yes | no |
    /// | `group`, `iommufd` | yes | no | yes | no |
    /// | and `device-cdev`, to any of these | yes | the same | yes | yes |
    /// | `device-cdev` | yes | no | no | yes |
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        let devices = lock(&self.devices);
        let mut nodes = Vec::new();
        if cfg!(feature = "iommufd") {
            nodes.push(Node::Iommufd);
        }
        if cfg!(feature = "container") {
            nodes.push(Node::Container);
        }
        if cfg!(feature = "iommufd-container") {
            nodes.push(Node::IommufdContainer);
        }
        if cfg!(feature = "group") {
            let groups = devices.groups.values();
            nodes.extend(groups.map(|group| Node::Group { number: group.number, no_iommu: group.no_iommu }));
        }
        if cfg!(feature = "device-cdev") {
            // A device without an IOMMU has no node of its own.
            let with_iommu = devices.by_number.values().filter(|slot| slot.hardware.is_some());
            nodes.extend(with_iommu.map(|slot| Node::Device { number: slot.number }));
        }
        nodes
    }

    /// Why a program will find no `/dev/vfio/vfio`, to be said when it is started; none when there is one, or no group that
    /// would want one.
    #[must_use]
    pub fn missing_container(&self) -> Option<&'static str> {
        let missing =
            cfg!(feature = "group") && !cfg!(any(feature = "container", feature = "iommufd-container"));
        missing.then_some(
            "there is no /dev/vfio/vfio: this was built without `container` and `iommufd-container`; a group takes \
             /dev/iommu as its container",
        )
    }

    /// Device `number`. ENODEV.
    #[cfg(feature = "device-cdev")]
    pub(super) fn slot(&self, number: u32) -> Result<Arc<Slot>> {
        lock(&self.devices).by_number.get(&number).cloned().ok_or(Errno::NODEV)
    }

    /// Group `number`. ENODEV.
    #[cfg(feature = "group")]
    pub(super) fn group(&self, number: u32) -> Result<Arc<GroupState>> {
        lock(&self.devices).groups.get(&number).cloned().ok_or(Errno::NODEV)
    }

    /// The devices for which `wanted` holds.
    pub(super) fn slots(&self, wanted: impl Fn(&Slot) -> bool) -> Vec<Arc<Slot>> {
        lock(&self.devices).by_number.values().filter(|slot| wanted(slot)).cloned().collect()
    }
}
