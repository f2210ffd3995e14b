//! Random bytes as accesses of a device's regions, its configuration space among them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vfio::doors::testing::fuzz_regions(data));
