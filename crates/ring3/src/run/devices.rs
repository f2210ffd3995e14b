//! Devices from elsewhere: `--device`.
//!
//! A device is connected before the process gives up its rights, asked for what the guest needs to drive it, and handed to
//! the machine. There are two kinds:
//!
//! - A vfio-user server's reaches guest memory by asking for each access: so the processor sees what it writes.
//! - One of the host's own, which the kernel's VFIO gives away, reaches guest memory by itself, through the host's IOMMU: all of
//!   it is mapped there and locked, and the processor looks at its code again whenever the device may have written. With
//!   `--iommu` it is what the guest maps for the device, which is then in an address space of its own.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use machine::assigned::Reach;
use machine::{Machine, MachineError};
use uapi::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio::Errno;
use vfio::device::Device;
use vfio::kernel::{AddressSpace, HostDevice, HostDeviceName, HostIommu, KernelError, MapError, PciAddress};
use vfio::user::client::{Options, RemoteDevice};

use crate::cli::{Iommu, NamedDevice};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Nobody listens.
    #[error("cannot connect to a vfio-user server at {}: does it run, and serve nobody else?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody does, and gives no device.
    #[error("what listens at {} gives no device that the guest can have", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Its answer, or what became of the connection.
        source: Errno,
    },
    /// The host does not give its device away.
    #[error("cannot give the guest the host's device {address}")]
    Host {
        /// The device.
        address: PciAddress,
        /// Why not.
        source: KernelError,
    },
    /// Two that the host cannot keep apart.
    #[error(
        "the host's devices {first} and {second} are both in IOMMU group {group}, so they cannot be in different address spaces \
         of the guest's: leave one of them out, or say --iommu none"
    )]
    OneGroup {
        /// One.
        first: PciAddress,
        /// The other.
        second: PciAddress,
        /// Their group.
        group: u32,
    },
    /// It does, and the device does not answer.
    #[error("the host's device {address} does not tell what it is")]
    Silent {
        /// The device.
        address: PciAddress,
        /// The answer.
        source: Errno,
    },
    /// Its memory cannot be locked, or not be reached by the host's IOMMU.
    #[error("the host's devices cannot be given the guest's memory")]
    Memory(#[from] MapError),
    /// The machine cannot have it.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A device that is connected.
#[derive(Debug)]
pub struct Connected {
    device: Given,
    class: [u8; 3],
}

/// Who gives it.
#[derive(Debug)]
enum Given {
    Server(Arc<RemoteDevice>),
    Host(Arc<HostDevice>),
}

/// Connects to all of them. Starts no thread.
///
/// # Errors
/// A [`DeviceError`].
pub fn connect(names: &[NamedDevice], iommu: Iommu) -> Result<Vec<Connected>, DeviceError> {
    let mut hosts = match iommu {
        Iommu::None => Hosts::Together(Vec::new()),
        Iommu::Virtio | Iommu::Intel => Hosts::Apart { iommufd: None, groups: Vec::new() },
    };
    let connect = |name: &NamedDevice| match name {
        NamedDevice::VfioUser(path) => connect_server(path),
        NamedDevice::VfioPci(name) => hosts.connect(*name),
    };
    names.iter().map(connect).collect()
}

fn connect_server(path: &Path) -> Result<Connected, DeviceError> {
    let path = || path.to_path_buf();
    let refused = |source| DeviceError::Refused { path: path(), source };
    let socket =
        UnixStream::connect(path()).map_err(|source| DeviceError::Connect { path: path(), source })?;
    let device = RemoteDevice::connect(socket.into(), Options::default()).map_err(refused)?;
    let class = class(&device).map_err(refused)?;
    Ok(Connected { device: Given::Server(Arc::new(device)), class })
}

/// Where the host's devices are.
enum Hosts {
    /// They share what they reach: an address space for each door.
    Together(Vec<Arc<AddressSpace>>),
    /// Each is where the guest's IOMMU puts it.
    Apart { iommufd: Option<Arc<HostIommu>>, groups: Vec<(u32, PciAddress)> },
}

impl Hosts {
    fn connect(
        &mut self,
        HostDeviceName { address, door }: HostDeviceName,
    ) -> Result<Connected, DeviceError> {
        let failed = |source| DeviceError::Host { address, source };
        let door = HostDevice::door(address, door).map_err(failed)?;
        let device = match self {
            Self::Together(spaces) => {
                let space = match spaces.iter().find(|space| space.door() == door) {
                    Some(space) => Arc::clone(space),
                    None => {
                        let space = AddressSpace::new(door).map_err(failed)?;
                        spaces.push(Arc::clone(&space));
                        space
                    }
                };
                HostDevice::open_in(address, &space).map_err(failed)?
            }
            Self::Apart { iommufd, groups } => {
                let group = HostDevice::group_of(address).map_err(failed)?;
                if let Some((_, first)) = groups.iter().find(|(known, _)| *known == group) {
                    return Err(DeviceError::OneGroup { first: *first, second: address, group });
                }
                groups.push((group, address));
                HostDevice::for_context(address, door, iommufd).map_err(failed)?
            }
        };
        let class = class(&device).map_err(|source| DeviceError::Silent { address, source })?;
        Ok(Connected { device: Given::Host(Arc::new(device)), class })
    }
}

/// The class code's place in configuration space, interface first (PCI Local Bus 3.0, section 6.2.1).
const CLASS: u64 = 0x09;

fn class(device: &dyn Device) -> Result<[u8; 3], Errno> {
    let mut class = [0; 3];
    match device.read(VFIO_PCI_CONFIG_REGION_INDEX, CLASS, &mut class)? {
        3 => Ok(class),
        _ => Err(Errno::IO),
    }
}

impl Connected {
    /// The kernel's driver for this kind of device, where the kind alone tells (PCI Code and ID Assignment, 1).
    #[must_use]
    pub fn driver(&self) -> Option<&'static str> {
        match self.class {
            [0x01, 0x06, 0x01] => Some("ahci"),
            [0x02, 0x08, 0x01] => Some("nvme"),
            [0x30, 0x03, 0x0c] => Some("xhci_pci"),
            _ => None,
        }
    }

    /// Whether the host's own VFIO gives it.
    #[must_use]
    pub fn is_of_host(&self) -> bool {
        matches!(self.device, Given::Host(_))
    }
}

/// Gives all of them to the guest.
///
/// # Errors
/// The machine's, when a device makes no sense, and what the host says about memory.
pub fn assign(devices: Vec<Connected>, machine: &mut Machine) -> Result<(), DeviceError> {
    let mut mapped: Vec<Arc<AddressSpace>> = Vec::new();
    for Connected { device, .. } in devices {
        match device {
            Given::Server(device) => machine.add_device(device, Reach::Called)?,
            Given::Host(device) => {
                if let Some(space) = device.space()
                    && !mapped.iter().any(|known| Arc::ptr_eq(known, space))
                {
                    space.map_guest(machine.memory())?;
                    mapped.push(Arc::clone(space));
                }
                machine.add_host_device(device)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let name = NamedDevice::VfioUser("/nonexistent/socket".into());
        let error = connect(&[name], Iommu::None).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    }

    #[test]
    fn a_device_that_the_host_has_not_is_named() {
        // No host has so many domains.
        let name = NamedDevice::VfioPci("fffe:1f:1f.7".parse().unwrap());
        for iommu in [Iommu::None, Iommu::Virtio] {
            let error = connect(std::slice::from_ref(&name), iommu).unwrap_err();
            assert!(error.to_string().contains("fffe:1f:1f.7"), "{error}");
            let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            assert!(reason.contains("lspci -D"), "{reason}");
        }
    }
}
