//! Where a command's data is: physical region pages (section 4.3).
//!
//! The first entry may begin anywhere in a page; each further one is a whole page, and the last need not be used to its
//! end. Two entries fit into the command. More are in lists: pages of entries, where the last entry of a page that is not
//! enough points to the next one.

use iommufd::iova::Iova;
use zerocopy::IntoBytes;

use super::spec::{Command, MAX_TRANSFER, PAGE, Status};
use crate::dma::Dma;

/// One contiguous piece of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment {
    pub(super) at: Iova,
    pub(super) length: usize,
}

/// Bytes of an entry.
const ENTRY: u64 = 8;

/// The pieces of `length` bytes, which are at most [`MAX_TRANSFER`].
///
/// # Errors
/// INVALID_FIELD for more bytes, and for SGLs, which are not offered; INVALID_PRP for an entry that is not where it must
/// be; DATA_TRANSFER when a list cannot be read.
pub(super) fn segments(dma: &dyn Dma, command: &Command, length: u64) -> Result<Vec<Segment>, Status> {
    const SGL: u8 = 3 << 6;
    if length > MAX_TRANSFER || command.flags & SGL != 0 {
        return Err(Status::INVALID_FIELD);
    }
    let mut pieces = Pieces { segments: Vec::new(), left: length };
    // Addresses of data are of dwords.
    if command.prp1 & 3 != 0 {
        return Err(Status::INVALID_PRP);
    }
    pieces.add(command.prp1);
    if pieces.left == 0 {
        return Ok(pieces.segments);
    }
    if pieces.left <= PAGE {
        pieces.add_page(command.prp2)?;
        return Ok(pieces.segments);
    }
    let mut list = command.prp2;
    while pieces.left > 0 {
        if !list.is_multiple_of(ENTRY) {
            return Err(Status::INVALID_PRP);
        }
        let room = (PAGE - list % PAGE) / ENTRY;
        let wanted = pieces.left.div_ceil(PAGE);
        // At most a page of entries; the last one leads on when they are not enough.
        let count = wanted.min(room);
        let mut entries = [0u64; (PAGE / ENTRY) as usize];
        let entries = entries.get_mut(..usize::try_from(count).unwrap_or(0)).unwrap_or_default();
        dma.read(Iova(list), entries.as_mut_bytes()).map_err(|_| Status::DATA_TRANSFER)?;
        let (pages, next) = match entries.split_last() {
            Some((last, pages)) if wanted > room => (pages, Some(*last)),
            _ => (&*entries, None),
        };
        for page in pages {
            pieces.add_page(*page)?;
        }
        match next {
            // A list of nothing but its link would go on for ever; one that begins in the last entry of a page may.
            Some(next) => {
                if pages.is_empty() && !next.is_multiple_of(PAGE) {
                    return Err(Status::INVALID_PRP);
                }
                list = next;
            }
            None => break,
        }
    }
    Ok(pieces.segments)
}

/// What was found so far.
struct Pieces {
    segments: Vec<Segment>,
    left: u64,
}

impl Pieces {
    /// From `at` to the end of its page, or of the data.
    fn add(&mut self, at: u64) {
        let length = (PAGE - at % PAGE).min(self.left);
        self.left -= length;
        let length = usize::try_from(length).unwrap_or(0);
        match self.segments.last_mut() {
            // Neighbours are one piece.
            Some(last) if last.at.0.checked_add(last.length as u64) == Some(at) => last.length += length,
            _ => self.segments.push(Segment { at: Iova(at), length }),
        }
    }

    fn add_page(&mut self, at: u64) -> Result<(), Status> {
        if !at.is_multiple_of(PAGE) {
            return Err(Status::INVALID_PRP);
        }
        self.add(at);
        Ok(())
    }
}

/// Copies from memory.
///
/// # Errors
/// DATA_TRANSFER.
pub(super) fn gather(dma: &dyn Dma, segments: &[Segment], mut to: &mut [u8]) -> Result<(), Status> {
    for segment in segments {
        let (part, rest) = to.split_at_mut_checked(segment.length).ok_or(Status::DATA_TRANSFER)?;
        dma.read(segment.at, part).map_err(|_| Status::DATA_TRANSFER)?;
        to = rest;
    }
    Ok(())
}

/// Copies to memory, as much as there is.
///
/// # Errors
/// DATA_TRANSFER.
pub(super) fn scatter(dma: &dyn Dma, segments: &[Segment], mut from: &[u8]) -> Result<(), Status> {
    for segment in segments {
        let (part, rest) = from.split_at_checked(segment.length).unwrap_or((from, &[]));
        dma.write(segment.at, part).map_err(|_| Status::DATA_TRANSFER)?;
        from = rest;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use iommufd::domain::Prot;
    use iommufd::iova::IovaRange;

    use super::*;
    use crate::dma::DmaFault;

    #[derive(Debug)]
    struct Ram(Mutex<Vec<u8>>);

    impl Ram {
        fn put(&self, at: u64, entries: &[u64]) {
            self.write(Iova(at), entries.as_bytes()).unwrap();
        }
    }

    impl Dma for Ram {
        fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
            let ram = self.0.lock().unwrap();
            let at = usize::try_from(iova.0).unwrap();
            to.copy_from_slice(ram.get(at..at.saturating_add(to.len())).ok_or(DmaFault::Unmapped(iova))?);
            Ok(())
        }

        fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
            let mut ram = self.0.lock().unwrap();
            let at = usize::try_from(iova.0).unwrap();
            ram[at..at + from.len()].copy_from_slice(from);
            Ok(())
        }

        fn translate(&self, range: IovaRange, _: Prot) -> Result<(), DmaFault> {
            Err(DmaFault::Unmapped(range.start()))
        }
    }

    fn of(ram: &Ram, prp1: u64, prp2: u64, length: u64) -> Result<Vec<(u64, usize)>, Status> {
        let command = Command { prp1, prp2, ..Default::default() };
        let segments = segments(ram, &command, length)?;
        Ok(segments.into_iter().map(|segment| (segment.at.0, segment.length)).collect())
    }

    #[test]
    fn entries_of_the_command() {
        let ram = Ram(Mutex::new(Vec::new()));
        assert_eq!(of(&ram, 0x1004, 0, 0x100), Ok(vec![(0x1004, 0x100)]));
        assert_eq!(of(&ram, 0x1000, 0x9000, 0x1000), Ok(vec![(0x1000, 0x1000)]));
        assert_eq!(of(&ram, 0x1ffc, 0x9000, 0x1000), Ok(vec![(0x1ffc, 4), (0x9000, 0xffc)]));
        assert_eq!(of(&ram, 0x1800, 0x2000, 0x1800), Ok(vec![(0x1800, 0x1800)]), "neighbours");
        assert_eq!(of(&ram, 0x1ffc, 0x9008, 0x1000), Err(Status::INVALID_PRP));
        assert_eq!(of(&ram, 0x1002, 0, 4), Err(Status::INVALID_PRP));
        assert_eq!(of(&ram, 0, 0, MAX_TRANSFER + 1), Err(Status::INVALID_FIELD));
        let sgl = Command { flags: 0x40, ..Default::default() };
        assert_eq!(segments(&ram, &sgl, 4), Err(Status::INVALID_FIELD));
    }

    #[test]
    fn lists() {
        let ram = Ram(Mutex::new(vec![0; 0x4000]));
        ram.put(0x1008, &[0x10_0000, 0x20_0000]);
        assert_eq!(
            of(&ram, 0xf00, 0x1008, 0x1900),
            Ok(vec![(0xf00, 0x100), (0x10_0000, 0x1000), (0x20_0000, 0x800)])
        );
        // A list that begins two entries before the end of its page, and goes on elsewhere.
        ram.put(0x1ff0, &[0x10_0000, 0x3000]);
        ram.put(0x3000, &[0x30_0000, 0x40_0000]);
        let expected = vec![(0, 0x1000), (0x10_0000, 0x1000), (0x30_0000, 0x1000), (0x40_0000, 0x1000)];
        assert_eq!(of(&ram, 0, 0x1ff0, 0x4000), Ok(expected));
        // One that begins with the link itself.
        ram.put(0x1ff8, &[0x3000]);
        let expected = vec![(0, 0x1000), (0x30_0000, 0x1000), (0x40_0000, 0x1000)];
        assert_eq!(of(&ram, 0, 0x1ff8, 0x3000), Ok(expected));
        // One that leads to itself.
        ram.put(0x1ff8, &[0x1ff8]);
        assert_eq!(of(&ram, 0, 0x1ff8, 0x4000), Err(Status::INVALID_PRP));
        assert_eq!(of(&ram, 0, 0x1001, 0x4000), Err(Status::INVALID_PRP));
        assert_eq!(of(&ram, 0, 0x9000, 0x4000), Err(Status::DATA_TRANSFER));
        ram.put(0x1000, &[0x10_0001]);
        assert_eq!(of(&ram, 0, 0x1000, 0x4000), Err(Status::INVALID_PRP));
    }

    #[test]
    fn the_longest_transfer() {
        let ram = Ram(Mutex::new(vec![0; 0x4000]));
        let pages: Vec<u64> = (0..511).map(|page| 0x100_0000 + 2 * page * PAGE).collect();
        ram.put(0x1000, &pages);
        let found = of(&ram, 4, 0x1000, MAX_TRANSFER).unwrap();
        assert_eq!(found.len(), 257);
        assert_eq!(found.iter().map(|(_, length)| *length as u64).sum::<u64>(), MAX_TRANSFER);
    }
}
