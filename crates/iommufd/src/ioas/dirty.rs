//! Which pages devices have written to.

use std::sync::Arc;

use super::Ioas;
use crate::{
    Errno, Result,
    domain::{DirtySink, Domain},
    inject,
    iova::{Iova, IovaRange},
    process::{Process, UserAddr},
};

/// How much of a bitmap is kept here before it is written to user memory.
const WINDOW: usize = 4096;

/// Where [`Ioas::read_dirty`] tells what was written to: a bitmap in user memory, one bit for each `page_size` bytes
/// from the start of `range` on, the lowest bit of a byte first. Bits are set there, and never cleared.
#[derive(Clone, Copy, Debug)]
pub struct DirtyBitmap<'a> {
    /// What it tells of.
    pub range: IovaRange,
    /// What one bit stands for: a power of two (of another number counts the largest one that divides it, as in the
    /// kernel).
    pub page_size: u64,
    /// Whose memory it is in.
    pub process: &'a dyn Process,
    /// Where.
    pub at: UserAddr,
}

impl Ioas {
    /// Starts or stops noting the pages that devices write to through `domain`, which is attached. Starts with none noted.
    pub fn set_dirty_tracking(&self, domain: &Arc<dyn Domain>, enable: bool) -> Result<()> {
        inject::check()?;
        let domains = self.read_domains();
        if !domains.has(domain) {
            return Err(Errno::INVAL);
        }
        if enable {
            let ranges: Vec<_> = self.read_areas().map.values().map(|area| area.range).collect();
            for range in ranges {
                domain.read_and_clear_dirty(range, false, &mut Nowhere)?;
            }
            domain.sync();
        }
        domain.set_dirty_tracking(enable)
    }

    /// Sets the bits of the pages that were written to through `domain` since the last time, and forgets them unless
    /// `keep`. Where nothing is mapped nothing was written to.
    ///
    /// EINVAL when the page size is 0, or the range is not made of whole pages, or `domain` is not attached; EFAULT when the
    /// bitmap cannot be written.
    pub fn read_dirty(&self, domain: &Arc<dyn Domain>, bitmap: &DirtyBitmap<'_>, keep: bool) -> Result<()> {
        let range = bitmap.range;
        inject::check()?;
        let domains = self.read_domains();
        let whole = bitmap.page_size.checked_sub(1).ok_or(Errno::INVAL)?;
        if (range.start().0 | range.last().0.wrapping_add(1)) & whole != 0 || !domains.has(domain) {
            return Err(Errno::INVAL);
        }
        let mut mapped: Vec<IovaRange> = Vec::new();
        for area in self.read_areas().overlapping(range) {
            let Some(here) = area.range.intersection(range) else { continue };
            match mapped.last_mut() {
                Some(before) if before.last().0.checked_add(1) == Some(here.start().0) => {
                    *before = IovaRange::new(before.start(), here.last())?;
                }
                _ => mapped.push(here),
            }
        }
        let mut writer = BitmapWriter::new(bitmap);
        // A domain that cannot tell says so also when nothing is mapped.
        if mapped.is_empty() {
            mapped.push(range);
        }
        for range in mapped {
            domain.read_and_clear_dirty(range, keep, &mut writer)?;
        }
        if !keep {
            // Who wrote just before its page was forgotten has finished.
            domain.sync();
        }
        writer.finish()
    }
}

struct Nowhere;

impl DirtySink for Nowhere {
    fn dirty(&mut self, _: Iova, _: u64) {}
}

/// Sets bits in user memory, a window at a time.
struct BitmapWriter<'a> {
    bitmap: &'a DirtyBitmap<'a>,
    bytes: u64,
    shift: u32,
    /// Which window is in `bits`, to be written when one of them is set.
    window: u64,
    bits: [u8; WINDOW],
    any: bool,
    result: Result<()>,
}

impl<'a> BitmapWriter<'a> {
    fn new(bitmap: &'a DirtyBitmap<'a>) -> Self {
        let shift = bitmap.page_size.trailing_zeros();
        let last = (bitmap.range.last().0 - bitmap.range.start().0) >> shift;
        let bytes = last / 8 + 1;
        Self { bitmap, bytes, shift, window: 0, bits: [0; WINDOW], any: false, result: Ok(()) }
    }

    fn set(&mut self, bit: u64) {
        let byte = bit / 8;
        let window = byte / WINDOW as u64;
        if window != self.window {
            self.flush();
            self.window = window;
        }
        if let Some(bits) = self.bits.get_mut((byte % WINDOW as u64) as usize) {
            *bits |= 1 << (bit % 8);
            self.any = true;
        }
    }

    /// Adds the window to user memory.
    fn flush(&mut self) {
        if !core::mem::take(&mut self.any) {
            return;
        }
        let before = self.window * WINDOW as u64;
        let length = (self.bytes - before).min(WINDOW as u64) as usize;
        let Some(at) = self.bitmap.at.0.checked_add(before).map(UserAddr) else {
            self.result = Err(Errno::FAULT);
            return;
        };
        let mut there = [0; WINDOW];
        if let (Some(there), Some(bits)) = (there.get_mut(..length), self.bits.get(..length))
            && self.result.is_ok()
        {
            let process = self.bitmap.process;
            self.result = process.read(at, there).and_then(|()| {
                there.iter_mut().zip(bits).for_each(|(there, bits)| *there |= bits);
                process.write(at, there)
            });
        }
        self.bits = [0; WINDOW];
    }

    fn finish(mut self) -> Result<()> {
        self.flush();
        self.result
    }
}

impl DirtySink for BitmapWriter<'_> {
    fn dirty(&mut self, iova: Iova, length: u64) {
        let Ok(written) = IovaRange::with_length(iova, length) else { return };
        let Some(here) = written.intersection(self.bitmap.range) else { return };
        let start = self.bitmap.range.start().0;
        for bit in (here.start().0 - start) >> self.shift..=(here.last().0 - start) >> self.shift {
            self.set(bit);
        }
    }
}
