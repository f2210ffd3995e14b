//! Why a device of the host cannot be had, and what to do about it.

use std::{io, path::PathBuf};

use iommufd::iova::{Iova, IovaRange};

use super::{Door, PciAddress};
use crate::Errno;

/// Why a device of the host cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// There is no such function.
    #[error("{0} is not on this host's PCI bus: `lspci -D` lists what is")]
    Absent(PciAddress),
    /// The host's IOMMU is off, or there is none.
    #[error(
        "{0} is behind no IOMMU: turn it on in the firmware, and with intel_iommu=on on the kernel's command line (Intel)"
    )]
    NoIommu(PciAddress),
    /// Another driver has it.
    #[error(
        "{address} is bound to {driver}: give it to vfio-pci with `modprobe vfio-pci; cd /sys/bus/pci; echo vfio-pci \
         >devices/{address}/driver_override; echo {address} >drivers/{driver}/unbind; echo {address} >drivers_probe`"
    )]
    OtherDriver {
        /// The device.
        address: PciAddress,
        /// Its driver.
        driver: String,
    },
    /// No driver has it.
    #[error(
        "{0} is bound to no driver: give it to vfio-pci with `modprobe vfio-pci; cd /sys/bus/pci; echo vfio-pci \
         >devices/{0}/driver_override; echo {0} >drivers_probe`"
    )]
    NoDriver(PciAddress),
    /// It cannot be opened by this door.
    #[error("{address} cannot be had by its {door}: {why}")]
    NoDoor {
        /// The device.
        address: PciAddress,
        /// The door.
        door: Door,
        /// What lacks.
        why: &'static str,
    },
    /// A node that cannot be opened.
    #[error("cannot open {}{}", path.display(), way_out(source))]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Other devices that cannot be kept apart from it have drivers of the kernel's.
    #[error(
        "{address} shares IOMMU group {group} with {}, which must not be driven by the kernel: unbind or give to \
         vfio-pci all of them",
        .others.join(", ")
    )]
    NotViable {
        /// The device.
        address: PciAddress,
        /// The group's number.
        group: u32,
        /// The others in it, with their drivers.
        others: Vec<String>,
    },
    /// The kernel refuses.
    #[error("the kernel refuses to {what} {address}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The device.
        address: PciAddress,
        /// Its answer.
        #[source]
        source: Errno,
    },
    /// The host's VFIO is not what is known here.
    #[error("this host's VFIO {0}")]
    Unknown(&'static str),
}

/// For the errors that a user meets.
fn way_out(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::ACCESS | Errno::PERM) => {
            ": its owner decides who may (`chown` it, or a udev rule), or be root"
        }
        Some(Errno::BUSY) => ": another program has it",
        Some(Errno::NOENT) => ": `modprobe vfio-pci` makes it",
        _ => "",
    }
}

/// Why memory cannot be given to devices.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Too much to lock.
    #[error(
        "devices need {needed} bytes of memory locked, and {} may be: raise the limit (`ulimit -l {}`, \
         LimitMEMLOCK= or limits.conf), or give less memory",
        limit.map_or_else(|| "less".to_owned(), |limit| format!("{limit} bytes")),
        needed.div_ceil(1024)
    )]
    Locked {
        /// Bytes that are mapped already, and those that were to be.
        needed: u64,
        /// RLIMIT_MEMLOCK; none when there is no limit.
        limit: Option<u64>,
    },
    /// The IOMMU cannot translate it.
    #[error("addresses {start:#x} to {last:#x} cannot be given to devices: usable are {usable}")]
    Reserved {
        /// The first.
        start: u64,
        /// The last.
        last: u64,
        /// The ranges.
        usable: String,
    },
    /// As many mappings as a container has (`dma_entry_limit` of the module vfio_iommu_type1, 65535 unless it was set).
    #[error(
        "VFIO's container takes no more mappings, where {length:#x} bytes at {start:#x} were to be one: raise its limit \
         (`modprobe vfio_iommu_type1 dma_entry_limit=1000000`, before it is used), or take the device by its own node \
         (door=cdev), which has none"
    )]
    TooMany {
        /// The first address.
        start: u64,
        /// How many bytes.
        length: u64,
    },
    /// The kernel refuses.
    #[error("the kernel does not map {length:#x} bytes at {start:#x} for devices")]
    Refused {
        /// The first address.
        start: u64,
        /// How many bytes.
        length: u64,
        /// Its answer.
        #[source]
        source: Errno,
    },
}

impl MapError {
    /// What the kernel's refusal of `length` bytes at `iova` means, where `locked` bytes would have been locked with them,
    /// and devices can use `ranges`.
    pub(super) fn explain(iova: Iova, length: u64, locked: u64, source: Errno, ranges: &[IovaRange]) -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        if source == Errno::NOMEM && limit.is_some_and(|limit| limit < locked) {
            return Self::Locked { needed: locked, limit };
        }
        if source == Errno::NOSPC {
            return Self::TooMany { start: iova.0, length };
        }
        if let Ok(range) = IovaRange::with_length(iova, length)
            && !ranges.is_empty()
            && !ranges.iter().any(|usable| usable.covers(range))
        {
            let usable =
                ranges.iter().map(|range| format!("{:#x} to {:#x}", range.start().0, range.last().0));
            let usable = usable.collect::<Vec<_>>().join(", ");
            return Self::Reserved { start: iova.0, last: range.last().0, usable };
        }
        Self::Refused { start: iova.0, length, source }
    }

    /// As an errno.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Locked { .. } => Errno::NOMEM,
            Self::Reserved { .. } => Errno::INVAL,
            Self::TooMany { .. } => Errno::NOSPC,
            Self::Refused { source, .. } => *source,
        }
    }
}
