//! Any bytes as the rings of a running device: descriptors, available and used ring, and what they point to.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

#[path = "../../crates/virtio/tests/common/mod.rs"]
mod common;

use common::Guest;

/// Bytes that go to each of the three rings.
const PART: usize = 256;

fuzz_target!(|data: &[u8]| {
    let mut guest = Guest::sink(virtio::rng::Rng::new());
    guest.run(u64::MAX);
    let (desc, avail, used) = guest.ring_addresses(0);
    for (at, part) in [desc, avail, used, desc + PART as u64].into_iter().zip(data.chunks(PART)) {
        guest.mem.write_slice(part, GuestAddress(at)).unwrap();
    }
    guest.kick(0);
    // This waits for the device's thread, which has then seen all of it.
    guest.pci.reset();
});
