//! FAULT: the queue in which a device's page requests reach user space.
//!
//! # Theory of operation
//!
//! A device that misses a translation asks for pages in groups (PCIe 10.4.1). The IOMMU's driver reports each request
//! ([`super::DevicePort::report`]); when the last one of a group has come, the group goes into the queue of the page
//! table that the device is attached to. User space reads whole groups, gets a cookie for each with them, and writes the
//! cookie back with an answer, which the driver gets ([`crate::hardware::Hardware::page_response`]).
//!
//! A group is waiting (not read), or read (it has a cookie), or answered. When the device is attached to something else,
//! and when the queue is destroyed, all its groups are answered "invalid": no device waits for ever.

use core::{any::Any, mem};
use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uapi::iommufd::{
    IOMMU_PGFAULT_FLAGS_LAST_PAGE, IOMMU_PGFAULT_FLAGS_PASID_VALID, IOMMUFD_PAGE_RESP_INVALID,
    IOMMUFD_PAGE_RESP_SUCCESS, iommu_hwpt_page_response, iommu_hwpt_pgfault,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Pending, readiness::Readiness, table::Use};
use crate::{
    Context, Errno, Result,
    caller::{self, Deliver, File},
    hardware::Hardware,
    inject,
};

/// How many groups of page requests may wait in one queue; devices whose groups find no room get "invalid".
const QUEUE_LIMIT: usize = 1 << 16;

/// How many requests one group may have: what PCI's index of groups and an outstanding limit of 512 allow.
pub(super) const GROUP_LIMIT: usize = 512;

bitflags::bitflags! {
    /// What a device wants to do with a page (`IOMMU_PGFAULT_PERM_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct PageRequestFlags: u32 {
        /// Read.
        const READ = 1;
        /// Write.
        const WRITE = 2;
        /// Execute.
        const EXEC = 4;
        /// In privileged mode.
        const PRIV = 8;
    }
}

/// A device's request for a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRequest {
    /// The address space of the device that misses it; none for its plain DMA.
    pub pasid: Option<u32>,
    /// Which group it belongs to (PCIe: Page Request Group Index).
    pub group: u32,
    /// Whether it is the last one of the group.
    pub last: bool,
    /// What it wants to do.
    pub perm: PageRequestFlags,
    /// Where.
    pub addr: u64,
}

/// What becomes of a group of page requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResponseCode {
    /// The pages are there: try again.
    Success,
    /// They are not, and will not be.
    Invalid,
}

/// The answer to a group of page requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageResponse {
    /// As in the requests.
    pub pasid: Option<u32>,
    /// As in the requests.
    pub group: u32,
    /// What becomes of them.
    pub code: ResponseCode,
}

/// A group of requests that wants an answer.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) device: u32,
    pub(super) hardware: Arc<dyn Hardware>,
    /// The address space that is attached to the queue's page table: under whose name the group is.
    pub(super) pasid: Option<u32>,
    pub(super) requests: Vec<PageRequest>,
}

impl Group {
    pub(super) fn respond(self, code: ResponseCode) {
        if let Some(request) = self.requests.last() {
            let response = PageResponse { pasid: request.pasid, group: request.group, code };
            self.hardware.page_response(response);
        }
    }

    fn records(&self, cookie: u32) -> impl Iterator<Item = iommu_hwpt_pgfault> {
        self.requests.iter().map(move |request| iommu_hwpt_pgfault {
            flags: request.pasid.map_or(0, |_| IOMMU_PGFAULT_FLAGS_PASID_VALID)
                | if request.last { IOMMU_PGFAULT_FLAGS_LAST_PAGE } else { 0 },
            dev_id: self.device,
            pasid: request.pasid.unwrap_or(0),
            grpid: request.group,
            perm: request.perm.bits(),
            addr: request.addr,
            cookie,
            ..Default::default()
        })
    }
}

#[derive(Debug, Default)]
struct State {
    /// Groups that nobody has read.
    waiting: VecDeque<Group>,
    /// Groups that were read, by their cookies.
    read: BTreeMap<u32, Group>,
    /// The last cookie that was given.
    cookie: u32,
}

/// A fault queue.
#[derive(Debug)]
pub(crate) struct FaultQueue {
    /// Taken last: nothing else is locked, and no driver called, while it is held.
    state: Mutex<State>,
    readiness: Readiness,
}

impl FaultQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a group into the queue, or gives it back when there is no room.
    pub(super) fn push(&self, group: Group) -> core::result::Result<(), Group> {
        let mut state = self.lock();
        if state.waiting.len() + state.read.len() >= QUEUE_LIMIT {
            return Err(group);
        }
        state.waiting.push_back(group);
        if state.waiting.len() == 1 {
            self.readiness.set(true);
        }
        Ok(())
    }

    /// Answers "invalid" to everything that `pasid` of `device` has here.
    pub(super) fn dismiss(&self, device: u32, pasid: Option<u32>) {
        let of_it = |group: &Group| group.device == device && group.pasid == pasid;
        let mut state = self.lock();
        let waited = !state.waiting.is_empty();
        let (gone, kept): (Vec<_>, VecDeque<_>) = {
            let mut gone = Vec::new();
            let mut kept = VecDeque::new();
            for group in mem::take(&mut state.waiting) {
                if of_it(&group) { gone.push(group) } else { kept.push_back(group) }
            }
            (gone, kept)
        };
        state.waiting = kept;
        if waited && state.waiting.is_empty() {
            self.readiness.set(false);
        }
        let read: Vec<_> =
            state.read.extract_if(.., |_, group| of_it(group)).map(|(_, group)| group).collect();
        drop(state);
        gone.into_iter().chain(read).for_each(|group| group.respond(ResponseCode::Invalid));
    }
}

impl Drop for FaultQueue {
    fn drop(&mut self) {
        let state = mem::take(&mut *self.lock());
        let groups = state.waiting.into_iter().chain(state.read.into_values());
        groups.for_each(|group| group.respond(ResponseCode::Invalid));
    }
}

/// What the program has of a fault queue.
#[derive(Debug)]
pub(crate) struct FaultFile {
    queue: Use<FaultQueue>,
    /// The context lives for as long as any of its files is open. Dropped after the use.
    _context: Arc<Context>,
}

impl File for FaultFile {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.read_to(to.len(), &mut caller::fill(to))
    }

    /// Reads whole groups, as many as fit: 0 bytes when there is none, or the first does not fit. ESPIPE when `room` is not
    /// for whole records. Faults that come meanwhile wait until what was read is delivered.
    fn read_to(&self, room: usize, to: Deliver<'_>) -> Result<usize> {
        let size = size_of::<iommu_hwpt_pgfault>();
        if !room.is_multiple_of(size) {
            return Err(Errno::SPIPE);
        }
        let mut done = 0;
        let mut state = self.queue.lock();
        while let Some(group) = state.waiting.front() {
            let length = group.requests.len() * size;
            if room - done < length {
                break;
            }
            let cookie = (1..=u32::MAX)
                .map(|step| state.cookie.wrapping_add(step))
                .find(|cookie| *cookie != 0 && !state.read.contains_key(cookie))
                .ok_or(Errno::NOSPC)?;
            let records: Vec<u8> =
                group.records(cookie).flat_map(|record| record.as_bytes().to_vec()).collect();
            match to(done, &records) {
                Ok(()) => done += length,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
            state.cookie = cookie;
            if let Some(group) = state.waiting.pop_front() {
                state.read.insert(cookie, group);
            }
            if state.waiting.is_empty() {
                self.queue.readiness.set(false);
            }
        }
        Ok(done)
    }

    /// Takes answers. ESPIPE when `from` is not made of whole records, EINVAL for a code or a cookie that there is not,
    /// unless there were answers before it.
    fn write(&self, from: &[u8]) -> Result<usize> {
        let size = size_of::<iommu_hwpt_page_response>();
        if !from.len().is_multiple_of(size) {
            return Err(Errno::SPIPE);
        }
        let mut done = 0;
        for record in from.chunks_exact(size) {
            let answered = self.answer(record);
            match answered {
                Ok(()) => done += size,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.queue.readiness.fd()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl FaultFile {
    fn answer(&self, record: &[u8]) -> Result<()> {
        let response = iommu_hwpt_page_response::read_from_bytes(record).map_err(|_| Errno::INVAL)?;
        let code = match response.code {
            IOMMUFD_PAGE_RESP_SUCCESS => ResponseCode::Success,
            IOMMUFD_PAGE_RESP_INVALID => ResponseCode::Invalid,
            _ => return Err(Errno::INVAL),
        };
        let group = self.queue.lock().read.remove(&response.cookie).ok_or(Errno::INVAL)?;
        group.respond(code);
        Ok(())
    }
}

impl Context {
    pub(crate) fn prepare_fault_queue(&self) -> Result<Pending<FaultQueue>> {
        inject::check()?;
        let reservation = self.table().reserve()?;
        let queue = FaultQueue { state: Mutex::default(), readiness: Readiness::new()? };
        Ok(Pending::new(reservation, queue))
    }

    /// The file of a fault queue.
    pub(crate) fn fault_file(self: &Arc<Self>, queue: Use<FaultQueue>) -> Arc<dyn File> {
        Arc::new(FaultFile { queue, _context: self.clone() })
    }
}
