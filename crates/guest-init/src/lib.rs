//! What `ring3` and the first process of its guest agree on: the [`spec`] that the host puts into the
//! initramfs, and the lines of the [`control`] port. The process itself is this crate's binary.

#![forbid(unsafe_code)]

pub mod control;
pub mod spec;
