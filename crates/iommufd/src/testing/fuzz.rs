//! Bodies of fuzz targets.

use super::{ARGUMENTS, LENGTH, MEMORY, MEMORY_FD, Program};
use crate::{caller::Caller, mock, process::UserAddr};

/// Takes numbers from the bytes of a fuzzer, which end some time.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Bytes<'_> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A number that is likely to mean something: small, near a boundary, an address of the program, or anything.
    pub(super) fn number(&mut self) -> Option<u64> {
        const NEAR: [u64; 8] = [0, 0x1000, 0x800, MEMORY, 0x100_0000, 0x8000_0000, u64::MAX, MEMORY + LENGTH];
        let choice = self.byte()?;
        let next = u64::from(self.byte()?);
        Some(match choice % 8 {
            0..=2 => next % 32,
            3 => 1 << (next % 64),
            4 | 5 => NEAR[usize::from(choice) / 8 % NEAR.len()].wrapping_add(next % 16).wrapping_sub(8),
            6 => NEAR[usize::from(choice) / 8 % NEAR.len()].wrapping_add((next % 16) << 12),
            _ => self.0.first_chunk().map_or(next, |bytes| u64::from_ne_bytes(*bytes)),
        })
    }
}

/// Any ioctls by a program, among other things that it may do with what they give it: reads, answers, closes, maps.
/// Nothing may panic, nor hang, nor stay pinned at the end.
pub fn run_ioctls(data: &[u8]) {
    let Ok(program) = Program::new() else { return };
    let context = mock::open();
    let mut bytes = Bytes(data);
    let mut mappings = Vec::new();
    while let Some(kind) = bytes.byte() {
        let step = match kind {
            0..=7 => close(&mut bytes, &program),
            8..=23 => transfer(&mut bytes, &program, kind % 2 == 0),
            24..=27 => map(&mut bytes, &context).map(|mapping| mappings.extend(mapping)),
            28..=31 => {
                mappings.clear();
                Some(())
            }
            _ => ioctl(&mut bytes, &program, &context, kind),
        };
        if step.is_none() {
            break;
        }
    }
    drop((mappings, context));
    for fd in 0..256 {
        let _ = program.close(fd);
    }
    program.assert_unpinned();
}

fn close(bytes: &mut Bytes<'_>, program: &Program) -> Option<()> {
    let _ = program.close(10 + i32::from(bytes.byte()? % 8));
    Some(())
}

fn transfer(bytes: &mut Bytes<'_>, program: &Program, read: bool) -> Option<()> {
    let fd = 10 + i32::from(bytes.byte()? % 8);
    let mut buffer = [0; 128];
    let length = usize::from(bytes.byte()? % 128);
    let from = bytes.number()?;
    if let (Ok(file), Some(buffer)) = (program.installed(fd), buffer.get_mut(..length)) {
        if let Some(first) = buffer.first_chunk_mut() {
            *first = from.to_ne_bytes();
        }
        let _ = if read { file.read(buffer) } else { file.write(buffer) };
    }
    Some(())
}

fn map(bytes: &mut Bytes<'_>, context: &crate::Context) -> Option<Option<crate::Mapping>> {
    use rustix::mm::{MapFlags, ProtFlags};
    let (offset, length) = (bytes.number()?, bytes.number()?);
    Some(context.mmap(offset, length, ProtFlags::READ, MapFlags::SHARED).ok())
}

fn ioctl(
    bytes: &mut Bytes<'_>,
    program: &Program,
    context: &std::sync::Arc<crate::Context>,
    kind: u8,
) -> Option<()> {
    // The numbers that there are, and a few around them.
    let command = match kind % 4 {
        0 => 0x3ba0,
        1 => 0x3b64 + u32::from(bytes.byte()? % 16),
        _ => 0x3b80 + u32::from(bytes.byte()? % 33),
    };
    let mut words = [0_u64; 10];
    for word in &mut words {
        *word = bytes.number()?;
    }
    let halves = bytes.byte()?;
    let mut args = [0; 80];
    for (index, (to, word)) in args.chunks_exact_mut(8).zip(&words).enumerate() {
        // Many fields have 32 bits.
        let word =
            if u32::from(halves) & 1 << (index % 8) != 0 { *word } else { *word << 32 | *word >> 32 & 0xff };
        to.copy_from_slice(&word.to_ne_bytes());
    }
    // Most structures are longer than 8 bytes and have the size that they say.
    let size = match bytes.byte()? {
        size @ 0..=80 => size,
        other => 8 + other % 10 * 8,
    };
    args[..4].copy_from_slice(&u32::from(size).to_ne_bytes());
    if command == 0x3ba0 {
        args[4..8].copy_from_slice(&u32::from(kind / 4 % 26).to_ne_bytes());
    }
    if command == 0x3b8f && kind & 64 != 0 {
        args[12..16].copy_from_slice(&MEMORY_FD.to_ne_bytes());
    }
    let arg = if kind == 255 { UserAddr(bytes.number()?) } else { ARGUMENTS };
    let _ = program.put(ARGUMENTS, &args);
    let _ = context.ioctl(program, command, arg);
    Some(())
}

/// Runs a target for about a second, from a fixed seed.
#[cfg(test)]
pub(super) fn for_a_second(target: fn(&[u8])) {
    use std::time::{Duration, Instant};
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let end = Instant::now() + Duration::from_secs(1);
    for round in 0.. {
        let data: Vec<u8> = (0..600).flat_map(|_| next().to_ne_bytes()).collect();
        target(&data);
        if round > 20 && Instant::now() > end {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_ioctls_do_no_harm() {
        for_a_second(run_ioctls);
    }
}
