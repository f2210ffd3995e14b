//! DEVICE_FEATURE: migration, and the log of what the device writes to.

use iommufd::domain::DirtySink;
use iommufd::iova::{Iova, IovaRange};
use uapi::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MASK,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION,
    VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, vfio_device_feature_dma_logging_range,
    vfio_device_feature_mig_data_size, vfio_device_feature_mig_state, vfio_device_feature_migration,
};
use zerocopy::{FromBytes, IntoBytes};

use super::session::{Reply, Session, check_argsz, length_u32};
use crate::migration::{Migration, State};
use crate::user::wire::{self, Feature, LoggingControl, LoggingReport};
use crate::user::{Errno, Result};

/// Ranges that a log may be restricted to.
const MAX_RANGES: usize = 1024;

/// What a feature offers.
fn methods(index: u32) -> u32 {
    match index {
        VFIO_DEVICE_FEATURE_MIGRATION | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE => VFIO_DEVICE_FEATURE_GET,
        VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET,
        VFIO_DEVICE_FEATURE_DMA_LOGGING_START | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => {
            VFIO_DEVICE_FEATURE_SET
        }
        VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => VFIO_DEVICE_FEATURE_GET,
        _ => 0,
    }
}

/// # Errors
/// ENOTTY for a feature that the device does not have, EINVAL for a method that the feature does not, and what the
/// feature itself says.
pub(super) fn handle(session: &mut Session, payload: &[u8]) -> Result<Reply> {
    const METHODS: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET;
    let (feature, data) = wire::split::<Feature>(payload)?;
    let index = feature.flags & VFIO_DEVICE_FEATURE_MASK;
    if feature.flags & !(VFIO_DEVICE_FEATURE_MASK | METHODS | VFIO_DEVICE_FEATURE_PROBE) != 0 {
        return Err(Errno::INVAL);
    }
    let wanted = feature.flags & METHODS;
    let offered = if exists(session, index) { methods(index) } else { 0 };
    if offered == 0 {
        return Err(Errno::NOTTY);
    }
    if wanted & !offered != 0 {
        return Err(Errno::INVAL);
    }
    if feature.flags & VFIO_DEVICE_FEATURE_PROBE != 0 {
        return Ok(Reply { payload: payload.to_vec(), fds: Vec::new() });
    }
    match wanted {
        VFIO_DEVICE_FEATURE_GET => get(session, feature, index, data),
        VFIO_DEVICE_FEATURE_SET => set(session, feature, index, data),
        _ => Err(Errno::INVAL),
    }
}

/// Whether the device has a feature.
fn exists(session: &Session, index: u32) -> bool {
    match index {
        VFIO_DEVICE_FEATURE_MIGRATION
        | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
        | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => session.device.migration().is_some(),
        // A device that keeps no log has all its writes noted here, where they pass.
        _ => true,
    }
}

/// The reply to GET: `data` behind the header.
fn found(feature: Feature, data: &[u8]) -> Result<Reply> {
    let length = size_of::<Feature>() + data.len();
    check_argsz(feature.argsz, length)?;
    let feature = Feature { argsz: length_u32(length), ..feature };
    Ok(Reply { payload: [feature.as_bytes(), data].concat(), fds: Vec::new() })
}

fn migration(session: &Session) -> Result<&dyn Migration> {
    session.device.migration().ok_or(Errno::NOTTY)
}

fn get(session: &Session, feature: Feature, index: u32, data: &[u8]) -> Result<Reply> {
    match index {
        VFIO_DEVICE_FEATURE_MIGRATION => {
            let flags = migration(session)?.flags().bits();
            found(feature, vfio_device_feature_migration { flags }.as_bytes())
        }
        VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => {
            let state = migration(session)?.state()? as u32;
            let state = vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
            found(feature, state.as_bytes())
        }
        VFIO_DEVICE_FEATURE_MIG_DATA_SIZE => {
            let stop_copy_length = migration(session)?.stop_copy_length()?;
            found(feature, vfio_device_feature_mig_data_size { stop_copy_length }.as_bytes())
        }
        VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => report(session, feature, data),
        _ => Err(Errno::INVAL),
    }
}

fn set(session: &mut Session, feature: Feature, index: u32, data: &[u8]) -> Result<Reply> {
    match index {
        VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => {
            let (asked, _) = wire::split::<vfio_device_feature_mig_state>(data)?;
            let state = State::try_from(asked.device_state)?;
            let stream = migration(session)?.set_state(state)?;
            match state {
                State::StopCopy | State::PreCopy | State::PreCopyP2p | State::Resuming => {
                    // STOP_COPY after PRE_COPY goes on with the same stream.
                    if stream.is_some() {
                        session.stream = stream;
                    }
                }
                _ => session.stream = None,
            }
            Ok(same(feature, data))
        }
        VFIO_DEVICE_FEATURE_DMA_LOGGING_START => start(session, feature, data),
        VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => {
            match session.device.dma_logging() {
                Some(log) => log.stop(),
                None => session.memory.dirty().stop(),
            }
            Ok(same(feature, data))
        }
        _ => Err(Errno::INVAL),
    }
}

/// The reply to SET: what came.
fn same(feature: Feature, data: &[u8]) -> Reply {
    Reply { payload: [feature.as_bytes(), data].concat(), fds: Vec::new() }
}

fn start(session: &Session, feature: Feature, data: &[u8]) -> Result<Reply> {
    let (mut control, rest) = wire::split::<LoggingControl>(data)?;
    let count = usize::try_from(control.num_ranges).ok().filter(|count| *count <= MAX_RANGES);
    let length = count.ok_or(Errno::INVAL)? * size_of::<vfio_device_feature_dma_logging_range>();
    let entries = rest.get(..length).ok_or(Errno::INVAL)?;
    let mut ranges = Vec::new();
    for entry in entries.chunks_exact(size_of::<vfio_device_feature_dma_logging_range>()) {
        let range =
            vfio_device_feature_dma_logging_range::read_from_bytes(entry).map_err(|_| Errno::INVAL)?;
        ranges.push(IovaRange::with_length(Iova(range.iova), range.length)?);
    }
    if !control.page_size.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    control.page_size = match session.device.dma_logging() {
        Some(log) => log.start(control.page_size, &ranges)?,
        None => session.memory.dirty().start(ranges)?,
    };
    Ok(Reply { payload: [feature.as_bytes(), control.as_bytes(), entries].concat(), fds: Vec::new() })
}

fn report(session: &Session, feature: Feature, data: &[u8]) -> Result<Reply> {
    let (asked, _) = wire::split::<LoggingReport>(data)?;
    let range = IovaRange::with_length(Iova(asked.iova), asked.length)?;
    if !asked.page_size.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    let bits = asked.length.div_ceil(asked.page_size);
    let words = usize::try_from(bits.div_ceil(64))
        .ok()
        .filter(|words| words.saturating_mul(8) <= session.max_transfer);
    let words = words.ok_or(Errno::INVAL)?;
    // Looked at first: what is reported is forgotten.
    check_argsz(feature.argsz, size_of::<Feature>() + size_of::<LoggingReport>() + words * 8)?;
    let mut bitmap = Bitmap { range, page_size: asked.page_size, words: vec![0; words] };
    match session.device.dma_logging() {
        Some(log) => log.report(range, &mut bitmap)?,
        None => session.memory.dirty().report(range, &mut bitmap)?,
    }
    found(feature, &[asked.as_bytes(), bitmap.words.as_bytes()].concat())
}

/// The bitmap of a report.
struct Bitmap {
    range: IovaRange,
    page_size: u64,
    words: Vec<u64>,
}

impl DirtySink for Bitmap {
    fn dirty(&mut self, iova: Iova, length: u64) {
        let Ok(range) = IovaRange::with_length(iova, length) else { return };
        let Some(range) = range.intersection(self.range) else { return };
        let first = (range.start().0 - self.range.start().0) / self.page_size;
        let last = (range.last().0 - self.range.start().0) / self.page_size;
        for bit in first..=last {
            let word = usize::try_from(bit / 64).ok().and_then(|word| self.words.get_mut(word));
            if let Some(word) = word {
                *word |= 1 << (bit % 64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_a_report() {
        let range = IovaRange::with_length(Iova(0x10_0000), 0x8_0000).unwrap();
        let mut bitmap = Bitmap { range, page_size: 4096, words: vec![0; 2] };
        bitmap.dirty(Iova(0x10_0000), 1);
        bitmap.dirty(Iova(0x10_0000 + 64 * 4096 - 1), 2);
        bitmap.dirty(Iova(0xf_0000), 0x1_0000);
        bitmap.dirty(Iova(0x17_f000), 0x10_0000);
        assert_eq!(bitmap.words, [1 | 1 << 63, 1 | 1 << 63]);
        // Smaller pages than were noted: each of them.
        let mut small = Bitmap { range, page_size: 1024, words: vec![0; 8] };
        small.dirty(Iova(0x10_0000), 4096);
        assert_eq!(small.words[0], 0xf);
    }
}
