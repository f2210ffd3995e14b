//! The union inside `struct iommu_test_cmd`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The union of what the operations of `IOMMU_TEST_CMD` take and give, as bytes: its members differ in size, so that
/// as a Rust union it could not be viewed as bytes. [`Self::as_member`] and [`Self::set_member`] give it a member's type
/// (`iommu_test_cmd__bindgen_ty_1__bindgen_ty_*`, in the order of the header).
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[allow(non_camel_case_types, reason = "the name that the generated structure uses")]
pub struct iommu_test_cmd__bindgen_ty_1 {
    words: [u64; 6],
}

impl iommu_test_cmd__bindgen_ty_1 {
    /// The union seen as its member `T`; none when `T` is larger than the union.
    pub fn as_member<T: FromBytes>(&self) -> Option<T> {
        T::read_from_prefix(self.words.as_bytes()).ok().map(|(member, _)| member)
    }

    /// Replaces the member `T`, and leaves the bytes after it. Whether it fits.
    pub fn set_member<T: IntoBytes + Immutable>(&mut self, member: &T) -> bool {
        member.write_to_prefix(self.words.as_mut_bytes()).is_ok()
    }
}

/// As `sizeof` says in C.
const _: () = assert!(size_of::<crate::iommufd_test::iommu_test_cmd>() == 72);
