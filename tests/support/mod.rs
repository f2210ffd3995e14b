//! What the end-to-end tests share: kernels ([`kernels`], [`standin`]), and `ring3` processes that always end
//! ([`process`]).
//!
//! The tests run `ring3` as the user of whom the documentation speaks: without root, with an empty home. When they
//! run as root themselves, they start it as `nobody`.
//!
//! Environment:
//! - `RING3_TEST_CACHE`: an `XDG_CACHE_HOME` whose kernels are used (default: one in the target directory, filled
//!   by `ring3 kernel fetch`);
//! - `RING3_TEST_REQUIRE_KERNELS`, set: a test that finds no kernel fails instead of being skipped.

#![allow(dead_code, unreachable_pub, reason = "each test program is a crate that uses a part")]

pub mod kernels;
pub mod net;
pub mod process;
pub mod qemu;
pub mod selftests;
pub mod standin;
pub mod world;

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Says that a test is skipped and why, past the test harness, which hides what passing tests print.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

/// Where the tests keep what outlives one of them.
pub fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A temporary directory that the user of [`process::ring3`] owns.
pub fn temp_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("ring3-e2e-").tempdir().unwrap();
    give(dir.path());
    dir
}

/// Gives a file to the user of [`process::ring3`].
pub fn give(path: &Path) {
    if let Some(id) = process::other_user() {
        std::os::unix::fs::chown(path, Some(id), Some(id)).unwrap();
    }
}

/// A file with this content, readable by everyone.
pub fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    give(&path);
    path
}

/// Bytes that repeat nothing: xorshift64* from a fixed seed.
pub struct Noise(pub u64);

impl Noise {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Fills a buffer whose length is a multiple of 8.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}
