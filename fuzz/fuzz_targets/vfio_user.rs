//! Any bytes as what a vfio-user client says to a server, or a server to a client.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio::user::testing;

fuzz_target!(|data: &[u8]| {
    let Some((side, data)) = data.split_first() else { return };
    if side & 1 == 0 {
        testing::serve_anything(data);
    } else {
        testing::connect_to_anything(data);
    }
});
