//! Any register accesses, tables and queues of a guest with a VT-d unit, among accesses of its devices.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| machine::iommu::vtd::testing::drive(data));
