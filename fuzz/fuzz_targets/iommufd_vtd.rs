//! Any guest of the software VT-d unit of crate `iommufd`, and any use that a program makes of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| iommufd::testing::run_vtd(data));
