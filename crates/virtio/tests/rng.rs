//! The entropy device from the driver's side.

mod common;

use common::Guest;
use virtio::rng::Rng;

#[test]
fn buffers_are_filled_with_different_bytes() {
    let mut guest = Guest::new(Rng::new());
    guest.run(u64::MAX);
    let a = guest.request(0, &[], 64);
    let b = guest.request(0, &[], 64);
    assert_eq!((a.len(), b.len()), (64, 64));
    assert_ne!(a, b);
    assert!(guest.request(0, &[], 1 << 20).len() >= 256);
    assert_eq!(guest.request(0, &[b"nothing to write to"], 0), []);
}
