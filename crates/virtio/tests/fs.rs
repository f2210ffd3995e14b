//! The file system from the driver's side: FUSE messages over the queues.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{Guest, WRITE};
use virtio::fs::{Fs, FsConfig, FsError};

const REQUESTS: usize = 1;
const HIGH_PRIORITY: usize = 0;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const DESTROY: u32 = 38;
const READDIRPLUS: u32 = 44;

const EIO_ROFS: i32 = -30;
const ENOSYS: i32 = -38;

struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ring3-fs-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn share(root: &std::path::Path) -> Fs {
    let config = FsConfig { tag: "host".to_owned(), root: root.to_owned(), timeout: Duration::from_secs(9) };
    Fs::new(&config).unwrap()
}

fn guest(root: &std::path::Path) -> Guest {
    let mut guest = Guest::new(share(root));
    guest.run(u64::MAX);
    guest
}

fn header(opcode: u32, node: u64, body: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(40 + body as u32).to_le_bytes());
    bytes.extend_from_slice(&opcode.to_le_bytes());
    bytes.extend_from_slice(&77u64.to_le_bytes());
    bytes.extend_from_slice(&node.to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes
}

/// Error and body of the answer to a request.
fn ask(guest: &mut Guest, opcode: u32, node: u64, body: &[u8], room: usize) -> (i32, Vec<u8>) {
    let mut answer = guest.request(REQUESTS, &[&header(opcode, node, body.len()), body], 16 + room);
    let body = answer.split_off(16);
    assert_eq!(u32_at(&answer, 0) as usize, 16 + body.len(), "length");
    assert_eq!(u64_at(&answer, 8), 77, "unique");
    (u32_at(&answer, 4) as i32, body)
}

fn ok(guest: &mut Guest, opcode: u32, node: u64, body: &[u8], room: usize) -> Vec<u8> {
    let (error, body) = ask(guest, opcode, node, body, room);
    assert_eq!(error, 0, "opcode {opcode}");
    body
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn init(guest: &mut Guest) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [7u32, 38, 1 << 17, 0x73ff_fffb] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    body.extend_from_slice(&[0; 48]);
    ok(guest, INIT, 0, &body, 64)
}

/// Node and the rest of struct fuse_entry_out.
fn lookup(guest: &mut Guest, parent: u64, name: &str) -> (u64, Vec<u8>) {
    let out = ok(guest, LOOKUP, parent, &[name.as_bytes(), b"\0"].concat(), 128);
    (u64_at(&out, 0), out)
}

#[test]
fn configuration_and_init() {
    let dir = TempDir::new("init");
    let mut guest = guest(&dir.0);
    assert_eq!(guest.read::<6>(0x2000), *b"host\0\0");
    assert_eq!(guest.read32(0x2000 + 36), 1);
    let out = init(&mut guest);
    assert_eq!(u32_at(&out, 0), 7);
    assert_eq!(u32_at(&out, 20), 1 << 20, "max_write");
    let flags = u32_at(&out, 12);
    assert_eq!(flags & (1 << 16), 0, "no writeback");
    assert_ne!(flags & (1 << 13), 0, "readdirplus");
    assert_eq!(u32_at(&out, 28) & 0xffff, 256, "max_pages");
}

#[test]
fn a_tree_is_read() {
    let dir = TempDir::new("read");
    let big: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
    std::fs::create_dir(dir.0.join("sub")).unwrap();
    std::fs::write(dir.0.join("sub/big"), &big).unwrap();
    std::os::unix::fs::symlink("sub/big", dir.0.join("link")).unwrap();
    let mut guest = guest(&dir.0);
    init(&mut guest);

    let (sub, out) = lookup(&mut guest, 1, "sub");
    assert_eq!(u32_at(&out, 40 + 60) & 0o170_000, 0o040_000, "mode");
    assert_eq!(u64_at(&out, 16), 9, "entry timeout");
    let (file, out) = lookup(&mut guest, sub, "big");
    assert_eq!(u64_at(&out, 40 + 8), big.len() as u64);
    let (nothing, out) = lookup(&mut guest, sub, "nothing");
    assert_eq!((nothing, u64_at(&out, 16)), (0, 9), "a negative entry is cached");
    let (link, _) = lookup(&mut guest, 1, "link");
    assert_eq!(ok(&mut guest, READLINK, link, &[], 256), b"sub/big");
    let attr = ok(&mut guest, GETATTR, file, &[0; 16], 104);
    assert_eq!(u64_at(&attr, 16 + 8), big.len() as u64);
    assert_eq!(u32_at(&ok(&mut guest, STATFS, 1, &[], 80), 44), 255, "name length");

    let open = ok(&mut guest, OPEN, file, &[0; 8], 16);
    let handle = u64_at(&open, 0);
    assert_eq!(u32_at(&open, 8) & 2, 2, "keep cache");
    // Into pages, as the driver gives them.
    let mut read = Vec::new();
    while read.len() < big.len() {
        let size = 1u32 << 20;
        let mut body = words(&[handle, read.len() as u64]);
        body.extend_from_slice(&size.to_le_bytes());
        body.extend_from_slice(&[0; 20]);
        let request = guest.put(&[header(READ, file, body.len()), body].concat());
        let answer = guest.alloc(16);
        let mut buffers = vec![(request, 80, 0), (answer, 16, WRITE)];
        let pages: Vec<u64> = (0..256).map(|_| guest.alloc(4096)).collect();
        buffers.extend(pages.iter().rev().map(|page| (*page, 4096, WRITE)));
        guest.offer(REQUESTS, &buffers);
        guest.kick(REQUESTS);
        let (_, len) = guest.wait_used(REQUESTS);
        let data: Vec<u8> = pages.iter().rev().flat_map(|page| guest.get(*page, 4096)).collect();
        assert!(len > 16, "at {}", read.len());
        read.extend_from_slice(&data[..len as usize - 16]);
    }
    assert!(read == big);
    ok(&mut guest, RELEASE, file, &words(&[handle, 0, 0]), 0);
    assert_eq!(ask(&mut guest, RELEASE, file, &words(&[handle, 0, 0]), 0).0, -9);

    // Forgets have no answer.
    guest.request(HIGH_PRIORITY, &[&header(FORGET, file, 8), &words(&[1])], 0);
    assert_eq!(ask(&mut guest, GETATTR, file, &[0; 16], 104).0, -116, "ESTALE");
    // Destroy has none either from this server; the device lives on.
    guest.request(REQUESTS, &[&header(DESTROY, 0, 0)], 16);
    assert_ne!(lookup(&mut guest, 1, "sub").0, 0);
}

#[test]
fn directories_are_listed() {
    let dir = TempDir::new("list");
    for number in 0..300 {
        std::fs::write(dir.0.join(format!("file-{number}")), b"").unwrap();
    }
    let mut guest = guest(&dir.0);
    init(&mut guest);
    let handle = u64_at(&ok(&mut guest, OPENDIR, 1, &[0; 8], 16), 0);
    let mut names = std::collections::HashSet::new();
    let mut offset = 0;
    loop {
        let mut body = words(&[handle, offset]);
        body.extend_from_slice(&4096u32.to_le_bytes());
        body.extend_from_slice(&[0; 20]);
        let out = ok(&mut guest, READDIRPLUS, 1, &body, 4096);
        if out.is_empty() {
            break;
        }
        let mut at = 0;
        while at < out.len() {
            let node = u64_at(&out, at);
            let dirent = at + 128;
            offset = u64_at(&out, dirent + 8);
            let len = u32_at(&out, dirent + 16) as usize;
            let name = String::from_utf8(out[dirent + 24..dirent + 24 + len].to_vec()).unwrap();
            assert_eq!(node == 0, name == "." || name == "..", "{name}");
            assert!(names.insert(name));
            at = (dirent + 24 + len + 7) & !7;
        }
    }
    assert_eq!(names.len(), 302);
    ok(&mut guest, RELEASEDIR, 1, &words(&[handle, 0, 0]), 0);
}

#[test]
fn nothing_can_be_changed() {
    let dir = TempDir::new("readonly");
    std::fs::write(dir.0.join("file"), b"unchanged").unwrap();
    let before = std::fs::metadata(dir.0.join("file")).unwrap().modified().unwrap();
    let mut guest = guest(&dir.0);
    init(&mut guest);
    let (file, _) = lookup(&mut guest, 1, "file");
    let name = b"name\0other\0".to_vec();
    let with = |len: usize| [vec![0; len], name.clone()].concat();
    let xattr = [&4u32.to_le_bytes()[..], &[0; 4], b"user.x\0data"].concat();
    let write = [words(&[0, 0]), 4u32.to_le_bytes().to_vec(), vec![0; 20], b"data".to_vec()].concat();
    let changes: Vec<(u32, u64, Vec<u8>)> = vec![
        (4, file, vec![0; 88]),
        (6, 1, name.clone()),
        (8, 1, with(16)),
        (9, 1, with(8)),
        (10, 1, b"file\0".to_vec()),
        (11, 1, b"file\0".to_vec()),
        (12, 1, [words(&[1]), b"file\0other\0".to_vec()].concat()),
        (13, 1, [words(&[file]), b"other\0".to_vec()].concat()),
        (16, file, write),
        (21, file, xattr),
        (24, file, b"user.x\0".to_vec()),
        (35, 1, with(16)),
        (43, file, vec![0; 32]),
        (45, 1, [words(&[1, 0]), b"file\0other\0".to_vec()].concat()),
    ];
    for (opcode, node, body) in changes {
        assert_eq!(ask(&mut guest, opcode, node, &body, 256).0, EIO_ROFS, "opcode {opcode}");
    }
    // O_WRONLY, O_RDWR, O_TRUNC.
    for flags in [1u32, 2, 0o1000, 0x8001] {
        let body = [&flags.to_le_bytes()[..], &[0; 4]].concat();
        assert_eq!(ask(&mut guest, OPEN, file, &body, 16).0, EIO_ROFS, "flags {flags:#o}");
    }
    assert_eq!(
        ask(&mut guest, 22, file, &[&[8, 0, 0, 0, 0, 0, 0, 0], &b"user.x\0"[..]].concat(), 64).0,
        ENOSYS
    );
    assert_eq!(ask(&mut guest, 4242, 1, &[], 64).0, ENOSYS);
    assert_eq!(std::fs::read(dir.0.join("file")).unwrap(), b"unchanged");
    assert_eq!(std::fs::metadata(dir.0.join("file")).unwrap().modified().unwrap(), before);
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1);
}

#[test]
fn the_hosts_kernel_windows_do_not_hang() {
    let mut guest = guest("/".as_ref());
    init(&mut guest);
    for name in ["proc", "sys", "dev"] {
        let (node, _) = lookup(&mut guest, 1, name);
        assert_ne!(node, 0);
        let handle = u64_at(&ok(&mut guest, OPENDIR, node, &[0; 8], 16), 0);
        let mut body = words(&[handle, 0]);
        body.extend_from_slice(&65536u32.to_le_bytes());
        body.extend_from_slice(&[0; 20]);
        let out = ok(&mut guest, READDIRPLUS, node, &body, 65536);
        assert_eq!(out.is_empty(), name != "dev");
    }
}

#[test]
fn nonsense_is_answered_or_dropped() {
    let dir = TempDir::new("nonsense");
    let mut guest = guest(&dir.0);
    guest.request(REQUESTS, &[b"short"], 64);
    guest.request(REQUESTS, &[&header(LOOKUP, 1, 3), b"abc"], 64);
    guest.request(REQUESTS, &[&header(READ, 1, 1 << 30), b"abc"], 64);
    guest.request(REQUESTS, &[&header(READ, 99, 40), &[0xff; 40]], 64);
    guest.request(REQUESTS, &[&header(LOOKUP, 1, 4), b"abc\0"], 3);
    guest.request(REQUESTS, &[&header(LOOKUP, u64::MAX, 4), b"abc\0"], 256);
    guest.request(REQUESTS, &[], 64);
    init(&mut guest);
    guest.set_status(0);
    guest.run(u64::MAX);
    init(&mut guest);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let config =
        |tag: &str, root: &str| FsConfig { tag: tag.to_owned(), root: root.into(), timeout: Duration::ZERO };
    assert!(matches!(Fs::new(&config("", "/")), Err(FsError::Tag(_))));
    assert!(matches!(Fs::new(&config(&"x".repeat(37), "/")), Err(FsError::Tag(_))));
    assert!(Fs::new(&config(&"x".repeat(36), "/")).is_ok());
    for root in ["/nowhere/at/all", "/dev/null"] {
        let error = Fs::new(&config("host", root)).unwrap_err();
        assert!(error.to_string().contains(root), "{error}");
    }
}
