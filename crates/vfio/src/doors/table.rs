//! Every call of VFIO's, once: what is done, and what is told of it. The documentation's table is made of this one.

use core::fmt::Write as _;
use std::sync::Arc;

use iommufd::process::{Process, UserAddr};
#[allow(clippy::wildcard_imports, reason = "all of the header's calls")]
use uapi::vfio::*;

#[cfg(feature = "device-cdev")]
use super::cdev;
#[cfg(feature = "container")]
use super::container::{self, Container};
#[cfg(feature = "group")]
use super::group::{self, GroupFile};
use super::{Caller, device_file::DeviceFile, feature, hot_reset, info, irqs};
use crate::{Errno, Result};

/// One call.
pub(super) struct Call<'a, F> {
    pub(super) file: &'a Arc<F>,
    pub(super) caller: &'a dyn Caller,
    /// The third argument: an address, or a number.
    pub(super) arg: UserAddr,
}

impl<F> Call<'_, F> {
    pub(super) fn process(&self) -> &dyn Process {
        &**self.caller.process()
    }
}

/// A call that one kind of file knows.
pub(super) struct Ioctl<F: 'static> {
    pub(super) command: u32,
    pub(super) name: &'static str,
    pub(super) run: fn(&Call<'_, F>) -> Result<i32>,
    /// It works on a device's node that is not bound.
    pub(super) unbound: bool,
    /// "full", "partial: ..." or "refused: ...".
    pub(super) support: &'static str,
    /// What it is for.
    pub(super) purpose: &'static str,
}

macro_rules! ioctl {
    ($command:ident, $run:expr, $support:literal, $purpose:literal) => {
        ioctl!($command, $run, $support, $purpose, false)
    };
    ($command:ident, $run:expr, $support:literal, $purpose:literal, $unbound:literal) => {
        Ioctl {
            command: $command,
            name: stringify!($command),
            run: $run,
            unbound: $unbound,
            support: $support,
            purpose: $purpose,
        }
    };
}

fn refused<F>(_: &Call<'_, F>) -> Result<i32> {
    Err(Errno::NOTTY)
}

/// A container's.
#[cfg(feature = "container")]
#[rustfmt::skip]
pub(super) static CONTAINER: &[Ioctl<Container>] = &[
    ioctl!(VFIO_GET_API_VERSION, container::api_version, "full", "the version of VFIO's interface: 0"),
    ioctl!(VFIO_CHECK_EXTENSION, container::check_extension,
        "full", "1 for TYPE1, TYPE1v2, UNMAP_ALL; with a type for DMA_CC, UPDATE_VADDR; for NOIOMMU with such groups"),
    ioctl!(VFIO_SET_IOMMU, container::set_iommu, "full", "version 1 or 2 of type 1, or none"),
    ioctl!(VFIO_IOMMU_GET_INFO, container::get_info, "full", "page sizes; capabilities MIGRATION, DMA_AVAIL, IOVA_RANGE"),
    ioctl!(VFIO_IOMMU_MAP_DMA, container::map_dma,
        "partial: registers of a device keep their place, but no other device reaches them", "maps memory of the process; VADDR"),
    ioctl!(VFIO_IOMMU_UNMAP_DMA, container::unmap_dma, "full", "unmaps; ALL, VADDR, GET_DIRTY_BITMAP"),
    ioctl!(VFIO_IOMMU_DIRTY_PAGES, container::dirty_pages,
        "partial: every page that is mapped counts as written to, as in the kernel without an IOMMU that tells; EACCES with version 1",
        "dirty tracking by the container"),
    ioctl!(VFIO_IOMMU_ENABLE, container::refused, "refused: ENOTTY, as of type 1", "sPAPR"),
    ioctl!(VFIO_IOMMU_DISABLE, container::refused, "refused: ENOTTY, as of type 1", "sPAPR"),
];

/// A group's.
#[cfg(feature = "group")]
#[rustfmt::skip]
pub(super) static GROUP: &[Ioctl<GroupFile>] = &[
    ioctl!(VFIO_GROUP_GET_STATUS, group::status, "full", "VIABLE, CONTAINER_SET"),
    ioctl!(VFIO_GROUP_SET_CONTAINER, group::set_container, "full", "gives the group a container, or an iommufd"),
    ioctl!(VFIO_GROUP_UNSET_CONTAINER, group::unset_container, "full", "takes it back"),
    ioctl!(VFIO_GROUP_GET_DEVICE_FD, group::device_fd, "full", "opens a device by its name; `vf_token=UUID` behind it"),
];

/// An open device's.
#[rustfmt::skip]
pub(super) static DEVICE: &[Ioctl<DeviceFile>] = &[
    ioctl!(VFIO_DEVICE_GET_INFO, info::device, "full", "regions, interrupts; capability PCI_ATOMIC_COMP"),
    ioctl!(VFIO_DEVICE_GET_REGION_INFO, info::region, "full", "size and place of a region; capabilities SPARSE_MMAP, TYPE, MSIX_MAPPABLE"),
    ioctl!(VFIO_DEVICE_GET_IRQ_INFO, info::irq, "full", "what interrupts there are"),
    ioctl!(VFIO_DEVICE_SET_IRQS, irqs::set, "full", "NONE, BOOL, EVENTFD for MASK, UNMASK, TRIGGER"),
    ioctl!(VFIO_DEVICE_RESET, irqs::reset, "full", "resets the function"),
    ioctl!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, hot_reset::info, "full", "which devices a reset of the bus concerns"),
    ioctl!(VFIO_DEVICE_PCI_HOT_RESET, hot_reset::reset, "full", "resets the bus, for who owns all devices there"),
    ioctl!(VFIO_DEVICE_QUERY_GFX_PLANE, refused, "refused: ENOTTY, no device here has a display", "mediated graphics"),
    ioctl!(VFIO_DEVICE_GET_GFX_DMABUF, refused, "refused: ENOTTY, no device here has a display", "mediated graphics"),
    ioctl!(VFIO_DEVICE_IOEVENTFD, irqs::ioeventfd, "full", "an eventfd that stands for a write of 1, 2, 4 or 8 bytes"),
    ioctl!(VFIO_DEVICE_FEATURE, feature::feature, "full", "the features below"),
    #[cfg(feature = "device-cdev")]
    ioctl!(VFIO_DEVICE_BIND_IOMMUFD, cdev::bind, "full", "binds a device's node to an iommufd; TOKEN", true),
    #[cfg(feature = "device-cdev")]
    ioctl!(VFIO_DEVICE_ATTACH_IOMMUFD_PT, cdev::attach, "full", "attaches it to an IOAS or a HWPT; PASID"),
    #[cfg(feature = "device-cdev")]
    ioctl!(VFIO_DEVICE_DETACH_IOMMUFD_PT, cdev::detach, "full", "detaches it; PASID"),
];

/// The tables of what is supported, for `docs/vfio.md`, as this is built.
#[must_use]
pub fn support_table() -> String {
    let mut table = "| ioctl | number | on | support | what it does |\n|---|---|---|---|---|\n".to_owned();
    #[cfg(feature = "container")]
    rows(&mut table, "container", CONTAINER);
    #[cfg(feature = "group")]
    rows(&mut table, "group", GROUP);
    rows(&mut table, "device", DEVICE);
    // A migration's own file has one call, which is not dispatched.
    let _ = writeln!(
        table,
        "| `VFIO_MIG_GET_PRECOPY_INFO` | +{} | migration | full | how much is still to be read |",
        (VFIO_MIG_GET_PRECOPY_INFO & 0xff) - VFIO_BASE
    );
    table.push_str("\n| feature | number | support |\n|---|---|---|\n");
    for feature in &feature::FEATURES {
        let _ = writeln!(table, "| `{}` | {} | {} |", feature.name, feature.index(), feature.support);
    }
    table
}

fn rows<F>(table: &mut String, on: &str, ioctls: &[Ioctl<F>]) {
    for Ioctl { command, name, support, purpose, .. } in ioctls {
        let number = (command & 0xff) - VFIO_BASE;
        // Writing to a string cannot fail.
        let _ = writeln!(table, "| `{name}` | +{number} | {on} | {support} | {purpose} |");
    }
}

#[cfg(all(test, feature = "container", feature = "device-cdev"))]
mod tests {
    use super::*;
    use crate::documentation;

    #[test]
    fn the_documentation_is_up_to_date() {
        let command = "cargo test -p vfio --features device-cdev doors::table";
        documentation::check("vfio.md", command, &support_table());
    }

    #[test]
    fn commands_are_there_once() {
        fn once<F>(ioctls: &[Ioctl<F>]) {
            let commands: std::collections::BTreeSet<_> = ioctls.iter().map(|ioctl| ioctl.command).collect();
            assert_eq!(commands.len(), ioctls.len());
        }
        once(CONTAINER);
        once(GROUP);
        once(DEVICE);
        for (at, feature) in feature::FEATURES.iter().enumerate() {
            assert_eq!(feature.index() as usize, at);
        }
    }
}
