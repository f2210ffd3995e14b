//! C's flexible array members.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Stands where a structure ends in an array whose length is given elsewhere: what follows the structure is of type `T`.
/// It has no size, only `T`'s alignment. The name is the one that the generated modules use.
#[repr(transparent)]
#[derive(Debug, Default, Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct __IncompleteArrayField<T>([T; 0]);
