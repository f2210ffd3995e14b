//! Features of a device of the host: migration, its log of DMA, low power (`VFIO_DEVICE_FEATURE`).

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
};

use iommufd::{
    domain::DirtySink,
    iova::{Iova, IovaRange, PAGE_SIZE},
    kernel::calls::{self, Plain},
};
use uapi::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET, vfio_device_feature_dma_logging_range, vfio_device_feature_mig_data_size,
    vfio_device_feature_mig_state, vfio_device_feature_migration, vfio_device_low_power_entry_with_wakeup,
    vfio_precopy_info,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    Errno, Result,
    device::{DmaLogging, LowPower},
    migration::{Migration, MigrationFlags, MigrationStream, PrecopyInfo, State},
};

/// Reads a feature that is one structure.
fn get<T: FromBytes + IntoBytes + Default>(device: BorrowedFd<'_>, feature: u32) -> Result<T> {
    let mut value = T::default();
    calls::feature(device, VFIO_DEVICE_FEATURE_GET | feature, value.as_mut_bytes())?;
    Ok(value)
}

/// Whether the device has a feature that can be set.
fn can_set(device: BorrowedFd<'_>, feature: u32) -> bool {
    calls::feature(device, VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_SET | feature, &mut []).is_ok()
}

/// Whether the device can sleep.
pub(super) fn has_low_power(device: BorrowedFd<'_>) -> bool {
    can_set(device, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)
}

/// Changes the power state.
pub(super) fn low_power(device: BorrowedFd<'_>, state: &LowPower) -> Result<()> {
    let set =
        |feature, structure: &mut [u8]| calls::feature(device, VFIO_DEVICE_FEATURE_SET | feature, structure);
    match state {
        LowPower::Enter => set(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, &mut []),
        LowPower::EnterWithWakeup(eventfd) => {
            let mut entry = vfio_device_low_power_entry_with_wakeup {
                wakeup_eventfd: eventfd.as_raw_fd(),
                ..Default::default()
            };
            set(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, entry.as_mut_bytes())
        }
        LowPower::Exit => set(VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, &mut []),
    }
}

/// A device's migration, as its driver offers it.
#[derive(Debug)]
pub(super) struct HostMigration {
    device: Arc<File>,
    flags: MigrationFlags,
}

impl HostMigration {
    /// Whether there is one.
    pub(super) fn probe(device: &Arc<File>) -> Option<Self> {
        let found =
            get::<vfio_device_feature_migration>(device.as_fd(), VFIO_DEVICE_FEATURE_MIGRATION).ok()?;
        let flags = MigrationFlags::from_bits_truncate(found.flags);
        flags.contains(MigrationFlags::STOP_COPY).then(|| Self { device: Arc::clone(device), flags })
    }
}

impl Migration for HostMigration {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn state(&self) -> Result<State> {
        let state: vfio_device_feature_mig_state =
            get(self.device.as_fd(), VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)?;
        State::try_from(state.device_state).map_err(|_| Errno::PROTO)
    }

    fn set_state(&self, to: State) -> Result<Option<Arc<dyn MigrationStream>>> {
        let stream = calls::set_migration_state(self.device.as_fd(), to as u32)?;
        Ok(stream.map(|fd| Arc::new(HostStream(fd.into())) as Arc<dyn MigrationStream>))
    }

    fn stop_copy_length(&self) -> Result<u64> {
        get::<vfio_device_feature_mig_data_size>(self.device.as_fd(), VFIO_DEVICE_FEATURE_MIG_DATA_SIZE)
            .map(|size| size.stop_copy_length)
    }
}

/// The descriptor of a state.
#[derive(Debug)]
struct HostStream(File);

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl MigrationStream for HostStream {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        (&self.0).read(to).map_err(errno)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        (&self.0).write(from).map_err(errno)
    }

    fn precopy_info(&self) -> Result<PrecopyInfo> {
        let mut info = vfio_precopy_info::default();
        calls::fixed(self.0.as_fd(), Plain::PrecopyInfo, &mut info)?;
        Ok(PrecopyInfo { initial_bytes: info.initial_bytes, dirty_bytes: info.dirty_bytes })
    }
}

/// A device's log of DMA, as its driver offers it.
#[derive(Debug)]
pub(super) struct HostLogging(Arc<File>);

/// Words of a bitmap that are asked for in one call.
const WORDS: usize = 512;

impl HostLogging {
    /// Whether there is one.
    pub(super) fn probe(device: &Arc<File>) -> Option<Self> {
        can_set(device.as_fd(), VFIO_DEVICE_FEATURE_DMA_LOGGING_START).then(|| Self(Arc::clone(device)))
    }
}

impl DmaLogging for HostLogging {
    fn start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64> {
        let ranges = ranges.iter().map(|range| {
            let length = range.length().ok_or(Errno::OVERFLOW)?;
            Ok(vfio_device_feature_dma_logging_range { iova: range.start().0, length })
        });
        calls::logging_start(self.0.as_fd(), page_size, &ranges.collect::<Result<Vec<_>>>()?)
    }

    fn stop(&self) {
        // A driver that does not stop notes nothing that anybody reads.
        let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
        let _ = calls::feature(self.0.as_fd(), flags, &mut []);
    }

    fn report(&self, range: IovaRange, sink: &mut dyn DirtySink) -> Result<()> {
        let step = WORDS as u64 * 64 * PAGE_SIZE;
        let mut at = range.start().0;
        loop {
            // Both ends belong to the range, which may end with the last address.
            let length = (range.last().0 - at).checked_add(1).map_or(step, |left| left.min(step));
            let mut bitmap = [0; WORDS];
            calls::logging_report(self.0.as_fd(), (at, length, PAGE_SIZE), &mut bitmap)?;
            for (word, bits) in (0u64..).zip(bitmap) {
                for bit in (0..64).filter(|bit| bits & 1 << bit != 0) {
                    let offset = (word * 64 + bit) * PAGE_SIZE;
                    if offset < length {
                        sink.dirty(Iova(at + offset), PAGE_SIZE.min(length - offset));
                    }
                }
            }
            match at.checked_add(length) {
                Some(next) if next <= range.last().0 => at = next,
                _ => return Ok(()),
            }
        }
    }
}
