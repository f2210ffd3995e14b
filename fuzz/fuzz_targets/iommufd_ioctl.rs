//! Any ioctls of a program on /dev/iommu, and what it may do with what they give it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| iommufd::testing::run_ioctls(data));
