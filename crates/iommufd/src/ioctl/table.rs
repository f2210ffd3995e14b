//! Which ioctls there are: one table for dispatching and for the documentation.

use core::{fmt::Write as _, mem::offset_of};

use uapi::{iommufd as uapi_iommufd, vfio as uapi_vfio};

use super::{Call, Words, device, fault, hwpt, ioas, option, view, viommu};
use crate::{Result, vfio_compat};

/// How an ioctl gets its argument.
pub(crate) enum Handler {
    /// A structure that begins with its size.
    Sized {
        /// How long it is as far as it is known here.
        size: usize,
        /// How long it must be.
        minimum: usize,
        run: fn(&Call<'_>, &mut Words) -> Result<()>,
    },
    /// As it comes: it is a number, or a structure of VFIO's.
    Plain(fn(&Call<'_>) -> Result<i32>),
}

/// An ioctl.
pub(crate) struct Ioctl {
    pub(crate) command: u32,
    pub(crate) name: &'static str,
    pub(crate) handler: Handler,
    /// "full", "partial: ..." or "refused: ...".
    pub(crate) support: &'static str,
    /// What it is for.
    pub(crate) purpose: &'static str,
}

/// How long a structure is up to the end of a field at `offset`.
const fn end_of<T, F>(offset: usize, _field: fn(&T) -> &F) -> usize {
    offset + size_of::<F>()
}

macro_rules! sized {
    ($number:ident, $name:literal, $type:ident, $last:ident, $handler:path, $support:literal, $purpose:literal) => {
        Ioctl {
            command: (uapi_iommufd::IOMMUFD_TYPE as u32) << 8 | uapi_iommufd::$number,
            name: $name,
            handler: Handler::Sized {
                size: size_of::<uapi_iommufd::$type>(),
                minimum: end_of(offset_of!(uapi_iommufd::$type, $last), |args: &uapi_iommufd::$type| {
                    &args.$last
                }),
                run: |call, words| $handler(call, view(words)?),
            },
            support: $support,
            purpose: $purpose,
        }
    };
}

macro_rules! plain {
    ($number:ident, $handler:path, $support:literal, $purpose:literal) => {
        Ioctl {
            command: uapi_vfio::$number,
            name: stringify!($number),
            handler: Handler::Plain($handler),
            support: $support,
            purpose: $purpose,
        }
    };
}

fn destroy(call: &Call<'_>, args: &mut uapi_iommufd::iommu_destroy) -> Result<()> {
    call.context.destroy(args.id)
}

/// The number of the first.
const FIRST: u32 = uapi_iommufd::IOMMUFD_CMD_BASE;

/// iommufd's, in the order of their numbers.
#[rustfmt::skip]
static IOCTLS: [Ioctl; 22] = [
    sized!(IOMMUFD_CMD_DESTROY, "IOMMU_DESTROY", iommu_destroy, id, destroy,
        "full", "destroys an object"),
    sized!(IOMMUFD_CMD_IOAS_ALLOC, "IOMMU_IOAS_ALLOC", iommu_ioas_alloc, out_ioas_id, ioas::alloc,
        "full", "makes an address space"),
    sized!(IOMMUFD_CMD_IOAS_ALLOW_IOVAS, "IOMMU_IOAS_ALLOW_IOVAS", iommu_ioas_allow_iovas, allowed_iovas, ioas::allow_iovas,
        "full", "confines automatic allocation to ranges; at most 2^20 of them"),
    sized!(IOMMUFD_CMD_IOAS_COPY, "IOMMU_IOAS_COPY", iommu_ioas_copy, src_iova, ioas::copy,
        "full", "maps what another address space has mapped; the pages are shared"),
    sized!(IOMMUFD_CMD_IOAS_IOVA_RANGES, "IOMMU_IOAS_IOVA_RANGES", iommu_ioas_iova_ranges, out_iova_alignment, ioas::iova_ranges,
        "full", "tells where mappings may be, and how aligned"),
    sized!(IOMMUFD_CMD_IOAS_MAP, "IOMMU_IOAS_MAP", iommu_ioas_map, iova, ioas::map_user,
        "full", "maps memory of the process, at a given or at a free address"),
    sized!(IOMMUFD_CMD_IOAS_UNMAP, "IOMMU_IOAS_UNMAP", iommu_ioas_unmap, length, ioas::unmap,
        "full", "unmaps whole areas"),
    sized!(IOMMUFD_CMD_OPTION, "IOMMU_OPTION", iommu_option, val64, option::option,
        "full", "RLIMIT_MODE: how pinned memory is counted; HUGE_PAGES: whether an address space uses large pages"),
    sized!(IOMMUFD_CMD_VFIO_IOAS, "IOMMU_VFIO_IOAS", iommu_vfio_ioas, __reserved, option::vfio_ioas,
        "full", "the address space that VFIO's ioctls mean"),
    sized!(IOMMUFD_CMD_HWPT_ALLOC, "IOMMU_HWPT_ALLOC", iommu_hwpt_alloc, __reserved, hwpt::alloc,
        "full", "makes a page table, the host's or a guest's; the types of data are the IOMMU's"),
    sized!(IOMMUFD_CMD_GET_HW_INFO, "IOMMU_GET_HW_INFO", iommu_hw_info, __reserved, device::get_hw_info,
        "partial: no IOMMU here tells the execute and privileged bits of PASIDs", "tells what the IOMMU of a device can do"),
    sized!(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, "IOMMU_HWPT_SET_DIRTY_TRACKING", iommu_hwpt_set_dirty_tracking, __reserved, hwpt::set_dirty_tracking,
        "full", "starts or stops noting writes of devices"),
    sized!(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, "IOMMU_HWPT_GET_DIRTY_BITMAP", iommu_hwpt_get_dirty_bitmap, data, hwpt::get_dirty_bitmap,
        "full", "tells which pages devices have written to"),
    sized!(IOMMUFD_CMD_HWPT_INVALIDATE, "IOMMU_HWPT_INVALIDATE", iommu_hwpt_invalidate, __reserved, hwpt::invalidate,
        "full", "passes a guest's invalidations on; the types of data are the IOMMU's"),
    sized!(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, "IOMMU_FAULT_QUEUE_ALLOC", iommu_fault_alloc, out_fault_fd, fault::alloc,
        "full", "makes a queue for page requests of devices"),
    sized!(IOMMUFD_CMD_IOAS_MAP_FILE, "IOMMU_IOAS_MAP_FILE", iommu_ioas_map_file, iova, ioas::map_file,
        "partial: of dma-bufs only those that this process exports", "maps memory of a memory file or a dma-buf"),
    sized!(IOMMUFD_CMD_VIOMMU_ALLOC, "IOMMU_VIOMMU_ALLOC", iommu_viommu_alloc, out_viommu_id, viommu::alloc,
        "full", "makes a virtual IOMMU; the types are the IOMMU's"),
    sized!(IOMMUFD_CMD_VDEVICE_ALLOC, "IOMMU_VDEVICE_ALLOC", iommu_vdevice_alloc, virt_id, viommu::alloc_device,
        "full", "tells a virtual IOMMU by what id the guest knows a device"),
    sized!(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, "IOMMU_IOAS_CHANGE_PROCESS", iommu_ioas_change_process, __reserved, ioas::change_process,
        "full", "counts pinned memory with the calling process from now on"),
    sized!(IOMMUFD_CMD_VEVENTQ_ALLOC, "IOMMU_VEVENTQ_ALLOC", iommu_veventq_alloc, out_veventq_fd, viommu::alloc_event_queue,
        "full", "makes a queue for events of a virtual IOMMU; the types are the IOMMU's"),
    sized!(IOMMUFD_CMD_HW_QUEUE_ALLOC, "IOMMU_HW_QUEUE_ALLOC", iommu_hw_queue_alloc, length, viommu::alloc_hw_queue,
        "full", "hands a queue in the guest's memory to the IOMMU; the types are the IOMMU's"),
    sized!(IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA, "IOMMU_IOAS_NOIOMMU_GET_PA", iommu_ioas_noiommu_get_pa, out_phys, ioas::no_iommu_get_pa,
        "full", "tells where memory is, for devices without an IOMMU; a physical address is one of the serving process here"),
];

/// Those of a VFIO container.
#[rustfmt::skip]
static VFIO_IOCTLS: [Ioctl; 6] = [
    plain!(VFIO_GET_API_VERSION, vfio_compat::get_api_version,
        "full", "the version of VFIO's interface: 0"),
    plain!(VFIO_CHECK_EXTENSION, vfio_compat::check_extension,
        "full", "1 for TYPE1, TYPE1v2, UNMAP_ALL, for DMA_CC where it is so, for NOIOMMU in such a context"),
    plain!(VFIO_SET_IOMMU, vfio_compat::set_iommu,
        "full", "version 1 or 2 of type 1, or none"),
    plain!(VFIO_IOMMU_GET_INFO, vfio_compat::get_info,
        "full", "page sizes; capabilities IOVA_RANGE and DMA_AVAIL"),
    plain!(VFIO_IOMMU_MAP_DMA, vfio_compat::map_dma,
        "partial: the flag VADDR is refused (EINVAL), as in the kernel's compatibility code", "maps memory of the process"),
    plain!(VFIO_IOMMU_UNMAP_DMA, vfio_compat::unmap_dma,
        "partial: the flags GET_DIRTY_BITMAP and VADDR are refused (EINVAL), as in the kernel's compatibility code", "unmaps; version 1 cuts areas"),
];

/// The ioctl of a command.
pub(super) fn find(command: u32) -> Option<&'static Ioctl> {
    let index = (command & 0xff).checked_sub(FIRST).and_then(|index| usize::try_from(index).ok());
    let ioctl = match index {
        Some(index) => IOCTLS.get(index),
        None => VFIO_IOCTLS.iter().find(|ioctl| ioctl.command == command),
    };
    ioctl.filter(|ioctl| ioctl.command == command)
}

/// Whether a command is in the range of numbers whose argument begins with a size.
pub(super) fn has_structure(command: u32) -> bool {
    (FIRST..=FIRST + 32).contains(&(command & 0xff))
}

/// The table of what is supported, for `docs/iommufd.md`.
pub fn support_table() -> String {
    let mut table =
        "| ioctl | number | structure, of it necessary | support | what it does |\n|---|---|---|---|---|\n"
            .to_owned();
    for Ioctl { command, name, handler, support, purpose } in IOCTLS.iter().chain(&VFIO_IOCTLS) {
        let structure = match handler {
            Handler::Sized { size, minimum, .. } => format!("{size}, {minimum} bytes"),
            Handler::Plain(_) => "-".to_owned(),
        };
        let number = command & 0xff;
        // Writing to a string cannot fail.
        let _ = writeln!(table, "| `{name}` | {number:#x} | {structure} | {support} | {purpose} |");
    }
    table.push_str(
        "| `VFIO_IOMMU_DIRTY_PAGES` | 0x75 | - | refused: ENOTTY, as in the kernel's compatibility code | \
         dirty tracking by the container |\n",
    );
    table
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_command_finds_its_row() {
        for ioctl in IOCTLS.iter().chain(&VFIO_IOCTLS) {
            assert_eq!(find(ioctl.command).map(|found| found.name), Some(ioctl.name));
            // Another direction or size in the command is another command.
            assert!(find(ioctl.command | 1 << 30).is_none() && find(ioctl.command | 8 << 16).is_none());
        }
        assert!(find(0x3b7f).is_none() && find(0x3b96).is_none());
    }

    #[test]
    fn structures_fit() {
        for ioctl in &IOCTLS {
            if let Handler::Sized { size, minimum, .. } = ioctl.handler {
                assert!(minimum >= 4 && minimum <= size && size <= size_of::<Words>(), "{}", ioctl.name);
            }
        }
    }

    #[test]
    fn the_documentation_is_up_to_date() {
        const MARKS: [&str; 2] =
            ["<!-- generated: RING3_REGENERATE=1 cargo test -p iommufd ioctl::table -->\n", "<!-- end -->"];
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/iommufd.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once(MARKS[0]).expect("docs/iommufd.md has a place for the table");
        let (_, after) = rest.split_once(MARKS[1]).expect("the place has an end");
        let now = [before, MARKS[0], &support_table(), MARKS[1], after].concat();
        if std::env::var_os("RING3_REGENERATE").is_some() {
            std::fs::write(&path, &now).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap() == now,
            "the support table in docs/iommufd.md is old: see above it"
        );
    }
}
