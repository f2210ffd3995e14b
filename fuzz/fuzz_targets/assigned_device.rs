//! Any device given to a guest, and any accesses of the guest to its configuration space and BARs.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| machine::assigned::testing::drive(data));
