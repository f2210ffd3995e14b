//! The page by which a program tells the threads of its queues that there is something to do, and learns what they did.
//!
//! A program may have it mapped, so every word may have any value at any time. What the threads rely on they keep elsewhere.

use core::{
    mem::offset_of,
    sync::atomic::{AtomicU32, Ordering},
};
use std::{os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    thread::futex,
};

use super::abi::{self, QUEUES};
use crate::{Result, hostmem::FileMapping, iova::PAGE_SIZE};

/// All doorbells of a vIOMMU.
#[derive(Debug)]
pub(super) struct Doorbells {
    page: FileMapping,
}

impl Doorbells {
    pub(super) const LENGTH: u64 = PAGE_SIZE;

    /// For who is in this process.
    pub(super) fn private() -> Result<Arc<Self>> {
        Self::of(&memfd_create("doorbells", MemfdFlags::CLOEXEC)?)
    }

    /// With the file that a program can map, and not make shorter.
    pub(super) fn shared() -> Result<(Arc<Self>, OwnedFd)> {
        let file = memfd_create("doorbells", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let doorbells = Self::of(&file)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok((doorbells, file))
    }

    fn of(file: &OwnedFd) -> Result<Arc<Self>> {
        ftruncate(file, Self::LENGTH)?;
        Ok(Arc::new(Self { page: FileMapping::new(file, PAGE_SIZE as usize, true)? }))
    }

    /// That of queue `index`, with all its words 0. None when there is no such queue.
    pub(super) fn bell(self: &Arc<Self>, index: u32) -> Option<Bell> {
        if index >= QUEUES {
            return None;
        }
        let bell = Bell { page: Arc::clone(self), at: index as usize * size_of::<abi::Doorbell>() };
        bell.words().for_each(|word| word.store(0, Ordering::Relaxed));
        Some(bell)
    }
}

/// The doorbell of a queue.
#[derive(Debug)]
pub(super) struct Bell {
    page: Arc<Doorbells>,
    /// Its first byte in the page.
    at: usize,
}

impl Bell {
    fn words(&self) -> impl Iterator<Item = &AtomicU32> {
        let offsets = (0..size_of::<abi::Doorbell>()).step_by(size_of::<u32>());
        offsets.map(|offset| self.word(offset))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.page.page.word(self.at + offset)
    }

    /// Where the program says that the queue ends.
    pub(super) fn tail(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, tail))
    }

    pub(super) fn head(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, head))
    }

    pub(super) fn error(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, error))
    }

    fn wake(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, wake))
    }

    fn idle(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, idle))
    }

    fn completed(&self) -> &AtomicU32 {
        self.word(offset_of!(abi::Doorbell, completed))
    }

    /// How often it rang: what [`Self::wait`] is given.
    pub(super) fn rings(&self) -> u32 {
        self.wake().load(Ordering::SeqCst)
    }

    /// Rings.
    pub(super) fn ring(&self) {
        self.wake().fetch_add(1, Ordering::SeqCst);
        if self.idle().load(Ordering::SeqCst) != 0 {
            self.rouse();
        }
    }

    /// Rings, and does not believe that nobody sleeps.
    pub(super) fn rouse(&self) {
        self.wake().fetch_add(1, Ordering::SeqCst);
        // It can only fail for an address that is none.
        let _ = futex::wake(self.wake(), futex::Flags::empty(), u32::MAX);
    }

    /// Sleeps until it has rung since [`Self::rings`] was `seen`; or less long.
    pub(super) fn wait(&self, seen: u32) {
        self.idle().store(1, Ordering::SeqCst);
        // EAGAIN, it rang, and EINTR are as good as being woken.
        let _ = futex::wait(self.wake(), futex::Flags::empty(), seen, None);
        self.idle().store(0, Ordering::SeqCst);
    }

    /// A wait descriptor that asks for an interrupt is done.
    pub(super) fn complete(&self) {
        self.completed().fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(self.completed(), futex::Flags::empty(), u32::MAX);
    }
}
