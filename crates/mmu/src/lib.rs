//! x86 page tables as data: formats, walks, permissions, accessed and dirty bits.

mod addr;

pub use addr::{Gpa, Gva};
