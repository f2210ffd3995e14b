//! Commands that move data (section 6).

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use disk::Clear;
use zerocopy::IntoBytes;

use super::controller::Shared;
use super::prp;
use super::spec::{
    ALL_NAMESPACES, BLOCK, Command, DatasetRange, MAX_TRANSFER, NAMESPACE, Status, io as opcode,
};

/// A bit of dword 12: Write Zeroes may deallocate.
const DEALLOCATE: u32 = 1 << 25;
/// A bit of dword 12: the command ends when the medium has its data.
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
/// A bit of dword 11: Dataset Management deallocates.
const DATASET_DEALLOCATE: u32 = 1 << 2;

/// Carries out one command. `buffer` is the worker's, for data on its way.
pub(super) fn execute(shared: &Shared, command: &Command, buffer: &mut Vec<u8>) -> Result<(), Status> {
    let known = [NAMESPACE, ALL_NAMESPACES].contains(&command.namespace);
    match command.opcode {
        opcode::FLUSH if known => shared.disk.flush().map_err(|error| failed(&error, Status::WRITE_FAULT)),
        _ if command.namespace != NAMESPACE => Err(Status::INVALID_NAMESPACE),
        opcode::READ => read(shared, command, buffer),
        opcode::WRITE => write(shared, command, buffer),
        opcode::COMPARE => compare(shared, command, buffer),
        opcode::VERIFY => {
            let (place, length) = range(shared, command)?;
            fetch(shared, buffer, place, length.min(MAX_TRANSFER))?;
            Ok(())
        }
        opcode::WRITE_ZEROES => {
            let (place, length) = range(shared, command)?;
            check_writable(shared)?;
            let how = if command.cdw12 & DEALLOCATE != 0 { Clear::ZeroAndUnmap } else { Clear::Zero };
            let cleared = shared.disk.clear(place, length, how);
            cleared.map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            persist(shared, command)
        }
        opcode::DATASET_MANAGEMENT => dataset(shared, command),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// What the host said, and what the driver is told.
fn failed(error: &io::Error, status: Status) -> Status {
    tracing::warn!(%error, "a disk fails");
    status
}

fn check_writable(shared: &Shared) -> Result<(), Status> {
    if shared.disk.read_only() { Err(Status::WRITE_PROTECTED) } else { Ok(()) }
}

/// Where on the disk, and how many bytes.
fn place(shared: &Shared, start: u64, blocks: u64) -> Result<(u64, u64), Status> {
    let end = start.checked_add(blocks).filter(|end| *end <= shared.disk.sectors());
    end.map(|_| (start * BLOCK, blocks * BLOCK)).ok_or(Status::OUT_OF_RANGE)
}

fn range(shared: &Shared, command: &Command) -> Result<(u64, u64), Status> {
    let start = u64::from(command.cdw10) | u64::from(command.cdw11) << 32;
    place(shared, start, u64::from(command.cdw12 & 0xffff) + 1)
}

/// The same, for commands with data.
fn data_range(shared: &Shared, command: &Command) -> Result<(u64, u64), Status> {
    let (place, length) = range(shared, command)?;
    if length > MAX_TRANSFER { Err(Status::INVALID_FIELD) } else { Ok((place, length)) }
}

/// As much of the buffer as a command needs.
fn room(buffer: &mut Vec<u8>, length: u64) -> &mut [u8] {
    let length = usize::try_from(length.min(MAX_TRANSFER)).unwrap_or(0);
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    buffer.get_mut(..length).unwrap_or_default()
}

/// Reads the disk. What a file lacks at its end is zero.
fn fetch<'a>(
    shared: &Shared,
    buffer: &'a mut Vec<u8>,
    place: u64,
    length: u64,
) -> Result<&'a mut [u8], Status> {
    let data = room(buffer, length);
    let mut done = 0;
    while done < data.len() {
        let rest = data.get_mut(done..).unwrap_or_default();
        match shared.disk.file().read_at(rest, place + done as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(&error, Status::READ_ERROR)),
        }
    }
    Ok(data)
}

fn read(shared: &Shared, command: &Command, buffer: &mut Vec<u8>) -> Result<(), Status> {
    let (place, length) = data_range(shared, command)?;
    let segments = prp::segments(&*shared.link, command, length)?;
    let data = fetch(shared, buffer, place, length)?;
    prp::scatter(&*shared.link, &segments, data)?;
    shared.counters.reads.fetch_add(1, Ordering::Relaxed);
    shared.counters.blocks_read.fetch_add(length / BLOCK, Ordering::Relaxed);
    Ok(())
}

fn write(shared: &Shared, command: &Command, buffer: &mut Vec<u8>) -> Result<(), Status> {
    let (place, length) = data_range(shared, command)?;
    check_writable(shared)?;
    let segments = prp::segments(&*shared.link, command, length)?;
    let data = room(buffer, length);
    prp::gather(&*shared.link, &segments, data)?;
    shared.disk.file().write_all_at(data, place).map_err(|error| failed(&error, Status::WRITE_FAULT))?;
    shared.counters.writes.fetch_add(1, Ordering::Relaxed);
    shared.counters.blocks_written.fetch_add(length / BLOCK, Ordering::Relaxed);
    persist(shared, command)
}

/// Waits for the medium if the command or the driver's configuration says so.
fn persist(shared: &Shared, command: &Command) -> Result<(), Status> {
    if command.cdw12 & FORCE_UNIT_ACCESS != 0 || !shared.write_cache.load(Ordering::SeqCst) {
        shared.disk.flush().map_err(|error| failed(&error, Status::WRITE_FAULT))?;
    }
    Ok(())
}

fn compare(shared: &Shared, command: &Command, buffer: &mut Vec<u8>) -> Result<(), Status> {
    let (place, length) = data_range(shared, command)?;
    let segments = prp::segments(&*shared.link, command, length)?;
    let mut theirs = vec![0; usize::try_from(length).unwrap_or(0)];
    prp::gather(&*shared.link, &segments, &mut theirs)?;
    let ours = fetch(shared, buffer, place, length)?;
    if *ours == *theirs { Ok(()) } else { Err(Status::COMPARE_FAILURE) }
}

fn dataset(shared: &Shared, command: &Command) -> Result<(), Status> {
    const MAX_RANGES: usize = 256;
    let count = usize::from(command.cdw10.to_le_bytes()[0]) + 1;
    let mut ranges = [DatasetRange::default(); MAX_RANGES];
    let ranges = ranges.get_mut(..count).unwrap_or_default();
    let segments = prp::segments(&*shared.link, command, size_of_val(ranges) as u64)?;
    prp::gather(&*shared.link, &segments, ranges.as_mut_bytes())?;
    if command.cdw11 & DATASET_DEALLOCATE == 0 {
        // The rest are hints that nothing is made of.
        return Ok(());
    }
    check_writable(shared)?;
    // All are looked at before anything is thrown away.
    let places: Result<Vec<_>, _> =
        ranges.iter().map(|range| place(shared, range.start, range.blocks.into())).collect();
    for (place, length) in places? {
        let cleared = shared.disk.clear(place, length, Clear::Discard);
        cleared.map_err(|error| failed(&error, Status::WRITE_FAULT))?;
    }
    Ok(())
}
