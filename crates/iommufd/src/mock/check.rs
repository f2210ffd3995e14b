//! The operations that look into page tables.

use super::{CheckMap, CheckRefs, Dirty, Operation, domain::PAGE};
use crate::{
    Errno, Result,
    domain::HostAddr,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::UserAddr,
};

/// How much of a bitmap is read at a time.
const WINDOW: usize = 4096;

impl Operation<'_> {
    /// Whether a page table leads to the memory that the process has at `uptr`. EINVAL when it does not.
    pub(super) fn check_map(&self) -> Result<()> {
        let CheckMap { iova, length, uptr } = self.member()?;
        let domain = self.context.hwpt(self.args.id)?.domain.clone();
        if !(iova | length | uptr).is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        let end = uptr.checked_add(length).ok_or(Errno::INVAL)?;
        let process = self.caller.process();
        for (user, iova) in (uptr..end).step_by(PAGE as usize).zip((iova..=u64::MAX).step_by(PAGE as usize)) {
            let host = domain.lookup(Iova(iova)).ok_or(Errno::INVAL)?.0;
            let page = HostAddr(host & !(PAGE_SIZE - 1));
            let same = process.host_page_id(page)? == process.page_id(UserAddr(user & !(PAGE_SIZE - 1)))?;
            if !same || host % PAGE_SIZE != user % PAGE_SIZE {
                return Err(Errno::INVAL);
            }
        }
        Ok(())
    }

    /// Whether each page that the process has at `uptr` is pinned `refs` times. EIO when one is not.
    pub(super) fn check_refs(&self) -> Result<()> {
        let CheckRefs { length, uptr, refs, .. } = self.member()?;
        if !(length | uptr).is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let end = uptr.checked_add(length).ok_or(Errno::INVAL)?;
        for at in (uptr..end).step_by(PAGE_SIZE as usize) {
            if self.caller.process().pin_count(UserAddr(at))? != u64::from(refs) {
                return Err(Errno::IO);
            }
        }
        Ok(())
    }

    /// Writes to the pages whose bits are set, as a device would, and tells how many these are.
    pub(super) fn dirty(&mut self) -> Result<()> {
        let mut member: Dirty = self.member()?;
        let Dirty { iova, length, page_size, uptr, flags, .. } = member;
        if flags != 0 || page_size == 0 || length == 0 || !(iova | length).is_multiple_of(page_size) {
            return Err(Errno::INVAL);
        }
        IovaRange::with_length(Iova(iova), length)?;
        let domain = self.domain(self.args.id)?;
        if !domain.tracks_writes {
            return Err(Errno::OPNOTSUPP);
        }
        let pages = length / page_size;
        let bytes = pages.div_ceil(8);
        let mut window = [0; WINDOW];
        member.out_nr_dirty = 0;
        for before in (0..bytes).step_by(WINDOW) {
            let at = uptr.checked_add(before).ok_or(Errno::FAULT)?;
            let length = usize::try_from(bytes - before).unwrap_or(WINDOW).min(WINDOW);
            let bits = window.get_mut(..length).unwrap_or_default();
            self.caller.process().read(UserAddr(at), bits)?;
            for (first, bits) in (before * 8..).step_by(8).zip(bits).filter(|(_, bits)| **bits != 0) {
                for page in (first..pages.min(first + 8)).filter(|page| *bits & 1 << (page % 8) != 0) {
                    domain.dirty(Iova(iova + page * page_size));
                    member.out_nr_dirty += 1;
                }
            }
        }
        self.respond(&member)
    }
}
