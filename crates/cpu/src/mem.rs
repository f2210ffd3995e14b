//! How instructions reach memory: the TLB's fast path, and everything that is not fast.
//!
//! # Theory of operation
//! [`Vcpu::read`], [`Vcpu::write`] and [`Vcpu::modify`] take a linear address. If the TLB has the page with
//! the right at hand, they touch guest RAM at once. Otherwise the slow path checks, in the architecture's
//! order: canonical form, alignment, page by page the translation (which fills the TLB), and then finds
//! RAM or sends an MMIO exit. An access that crosses a page is checked on both pages before a byte moves.
//!
//! Accesses of the processor itself (descriptor tables, TSS, event frames at a privilege other than the
//! current one) use the `_as` variants with an explicit [`Privilege`].

use mmu::{Access, AccessKind, Gpa, Gva, Privilege};

use crate::data::Data;
use crate::exit::Exit;
use crate::fault::{Exec, Fault, fault, vector};
use crate::flags;
use crate::hostmem;
use crate::insn::{Insn, insn_flags};
use crate::stack::as_stack_fault;
use crate::state::{CodeMode, CpuState, REG_ZERO, cr0, cr4, seg};
use crate::tlb::{Fill, PageKey, Table};
use crate::vcpu::Vcpu;

/// What a linear address turned out to be.
#[derive(Clone, Copy)]
enum Place {
    /// Guest RAM at this host address; `watched` if the page holds decoded code.
    Ram { host: usize, gpa: Gpa, watched: bool },
    /// Something else.
    Mmio { gpa: Gpa },
}

/// Where the bytes of an access are: in one or two pages, each with the part of the buffer that it holds.
type Places = [Option<(Place, std::ops::Range<usize>)>; 2];

impl Vcpu {
    // ---- effective addresses ----

    /// The linear address of the memory operand of `i`, for an access of `size` bytes.
    ///
    /// # Errors
    /// #GP or #SS where legacy segmentation forbids the access.
    #[inline(always)]
    pub fn linear(&self, i: &Insn, size: u64, write: bool) -> Exec<u64> {
        if i.flags & insn_flags::SEGMENTED == 0 {
            Ok(self.offset(i).wrapping_add(self.state.seg_base[usize::from(i.seg & 7)]))
        } else {
            self.linear_segmented(i, size, write)
        }
    }

    /// The offset part of the memory operand, as LEA computes it before truncation to the operand size.
    #[inline(always)]
    pub fn offset(&self, i: &Insn) -> u64 {
        let regs = &self.state.regs;
        regs[usize::from(i.base & 31)]
            .wrapping_add(regs[usize::from(i.index & 31)] << i.shift)
            .wrapping_add(i.disp)
    }

    /// [`Self::offset`] truncated to the instruction's address size.
    #[inline]
    pub fn effective_address(&self, i: &Insn) -> u64 {
        match i.address_size {
            8 => self.offset(i),
            4 => self.offset(i) & 0xffff_ffff,
            _ => {
                // 16-bit registers: the upper halves do not take part.
                let regs = &self.state.regs;
                let part = |r: u8| if r == REG_ZERO { 0 } else { regs[usize::from(r & 31)] };
                part(i.base).wrapping_add(part(i.index)).wrapping_add(i.disp) & 0xffff
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn linear_segmented(&self, i: &Insn, size: u64, write: bool) -> Exec<u64> {
        self.segmented(i.seg, self.effective_address(i), size, write)
    }

    /// The linear address of `offset` in segment `segment` ([`seg`]), checked as data access of `size`
    /// bytes: in 64-bit mode only the base counts, elsewhere type and limit too.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for the stack segment.
    pub fn segmented(&self, segment: u8, offset: u64, size: u64, write: bool) -> Exec<u64> {
        let base = self.state.seg_base[usize::from(segment & 7)];
        if self.state.code_mode == CodeMode::Bits64 {
            return Ok(base.wrapping_add(offset));
        }
        let Some(s) = self.state.segments.get(usize::from(segment)) else {
            return Ok(base.wrapping_add(offset) & 0xffff_ffff);
        };
        let bad = || fault(if segment == seg::SS { Fault::with_code(vector::SS, 0) } else { Fault::gp(0) });
        if self.state.protected() && !self.state.virtual_8086() {
            if !s.has(crate::state::Segment::PRESENT) {
                return bad();
            }
            let code = s.has(crate::state::Segment::CODE);
            let writable = s.has(crate::state::Segment::WRITABLE);
            let allowed = if write { writable && !code } else { writable || !code };
            if !allowed {
                return bad();
            }
        }
        let last = offset.wrapping_add(size.saturating_sub(1));
        let inside = if s.has(crate::state::Segment::EXPAND_DOWN) && !s.has(crate::state::Segment::CODE) {
            let top = if s.has(crate::state::Segment::DEFAULT_BIG) { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            last <= u64::from(s.limit)
        };
        if !inside {
            return bad();
        }
        Ok(base.wrapping_add(offset) & 0xffff_ffff)
    }

    // ---- operands ----

    /// Reads the memory operand of `i`.
    ///
    /// # Errors
    /// Any fault of a data read.
    #[inline(always)]
    pub fn load<T: Data>(&mut self, i: &Insn) -> Exec<T> {
        let gva = self.linear(i, T::SIZE, false)?;
        match self.tlb.read(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            // SAFETY: needed for speed; a TLB hit means that the bytes lie in a page of guest RAM that may
            // be read.
            Some(host) => Ok(unsafe { hostmem::load(host) }),
            None => self.read_slow(gva, self.privilege()).map_err(|e| stack_fault(i, e)),
        }
    }

    /// Writes the memory operand of `i`.
    ///
    /// # Errors
    /// Any fault of a data write.
    #[inline(always)]
    pub fn store<T: Data>(&mut self, i: &Insn, value: T) -> Exec {
        let gva = self.linear(i, T::SIZE, true)?;
        match self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            Some(host) => {
                // SAFETY: needed for speed; a TLB hit means that the bytes lie in a page of guest RAM that
                // may be written and holds no decoded code.
                unsafe { hostmem::store(host, value) };
                Ok(())
            }
            None => self.write_slow(gva, value, self.privilege()).map_err(|e| stack_fault(i, e)),
        }
    }

    /// Replaces the memory operand of `i` by `f` of it; returns the old and the new value.
    ///
    /// With a LOCK prefix (or `locked`) the replacement is atomic, and `f` may run more than once: it must
    /// not change anything.
    ///
    /// # Errors
    /// Any fault of a data write.
    #[inline(always)]
    pub fn update<T: Data>(&mut self, i: &Insn, locked: bool, f: impl Fn(T) -> T) -> Exec<(T, T)> {
        let gva = self.linear(i, T::SIZE, true)?;
        self.modify(gva, locked, f).map_err(|e| stack_fault(i, e))
    }

    /// Exchanges the memory operand of `i` for `value`, atomically; returns what was there.
    ///
    /// # Errors
    /// Any fault of a data write.
    #[inline(always)]
    pub fn exchange<T: Data>(&mut self, i: &Insn, value: T) -> Exec<T> {
        let gva = self.linear(i, T::SIZE, true)?;
        match self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            // SAFETY: as in `store`.
            Some(host) if !crosses_line::<T>(gva) => Ok(unsafe { hostmem::exchange(host, value) }),
            _ => Ok(self.modify(gva, true, |_| value).map_err(|e| stack_fault(i, e))?.0),
        }
    }

    /// Reads the memory operand of `i`: N bytes, 16 or 32, at a multiple of that if `ALIGNED`, to the first N
    /// bytes of `to`. (They go there at once, because a `Result` full of bytes is slow.)
    ///
    /// # Errors
    /// Any fault of a data read; #GP(0) if misaligned. Nothing has been changed then.
    #[inline(always)]
    pub(crate) fn load_vector<const N: usize, const ALIGNED: bool>(
        &mut self,
        i: &Insn,
        to: impl FnOnce(&mut CpuState) -> &mut [u8],
    ) -> Exec {
        let gva = self.linear(i, N as u64, false)?;
        if ALIGNED && gva & (N as u64 - 1) != 0 {
            return fault(Fault::gp(0));
        }
        let Some(host) = self.tlb.read(self.state.tlb_base, self.state.tlb_tag, gva, N as u64) else {
            return self.load_vector_slow::<N>(i, gva, to);
        };
        for (n, piece) in to(&mut self.state).as_chunks_mut::<16>().0.iter_mut().take(N / 16).enumerate() {
            // SAFETY: needed for speed; a TLB hit means that all N bytes lie in a page of guest RAM that may
            // be read.
            *piece = unsafe { hostmem::load_16(host + n * 16) };
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn load_vector_slow<const N: usize>(
        &mut self,
        i: &Insn,
        gva: u64,
        to: impl FnOnce(&mut CpuState) -> &mut [u8],
    ) -> Exec {
        let mut bytes = [0; N];
        self.read_bytes_as(gva, &mut bytes, self.privilege()).map_err(|e| stack_fault(i, e))?;
        for (to, from) in to(&mut self.state).iter_mut().zip(bytes) {
            *to = from;
        }
        Ok(())
    }

    /// Writes the memory operand of `i`: 16 or 32 bytes, at a multiple of that if `ALIGNED`.
    ///
    /// # Errors
    /// Any fault of a data write; #GP(0) if misaligned.
    #[inline(always)]
    pub(crate) fn store_vector<const N: usize, const ALIGNED: bool>(
        &mut self,
        i: &Insn,
        bytes: [u8; N],
    ) -> Exec {
        let gva = self.linear(i, N as u64, true)?;
        if ALIGNED && gva & (N as u64 - 1) != 0 {
            return fault(Fault::gp(0));
        }
        match self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, N as u64) {
            Some(host) => {
                for (n, piece) in bytes.as_chunks::<16>().0.iter().enumerate() {
                    // SAFETY: needed for speed; a TLB hit means that all N bytes lie in a page of guest RAM
                    // that may be written and holds no decoded code.
                    unsafe { hostmem::store_16(host + n * 16, *piece) };
                }
                Ok(())
            }
            None => {
                let privilege = self.privilege();
                self.write_bytes_as(gva, &bytes, privilege).map_err(|e| stack_fault(i, e))
            }
        }
    }

    /// Reads the memory operand of `i` into `buffer` (at most a page).
    ///
    /// # Errors
    /// Any fault of a data read; alignment is checked where the operand is a number of 2, 4 or 8 bytes.
    pub(crate) fn load_bytes(&mut self, i: &Insn, buffer: &mut [u8]) -> Exec {
        let size = buffer.len() as u64;
        let gva = self.linear(i, size, false)?;
        if matches!(size, 2 | 4 | 8) {
            self.check_alignment(gva, size, self.privilege()).map_err(|e| stack_fault(i, e))?;
        }
        self.read_bytes(gva, buffer).map_err(|e| stack_fault(i, e))
    }

    /// Writes `buffer` (at most a page) to the memory operand of `i`.
    ///
    /// # Errors
    /// Any fault of a data write.
    pub(crate) fn store_bytes(&mut self, i: &Insn, buffer: &[u8]) -> Exec {
        let gva = self.linear(i, buffer.len() as u64, true)?;
        self.write_bytes(gva, buffer).map_err(|e| stack_fault(i, e))
    }

    /// Checks that `size` bytes could be written to the memory operand of `i`.
    ///
    /// # Errors
    /// As for the write.
    pub(crate) fn probe_store(&mut self, i: &Insn, size: u64) -> Exec {
        let gva = self.linear(i, size, true)?;
        if matches!(size, 2 | 4 | 8) {
            self.check_alignment(gva, size, self.privilege()).map_err(|e| stack_fault(i, e))?;
        }
        self.probe_write(gva, size).map_err(|e| stack_fault(i, e))
    }

    // ---- linear addresses ----

    /// Reads a `T` at a linear address with the current privilege.
    ///
    /// # Errors
    /// #GP(0) if not canonical, #AC, #PF.
    #[inline(always)]
    pub fn read<T: Data>(&mut self, gva: u64) -> Exec<T> {
        match self.tlb.read(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            // SAFETY: as in `load`.
            Some(host) => Ok(unsafe { hostmem::load(host) }),
            None => self.read_slow(gva, self.privilege()),
        }
    }

    /// Writes a `T` at a linear address with the current privilege.
    ///
    /// # Errors
    /// As [`Self::read`].
    #[inline(always)]
    pub fn write<T: Data>(&mut self, gva: u64, value: T) -> Exec {
        match self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `store`.
                unsafe { hostmem::store(host, value) };
                Ok(())
            }
            None => self.write_slow(gva, value, self.privilege()),
        }
    }

    /// Replaces the `T` at a linear address by `f` of it; see [`Self::update`].
    ///
    /// # Errors
    /// As for a write.
    #[inline(always)]
    pub fn modify<T: Data>(&mut self, gva: u64, locked: bool, f: impl Fn(T) -> T) -> Exec<(T, T)> {
        match self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, T::SIZE) {
            Some(host) if !(locked && crosses_line::<T>(gva)) => Ok(modify_ram(host, locked, f)),
            _ => self.modify_slow(gva, locked, self.privilege(), f),
        }
    }

    /// Compares the 16 bytes at a 16-byte aligned linear address with `old` and, if equal, replaces them
    /// by `new`, atomically; returns what was there. The page is written in either case, as CMPXCHG16B does.
    ///
    /// # Errors
    /// As for a write. The caller checks alignment.
    pub fn compare_exchange_16(&mut self, gva: u64, old: u128, new: u128) -> Exec<u128> {
        let seen = match self.place(gva, AccessKind::Write, self.privilege())? {
            Place::Ram { host, gpa, watched } => {
                self.note_store(gpa, watched);
                // SAFETY: needed for the 128-bit atomic; `place` found RAM there, and 16 aligned bytes do not
                // leave the page.
                unsafe { hostmem::compare_exchange_16(host & !15, old, new) }
            }
            Place::Mmio { gpa } => {
                let mut bytes = [0; 16];
                for (n, chunk) in bytes.chunks_mut(8).enumerate() {
                    self.exit(Exit::MmioRead { gpa: gpa.wrapping_add(n as u64 * 8), data: chunk });
                }
                let seen = u128::from_le_bytes(bytes);
                let value = if seen == old { new } else { seen };
                for (n, chunk) in value.to_le_bytes().chunks(8).enumerate() {
                    self.exit(Exit::MmioWrite { gpa: gpa.wrapping_add(n as u64 * 8), data: chunk });
                }
                seen
            }
        };
        self.data_breakpoint(gva, 16, true);
        Ok(seen)
    }

    /// Reads bytes (at most a page) at a linear address with the current privilege.
    ///
    /// # Errors
    /// As [`Self::read`], without alignment check.
    #[inline]
    pub fn read_bytes(&mut self, gva: u64, buffer: &mut [u8]) -> Exec {
        if let Some(host) = self.tlb.read(self.state.tlb_base, self.state.tlb_tag, gva, buffer.len() as u64) {
            // SAFETY: as in `load`.
            unsafe { hostmem::copy_from(host, buffer) };
            return Ok(());
        }
        self.read_bytes_as(gva, buffer, self.privilege())
    }

    /// Writes bytes (at most a page) at a linear address with the current privilege: all or none.
    ///
    /// # Errors
    /// As [`Self::read_bytes`].
    #[inline]
    pub fn write_bytes(&mut self, gva: u64, buffer: &[u8]) -> Exec {
        if let Some(host) = self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, buffer.len() as u64)
        {
            // SAFETY: as in `store`.
            unsafe { hostmem::copy_to(host, buffer) };
            return Ok(());
        }
        self.write_bytes_as(gva, buffer, self.privilege())
    }

    /// Checks that `size` bytes at `gva` could be written, and sets dirty bits as a write would.
    ///
    /// # Errors
    /// As for the write.
    pub fn probe_write(&mut self, gva: u64, size: u64) -> Exec {
        self.probe_write_as(gva, size, self.privilege())
    }

    /// As [`Self::probe_write`], with the privilege `privilege`.
    ///
    /// # Errors
    /// As for the write.
    pub(crate) fn probe_write_as(&mut self, gva: u64, size: u64, privilege: Privilege) -> Exec {
        self.places(gva, size as usize, AccessKind::Write, privilege)?;
        Ok(())
    }

    /// Copies up to `size` bytes forward from one linear address to another if both are at hand in the
    /// TLB and do not overlap in a way that shows; returns how many were copied, 0 if the caller must go
    /// element by element. Never crosses a page.
    pub fn copy_run(&mut self, destination: u64, source: u64, size: u64) -> u64 {
        let (base, tag) = (self.state.tlb_base, self.state.tlb_tag);
        let size = size.min(0x1000 - (source & 0xfff)).min(0x1000 - (destination & 0xfff));
        let (Some(from), Some(to)) =
            (self.tlb.read(base, tag, source, 1), self.tlb.write(base, tag, destination, 1))
        else {
            return 0;
        };
        if to > from && to < from + size as usize {
            return 0;
        }
        // SAFETY: needed for bulk speed; both pages hit in the TLB and `size` stays inside both.
        unsafe { hostmem::copy_within(from, to, size as usize) };
        size
    }

    /// Stores `value` up to `count` times from a linear address upward if the page is at hand in the TLB;
    /// returns how many were stored, 0 if the caller must go element by element. Never crosses a page.
    pub fn fill_run<T: Data>(&mut self, gva: u64, value: T, count: u64) -> u64 {
        let count = count.min((0x1000 - (gva & 0xfff)) / T::SIZE);
        if count == 0 {
            return 0;
        }
        let Some(host) = self.tlb.write(self.state.tlb_base, self.state.tlb_tag, gva, count * T::SIZE) else {
            return 0;
        };
        // SAFETY: needed for bulk speed; the page hits in the TLB and the range stays inside it.
        unsafe { hostmem::fill(host, value, count as usize) };
        count
    }

    // ---- accesses with an explicit privilege ----

    /// Reads a `T` at a linear address as `privilege`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_as<T: Data>(&mut self, gva: u64, privilege: Privilege) -> Exec<T> {
        let base = self.table_of(privilege).base();
        match self.tlb.read(base, self.state.tlb_tag, gva, T::SIZE) {
            // SAFETY: as in `load`.
            Some(host) => Ok(unsafe { hostmem::load(host) }),
            None => self.read_slow(gva, privilege),
        }
    }

    /// Writes a `T` at a linear address as `privilege`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write_as<T: Data>(&mut self, gva: u64, value: T, privilege: Privilege) -> Exec {
        let base = self.table_of(privilege).base();
        match self.tlb.write(base, self.state.tlb_tag, gva, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `store`.
                unsafe { hostmem::store(host, value) };
                Ok(())
            }
            None => self.write_slow(gva, value, privilege),
        }
    }

    /// Replaces the `T` at a linear address by `f` of it, atomically, as `privilege`; see [`Self::update`].
    ///
    /// # Errors
    /// As for a write.
    pub(crate) fn modify_as<T: Data>(
        &mut self,
        gva: u64,
        privilege: Privilege,
        f: impl Fn(T) -> T,
    ) -> Exec<(T, T)> {
        self.modify_slow(gva, true, privilege, f)
    }

    /// Reads bytes (at most a page) at a linear address as `privilege`.
    ///
    /// # Errors
    /// As [`Self::read_bytes`].
    pub fn read_bytes_as(&mut self, gva: u64, buffer: &mut [u8], privilege: Privilege) -> Exec {
        for (place, part) in
            self.places(gva, buffer.len(), AccessKind::Read, privilege)?.into_iter().flatten()
        {
            let Some(piece) = buffer.get_mut(part) else { continue };
            match place {
                // SAFETY: needed to read RAM; `place` found RAM there, and `part` stays inside its page.
                Place::Ram { host, .. } => unsafe { hostmem::copy_from(host, piece) },
                Place::Mmio { gpa } => {
                    for (n, chunk) in piece.chunks_mut(8).enumerate() {
                        self.exit(Exit::MmioRead { gpa: gpa.wrapping_add(n as u64 * 8), data: chunk });
                    }
                }
            }
        }
        self.data_breakpoint(gva, buffer.len() as u64, false);
        Ok(())
    }

    /// Writes bytes (at most a page) at a linear address as `privilege`: all or none.
    ///
    /// # Errors
    /// As [`Self::write_bytes`].
    pub fn write_bytes_as(&mut self, gva: u64, buffer: &[u8], privilege: Privilege) -> Exec {
        let places = self.places(gva, buffer.len(), AccessKind::Write, privilege)?;
        // RAM first: the page may become watched during an exit.
        for (place, part) in places.iter().flatten() {
            if let (Place::Ram { host, gpa, watched }, Some(piece)) = (*place, buffer.get(part.clone())) {
                self.note_store(gpa, watched);
                // SAFETY: needed to write RAM; `place` found RAM there, and `part` stays inside its page.
                unsafe { hostmem::copy_to(host, piece) };
            }
        }
        for (place, part) in places.iter().flatten() {
            if let (Place::Mmio { gpa }, Some(piece)) = (*place, buffer.get(part.clone())) {
                for (n, chunk) in piece.chunks(8).enumerate() {
                    self.exit(Exit::MmioWrite { gpa: gpa.wrapping_add(n as u64 * 8), data: chunk });
                }
            }
        }
        self.data_breakpoint(gva, buffer.len() as u64, true);
        Ok(())
    }

    // ---- slow paths ----

    #[cold]
    #[inline(never)]
    fn read_slow<T: Data>(&mut self, gva: u64, privilege: Privilege) -> Exec<T> {
        self.check_alignment(gva, T::SIZE, privilege)?;
        if (gva & 0xfff) + T::SIZE <= 0x1000
            && let Place::Ram { host, .. } = self.place(gva, AccessKind::Read, privilege)?
        {
            self.data_breakpoint(gva, T::SIZE, false);
            // SAFETY: needed to read RAM; `place` found RAM there and the access stays inside the page.
            return Ok(unsafe { hostmem::load(host) });
        }
        let mut bytes = [0; 8];
        let size = T::SIZE as usize;
        self.read_bytes_as(gva, &mut bytes[..size], privilege)?;
        Ok(T::truncate(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Data>(&mut self, gva: u64, value: T, privilege: Privilege) -> Exec {
        self.check_alignment(gva, T::SIZE, privilege)?;
        if (gva & 0xfff) + T::SIZE <= 0x1000
            && let Place::Ram { host, gpa, watched } = self.place(gva, AccessKind::Write, privilege)?
        {
            self.note_store(gpa, watched);
            // SAFETY: needed to write RAM; `place` found RAM there and the access stays inside the page.
            unsafe { hostmem::store(host, value) };
            self.data_breakpoint(gva, T::SIZE, true);
            return Ok(());
        }
        let bytes = value.widen().to_le_bytes();
        let size = T::SIZE as usize;
        self.write_bytes_as(gva, &bytes[..size], privilege)
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: Data>(
        &mut self,
        gva: u64,
        locked: bool,
        privilege: Privilege,
        f: impl Fn(T) -> T,
    ) -> Exec<(T, T)> {
        self.check_alignment(gva, T::SIZE, privilege)?;
        if (gva & 0xfff) + T::SIZE <= 0x1000
            && !(locked && crosses_line::<T>(gva))
            && let Place::Ram { host, gpa, watched } = self.place(gva, AccessKind::Write, privilege)?
        {
            self.note_store(gpa, watched);
            let result = modify_ram(host, locked, f);
            self.data_breakpoint(gva, T::SIZE, true);
            return Ok(result);
        }
        // MMIO, or a page crossed, or a cache line with LOCK. For a LOCK hardware would lock the bus: one process's
        // split lock holds up the whole host, or raises #AC there. Here the other vCPUs stop instead.
        self.probe_write_as(gva, T::SIZE, privilege)?;
        let ram = std::sync::Arc::clone(&self.ram);
        let _alone = locked.then(|| {
            self.stats.split_locks += 1;
            self.outside(|vcpu| ram.group().stop_others(&vcpu.membership))
        });
        let mut bytes = [0; 8];
        let size = T::SIZE as usize;
        self.read_bytes_as(gva, &mut bytes[..size], privilege)?;
        let old = T::truncate(u64::from_le_bytes(bytes));
        let new = f(old);
        self.write_bytes_as(gva, &new.widen().to_le_bytes()[..size], privilege)?;
        Ok((old, new))
    }

    /// Where `len` bytes at `gva` are: one or two pages, both checked before anything moves, each with the
    /// part of the buffer that it holds.
    fn places(&mut self, gva: u64, len: usize, kind: AccessKind, privilege: Privilege) -> Exec<Places> {
        let first = len.min(0x1000 - (gva & 0xfff) as usize);
        let mut next = gva.wrapping_add(first as u64);
        // In compatibility mode the processor's own tables may lie above 4 GiB.
        if gva <= 0xffff_ffff {
            next = self.wrapped(Gva(next)).0;
        }
        if first < len && self.walk.canonical(Gva(gva)) != self.walk.canonical(Gva(next)) {
            // Before any page fault.
            return fault(Fault::gp(0));
        }
        let one = self.place(gva, kind, privilege)?;
        let two = if first < len { Some((self.place(next, kind, privilege)?, first..len)) } else { None };
        Ok([Some((one, 0..first)), two])
    }

    /// A linear address that was computed from one below 4 GiB: outside 64-bit mode, it wraps around there.
    #[inline]
    pub(crate) fn wrapped(&self, gva: Gva) -> Gva {
        if self.state.code_mode == CodeMode::Bits64 { gva } else { Gva(gva.0 & 0xffff_ffff) }
    }

    /// Translates one address, by the TLB or by a walk that fills it.
    fn place(&mut self, gva: u64, kind: AccessKind, privilege: Privilege) -> Exec<Place> {
        // Without long mode no linear address has more than 32 bits, also not one in the middle of a descriptor.
        let gva = if self.state.long_mode() { gva } else { gva & 0xffff_ffff };
        let wide = self.state.code_mode == CodeMode::Bits64 || gva > 0xffff_ffff;
        if wide && !self.walk.canonical(Gva(gva)) {
            return fault(Fault::gp(0));
        }
        let table = self.table_of(privilege);
        let tag = self.state.tlb_tag;
        self.tlb.adopt_global(table.base(), tag, Gva(gva));
        // A part of an access that crosses a page may well be at hand.
        let hit = match kind {
            AccessKind::Read => self.tlb.read(table.base(), tag, gva, 1),
            AccessKind::Write => self.tlb.write(table.base(), tag, gva, 1),
            AccessKind::Fetch => None,
        };
        // A hit through `write` is never on a watched page; `gpa` is only used for those.
        if let Some(host) = hit {
            return Ok(Place::Ram { host, gpa: Gpa(0), watched: false });
        }
        let (gpa, filled) = self.translate(Gva(gva), kind, privilege)?;
        Ok(match filled {
            Some((host, watched)) => Place::Ram { host: host + gpa.page_offset() as usize, gpa, watched },
            None => Place::Mmio { gpa },
        })
    }

    /// Walks the page tables for `gva`, fills the TLB, and returns the guest-physical address with, for
    /// RAM, the page's host address and whether it is watched.
    ///
    /// # Errors
    /// #PF.
    pub(crate) fn translate(
        &mut self,
        gva: Gva,
        kind: AccessKind,
        privilege: Privilege,
    ) -> Exec<(Gpa, Option<(usize, bool)>)> {
        self.stats.tlb_misses += 1;
        let table = self.table_of(privilege);
        let access = Access { kind, privilege, ac: self.state.flags.system() & flags::AC != 0 };
        if self.state.deprivileged {
            self.check_pvm_address(gva, access)?;
        }
        let translation = match self.walk.translate(&*self.ram, gva, access) {
            Ok(translation) => translation,
            Err(f) => return fault(Fault::pf(gva, f.error_code)),
        };
        let gpa = translation.gpa;
        let Some(page) = self.ram.page(gpa) else { return Ok((gpa, None)) };
        let watched = page.is_watched();
        let allowed = |kind| self.walk.permits(&translation, Access { kind, ..access });
        let fill = Fill {
            host: page.host,
            gpa,
            read: allowed(AccessKind::Read),
            write: !watched && translation.dirty && allowed(AccessKind::Write),
            exec: allowed(AccessKind::Fetch),
            // PVM tags translations by their root, whatever they say.
            global: translation.global && !self.state.deprivileged,
            large: translation.page_size != mmu::PageSize::Size4K,
            key: PageKey { key: translation.pkey, user: translation.rights.contains(mmu::PageRights::USER) },
        };
        let host = page.host;
        if table != Table::Slow {
            self.tlb.fill(table.base(), self.state.tlb_tag, gva, fill);
        }
        Ok((gpa, Some((host, watched))))
    }

    /// Before a store to `gpa`: if its page holds decoded code, that is invalid from now on, and the running
    /// block, which may be part of it, ends with the present instruction.
    ///
    /// Before, because a vCPU that would decode the page anew waits until this one has answered its hand-shake,
    /// thus until the store is done; one that decodes already finds the stamp changed. Neither takes a
    /// half-written instruction for code.
    fn note_store(&mut self, gpa: Gpa, watched: bool) {
        if watched && let Some(page) = self.ram.page(gpa) {
            page.note_write();
            self.state.block_end = 0;
            self.stats.code_writes += 1;
        }
    }

    /// #AC for a misaligned access at CPL 3 when alignment checking is on.
    fn check_alignment(&self, gva: u64, size: u64, privilege: Privilege) -> Exec {
        if gva & (size - 1) != 0 && privilege == Privilege::User && self.alignment_check() {
            // Canonical form comes first.
            let long = self.state.code_mode == CodeMode::Bits64;
            let last = gva.wrapping_add(size - 1);
            if long && !(self.walk.canonical(Gva(gva)) && self.walk.canonical(Gva(last))) {
                return fault(Fault::gp(0));
            }
            return fault(Fault::with_code(vector::AC, 0));
        }
        Ok(())
    }

    /// Whether misaligned accesses at the current privilege raise #AC.
    pub(crate) fn alignment_check(&self) -> bool {
        self.state.cpl == 3 && self.state.cr0 & cr0::AM != 0 && self.state.flags.system() & flags::AC != 0
    }

    /// The privilege of the instruction's own data accesses.
    #[inline(always)]
    pub fn privilege(&self) -> Privilege {
        if self.state.cpl == 3 { Privilege::User } else { Privilege::Supervisor }
    }

    fn table_of(&self, privilege: Privilege) -> Table {
        if self.data_breakpoints_armed() || self.alignment_check() && privilege == Privilege::User {
            return Table::Slow;
        }
        match privilege {
            Privilege::User => Table::User,
            Privilege::Implicit => Table::Supervisor,
            Privilege::Supervisor => {
                if self.state.cr4 & cr4::SMAP != 0 && self.state.flags.system() & flags::AC != 0 {
                    Table::SupervisorAc
                } else {
                    Table::Supervisor
                }
            }
        }
    }

    /// Recomputes which TLB table data accesses go through. To be called after a change of CPL, CR0.AM,
    /// CR4.SMAP, EFLAGS.AC or DR7.
    #[inline]
    pub fn refresh_table(&mut self) {
        self.state.tlb_base = self.table_of(self.privilege()).base();
    }
}

/// Whether a `T` at `gva` lies in two cache lines of the host: there a locked access to it is a split lock.
#[inline(always)]
fn crosses_line<T: Data>(gva: u64) -> bool {
    const LINE: u64 = 64;
    (gva & (LINE - 1)) + T::SIZE > LINE
}

#[inline(always)]
fn modify_ram<T: Data>(host: usize, locked: bool, f: impl Fn(T) -> T) -> (T, T) {
    // SAFETY: needed to change RAM in place; every caller got `host` for a `T` inside one page from the TLB
    // or from `place`, with the right to write.
    unsafe {
        let mut old: T = hostmem::load(host);
        if !locked {
            let new = f(old);
            hostmem::store(host, new);
            return (old, new);
        }
        loop {
            let new = f(old);
            let seen = hostmem::compare_exchange(host, old, new);
            if seen == old {
                return (old, new);
            }
            old = seen;
        }
    }
}

/// In 64-bit mode a non-canonical address of a stack access is #SS, not #GP.
#[cold]
pub(crate) fn stack_fault(i: &Insn, stop: Box<crate::fault::Stop>) -> Box<crate::fault::Stop> {
    if i.has(insn_flags::STACK) { as_stack_fault(stop) } else { stop }
}
