//! How an access of any length becomes accesses that a register takes.

use std::ops::Range;

/// Takes an access of `length` bytes at `offset` apart: pieces of 1, 2, 4 ... up to `widest` bytes, each aligned to its size,
/// in rising order, as offset and place in the access' data. `widest` is a power of two.
///
/// It is no fault when the access goes past the last offset: what is beyond it is left out.
pub fn natural(offset: u64, length: usize, widest: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = length.checked_sub(done).filter(|left| *left > 0)?;
        let at = offset.checked_add(done as u64)?;
        let mut width = widest.max(1);
        while width > 1 && (width > left || !at.is_multiple_of(width as u64)) {
            width /= 2;
        }
        let range = done..done + width;
        done += width;
        Some((at, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(offset: u64, length: usize, widest: usize) -> Vec<(u64, Range<usize>)> {
        natural(offset, length, widest).collect()
    }

    #[test]
    fn pieces_are_aligned_and_cover_the_access() {
        assert_eq!(pieces(0, 8, 8), [(0, 0..8)]);
        assert_eq!(pieces(0, 8, 4), [(0, 0..4), (4, 4..8)]);
        assert_eq!(pieces(1, 8, 4), [(1, 0..1), (2, 1..3), (4, 3..7), (8, 7..8)]);
        assert_eq!(pieces(6, 3, 8), [(6, 0..2), (8, 2..3)]);
        assert_eq!(pieces(5, 0, 8), []);
    }

    #[test]
    fn the_last_offset_is_the_end() {
        assert_eq!(pieces(u64::MAX, 4, 4), [(u64::MAX, 0..1)]);
    }
}
