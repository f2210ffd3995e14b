//! Mapping, and copying mappings.

use std::sync::Arc;

use super::{
    Ioas,
    area::{Area, Areas, Piece},
    domains::{Domains, empty},
    ranges::Alignment,
};
use crate::{
    Errno, Result,
    domain::Prot,
    inject,
    iova::{Iova, IovaRange},
    pages::Pages,
};

impl Ioas {
    /// Maps `length` bytes of `pages`, from byte `offset` on, at `at`, or where there is room for them when that is none:
    /// where they are mapped.
    ///
    /// - EINVAL: `length` is 0, or `pages` has not so many bytes, or something is not a multiple of
    ///   [`Self::iova_alignment`], or a part of the range at `at` is reserved.
    /// - EOVERFLOW: the range goes past the last address.
    /// - EEXIST: something is mapped at `at`.
    /// - ENOSPC: no range that is long enough is free and allowed.
    /// - EPERM: `prot` has write but `pages` has not.
    /// - ENOMEM, EFAULT: a domain needs the pages pinned, and they cannot be.
    pub fn map(
        &self,
        pages: &Arc<Pages>,
        offset: u64,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        let end = offset.checked_add(length).ok_or(Errno::OVERFLOW)?;
        if length == 0 || end > pages.length() {
            return Err(Errno::INVAL);
        }
        self.place(&[Piece { pages: pages.clone(), offset, length }], at, prot)
    }

    /// Maps what `source` has mapped in `from` (parts of areas, without a hole between them) here too. The pages are
    /// shared, and pinned once for both. `source` may be this address space.
    ///
    /// As [`Self::map`]; and ENOENT when not all of `from` is mapped.
    pub fn copy_from(&self, source: &Self, from: IovaRange, at: Option<Iova>, prot: Prot) -> Result<Iova> {
        let mut pieces = Vec::new();
        inject::check()?;
        source.read_areas().walk(from, |part| {
            pieces.push(part.piece());
            Ok(())
        })?;
        self.place(&pieces, at, prot)
    }

    /// Maps `pieces` one after the other.
    fn place(&self, pieces: &[Piece], at: Option<Iova>, prot: Prot) -> Result<Iova> {
        if prot.contains(Prot::WRITE) && !pieces.iter().all(|piece| piece.pages.writable()) {
            return Err(Errno::PERM);
        }
        inject::check()?;
        let domains = self.read_domains();
        let (areas, huge_pages) = {
            let mut areas = self.write_areas();
            let range = areas.find(pieces, at)?;
            let new = areas.insert_pieces(pieces, range, prot, domains.is_empty());
            (new, areas.huge_pages)
        };
        let start = areas.first().map(|area| area.range.start()).ok_or(Errno::INVAL)?;
        if domains.is_empty() {
            return Ok(start);
        }
        if let Err(errno) = domains.fill(&areas, huge_pages) {
            let mut map = self.write_areas();
            for area in &areas {
                map.remove(area.range);
            }
            return Err(errno);
        }
        areas.iter().for_each(|area| area.set_ready(true));
        Ok(start)
    }
}

impl Domains {
    /// Enters `areas` into all domains. Nothing has changed when it fails.
    fn fill(&self, areas: &[Arc<Area>], huge_pages: bool) -> Result<()> {
        for (done, area) in areas.iter().enumerate() {
            for (entered, domain) in self.iter().enumerate() {
                let Err(errno) = area.pages.enter(domain, area.placement(huge_pages)) else { continue };
                let domains = |n| self.iter().take(n);
                for domain in domains(entered) {
                    empty(domain, std::slice::from_ref(area));
                }
                for domain in self.iter() {
                    empty(domain, areas.get(..done).unwrap_or_default());
                }
                return Err(errno);
            }
        }
        Ok(())
    }
}

impl Areas {
    /// Where `pieces` are to be mapped.
    fn find(&mut self, pieces: &[Piece], at: Option<Iova>) -> Result<IovaRange> {
        let first = pieces.first().ok_or(Errno::INVAL)?;
        let length = pieces
            .iter()
            .try_fold(0_u64, |sum, piece| sum.checked_add(piece.length))
            .ok_or(Errno::OVERFLOW)?;
        let aligned = |bits: u64| bits & (self.alignment - 1) == 0;
        let bytes =
            pieces.iter().fold(length, |bits, piece| bits | piece.length | piece.pages.in_page(piece.offset));
        if !aligned(bytes) || !aligned(at.map_or(0, |at| at.0)) {
            return Err(Errno::INVAL);
        }
        let Some(at) = at else {
            let address = first.pages.address(first.offset);
            let best = Alignment::of(length, address, self.alignment);
            let weakest = Alignment::weakest(address, self.alignment);
            return self.ranges.allocate(&self.map, length, best).or_else(|errno| {
                // Only what is allowed is filled to the last page, as the kernel does.
                if !self.ranges.is_confined() {
                    return Err(errno);
                }
                // The floors are those of the best alignment.
                self.ranges.freed(0);
                self.ranges.allocate(&self.map, length, weakest)
            });
        };
        let range = IovaRange::with_length(at, length)?;
        if self.ranges.is_reserved(range) {
            return Err(Errno::INVAL);
        }
        if self.overlapping(range).next().is_some() {
            return Err(Errno::EXIST);
        }
        Ok(range)
    }

    fn insert_pieces(
        &mut self,
        pieces: &[Piece],
        range: IovaRange,
        prot: Prot,
        ready: bool,
    ) -> Vec<Arc<Area>> {
        let mut next = range.start().0;
        let mut areas = Vec::with_capacity(pieces.len());
        for piece in pieces {
            // The pieces have the length of the range together.
            let Ok(range) = IovaRange::with_length(Iova(next), piece.length) else { break };
            let area = Arc::new(Area::new(range, piece, prot, ready));
            self.insert(area.clone());
            areas.push(area);
            next = range.last().0.wrapping_add(1);
        }
        areas
    }
}
