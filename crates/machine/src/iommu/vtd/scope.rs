//! What an invalidation is about, whichever way it is asked for.

/// Which context entries are to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContextScope {
    /// All.
    All,
    /// Those of a domain.
    Domain(u16),
    /// That of a device, and of other functions of it.
    Device {
        /// Bus, device and function number.
        source: u16,
        /// The bits of the number that do not matter.
        ignored: u16,
    },
}

impl ContextScope {
    /// By the fields of a command or descriptor (VT-d 6.5.2.1): granularity, domain, source, function mask. None for a
    /// granularity that is reserved.
    pub(super) fn new(granularity: u64, domain: u16, source: u16, mask: u64) -> Option<Self> {
        match granularity {
            1 => Some(Self::All),
            2 => Some(Self::Domain(domain)),
            3 => {
                // The mask's bits count from the top of the three of the function number.
                let ignored = [0, 0b100, 0b110, 0b111][(mask & 3) as usize];
                Some(Self::Device { source, ignored })
            }
            _ => None,
        }
    }

    /// Whether it is about a device, which has this domain now.
    pub(super) fn covers(self, device: u16, of: Option<u16>) -> bool {
        match self {
            Self::All => true,
            Self::Domain(domain) => of == Some(domain),
            Self::Device { source, ignored } => (device ^ source) & !ignored == 0,
        }
    }
}

/// Which translations are out of date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IotlbScope {
    /// All.
    All,
    /// Those of a domain.
    Domain(u16),
    /// Those of a range of a domain, which is aligned to its size.
    Pages {
        /// The domain.
        domain: u16,
        /// The first address.
        first: u64,
        /// log2 of the number of pages of 4 KiB.
        order: u8,
    },
}

impl IotlbScope {
    /// The largest [`Self::Pages::order`] that is offered: 1 GiB.
    pub(super) const MAX_ORDER: u8 = 18;

    /// By the fields of a command or descriptor (VT-d 6.5.2.3): granularity, domain, address, address mask. None for a granularity
    /// that is reserved, and for more pages than are offered.
    pub(super) fn new(granularity: u64, domain: u16, address: u64, mask: u64) -> Option<Self> {
        match granularity {
            1 => Some(Self::All),
            2 => Some(Self::Domain(domain)),
            3 => {
                let order = u8::try_from(mask).ok().filter(|order| *order <= Self::MAX_ORDER)?;
                let first = address & !((0x1000 << order) - 1);
                Some(Self::Pages { domain, first, order })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_masks_are_of_the_upper_bits() {
        let scope = |mask| ContextScope::new(3, 7, 0x1a, mask).unwrap();
        for (mask, covered) in [(0, 1), (1, 2), (2, 4), (3, 8)] {
            let count = (0..=u16::MAX).filter(|device| scope(mask).covers(*device, None)).count();
            assert_eq!(count, covered);
            assert!(scope(mask).covers(0x1a, Some(1)));
        }
        assert!(scope(1).covers(0x1e, None) && !scope(1).covers(0x1b, None));
        assert!(ContextScope::Domain(7).covers(1, Some(7)) && !ContextScope::Domain(7).covers(1, None));
    }

    #[test]
    fn pages_are_aligned_and_not_too_many() {
        let scope = IotlbScope::new(3, 1, 0x1234_5678, 4);
        assert_eq!(scope, Some(IotlbScope::Pages { domain: 1, first: 0x1234_0000, order: 4 }));
        assert!(IotlbScope::new(3, 1, u64::MAX, 18).is_some());
        assert_eq!(IotlbScope::new(3, 1, 0, 19), None);
        assert_eq!(IotlbScope::new(0, 1, 0, 0), None);
        assert_eq!(ContextScope::new(0, 1, 0, 0), None);
    }
}
