//! Address kinds as types.
//!
//! A guest-virtual and a guest-physical address are both 64 bits wide and must never be mixed up, so
//! each is a type of its own. Neither has operators: what happens on overflow stands in the method's
//! name.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset inside the 4 KiB page.
            #[inline(always)]
            pub const fn page_offset(self) -> u64 {
                self.0 & 0xfff
            }

            /// The start of the 4 KiB page that holds the address.
            #[inline(always)]
            pub const fn page(self) -> Self {
                Self(self.0 & !0xfff)
            }

            /// The number of the 4 KiB page that holds the address.
            #[inline(always)]
            pub const fn page_number(self) -> u64 {
                self.0 >> 12
            }

            /// The address `offset` bytes on, wrapping at 2^64.
            #[inline(always)]
            pub const fn wrapping_add(self, offset: u64) -> Self {
                Self(self.0.wrapping_add(offset))
            }

            /// The address `offset` bytes on, or `None` past the end of the address space.
            #[inline(always)]
            pub const fn checked_add(self, offset: u64) -> Option<Self> {
                match self.0.checked_add(offset) {
                    Some(a) => Some(Self(a)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A guest-virtual address (Intel SDM: linear address): what guest code uses after segmentation.
    Gva
}
address! {
    /// A guest-physical address: what a guest page table yields, and where guest RAM and devices are.
    Gpa
}
