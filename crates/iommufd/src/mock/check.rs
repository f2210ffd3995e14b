//! The operations that look into page tables.

use super::{CheckMap, CheckRefs, Dirty, Operation, domain::PAGE};
use crate::{
    Errno, Result,
    domain::HostAddr,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::UserAddr,
};

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
        let mut bits = [0];
        member.out_nr_dirty = 0;
        for page in 0..pages {
            if page % 8 == 0 {
                let at = uptr.checked_add(page / 8).ok_or(Errno::FAULT)?;
                self.caller.process().read(UserAddr(at), &mut bits)?;
            }
            if bits[0] & 1 << (page % 8) != 0 {
                domain.dirty(Iova(iova + page * page_size));
                member.out_nr_dirty += 1;
            }
        }
        self.respond(&member)
    }
}
