//! Capability chains, which stand behind an information structure (`struct vfio_info_cap_header`).

use iommufd::process::{Process, UserAddr};
use uapi::vfio::vfio_info_cap_header;
use zerocopy::IntoBytes;

use super::structure::plus;
use crate::Result;

/// Capabilities in the order in which they are found.
#[derive(Debug, Default)]
pub(super) struct Chain {
    bytes: Vec<u8>,
    /// Where the last one begins.
    last: Option<usize>,
}

impl Chain {
    /// Adds one: what follows its header.
    pub(super) fn push(&mut self, id: u32, version: u16, body: &[u8]) {
        let at = self.bytes.len();
        if let Some(last) = self.last {
            // Counted from the start of the structure once that is known.
            self.set_next(last, at as u32);
        }
        let header = vfio_info_cap_header { id: id as u16, version, next: 0 };
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.last = Some(at);
    }

    fn set_next(&mut self, header: usize, next: u32) {
        if let Some(bytes) = self.bytes.get_mut(header + 4..header + 8) {
            bytes.copy_from_slice(&next.to_ne_bytes());
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes it behind a structure of `size` bytes for which the caller has room of `argsz`: the new `argsz` and
    /// the offset of the first capability, which is 0 when they do not fit.
    pub(super) fn put(
        mut self,
        process: &dyn Process,
        at: UserAddr,
        size: usize,
        argsz: u32,
    ) -> Result<(u32, u32)> {
        let total = (size + self.bytes.len()) as u32;
        if argsz < total {
            return Ok((total, 0));
        }
        let mut header = 0;
        while self.last.is_some_and(|last| header < last) {
            let next = self.bytes.get(header + 4..header + 8).and_then(|next| next.first_chunk());
            let next = u32::from_ne_bytes(next.copied().unwrap_or_default());
            self.set_next(header, next + size as u32);
            header = next as usize;
        }
        process.write(plus(at, size)?, &self.bytes)?;
        Ok((argsz, size as u32))
    }
}
