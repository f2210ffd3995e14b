//! Features of the other end's device: migration, and its log of DMA.

use std::sync::Arc;

use iommufd::domain::DirtySink;
use iommufd::iova::{Iova, IovaRange};
use uapi::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET, vfio_device_feature_dma_logging_range, vfio_device_feature_mig_data_size,
    vfio_device_feature_mig_state, vfio_device_feature_migration,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire_length;
use crate::device::DmaLogging;
use crate::migration::{Migration, MigrationFlags, MigrationStream, State};
use crate::user::connection::Connection;
use crate::user::wire::{self, Command, Feature, LoggingControl, LoggingReport, MigData};
use crate::user::{Errno, Result};

/// Sends DEVICE_FEATURE: what follows the header of the reply, at most `room` bytes.
fn feature(main: &Connection, flags: u32, data: &[u8], room: usize) -> Result<Vec<u8>> {
    let feature = Feature { argsz: wire_length(size_of::<Feature>() + room.max(data.len())), flags };
    let mut reply = main.request(Command::DeviceFeature, &[feature.as_bytes(), data], &[])?.payload;
    reply.drain(..size_of::<Feature>());
    Ok(reply)
}

/// Reads a feature that is one structure.
fn get<T: FromBytes + KnownLayout + Immutable>(main: &Connection, index: u32) -> Result<T> {
    let reply = feature(main, VFIO_DEVICE_FEATURE_GET | index, &[], size_of::<T>())?;
    T::read_from_prefix(&reply).map(|(value, _)| value).map_err(|_| Errno::PROTO)
}

/// Whether the server has a feature: what was found, or nothing when it says that it has not. A connection that ends is
/// an error.
fn if_there<T>(main: &Connection, found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(errno) => main.broken().map_or(Ok(None), |_| Err(errno)),
    }
}

/// A device's migration, as the server offers it.
#[derive(Debug)]
pub(super) struct RemoteMigration {
    main: Arc<Connection>,
    flags: MigrationFlags,
    max_transfer: usize,
}

impl RemoteMigration {
    /// Whether there is one.
    pub(super) fn probe(main: &Arc<Connection>, max_transfer: usize) -> Result<Option<Self>> {
        let found = get::<vfio_device_feature_migration>(main, VFIO_DEVICE_FEATURE_MIGRATION);
        Ok(if_there(main, found)?.map(|found| Self {
            main: Arc::clone(main),
            flags: MigrationFlags::from_bits_truncate(found.flags),
            max_transfer,
        }))
    }
}

impl Migration for RemoteMigration {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn state(&self) -> Result<State> {
        let state = get::<vfio_device_feature_mig_state>(&self.main, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)?;
        State::try_from(state.device_state).map_err(|_| Errno::PROTO)
    }

    fn set_state(&self, to: State) -> Result<Option<Arc<dyn MigrationStream>>> {
        let before = self.state()?;
        let state = vfio_device_feature_mig_state { device_state: to as u32, data_fd: -1 };
        let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
        feature(&self.main, flags, state.as_bytes(), 0)?;
        let saving = |state| matches!(state, State::PreCopy | State::PreCopyP2p | State::StopCopy);
        let new = to == State::Resuming || saving(to) && !saving(before);
        Ok(new.then(|| {
            let main = Arc::clone(&self.main);
            Arc::new(RemoteStream { main, max_transfer: self.max_transfer }) as Arc<dyn MigrationStream>
        }))
    }

    fn stop_copy_length(&self) -> Result<u64> {
        get::<vfio_device_feature_mig_data_size>(&self.main, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)
            .map(|size| size.stop_copy_length)
    }
}

/// The state of the other end's device. Which one it is, the server knows.
#[derive(Debug)]
struct RemoteStream {
    main: Arc<Connection>,
    max_transfer: usize,
}

impl MigrationStream for RemoteStream {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        let size = to.len().min(self.max_transfer);
        let asked = MigData { argsz: wire_length(size_of::<MigData>() + size), size: wire_length(size) };
        let reply = self.main.request(Command::MigDataRead, &[asked.as_bytes()], &[])?;
        let (came, data) = wire::split::<MigData>(&reply.payload)?;
        if data.len() > size || usize::try_from(came.size) != Ok(data.len()) {
            return Err(Errno::PROTO);
        }
        to.get_mut(..data.len()).unwrap_or_default().copy_from_slice(data);
        Ok(data.len())
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        let part = from.get(..self.max_transfer).unwrap_or(from);
        let head =
            MigData { argsz: wire_length(size_of::<MigData>() + part.len()), size: wire_length(part.len()) };
        self.main.request(Command::MigDataWrite, &[head.as_bytes(), part], &[])?;
        Ok(part.len())
    }
}

/// A device's log of DMA, as the server offers it.
#[derive(Debug)]
pub(super) struct RemoteLogging {
    main: Arc<Connection>,
    max_transfer: usize,
}

/// Bytes that one bit of a report stands for.
const PAGE: u64 = 4096;

impl RemoteLogging {
    /// Whether there is one.
    pub(super) fn probe(main: &Arc<Connection>, max_transfer: usize) -> Result<Option<Self>> {
        let flags =
            VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        let found = feature(main, flags, &[], 0);
        Ok(if_there(main, found)?.map(|_| Self { main: Arc::clone(main), max_transfer }))
    }
}

impl DmaLogging for RemoteLogging {
    fn start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64> {
        let num_ranges = u32::try_from(ranges.len()).map_err(|_| Errno::INVAL)?;
        let control = LoggingControl { page_size, num_ranges, reserved: 0 };
        let mut data = control.as_bytes().to_vec();
        for range in ranges {
            let length = range.length().ok_or(Errno::OVERFLOW)?;
            let range = vfio_device_feature_dma_logging_range { iova: range.start().0, length };
            data.extend_from_slice(range.as_bytes());
        }
        let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        let reply = feature(&self.main, flags, &data, 0)?;
        LoggingControl::read_from_prefix(&reply)
            .map(|(control, _)| control.page_size)
            .map_err(|_| Errno::PROTO)
    }

    fn stop(&self) {
        // A server that cannot be told notes nothing any more.
        let _ = feature(&self.main, VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, &[], 0);
    }

    fn report(&self, range: IovaRange, sink: &mut dyn DirtySink) -> Result<()> {
        // A page for each bit that a reply has room for.
        let most = u64::try_from(self.max_transfer / 2).unwrap_or(u64::MAX).saturating_mul(8 * PAGE);
        let mut at = range.start().0;
        loop {
            let rest = range.last().0 - at;
            let length = rest.checked_add(1).map_or(most, |rest| rest.min(most));
            self.report_part(at, length, sink)?;
            match at.checked_add(length) {
                Some(next) if next <= range.last().0 => at = next,
                _ => return Ok(()),
            }
        }
    }
}

impl RemoteLogging {
    fn report_part(&self, iova: u64, length: u64, sink: &mut dyn DirtySink) -> Result<()> {
        let asked = LoggingReport { iova, length, page_size: PAGE };
        let words = usize::try_from(length.div_ceil(PAGE).div_ceil(64)).map_err(|_| Errno::INVAL)?;
        let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
        let reply = feature(&self.main, flags, asked.as_bytes(), size_of::<LoggingReport>() + words * 8)?;
        let bitmap = reply.get(size_of::<LoggingReport>()..).ok_or(Errno::PROTO)?;
        if bitmap.len() < words * 8 {
            return Err(Errno::PROTO);
        }
        for (byte, bits) in (0u64..).zip(bitmap.iter().take(words * 8)) {
            for bit in (0..8).filter(|bit| bits & 1 << bit != 0) {
                let offset = (byte * 8 + bit) * PAGE;
                if offset < length {
                    sink.dirty(Iova(iova + offset), PAGE.min(length - offset));
                }
            }
        }
        Ok(())
    }
}
