//! Random bytes as the memory of a vhost-user guest: descriptors, rings and buffers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| taps::vhost_user::testing::any_rings(data));
