//! The calls of the host's kernel: the only `unsafe` code of those who talk to it.
//!
//! Every structure of iommufd and VFIO begins with its own length, which tells the kernel how much of it may be read and
//! written. So a call with a structure that holds no address is safe when that length is right, and [`sized`] sets it
//! itself. Which calls these are is a closed list, [`Plain`]. Those whose structure holds an address have functions of their
//! own, which make the address of a slice.
//!
//! They go through libc, not past it: so a program that uses this crate can be given the devices of `ring3 shim`, too.
//! `vfio-ioctls`, which is well kept, has neither the features of a device nor a container that others share, takes device
//! nodes only together with KVM, and would give each structure a second type beside [`uapi`]'s.

#![allow(unsafe_code, reason = "system calls, see above")]

use std::{
    ffi::{c_int, c_uint, c_void},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use uapi::{iommufd as iommu, vfio};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Errno, Result,
    domain::{HostAddr, Prot},
    iova::Iova,
};

/// One call of `ioctl`.
///
/// # Safety
/// `argument` is what the request takes: a number, or the address of a structure whose addresses, if it holds any, are of
/// memory that the kernel may use as the request says.
unsafe fn ioctl(fd: BorrowedFd<'_>, request: c_uint, argument: *mut c_void) -> Result<c_int> {
    // SAFETY: the descriptor is open for as long as the call takes, the rest is the caller's word. A descriptor of
    // something that is neither an iommufd nor VFIO's does not know the request, and gives ENOTTY.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), argument) };
    if done < 0 { Err(last_error()) } else { Ok(done) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Calls whose structure begins with its length and holds no address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
#[allow(missing_docs, reason = "the header names and explains them")]
pub enum Plain {
    Destroy = iommu::IOMMU_DESTROY,
    IoasAlloc = iommu::IOMMU_IOAS_ALLOC,
    IoasUnmap = iommu::IOMMU_IOAS_UNMAP,
    SetDirtyTracking = iommu::IOMMU_HWPT_SET_DIRTY_TRACKING,
    GroupStatus = vfio::VFIO_GROUP_GET_STATUS,
    DeviceInfo = vfio::VFIO_DEVICE_GET_INFO,
    RegionInfo = vfio::VFIO_DEVICE_GET_REGION_INFO,
    IrqInfo = vfio::VFIO_DEVICE_GET_IRQ_INFO,
    SetIrqs = vfio::VFIO_DEVICE_SET_IRQS,
    IoEventFd = vfio::VFIO_DEVICE_IOEVENTFD,
    Attach = vfio::VFIO_DEVICE_ATTACH_IOMMUFD_PT,
    Detach = vfio::VFIO_DEVICE_DETACH_IOMMUFD_PT,
    PrecopyInfo = vfio::VFIO_MIG_GET_PRECOPY_INFO,
    /// On a container.
    ContainerInfo = vfio::VFIO_IOMMU_GET_INFO,
}

/// Makes a call with `structure`, whose first four bytes it sets to its length.
///
/// # Errors
/// The kernel's; EINVAL for a structure that is too short to hold its length, or too long.
pub fn sized(fd: BorrowedFd<'_>, call: Plain, structure: &mut [u8]) -> Result<c_int> {
    // SAFETY: none of these holds an address.
    unsafe { with_length(fd, call as c_uint, structure) }
}

/// As [`sized`], with a structure of a fixed length.
///
/// # Errors
/// As [`sized`].
pub fn fixed<T: IntoBytes + FromBytes>(fd: BorrowedFd<'_>, call: Plain, structure: &mut T) -> Result<c_int> {
    sized(fd, call, structure.as_mut_bytes())
}

/// # Safety
/// As for [`ioctl`], for the addresses in `structure`. Its length is set here.
unsafe fn with_length(fd: BorrowedFd<'_>, request: c_uint, structure: &mut [u8]) -> Result<c_int> {
    let length = u32::try_from(structure.len()).map_err(|_| Errno::INVAL)?;
    structure.get_mut(..4).ok_or(Errno::INVAL)?.copy_from_slice(&length.to_ne_bytes());
    // SAFETY: the kernel reads and writes no more of the structure than the length in it, which is right; it copies, so
    // alignment does not matter. The rest is the caller's word.
    unsafe { ioctl(fd, request, structure.as_mut_ptr().cast()) }
}

/// Calls without a structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
#[allow(missing_docs, reason = "the header names and explains them")]
pub enum Bare {
    ApiVersion = vfio::VFIO_GET_API_VERSION,
    /// The argument is the extension.
    CheckExtension = vfio::VFIO_CHECK_EXTENSION,
    /// The argument is the type.
    SetIommu = vfio::VFIO_SET_IOMMU,
    UnsetContainer = vfio::VFIO_GROUP_UNSET_CONTAINER,
    Reset = vfio::VFIO_DEVICE_RESET,
}

/// Makes a call whose argument is a number, or nothing.
///
/// # Errors
/// The kernel's.
pub fn bare(fd: BorrowedFd<'_>, call: Bare, argument: u32) -> Result<c_int> {
    // SAFETY: these take no address.
    unsafe { ioctl(fd, call as c_uint, argument as usize as *mut c_void) }
}

/// Gives a group its container: `VFIO_GROUP_SET_CONTAINER`.
///
/// # Errors
/// The kernel's.
pub fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<()> {
    let mut fd = container.as_raw_fd();
    // SAFETY: the argument is the address of a descriptor, which is read.
    unsafe { ioctl(group, vfio::VFIO_GROUP_SET_CONTAINER, (&raw mut fd).cast()) }.map(drop)
}

/// Opens a device of a group by its name: `VFIO_GROUP_GET_DEVICE_FD`.
///
/// # Errors
/// The kernel's.
pub fn device_of_group(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd> {
    let name = name.as_ptr().cast_mut().cast();
    // SAFETY: the argument is the address of a string with its end, which is read.
    let fd = unsafe { ioctl(group, vfio::VFIO_GROUP_GET_DEVICE_FD, name) }?;
    // SAFETY: the kernel has just made the descriptor, for this caller alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds a device's node to an iommufd: its number there. `VFIO_DEVICE_BIND_IOMMUFD`.
///
/// # Errors
/// The kernel's.
pub fn bind(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> Result<u32> {
    /// The structure as it was before tokens came; a kernel that knows them takes it.
    #[derive(IntoBytes, FromBytes, Immutable)]
    #[repr(C)]
    struct Bind {
        argsz: u32,
        flags: u32,
        iommufd: i32,
        out_devid: u32,
    }
    let mut bind = Bind { argsz: 0, flags: 0, iommufd: iommufd.as_raw_fd(), out_devid: 0 };
    // SAFETY: without the flag for it there is no address of a token.
    unsafe { with_length(device, vfio::VFIO_DEVICE_BIND_IOMMUFD, bind.as_mut_bytes()) }?;
    Ok(bind.out_devid)
}

/// Memory of this process, as devices will reach it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// Where the devices find it.
    pub iova: u64,
    /// Where it is here.
    pub address: u64,
    /// How many bytes.
    pub length: u64,
    /// Devices may read it.
    pub readable: bool,
    /// Devices may write it.
    pub writable: bool,
}

impl Window {
    /// `length` bytes at `host`, which devices find at `iova`.
    #[must_use]
    pub fn new(iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Self {
        let (readable, writable) = (prot.contains(Prot::READ), prot.contains(Prot::WRITE));
        Self { iova: iova.0, address: host.0, length, readable, writable }
    }
}

/// Enters memory in an IOAS: `IOMMU_IOAS_MAP` at a fixed address.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// Until it is unmapped, devices may do with the memory what `window` allows: it is memory that nobody in this process
/// has a reference to, and it stays what it is.
pub unsafe fn ioas_map(iommufd: BorrowedFd<'_>, ioas: u32, window: Window) -> Result<()> {
    let mut flags = iommu::IOMMU_IOAS_MAP_FIXED_IOVA;
    if window.readable {
        flags |= iommu::IOMMU_IOAS_MAP_READABLE;
    }
    if window.writable {
        flags |= iommu::IOMMU_IOAS_MAP_WRITEABLE;
    }
    let mut map = iommu::iommu_ioas_map {
        flags,
        ioas_id: ioas,
        user_va: window.address,
        length: window.length,
        iova: window.iova,
        ..Default::default()
    };
    // SAFETY: the address in it is the caller's word.
    unsafe { with_length(iommufd, iommu::IOMMU_IOAS_MAP, map.as_mut_bytes()) }.map(drop)
}

/// Enters memory in a container: `VFIO_IOMMU_MAP_DMA`.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// As for [`ioas_map`].
pub unsafe fn container_map(container: BorrowedFd<'_>, window: Window) -> Result<()> {
    let mut flags = 0;
    if window.readable {
        flags |= vfio::VFIO_DMA_MAP_FLAG_READ;
    }
    if window.writable {
        flags |= vfio::VFIO_DMA_MAP_FLAG_WRITE;
    }
    let mut map = vfio::vfio_iommu_type1_dma_map {
        flags,
        vaddr: window.address,
        iova: window.iova,
        size: window.length,
        ..Default::default()
    };
    // SAFETY: the address in it is the caller's word.
    unsafe { with_length(container, vfio::VFIO_IOMMU_MAP_DMA, map.as_mut_bytes()) }.map(drop)
}

/// Takes memory out of a container: how many bytes. `VFIO_IOMMU_UNMAP_DMA`.
///
/// # Errors
/// The kernel's.
pub fn container_unmap(container: BorrowedFd<'_>, iova: u64, length: u64) -> Result<u64> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap { iova, size: length, ..Default::default() };
    // SAFETY: without flags there is no bitmap, and so no address.
    unsafe { with_length(container, vfio::VFIO_IOMMU_UNMAP_DMA, unmap.as_mut_bytes()) }?;
    Ok(unmap.size)
}

/// The addresses that an IOAS can translate, as many as there is room for: how many there are. `IOMMU_IOAS_IOVA_RANGES`.
///
/// # Errors
/// The kernel's; EMSGSIZE when there are more than `ranges` has room for is no error here.
pub fn iova_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    ranges: &mut [iommu::iommu_iova_range],
) -> Result<usize> {
    let mut ask = iommu::iommu_ioas_iova_ranges {
        ioas_id: ioas,
        num_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
        allowed_iovas: ranges.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the address in it is of so many ranges, which are written.
    match unsafe { with_length(iommufd, iommu::IOMMU_IOAS_IOVA_RANGES, ask.as_mut_bytes()) } {
        Ok(_) | Err(Errno::MSGSIZE) => usize::try_from(ask.num_iovas).map_err(|_| Errno::OVERFLOW),
        Err(errno) => Err(errno),
    }
}

/// What the IOMMU behind a device says of itself: the structure with the results, and how much of `data` was written.
/// `IOMMU_GET_HW_INFO`.
///
/// # Errors
/// The kernel's.
pub fn hw_info(
    iommufd: BorrowedFd<'_>,
    device: u32,
    kind: u32,
    data: &mut [u8],
) -> Result<iommu::iommu_hw_info> {
    let mut ask = iommu::iommu_hw_info {
        flags: if kind == 0 { 0 } else { iommu::IOMMU_HW_INFO_FLAG_INPUT_TYPE },
        dev_id: device,
        data_len: u32::try_from(data.len()).unwrap_or(u32::MAX),
        data_uptr: data.as_mut_ptr() as u64,
        in_data_type: kind,
        ..Default::default()
    };
    // SAFETY: the address in it is of so many bytes, which are written.
    unsafe { with_length(iommufd, iommu::IOMMU_GET_HW_INFO, ask.as_mut_bytes()) }?;
    Ok(ask)
}

/// Makes a page table: its number. `IOMMU_HWPT_ALLOC` with the driver's own `data`.
///
/// # Errors
/// The kernel's.
pub fn hwpt_alloc(
    iommufd: BorrowedFd<'_>,
    device: u32,
    parent: u32,
    flags: u32,
    kind: u32,
    data: &[u8],
) -> Result<u32> {
    let mut alloc = iommu::iommu_hwpt_alloc {
        flags,
        dev_id: device,
        pt_id: parent,
        data_type: kind,
        data_len: u32::try_from(data.len()).map_err(|_| Errno::INVAL)?,
        data_uptr: if data.is_empty() { 0 } else { data.as_ptr() as u64 },
        ..Default::default()
    };
    // SAFETY: the address in it is of so many bytes, which are read. What a driver finds in them are addresses of the
    // device's, not of this process.
    unsafe { with_length(iommufd, iommu::IOMMU_HWPT_ALLOC, alloc.as_mut_bytes()) }?;
    Ok(alloc.out_hwpt_id)
}

/// Which pages of a page table were written to, a bit for each of `page` bytes from `iova` on. `IOMMU_HWPT_GET_DIRTY_BITMAP`.
///
/// # Errors
/// The kernel's; EINVAL when the bitmap is too short for `length`.
pub fn dirty_bitmap(
    iommufd: BorrowedFd<'_>,
    hwpt: u32,
    (iova, length, page): (u64, u64, u64),
    keep: bool,
    bitmap: &mut [u64],
) -> Result<()> {
    check_bitmap(length, page, bitmap)?;
    let mut ask = iommu::iommu_hwpt_get_dirty_bitmap {
        hwpt_id: hwpt,
        flags: if keep { iommu::IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR } else { 0 },
        iova,
        length,
        page_size: page,
        data: bitmap.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the address in it is of a bit for each page, which are written.
    unsafe { with_length(iommufd, iommu::IOMMU_HWPT_GET_DIRTY_BITMAP, ask.as_mut_bytes()) }.map(drop)
}

fn check_bitmap(length: u64, page: u64, bitmap: &[u64]) -> Result<()> {
    let pages = length.div_ceil(if page == 0 { return Err(Errno::INVAL) } else { page });
    if pages.div_ceil(64) > bitmap.len() as u64 { Err(Errno::INVAL) } else { Ok(()) }
}

/// Uses a feature of a device: `VFIO_DEVICE_FEATURE` with `flags` (the feature and what is to be done with it) and its
/// structure, which is written when the feature is read.
///
/// # Errors
/// The kernel's; EINVAL for the two features whose structure holds an address ([`logging_start`], [`logging_report`]).
pub fn feature(device: BorrowedFd<'_>, flags: u32, structure: &mut [u8]) -> Result<()> {
    let number = flags & vfio::VFIO_DEVICE_FEATURE_MASK;
    let probe = flags & vfio::VFIO_DEVICE_FEATURE_PROBE != 0;
    if !probe && HOLDS_ADDRESS.contains(&number) {
        return Err(Errno::INVAL);
    }
    // SAFETY: no other feature's structure holds an address, and probing reads none.
    unsafe { any_feature(device, flags, structure) }
}

const HOLDS_ADDRESS: [u32; 2] =
    [vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_START, vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT];

/// # Safety
/// As for [`ioctl`], for the addresses in `structure`.
unsafe fn any_feature(device: BorrowedFd<'_>, flags: u32, structure: &mut [u8]) -> Result<()> {
    let head = size_of::<vfio::vfio_device_feature>();
    let mut whole = vec![0; head + structure.len()];
    let (header, body) = whole.split_at_mut(head);
    header.get_mut(4..8).ok_or(Errno::INVAL)?.copy_from_slice(&flags.to_ne_bytes());
    body.copy_from_slice(structure);
    // SAFETY: the caller's word.
    unsafe { with_length(device, vfio::VFIO_DEVICE_FEATURE, &mut whole) }?;
    structure.copy_from_slice(whole.get(head..).unwrap_or_default());
    Ok(())
}

/// Lets a device note its writes to `ranges`: the page size that it notes in. `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`.
///
/// # Errors
/// The kernel's.
pub fn logging_start(
    device: BorrowedFd<'_>,
    page_size: u64,
    ranges: &[vfio::vfio_device_feature_dma_logging_range],
) -> Result<u64> {
    let mut control = vfio::vfio_device_feature_dma_logging_control {
        page_size,
        num_ranges: u32::try_from(ranges.len()).map_err(|_| Errno::INVAL)?,
        ranges: ranges.as_ptr() as u64,
        ..Default::default()
    };
    let flags = vfio::VFIO_DEVICE_FEATURE_SET | vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    // SAFETY: the address in it is of so many ranges, which are read.
    unsafe { any_feature(device, flags, control.as_mut_bytes()) }?;
    Ok(control.page_size)
}

/// Which pages a device wrote to, a bit for each of `page` bytes from `iova` on.
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
///
/// # Errors
/// The kernel's; EINVAL when the bitmap is too short for `length`.
pub fn logging_report(
    device: BorrowedFd<'_>,
    (iova, length, page_size): (u64, u64, u64),
    bitmap: &mut [u64],
) -> Result<()> {
    check_bitmap(length, page_size, bitmap)?;
    let bitmap = bitmap.as_mut_ptr() as u64;
    let mut report = vfio::vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap };
    let flags = vfio::VFIO_DEVICE_FEATURE_GET | vfio::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    // SAFETY: the address in it is of a bit for each page, which are written.
    unsafe { any_feature(device, flags, report.as_mut_bytes()) }
}

/// Takes a device to another state of its migration: the descriptor of its state's stream, if there is a new one.
/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
///
/// # Errors
/// The kernel's.
pub fn set_migration_state(device: BorrowedFd<'_>, state: u32) -> Result<Option<OwnedFd>> {
    let mut state = vfio::vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
    let flags = vfio::VFIO_DEVICE_FEATURE_SET | vfio::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    feature(device, flags, state.as_mut_bytes())?;
    // SAFETY: the kernel has just made the descriptor, for this caller alone.
    Ok((state.data_fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(state.data_fd) }))
}
