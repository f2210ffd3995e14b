//! A device that does anything: the body of the fuzz target `vhost_rings`.

use std::io;

use usernet::tap::{LONGEST_FRAME, Offload, Tap};
use vm_memory::{Bytes, GuestAddress};

use super::VhostTap;
use super::software::{Dummy, EVERYTHING, Software};

/// Bytes of a frame from Ethernet to TCP.
const HEADERS: usize = 54;

/// Lets a device do what `data` says between the driver's own calls: use any buffer of either ring, with any length, or
/// write any index; write anything to a receive buffer; complain. Whatever happens, frames are no longer than
/// frames are, and a link that has ended stays so.
///
/// # Panics
/// Never: that is what the target is for.
pub fn any_completions(mut data: &[u8]) {
    let take = |data: &mut &[u8]| {
        let (&first, rest) = data.split_first()?;
        *data = rest;
        Some(first)
    };
    // Some devices lack what is optional.
    let lacks = u64::from(take(&mut data).unwrap_or(0));
    let software = Software::new(EVERYTHING & !((lacks & 1) << 15 | (lacks >> 1 & 1) << 29));
    let tap = super::attach::open(|memory| software.open(memory));
    let Ok(mut tap) = tap.and_then(|opened| VhostTap::new(&Dummy::new(), opened)) else {
        panic!("the device refuses nothing")
    };
    let mut used = [0u16; 2];
    let mut buffer = vec![0; LONGEST_FRAME];
    let mut ended: Option<String> = None;
    while let [operation, a, b, c, rest @ ..] = data {
        data = rest;
        let queue = usize::from(operation >> 7);
        let word = u16::from_le_bytes([*a, *b]);
        let outcome = match operation & 0x7f {
            0..32 => {
                // The id is mostly one that there is; the length mostly one that fits.
                let id = if c & 0x80 == 0 { u32::from(word % 512) } else { u32::from(word) };
                let length = if queue == 1 { u32::from(c & 0x40) } else { u32::from(*c) << (c & 15) };
                let place = 4 + u64::from(used[queue] % 512) * 8;
                software.write_used(queue, place, &[id.to_le_bytes(), length.to_le_bytes()].concat());
                used[queue] = used[queue].wrapping_add(1);
                software.write_used(queue, 2, &used[queue].to_le_bytes());
                Ok(())
            }
            32..36 => {
                used[queue] = word;
                software.write_used(queue, 2, &word.to_le_bytes());
                Ok(())
            }
            36..44 => {
                // Flags, an index or entries of the used ring.
                software.write_used(queue, u64::from(word), &[*c; 3]);
                Ok(())
            }
            44..56 => {
                write_header(&software, word % 512, *c);
                Ok(())
            }
            56..60 => {
                software.complain(queue);
                tap.acknowledge();
                Ok(())
            }
            60..88 => tap.receive(&mut buffer).map(|frame| {
                assert!(frame.is_none_or(|(length, _)| length <= LONGEST_FRAME));
            }),
            88..112 => {
                let length = usize::from(word).min(LONGEST_FRAME - HEADERS);
                let payload = buffer.get(..length).unwrap_or_default();
                tap.send(&[*c; HEADERS], payload, Offload::default()).map(|_| ())
            }
            _ => tap.flush(),
        };
        check(&mut ended, outcome);
    }
    check(&mut ended, tap.flush());
    assert_eq!(software.state().vrings.iter().filter(|vring| vring.running).count(), 2);
    drop(tap);
    assert!(software.state().vrings.iter().all(|vring| !vring.running));
}

/// An error ends a link, and every later error is that one.
fn check(ended: &mut Option<String>, outcome: io::Result<()>) {
    let Err(error) = outcome else { return };
    let error = error.to_string();
    assert_eq!(*ended.get_or_insert_with(|| error.clone()), error);
}

/// Writes a header that counts `buffers` to the receive buffer of a descriptor, which is where the table says.
fn write_header(software: &Software, id: u16, buffers: u8) {
    let table = software.state().vrings[0].addresses.map(|addresses| addresses.desc_table_addr);
    let (Some(memory), Some(table)) = (software.memory(), table) else { return };
    let descriptor = GuestAddress(table + u64::from(id) * 16);
    if let Ok(address) = memory.read_obj::<u64>(descriptor) {
        let mut header = [buffers; crate::vnet::HEADER];
        header[11] = 0;
        // An address of nothing is not written to.
        let _ = memory.write(&header, GuestAddress(u64::from_le(address)));
    }
}
