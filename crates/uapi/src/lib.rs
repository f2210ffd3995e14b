//! The kernel's iommufd and VFIO interfaces as Rust types.
//!
//! The published binding crates stop at Linux 6.7 or so: they lack more than half of iommufd's commands and the newer
//! VFIO features. So these modules are generated from the headers of a newer kernel, all of them, rather than the
//! missing half: two crates that describe one header would give each structure two types. `generate.sh` writes them, a
//! test compares sizes, offsets and values with the headers.
//!
//! Names are the kernel's. Every structure can be made from bytes and viewed as bytes (`zerocopy`): none has hidden
//! padding. What the fields mean stands in the headers and in the kernel's `Documentation/userspace-api/iommufd.rst`
//! and `Documentation/driver-api/vfio.rst`.

#![forbid(unsafe_code)]
#![no_std]

/// `linux/iommufd.h`.
#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, dead_code, unused_imports, reason = "generated, with the kernel's names")]
#[rustfmt::skip]
pub mod iommufd;

/// The mock driver of the kernel's own iommufd tests: `drivers/iommu/iommufd/iommufd_test.h`.
#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, dead_code, unused_imports, reason = "generated, with the kernel's names")]
#[rustfmt::skip]
pub mod iommufd_test;

/// `linux/vfio.h`.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    dead_code,
    unused_imports,
    clippy::upper_case_acronyms,
    reason = "generated, with the kernel's names"
)]
#[rustfmt::skip]
pub mod vfio;

mod flexible;
mod test_cmd_payload;
