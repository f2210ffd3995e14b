//! Descriptors of the library's own, which lie among the program's.
//!
//! Programs close descriptors that they do not know: all but those that they need, before they become a daemon or in a child. The
//! kernel has nothing of its own there. So what the library cannot do without has numbers above those that programs use, and the
//! exported functions behave as if these were not open.

use core::{
    ffi::c_int,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::FileType;

use crate::process;

/// Where the numbers begin.
const FROM: c_int = 900;

/// One bit for each number: as many as Linux allows by default.
static NUMBERS: [AtomicU64; 1 << 14] = [const { AtomicU64::new(0) }; 1 << 14];

/// How many there are, so that most programs are done with one load.
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn bit(number: c_int) -> Option<(&'static AtomicU64, u64)> {
    let number = usize::try_from(number).ok()?;
    Some((NUMBERS.get(number / 64)?, 1 << (number % 64)))
}

fn mark(number: c_int) {
    if let Some((word, bit)) = bit(number)
        && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
    {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

fn unmark(number: c_int) {
    if let Some((word, bit)) = bit(number)
        && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    {
        COUNT.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether `number` is a descriptor of the library's.
pub(crate) fn is(number: c_int) -> bool {
    COUNT.load(Ordering::Relaxed) != 0
        && bit(number).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
}

/// Those from `first` to `last`, in order.
pub(crate) fn within(first: u32, last: u32) -> impl Iterator<Item = u32> {
    let words = if COUNT.load(Ordering::Relaxed) == 0 { &[][..] } else { &NUMBERS[..] };
    (0_u32..)
        .step_by(64)
        .zip(words)
        .map(|(number, word)| (number, word.load(Ordering::Relaxed)))
        .filter(|(_, word)| *word != 0)
        .flat_map(|(number, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| number + bit)
        })
        .filter(move |number| (first..=last).contains(number))
}

/// A high number for a descriptor, if there is one.
fn aside(descriptor: OwnedFd) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(&descriptor, FROM).unwrap_or(descriptor)
}

/// A descriptor that only the library closes.
pub(crate) struct Kept(OwnedFd);

impl Kept {
    /// Takes it out of the program's reach.
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        let descriptor = aside(descriptor);
        mark(descriptor.as_raw_fd());
        Self(descriptor)
    }
}

impl AsFd for Kept {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Kept {
    /// It is closed after this.
    fn drop(&mut self) {
        unmark(self.0.as_raw_fd());
    }
}

/// In a child after `fork`: closes the sockets that its parent had, but those that were made for the child.
pub(crate) fn close_sockets_but(of_child: &[BorrowedFd<'_>]) {
    for number in within(0, u32::MAX).filter_map(|number| c_int::try_from(number).ok()) {
        let is_socket = || {
            let file = rustix::fs::stat(format!("/proc/self/fd/{number}"));
            file.is_ok_and(|file| FileType::from_raw_mode(file.st_mode) == FileType::Socket)
        };
        if of_child.iter().all(|own| own.as_raw_fd() != number) && is_socket() {
            unmark(number);
            process::close(number);
        }
    }
}

/// Takes a descriptor out of the program's reach that lives as long as the process.
pub(crate) fn for_ever(descriptor: OwnedFd) -> OwnedFd {
    let descriptor = aside(descriptor);
    mark(descriptor.as_raw_fd());
    descriptor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_librarys_until_they_are_closed() {
        let file = rustix::fs::memfd_create(c"file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let low = file.as_raw_fd();
        let kept = Kept::new(file);
        let high = kept.as_fd().as_raw_fd();
        assert!(high >= FROM && is(high) && !is(low) && !is(-1));
        let number = u32::try_from(high).unwrap();
        let has = |first, last| within(first, last).any(|it| it == number);
        assert!(has(0, u32::MAX) && has(number, number));
        assert!(!has(0, number - 1) && !has(number + 1, u32::MAX));
        drop(kept);
        assert!(!is(high) && !has(0, u32::MAX));
    }
}
