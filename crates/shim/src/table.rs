//! Which descriptors of the program this library serves.
//!
//! Every `read`, `ioctl` and `close` of the program asks here first, from any thread and from signal handlers. So asking takes
//! no lock and allocates nothing: one relaxed load while nothing is served, and otherwise two more and a hazard slot of
//! `arc_swap`.
//!
//! Descriptors that were duplicated share one [`Description`], as in the kernel; the served file is released when the last
//! descriptor is closed and the last call on it has returned. Real descriptor numbers stand for all of them (the program's
//! own kernel gave them), so close-on-exec, limits and `poll` are the kernel's affair.
//!
//! Only the process whose descriptors these are changes the table: see [`crate::owner`].

use core::{
    ffi::c_int,
    sync::atomic::{AtomicUsize, Ordering},
};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use crate::{node::ServedFile, owner};

/// An open file, which several descriptors may share.
pub(crate) struct Description {
    /// What serves it.
    pub file: Arc<dyn ServedFile>,
}

type Slot = ArcSwapOption<Description>;

/// Descriptors in one chunk, and how many chunks there are: 2^20 descriptors, the most that Linux allows by default.
const CHUNK: usize = 1024;
const CHUNKS: usize = 1024;

static TABLE: [OnceLock<Box<[Slot]>>; CHUNKS] = [const { OnceLock::new() }; CHUNKS];

/// How many descriptors are served.
static SERVED: AtomicUsize = AtomicUsize::new(0);

fn slot(fd: c_int) -> Option<&'static Slot> {
    let fd = usize::try_from(fd).ok()?;
    TABLE.get(fd / CHUNK)?.get()?.get(fd % CHUNK)
}

/// Whether any descriptor is served.
pub(crate) fn serves_any() -> bool {
    SERVED.load(Ordering::Relaxed) != 0
}

/// What `fd` is, when it is served.
pub(crate) fn get(fd: c_int) -> Option<Guard<Option<Arc<Description>>>> {
    if !serves_any() {
        return None;
    }
    let description = slot(fd)?.load();
    description.is_some().then_some(description)
}

/// [`get`], to keep.
pub(crate) fn get_full(fd: c_int) -> Option<Arc<Description>> {
    get(fd)?.as_ref().map(Arc::clone)
}

/// From now on `fd`, which is the program's, is `description`. Gives it back when the number is too large for the table, or not one
/// of the process that the table is of.
pub(crate) fn insert(fd: c_int, description: Arc<Description>) -> Result<(), Arc<Description>> {
    let Some(chunk) = usize::try_from(fd).ok().and_then(|fd| TABLE.get(fd / CHUNK)) else {
        return Err(description);
    };
    chunk.get_or_init(|| (0..CHUNK).map(|_| Slot::empty()).collect());
    let Some(slot) = slot(fd).filter(|_| owner::is_caller()) else { return Err(description) };
    if slot.swap(Some(description)).is_none() {
        SERVED.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// `fd` is not served any more: what it was.
pub(crate) fn remove(fd: c_int) -> Option<Arc<Description>> {
    if !serves_any() {
        return None;
    }
    let slot = slot(fd)?;
    // Nearly all are not served, and asking costs a system call.
    if slot.load().is_none() || !owner::is_caller() {
        return None;
    }
    let description = slot.swap(None)?;
    SERVED.fetch_sub(1, Ordering::Relaxed);
    Some(description)
}

/// The served descriptors from `first` to `last`, in order.
pub(crate) fn range(first: c_int, last: c_int) -> impl Iterator<Item = (c_int, Arc<Description>)> {
    let first = usize::try_from(first).unwrap_or(0);
    let last = usize::try_from(last).unwrap_or(0);
    let chunks = if serves_any() { first / CHUNK..(last / CHUNK + 1).min(CHUNKS) } else { 0..0 };
    chunks
        .filter_map(|index| Some((index, TABLE[index].get()?)))
        .flat_map(|(index, chunk)| {
            chunk
                .iter()
                .enumerate()
                .filter_map(move |(at, slot)| Some((index * CHUNK + at, slot.load_full()?)))
        })
        .filter(move |(fd, _)| (first..=last).contains(fd))
        .filter_map(|(fd, description)| Some((c_int::try_from(fd).ok()?, description)))
}
