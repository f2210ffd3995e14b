//! Random bytes from a client of the stream socket.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| taps::stream::testing::any_client(data));
