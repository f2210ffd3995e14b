//! Random bytes as solicitations of neighbours and routers.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| usernet::testing::any_ndp(data));
