//! Random bytes as what a vhost-user front end says.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| taps::vhost_user::testing::any_messages(data));
