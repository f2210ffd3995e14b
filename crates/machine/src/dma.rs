//! Guest memory as a device reaches it: as it is, or through an IOMMU.
//!
//! # Theory of operation
//!
//! `vm-memory` knows memory as a collection of regions. A device without an IOMMU has those of guest RAM. Behind an
//! IOMMU an access begins with a translation, and what `vm-memory` gets for a region is a [`Window`]: a run of I/O virtual
//! addresses that lies in one piece in guest RAM.
//!
//! A [`View`] is what [`GuestAddressSpace::memory`] gives: one section of the software IOMMU (see [`iommufd::soft`]). The
//! windows that it has found stay good until it is dropped, so slices of them can be handed to system calls. The
//! guest's UNMAP waits for it.
//!
//! What looks after the port of a device is its [`Remapper`]: it attaches the port, where the guest need not say when that is to be
//! done, and hears of faults.
//!
//! What a window is used for is not known here. A piece of memory that may only be read is a window, too: who takes buffers
//! from a guest asks [`Reach`] what the device may do with them. `virtio::queue` does, in one place.

use std::cell::{Cell, OnceCell};
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use cpu::{GuestRam, PageStamps};
use iommufd::iova::Iova;
use iommufd::soft::{Access, Fault, FaultReason, Port, PortReader, PortSection, Translation};
use virtio::device::Reach;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// The longest window, in bytes, that is put together from smaller mappings.
const LONGEST: u64 = 4 << 20;
/// The most windows of one view, which are the pieces of one request, are 64 blocks of 64.
const BLOCK: usize = 64;
const BLOCKS: usize = 64;
/// How many windows a view looks at before it makes another: an access is often near the last one.
const RECENT: usize = 4;

/// What looks after the translations of one device. It is called by the device's threads, which may have sections open: it must
/// not wait for who waits for sections.
pub trait Remapper: Send + Sync + std::fmt::Debug {
    /// A section is about to begin: the device is to be attached to what the guest wants now.
    fn prepare(&self) {}

    /// The device made an access that was not translated.
    fn report(&self, fault: Fault);
}

/// A run of a device's addresses that lies in one piece in guest RAM.
#[derive(Clone, Debug)]
pub struct Window {
    ram: Arc<GuestRam>,
    start: GuestAddress,
    physical: GuestAddress,
    len: u64,
}

impl Window {
    fn contains(&self, at: GuestAddress) -> bool {
        at.checked_offset_from(self.start).is_some_and(|offset| offset < self.len)
    }
}

impl GuestMemoryRegion for Window {
    type B = PageStamps;

    fn len(&self) -> GuestUsize {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    /// Nothing marks by it: the slices have their own.
    fn bitmap(&self) -> BS<'_, PageStamps> {
        static NONE: LazyLock<PageStamps> = LazyLock::new(PageStamps::default);
        NONE.slice_at(0)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, PageStamps>>, GuestMemoryError> {
        let beyond = GuestMemoryError::InvalidBackendAddress;
        let end = offset.0.checked_add(count as u64).ok_or(beyond)?;
        if end > self.len {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let at = self.physical.checked_add(offset.0).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.ram.get_slice(at, count)
    }
}

impl GuestMemoryRegionBytes for Window {}

/// Guest memory as one device reaches it.
#[derive(Clone, Debug)]
pub struct DeviceMemory(Arc<Way>);

#[derive(Debug)]
enum Way {
    /// All of it, at its physical addresses.
    Whole(Vec<Window>),
    Translated(Translated),
}

impl DeviceMemory {
    /// All of `ram`.
    pub fn whole(ram: &Arc<GuestRam>) -> Self {
        let window = |region: &vm_memory::GuestRegionMmap<PageStamps>| Window {
            ram: Arc::clone(ram),
            start: region.start_addr(),
            physical: region.start_addr(),
            len: region.len(),
        };
        Self(Arc::new(Way::Whole(ram.iter().map(window).collect())))
    }

    /// What `port` is attached to, whose translations lead into `ram`, and which `remapper` looks after.
    pub fn translated(ram: &Arc<GuestRam>, port: Arc<Port>, remapper: Arc<dyn Remapper>) -> Self {
        let (ram, places, idle) = (Arc::clone(ram), places(ram), Mutex::default());
        Self(Arc::new(Way::Translated(Translated { ram, places, port, idle, remapper })))
    }
}

/// A region of guest RAM in this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Its address in this process.
    pub(crate) host: u64,
    /// Its guest-physical address.
    pub(crate) physical: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl Place {
    /// The address in this process of a guest-physical range, if all of it lies here.
    pub(crate) fn host(&self, physical: u64, length: u64) -> Option<u64> {
        Some(self.host + self.offset(self.physical, physical, length)?)
    }

    /// The guest-physical address of a range in this process, if all of it lies here.
    pub(crate) fn physical(&self, host: u64, length: u64) -> Option<u64> {
        Some(self.physical + self.offset(self.host, host, length)?)
    }

    fn offset(&self, base: u64, at: u64, length: u64) -> Option<u64> {
        let offset = at.checked_sub(base)?;
        (offset.checked_add(length)? <= self.len).then_some(offset)
    }
}

/// Where guest RAM is.
pub(crate) fn places(ram: &GuestRam) -> Vec<Place> {
    ram.iter()
        .map(|region| Place {
            host: region.as_ptr() as u64,
            physical: region.start_addr().0,
            len: region.len(),
        })
        .collect()
}

#[derive(Debug)]
struct Translated {
    ram: Arc<GuestRam>,
    places: Vec<Place>,
    port: Arc<Port>,
    /// Readers that no view uses now.
    idle: Mutex<Vec<PortReader>>,
    remapper: Arc<dyn Remapper>,
}

impl Translated {
    fn section(&self) -> PortSection<PortReader> {
        self.remapper.prepare();
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| self.port.reader()).into_section()
    }

    fn keep(&self, reader: PortReader) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(reader);
    }

    /// The guest-physical address of one of this process.
    fn physical(&self, host: u64) -> Option<u64> {
        self.places.iter().find_map(|place| place.physical(host, 1))
    }
}

/// Windows that only become more, so that what refers to one stays good.
struct Windows {
    blocks: [OnceCell<Box<[OnceCell<Window>; BLOCK]>>; BLOCKS],
    count: Cell<usize>,
}

impl Windows {
    fn new() -> Self {
        Self { blocks: [const { OnceCell::new() }; BLOCKS], count: Cell::new(0) }
    }

    fn get(&self, index: usize) -> Option<&Window> {
        self.blocks.get(index / BLOCK)?.get()?.get(index % BLOCK)?.get()
    }

    fn recent(&self) -> impl Iterator<Item = &Window> {
        let count = self.count.get();
        (count.saturating_sub(RECENT)..count).rev().filter_map(|index| self.get(index))
    }

    fn all(&self) -> impl Iterator<Item = &Window> {
        (0..self.count.get()).filter_map(|index| self.get(index))
    }

    /// Adds one; none when there are too many.
    fn add(&self, window: Window) -> Option<&Window> {
        let index = self.count.get();
        let block = self.blocks.get(index / BLOCK)?;
        let block = block.get_or_init(|| Box::new([const { OnceCell::new() }; BLOCK]));
        self.count.set(index + 1);
        Some(block.get(index % BLOCK)?.get_or_init(|| window))
    }
}

/// One section of the IOMMU, and what was found in it.
struct Open {
    /// None when it has ended.
    section: Option<PortSection<PortReader>>,
    windows: Windows,
}

/// What a device reaches, now.
pub struct View {
    way: Arc<Way>,
    /// None where nothing is translated.
    open: Option<Box<Open>>,
}

impl View {
    fn new(way: &Arc<Way>) -> Self {
        let open = match &**way {
            Way::Whole(_) => None,
            Way::Translated(translated) => {
                Some(Box::new(Open { section: Some(translated.section()), windows: Windows::new() }))
            }
        };
        Self { way: Arc::clone(way), open }
    }

    /// The translation, and what is needed to make something of it.
    fn translated(&self) -> Option<(&Translated, &Open, &PortSection<PortReader>)> {
        match (&*self.way, &self.open) {
            (Way::Translated(translated), Some(open)) => Some((translated, open, open.section.as_ref()?)),
            _ => None,
        }
    }

    /// Whether the device may access all of the range in this way. If not, it faults.
    ///
    /// # Errors
    /// Why it may not, and the first address of which that is so.
    pub fn check(&self, at: GuestAddress, len: usize, access: Access) -> Result<(), Fault> {
        let unmapped = |at: u64| Fault { iova: Iova(at), access, reason: FaultReason::Unmapped };
        let Some((translated, _, section)) = self.translated() else {
            return if self.check_range(at, len) { Ok(()) } else { Err(unmapped(at.0)) };
        };
        let (mut iova, mut rest) = (at.0, len as u64);
        while rest > 0 {
            let found = section.translate(Iova(iova), access);
            let found = found.inspect_err(|fault| translated.remapper.report(*fault))?;
            rest = rest.saturating_sub(found.length);
            match iova.checked_add(found.length) {
                Some(next) => iova = next,
                None if rest == 0 => break,
                None => return Err(unmapped(iova)),
            }
        }
        Ok(())
    }

    /// A window with `at` in it, that goes on for as long as guest RAM does in one piece if it must be `whole`.
    fn window(&self, at: GuestAddress, whole: bool) -> Option<&Window> {
        let (translated, open, section) = match self.translated() {
            Some(parts) => parts,
            None => match &*self.way {
                Way::Whole(windows) => return windows.iter().find(|window| window.contains(at)),
                Way::Translated(_) => return None,
            },
        };
        if !whole && let Some(window) = open.windows.recent().find(|window| window.contains(at)) {
            return Some(window);
        }
        let found = match reachable(section, at.0) {
            Ok(found) => found,
            Err(fault) => {
                translated.remapper.report(fault);
                return None;
            }
        };
        let physical = translated.physical(found.host.0)?;
        let mut len = found.length;
        while whole && len < LONGEST {
            let next = at.0.checked_add(len).and_then(|next| reachable(section, next).ok());
            match next {
                Some(next) if translated.physical(next.host.0) == physical.checked_add(len) => {
                    len += next.length;
                }
                _ => break,
            }
        }
        open.windows.add(Window {
            ram: Arc::clone(&translated.ram),
            start: at,
            physical: GuestAddress(physical),
            len,
        })
    }
}

/// The translation for whatever access is possible.
fn reachable(section: &PortSection<PortReader>, iova: u64) -> Result<Translation, Fault> {
    match section.translate(Iova(iova), Access::Read) {
        Err(fault) if fault.reason == FaultReason::Permission => section.translate(Iova(iova), Access::Write),
        result => result,
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let (Way::Translated(translated), Some(open)) = (&*self.way, &mut self.open)
            && let Some(reader) = open.section.take().and_then(PortSection::close)
        {
            translated.keep(reader);
        }
    }
}

impl GuestMemory for View {
    type R = Window;

    /// A library that looks for regions by itself takes a whole buffer from one.
    fn find_region(&self, at: GuestAddress) -> Option<&Window> {
        self.window(at, true)
    }

    fn iter(&self) -> impl Iterator<Item = &Window> {
        let (whole, found) = match (&*self.way, &self.open) {
            (Way::Whole(windows), _) => (Some(windows.iter()), None),
            (Way::Translated(_), open) => (None, open.as_ref().map(|open| open.windows.all())),
        };
        whole.into_iter().flatten().chain(found.into_iter().flatten())
    }

    fn to_region_addr(&self, at: GuestAddress) -> Option<(&Window, MemoryRegionAddress)> {
        let window = self.window(at, false)?;
        Some((window, MemoryRegionAddress(at.checked_offset_from(window.start)?)))
    }
}

impl Reach for View {
    fn may_read(&self, at: GuestAddress, len: usize) -> bool {
        self.check(at, len, Access::Read).is_ok()
    }

    fn may_write(&self, at: GuestAddress, len: usize) -> bool {
        self.check(at, len, Access::Write).is_ok()
    }
}

/// A [`View`] that can be copied: the copy is a section of its own.
pub struct OpenMemory(View);

impl Clone for OpenMemory {
    fn clone(&self) -> Self {
        Self(View::new(&self.0.way))
    }
}

impl Deref for OpenMemory {
    type Target = View;

    fn deref(&self) -> &View {
        &self.0
    }
}

impl GuestAddressSpace for DeviceMemory {
    type M = View;
    type T = OpenMemory;

    fn memory(&self) -> OpenMemory {
        OpenMemory(View::new(&self.0))
    }
}
