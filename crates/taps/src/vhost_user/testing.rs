//! The bodies of this module's fuzz targets.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use usernet::tap::{LONGEST_FRAME, Offload};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::features::Features;
use super::memory::Shared;
use super::pair::{Pair, Which};
use super::{Source, links};

/// What is written to a socket that nobody reads from yet.
const MOST: usize = 64 << 10;
/// The guest's memory; its first page has the rings of one queue, its second one those of the other.
const MEMORY: usize = 64 << 10;
const PAGE: u64 = 4096;

/// Any bytes as what a front end says.
///
/// # Panics
/// Never: that is what the target is for. Unless there are no descriptors.
pub fn any_messages(data: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("descriptors");
    let (_links, control) = links(Source::Connected(ours), 2, 1500).expect("descriptors");
    theirs.write_all(data.get(..MOST).unwrap_or(data)).expect("room for a little");
    drop(theirs);
    control.run();
}

/// Any bytes as the memory of a guest: descriptors, rings and buffers.
///
/// # Panics
/// Never: that is what the target is for. Unless there is no memory.
pub fn any_rings(data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    let (choice, data) = data.split_first().unwrap_or((&0, &[]));
    memory.write_slice(data.get(..MEMORY).unwrap_or(data), GuestAddress(0)).expect("it fits");
    let shared = Arc::new(Shared::of(memory));
    let mut pair = Pair::new(1500).expect("a size that can be");
    let off = if choice & 1 == 0 { 0 } else { 1 << Features::MRG_RXBUF | 1 << Features::EVENT_IDX };
    pair.set_features(Features(Features::offered(1).0 & !off));
    for (which, page) in [(Which::ToGuest, 0), (Which::FromGuest, PAGE)] {
        let ring = pair.ring(which);
        ring.queue.set_size(16);
        ring.enabled = true;
        ring.kick = eventfd(0, EventfdFlags::CLOEXEC).ok().map(File::from);
        let at = |offset| GuestAddress(page + offset);
        // Index 0 and what is at 2: a used ring that claims anything.
        let _ = ring.place(&shared.memory, at(0), at(256), at(512));
    }
    pair.shared = Some(shared);
    let mut buffer = vec![0; LONGEST_FRAME];
    for length in [60, 1514, 9000, 100] {
        // Whatever the rings say, they have 16 entries.
        for _ in 0..20 {
            if pair.receive(&mut buffer).is_none() {
                break;
            }
        }
        let _ = pair.send(&[0; 54], &buffer[..length], Offload::default());
        pair.flush();
    }
}
