//! What is mapped in a container, piece by piece.

use std::collections::BTreeMap;

use iommufd::iova::IovaRange;

use crate::{Errno, Result};

/// How many pieces there may be, as in the kernel's `dma_entry_limit`.
pub(super) const MOST: usize = u16::MAX as usize;

/// One piece.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mapping {
    pub(super) range: IovaRange,
    /// Registers of a device: nothing is mapped for them.
    pub(super) registers: bool,
    /// The program has withdrawn its address of the memory (`VFIO_DMA_UNMAP_FLAG_VADDR`).
    pub(super) withdrawn: bool,
}

/// The pieces, by where they begin. They do not overlap.
#[derive(Debug, Default)]
pub(super) struct Mappings(BTreeMap<u64, Mapping>);

impl Mappings {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds one. EEXIST when something overlaps it.
    pub(super) fn insert(&mut self, mapping: Mapping) -> Result<()> {
        if self.in_range(mapping.range).next().is_some() {
            return Err(Errno::EXIST);
        }
        self.0.insert(mapping.range.start().0, mapping);
        Ok(())
    }

    pub(super) fn remove(&mut self, mapping: &Mapping) {
        self.0.remove(&mapping.range.start().0);
    }

    /// The piece that begins at `start`.
    pub(super) fn at(&mut self, start: u64) -> Option<&mut Mapping> {
        self.0.get_mut(&start)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Mapping> {
        self.0.values_mut()
    }

    /// The pieces that have a part in `range`, in order.
    pub(super) fn in_range(&self, range: IovaRange) -> impl Iterator<Item = &Mapping> {
        // One may begin before the range; no other can that ends in it.
        let before = self.0.range(..range.start().0).next_back();
        let within = self.0.range(range.start().0..=range.last().0);
        before
            .into_iter()
            .chain(within)
            .map(|(_, mapping)| mapping)
            .filter(move |mapping| mapping.range.intersection(range).is_some())
    }

    /// Whether a piece is only partly in `range`.
    pub(super) fn cuts(&self, range: IovaRange) -> bool {
        self.in_range(range).any(|mapping| !range.covers(mapping.range))
    }
}

#[cfg(test)]
mod tests {
    use iommufd::iova::Iova;

    use super::*;

    fn range(start: u64, length: u64) -> IovaRange {
        IovaRange::with_length(Iova(start), length).unwrap()
    }

    fn mapping(start: u64, length: u64) -> Mapping {
        Mapping { range: range(start, length), registers: false, withdrawn: false }
    }

    #[test]
    fn pieces_do_not_overlap() {
        let mut mappings = Mappings::default();
        mappings.insert(mapping(0x3000, 0x2000)).unwrap();
        mappings.insert(mapping(0x1000, 0x1000)).unwrap();
        mappings.insert(mapping(u64::MAX - 0xfff, 0x1000)).unwrap();
        for (start, length) in [(0x2000, 0x1001), (0x4fff, 1), (0x3000, 0x2000), (0, 0x1001), (u64::MAX, 1)] {
            assert_eq!(mappings.insert(mapping(start, length)), Err(Errno::EXIST), "{start:#x}");
        }
        mappings.insert(mapping(0x2000, 0x1000)).unwrap();
        let starts = |of| mappings.in_range(of).map(|found| found.range.start().0).collect::<Vec<_>>();
        assert_eq!(starts(range(0x2800, 0x1000)), [0x2000, 0x3000]);
        assert_eq!(starts(range(0x5000, 0x1000)), [0u64; 0]);
        assert!(mappings.cuts(range(0x2800, 0x1000)) && mappings.cuts(range(0x4000, 0x1000)));
        assert!(!mappings.cuts(range(0, 0x5000)) && !mappings.cuts(IovaRange::ALL));
    }
}
