//! Invalidation descriptors of 128 bits (VT-d 6.5.2).

/// What a guest wants forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// Context entries.
    Context(ContextScope),
    /// Translations.
    Iotlb(IotlbScope),
    /// Entries of the interrupt remapping table; there are none here.
    Interrupts,
}

/// Which context entries have changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ContextScope {
    /// Any.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// That of a device, or of several.
    Device {
        /// The domain that the entry named before.
        domain: u16,
        /// Its requester id.
        source: u16,
        /// The bits of the requester id that do not matter.
        mask: u16,
    },
}

/// Which translations have changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IotlbScope {
    /// Any.
    Global,
    /// Those of a domain.
    Domain(u16),
    /// Pages of a domain.
    Pages {
        /// The domain.
        domain: u16,
        /// The first address.
        first: u64,
        /// The last address.
        last: u64,
    },
}

/// Why a queue stopped (`FSTS.IQE`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u32)]
pub enum QueueError {
    /// The tail is outside of the queue, or within a descriptor.
    #[error("the tail is outside of the queue or not at a descriptor")]
    Tail = 1,
    /// The queue cannot be read.
    #[error("the queue's memory cannot be read")]
    Memory = 2,
    /// There is no such descriptor in legacy mode.
    #[error("no descriptor has this type")]
    Type = 3,
    /// The descriptor has reserved bits, or a granularity that is none.
    #[error("the descriptor has reserved bits set, or no granularity")]
    Reserved = 4,
}

impl QueueError {
    pub(super) fn of(number: u32) -> Option<Self> {
        [Self::Tail, Self::Memory, Self::Type, Self::Reserved]
            .into_iter()
            .find(|error| *error as u32 == number)
    }
}

/// A descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Descriptor {
    Invalidate(Invalidation),
    /// What came before is to be complete.
    Wait {
        /// The guest's address for a status, and that.
        status: Option<(u64, u32)>,
        /// An interrupt, too.
        interrupt: bool,
    },
}

mod kind {
    pub(super) const CONTEXT: u64 = 1;
    pub(super) const IOTLB: u64 = 2;
    pub(super) const INTERRUPTS: u64 = 4;
    pub(super) const WAIT: u64 = 5;
}

/// Pages have 12 bits.
const PAGE_BITS: u64 = 12;
/// The largest address mask (CAP.MAMV) that an IOTLB descriptor may have: 2^18 pages, 1 GiB.
pub const MAX_MASK: u64 = 18;

/// The bits `from..=to`.
const fn bits(from: u32, to: u32) -> u64 {
    (u64::MAX >> (63 - (to - from))) << from
}

fn field(word: u64, from: u32, to: u32) -> u64 {
    (word & bits(from, to)) >> from
}

/// A field of at most 16 bits.
fn short(word: u64, from: u32) -> u16 {
    field(word, from, from + 15) as u16
}

impl Descriptor {
    /// Reads one. Device-TLB descriptors are none here, because no device has a TLB of its own (ECAP.DT is 0), nor are those of
    /// scalable mode.
    pub(super) fn decode(low: u64, high: u64) -> Result<Self, QueueError> {
        let only = |low_bits: u64, high_bits: u64| {
            if low & !low_bits == 0 && high & !high_bits == 0 { Ok(()) } else { Err(QueueError::Reserved) }
        };
        // The type's upper bits are in bits 9 to 11.
        let invalidation = match field(low, 0, 3) | field(low, 9, 11) << 4 {
            kind::CONTEXT => {
                only(bits(0, 5) | bits(16, 49), 0)?;
                Invalidation::Context(match field(low, 4, 5) {
                    1 => ContextScope::Global,
                    2 => ContextScope::Domain(short(low, 16)),
                    3 => ContextScope::Device {
                        domain: short(low, 16),
                        source: short(low, 32),
                        // The function mask: 0 to 3 of the function's bits.
                        mask: [0, 0b100, 0b110, 0b111][field(low, 48, 49) as usize % 4],
                    },
                    _ => return Err(QueueError::Reserved),
                })
            }
            kind::IOTLB => {
                only(bits(0, 7) | bits(16, 31), bits(0, 6) | bits(12, 63))?;
                let domain = short(low, 16);
                Invalidation::Iotlb(match field(low, 4, 5) {
                    1 => IotlbScope::Global,
                    2 => IotlbScope::Domain(domain),
                    3 => {
                        let mask = field(high, 0, 5);
                        if mask > MAX_MASK {
                            return Err(QueueError::Reserved);
                        }
                        let size = 1 << (PAGE_BITS + mask);
                        // Address bits below the mask are ignored.
                        let first = high & !(size - 1);
                        IotlbScope::Pages { domain, first, last: first | (size - 1) }
                    }
                    _ => return Err(QueueError::Reserved),
                })
            }
            kind::INTERRUPTS => {
                only(bits(0, 4) | bits(27, 47), 0)?;
                Invalidation::Interrupts
            }
            kind::WAIT => {
                only(bits(0, 6) | bits(32, 63), bits(2, 63))?;
                let status = (low & 1 << 5 != 0).then_some((high, field(low, 32, 63) as u32));
                return Ok(Self::Wait { status, interrupt: low & 1 << 4 != 0 });
            }
            _ => return Err(QueueError::Type),
        };
        Ok(Self::Invalidate(invalidation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_specification_says() {
        let invalidate = |low, high| match Descriptor::decode(low, high) {
            Ok(Descriptor::Invalidate(it)) => Ok(it),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        assert_eq!(invalidate(0x11, 0), Ok(Invalidation::Context(ContextScope::Global)));
        assert_eq!(invalidate(0x21 | 7 << 16, 0), Ok(Invalidation::Context(ContextScope::Domain(7))));
        let device = ContextScope::Device { domain: 7, source: 0x0118, mask: 0b110 };
        assert_eq!(invalidate(0x31 | 7 << 16 | 0x118 << 32 | 2 << 48, 0), Ok(Invalidation::Context(device)));
        assert_eq!(invalidate(0xd2, 0), Ok(Invalidation::Iotlb(IotlbScope::Global)));
        assert_eq!(invalidate(0xe2 | 9 << 16, 0), Ok(Invalidation::Iotlb(IotlbScope::Domain(9))));
        let pages = IotlbScope::Pages { domain: 9, first: 0x8000, last: 0xffff };
        assert_eq!(invalidate(0xf2 | 9 << 16, 0x9000 | 1 << 6 | 3), Ok(Invalidation::Iotlb(pages)));
        assert_eq!(invalidate(0x4, 0), Ok(Invalidation::Interrupts));
        assert_eq!(invalidate(0x14 | 5 << 27 | 3 << 32, 0), Ok(Invalidation::Interrupts));
        assert_eq!(
            Descriptor::decode(0x25 | 2 << 32, 0x1234_5678),
            Ok(Descriptor::Wait { status: Some((0x1234_5678, 2)), interrupt: false })
        );
        assert_eq!(Descriptor::decode(0x15, 0), Ok(Descriptor::Wait { status: None, interrupt: true }));
    }

    #[test]
    fn what_is_no_descriptor_is_refused() {
        for (low, high, error) in [
            (0, 0, QueueError::Type),
            (3, 0, QueueError::Type),
            (0x6, 0, QueueError::Type),
            (0x202, 0, QueueError::Type),
            (0x1, 0, QueueError::Reserved),
            (0x11 | 1 << 50, 0, QueueError::Reserved),
            (0x11, 1, QueueError::Reserved),
            (0x2, 0, QueueError::Reserved),
            (0x32, 19, QueueError::Reserved),
            (0x12, 1 << 7, QueueError::Reserved),
            (0x25, 1, QueueError::Reserved),
            (0x25 | 1 << 12, 0, QueueError::Reserved),
        ] {
            assert_eq!(Descriptor::decode(low, high), Err(error), "{low:#x} {high:#x}");
        }
        assert_eq!(QueueError::of(QueueError::Type as u32), Some(QueueError::Type));
        assert_eq!(QueueError::of(0), None);
    }
}
