//! Devices from elsewhere: `--device`.
//!
//! A device is connected before the process gives up its rights, asked for what the guest needs to drive it, and handed to
//! the machine. It reaches guest memory by asking for each access: so the processor sees what it writes.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use machine::assigned::Reach;
use machine::{Machine, MachineError};
use uapi::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio::Errno;
use vfio::device::Device;
use vfio::user::client::{Options, RemoteDevice};

/// What `--device` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A vfio-user server, by its socket.
    VfioUser(PathBuf),
}

/// Parses `--device`.
///
/// # Errors
/// Words for the user.
pub fn parse(text: &str) -> Result<DeviceSpec, String> {
    match text.split_once('=') {
        Some(("vfio-user", path)) if !path.is_empty() => Ok(DeviceSpec::VfioUser(path.into())),
        _ => Err(format!("`{text}` is no device: write vfio-user=SOCKET")),
    }
}

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
}

/// A device that is connected.
#[derive(Debug)]
pub struct Connected {
    device: Arc<dyn Device>,
    class: [u8; 3],
}

/// Connects to all of them. Starts no thread.
///
/// # Errors
/// A [`DeviceError`].
pub fn connect(specs: &[DeviceSpec]) -> Result<Vec<Connected>, DeviceError> {
    specs.iter().map(|DeviceSpec::VfioUser(path)| connect_one(path)).collect()
}

fn connect_one(path: &PathBuf) -> Result<Connected, DeviceError> {
    let refused = |source| DeviceError::Refused { path: path.clone(), source };
    let socket =
        UnixStream::connect(path).map_err(|source| DeviceError::Connect { path: path.clone(), source })?;
    let device = RemoteDevice::connect(socket.into(), Options::default()).map_err(refused)?;
    let mut class = [0; 3];
    device.read(VFIO_PCI_CONFIG_REGION_INDEX, CLASS, &mut class).map_err(refused)?;
    Ok(Connected { device: Arc::new(device), class })
}

/// The class code's place in configuration space, interface first (PCI Local Bus 3.0, section 6.2.1).
const CLASS: u64 = 0x09;

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

    /// Gives it to the guest.
    ///
    /// # Errors
    /// The machine's, when the device makes no sense.
    pub fn assign(self, machine: &mut Machine) -> Result<(), MachineError> {
        machine.add_device(self.device, Reach::Called)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_kind_and_place() {
        assert_eq!(parse("vfio-user=/run/nvme"), Ok(DeviceSpec::VfioUser("/run/nvme".into())));
        assert_eq!(parse("vfio-user=a=b"), Ok(DeviceSpec::VfioUser("a=b".into())));
        for wrong in ["", "vfio-user", "vfio-user=", "/run/nvme"] {
            assert!(parse(wrong).unwrap_err().contains("vfio-user=SOCKET"), "{wrong}");
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let spec = DeviceSpec::VfioUser("/nonexistent/socket".into());
        let error = connect(&[spec]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    }
}
