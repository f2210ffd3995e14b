//! A set of interrupt vectors: the shape of IRR, ISR and TMR (SDM vol. 3, 12.8.4).

/// A set of the vectors 0 to 255.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct VectorSet([u64; 4]);

impl VectorSet {
    fn place(vector: u8) -> (usize, u64) {
        (usize::from(vector >> 6), 1 << (vector & 63))
    }

    /// Adds `vector`.
    pub(crate) fn insert(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.0[word] |= bit;
    }

    /// Takes `vector` out.
    pub(crate) fn remove(&mut self, vector: u8) {
        let (word, bit) = Self::place(vector);
        self.0[word] &= !bit;
    }

    /// Adds or takes out `vector`.
    pub(crate) fn set(&mut self, vector: u8, member: bool) {
        if member { self.insert(vector) } else { self.remove(vector) }
    }

    /// Whether `vector` is in the set.
    pub(crate) fn contains(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.0[word] & bit != 0
    }

    /// The highest vector in the set.
    pub(crate) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&w| w != 0)?;
        u8::try_from(word as u32 * 64 + self.0[word].ilog2()).ok()
    }

    /// The 32 vectors from `32 * index` on, as the register bank at 16-byte steps shows them.
    pub(crate) fn bank(&self, index: u32) -> u32 {
        let word = self.0.get(index as usize / 2).copied().unwrap_or(0);
        if index.is_multiple_of(2) { word as u32 } else { (word >> 32) as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_has_a_bit_of_its_own() {
        for v in 0..=255u8 {
            let mut s = VectorSet::default();
            assert_eq!(s.highest(), None);
            s.insert(v);
            assert_eq!(s.highest(), Some(v));
            for bank in 0..8 {
                let want = if u32::from(v) / 32 == bank { 1 << (v % 32) } else { 0 };
                assert_eq!(s.bank(bank), want);
            }
            assert_eq!((0..=255).filter(|&o| s.contains(o)).count(), 1);
            s.set(v, false);
            assert_eq!(s, VectorSet::default());
        }
    }
}
