//! Random deeds of a vhost-net device on its driver's rings.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| taps::testing::any_completions(data));
