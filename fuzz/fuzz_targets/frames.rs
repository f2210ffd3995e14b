//! Random bytes as frames from a guest, right enough to reach every protocol.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| usernet::testing::any_frames(data));
