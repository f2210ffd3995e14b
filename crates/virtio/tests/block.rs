//! The disk from the driver's side.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{EVENT_IDX, Guest, INDIRECT_DESC, VERSION_1, WRITE};
use virtio::block::{Block, BlockError};

const RINGS: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;
const ANY: u64 = u64::MAX;
const SECTORS: u64 = 2048;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn disk(read_only: bool) -> (Guest, File) {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    // A part of a sector at the end does not count.
    file.set_len(SECTORS * 512 + 100).unwrap();
    let block = Block::new(file.try_clone().unwrap(), read_only, "a serial number that is too long").unwrap();
    let mut guest = Guest::new(block);
    guest.run(ANY);
    (guest, file)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Status of a request that carries data to the device.
fn send(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let answer = guest.request(0, &[&header(kind, sector), data], 1);
    assert_eq!(answer.len(), 1);
    answer[0]
}

/// Data and status of a request that brings data.
fn fetch(guest: &mut Guest, kind: u32, sector: u64, len: usize) -> (Vec<u8>, u8) {
    let mut answer = guest.request(0, &[&header(kind, sector)], len + 1);
    assert_eq!(answer.len(), len + 1);
    let status = answer.pop().unwrap();
    (answer, status)
}

#[test]
fn configuration() {
    let (mut guest, _) = disk(false);
    assert_eq!(u64::from_le_bytes(guest.read(0x2000)), SECTORS);
    assert_eq!(guest.read32(0x2000 + 20), 512);
    assert_eq!(guest.offered() & (1 << 5), 0);
    let (mut guest, _) = disk(true);
    assert_ne!(guest.offered() & (1 << 5), 0, "read-only");
}

#[test]
fn write_read_flush_id() {
    let (mut guest, file) = disk(false);
    let data: Vec<u8> = (0..20 * 512u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(send(&mut guest, OUT, 100, &data), OK);
    assert_eq!(send(&mut guest, FLUSH, 0, &[]), OK);
    let mut on_host = vec![0; data.len()];
    file.read_exact_at(&mut on_host, 100 * 512).unwrap();
    assert!(on_host == data);
    assert_eq!(fetch(&mut guest, IN, 100, data.len()), (data, OK));
    let (id, status) = fetch(&mut guest, GET_ID, 0, 20);
    assert_eq!((&id[..], status), (&b"a serial number that"[..], OK));
}

#[test]
fn buffers_may_be_split_anywhere() {
    let (mut guest, file) = disk(false);
    file.write_all_at(&[7; 512], 512).unwrap();
    let head = guest.put(&header(IN, 1));
    let answer = guest.alloc(1024);
    guest.offer(
        0,
        &[
            (head, 3, 0),
            (head + 3, 13, 0),
            (answer, 1, WRITE),
            (answer + 1, 500, WRITE),
            (0, 0, WRITE),
            (answer + 501, 12, WRITE),
        ],
    );
    guest.kick(0);
    assert_eq!(guest.wait_used(0).1, 513);
    let got = guest.get(answer, 513);
    assert_eq!(got, [vec![7; 512], vec![OK]].concat());
}

#[test]
fn discard_and_zeroes() {
    let (mut guest, file) = disk(false);
    file.write_all_at(&[9; 64 * 512], 0).unwrap();
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &[range(8, 8, 0), range(24, 8, 1)].concat()), OK);
    assert_eq!(send(&mut guest, DISCARD, 0, &range(40, 8, 0)), OK);
    for (sector, byte) in [(7, 9), (8, 0), (15, 0), (16, 9), (24, 0), (32, 9), (40, 0), (48, 9)] {
        assert_eq!(fetch(&mut guest, IN, sector, 512), (vec![byte; 512], OK), "sector {sector}");
    }
    assert_eq!(send(&mut guest, DISCARD, 0, &range(40, 8, 1)), UNSUPP);
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &range(40, 8, 2)), UNSUPP);
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &range(SECTORS - 1, 2, 0)), IOERR);
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &range(0, u32::MAX, 0)), IOERR);
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &range(0, 8, 0)[..15]), IOERR);
}

#[test]
fn bounds_and_nonsense() {
    let (mut guest, _) = disk(false);
    assert_eq!(fetch(&mut guest, IN, SECTORS - 1, 512).1, OK);
    assert_eq!(fetch(&mut guest, IN, SECTORS - 1, 1024).1, IOERR);
    assert_eq!(fetch(&mut guest, IN, u64::MAX, 512).1, IOERR);
    assert_eq!(fetch(&mut guest, IN, u64::MAX / 512 + 1, 512).1, IOERR);
    assert_eq!(fetch(&mut guest, IN, 0, 100).1, IOERR, "no whole sector");
    assert_eq!(send(&mut guest, OUT, SECTORS, &[0; 512]), IOERR);
    assert_eq!(send(&mut guest, 77, 0, &[]), UNSUPP);
    // A header cut short, and no room for a status.
    assert_eq!(guest.request(0, &[&[0; 15]], 1), [IOERR]);
    assert_eq!(guest.request(0, &[&header(FLUSH, 0)], 0), []);
    assert_eq!(fetch(&mut guest, IN, 0, 512).1, OK, "still at work");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let (mut guest, file) = disk(true);
    assert_eq!(send(&mut guest, OUT, 0, &[1; 512]), IOERR);
    assert_eq!(send(&mut guest, WRITE_ZEROES, 0, &range(0, 8, 0)), IOERR);
    assert_eq!(send(&mut guest, DISCARD, 0, &range(0, 8, 0)), IOERR);
    assert_eq!(fetch(&mut guest, IN, 0, 512), (vec![0; 512], OK));
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512 + 100);
}

#[test]
fn a_broken_chain_needs_a_reset_and_a_reset_helps() {
    let (mut guest, _) = disk(false);
    guest.offer(0, &[(1 << 40, 16, 0), (0x1000, 1, WRITE)]);
    guest.kick(0);
    guest.expect_needs_reset();
    guest.run(RINGS);
    assert_eq!(fetch(&mut guest, IN, 0, 512).1, OK);
}

#[test]
fn what_is_no_disk_is_refused() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Block::new(null, true, ""), Err(BlockError::Kind)));
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(matches!(Block::new(fd.into(), true, ""), Err(BlockError::Size(0))));
}
