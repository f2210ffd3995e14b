//! `VFIO_DEVICE_FEATURE`.

use core::mem::offset_of;

use iommufd::{
    domain::DirtySink,
    iova::{Iova, IovaRange},
    process::{Process, UserAddr},
};
use uapi::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 as VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFO_V2,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET, vfio_device_feature, vfio_device_feature_dma_logging_control,
    vfio_device_feature_dma_logging_range, vfio_device_feature_dma_logging_report,
    vfio_device_feature_mig_data_size, vfio_device_feature_mig_state, vfio_device_feature_migration,
    vfio_device_low_power_entry_with_wakeup,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::{device_file::DeviceFile, migration_file::MigrationFile, structure, table::Call};
use crate::{
    Errno, Result,
    device::{DmaLogging, LowPower},
    migration::{Migration, MigrationFlags, State},
};

/// Where a feature's own data begins.
const DATA: usize = offset_of!(vfio_device_feature, data);
/// How many ranges one call may name: as many as fit a page, as in the kernel.
const MOST_RANGES: u32 = 4096 / size_of::<vfio_device_feature_dma_logging_range>() as u32;

const GET: u32 = VFIO_DEVICE_FEATURE_GET;
const SET: u32 = VFIO_DEVICE_FEATURE_SET;

/// A call, as far as all features have it in common.
struct Request<'a> {
    call: &'a Call<'a, DeviceFile>,
    argsz: u32,
    flags: u32,
}

/// What is left to be done of one.
enum Step {
    /// Nothing: it was only asked whether it could be done.
    Probed,
    Get,
    Set,
}

impl Request<'_> {
    /// Checks a request of a feature that knows `operations` and needs `size` bytes.
    fn step(&self, operations: u32, size: usize) -> Result<Step> {
        let asked = self.flags & (GET | SET);
        if asked & !operations != 0 {
            return Err(Errno::INVAL);
        }
        if self.flags & VFIO_DEVICE_FEATURE_PROBE != 0 {
            return Ok(Step::Probed);
        }
        if asked == 0 || (self.argsz as usize).saturating_sub(DATA) < size {
            return Err(Errno::INVAL);
        }
        Ok(if asked == GET { Step::Get } else { Step::Set })
    }

    fn process(&self) -> &dyn Process {
        self.call.process()
    }

    fn data<T: FromBytes + FromZeros + IntoBytes + Immutable>(&self) -> Result<T> {
        let mut value = T::new_zeroed();
        self.process().read(structure::plus(self.call.arg, DATA)?, value.as_mut_bytes())?;
        Ok(value)
    }

    fn respond<T: IntoBytes + Immutable>(&self, value: &T) -> Result<()> {
        self.process().write(structure::plus(self.call.arg, DATA)?, value.as_bytes())
    }
}

pub(super) fn feature(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let [argsz, flags]: [u32; 2] = structure::get(call.process(), call.arg, DATA)?;
    let known = VFIO_DEVICE_FEATURE_MASK | GET | SET | VFIO_DEVICE_FEATURE_PROBE;
    let both = flags & (GET | SET) == GET | SET && flags & VFIO_DEVICE_FEATURE_PROBE == 0;
    if flags & !known != 0 || both {
        return Err(Errno::INVAL);
    }
    let request = Request { call, argsz, flags };
    let index = flags & VFIO_DEVICE_FEATURE_MASK;
    let found = FEATURES.iter().find(|feature| feature.index == index).ok_or(Errno::NOTTY)?;
    (found.run)(&request).map(|()| 0)
}

/// A feature: a row of the table of what is supported.
pub(super) struct Feature {
    index: u32,
    pub(super) name: &'static str,
    run: fn(&Request<'_>) -> Result<()>,
    pub(super) support: &'static str,
}

impl Feature {
    pub(super) fn index(&self) -> u32 {
        self.index
    }
}

fn refused(_: &Request<'_>) -> Result<()> {
    Err(Errno::NOTTY)
}

/// The features, in the order of their numbers.
#[rustfmt::skip]
pub(super) static FEATURES: [Feature; 14] = [
    Feature { index: VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, name: "PCI_VF_TOKEN", run: vf_token, support: "full; ENOTTY unless it is a physical function" },
    Feature { index: VFIO_DEVICE_FEATURE_MIGRATION, name: "MIGRATION", run: migration, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, name: "MIG_DEVICE_STATE", run: device_state, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, name: "LOW_POWER_ENTRY", run: low_power, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, name: "LOW_POWER_ENTRY_WITH_WAKEUP", run: low_power_with_wakeup, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, name: "LOW_POWER_EXIT", run: low_power_exit, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_DMA_LOGGING_START, name: "DMA_LOGGING_START", run: logging_start, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, name: "DMA_LOGGING_STOP", run: logging_stop, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, name: "DMA_LOGGING_REPORT", run: logging_report, support: "full" },
    Feature { index: VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, name: "MIG_DATA_SIZE", run: data_size, support: "full" },
    Feature { index: uapi::vfio::VFIO_DEVICE_FEATURE_BUS_MASTER, name: "BUS_MASTER", run: refused, support: "refused: ENOTTY, as of every device that is not on a CDX bus" },
    Feature { index: uapi::vfio::VFIO_DEVICE_FEATURE_DMA_BUF, name: "DMA_BUF", run: refused, support: "refused: ENOTTY, a process cannot make dma-bufs" },
    Feature { index: VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFO_V2, name: "MIG_PRECOPY_INFOv2", run: precopy_info_v2, support: "full" },
    Feature { index: uapi::vfio::VFIO_DEVICE_FEATURE_ZPCI_ERROR, name: "ZPCI_ERROR", run: refused, support: "refused: ENOTTY, as on every machine that is not s390" },
];

fn vf_token(request: &Request<'_>) -> Result<()> {
    let token = &request.call.file.slot.token;
    if !token.is_physical() {
        return Err(Errno::NOTTY);
    }
    match request.step(SET, 16)? {
        Step::Probed => Ok(()),
        _ => token.set(request.data()?),
    }
}

/// The device's migration. ENOTTY when it has none.
fn migrates<'a>(request: &'a Request<'_>) -> Result<&'a dyn Migration> {
    request.call.file.slot.device.migration().ok_or(Errno::NOTTY)
}

fn migration(request: &Request<'_>) -> Result<()> {
    let migration = migrates(request)?;
    match request.step(GET, size_of::<vfio_device_feature_migration>())? {
        Step::Probed => Ok(()),
        _ => request.respond(&vfio_device_feature_migration { flags: migration.flags().bits() }),
    }
}

fn device_state(request: &Request<'_>) -> Result<()> {
    let migration = migrates(request)?;
    let mut args = match request.step(GET | SET, size_of::<vfio_device_feature_mig_state>())? {
        Step::Probed => return Ok(()),
        Step::Get => {
            let device_state = migration.state()? as u32;
            return request.respond(&vfio_device_feature_mig_state { device_state, data_fd: -1 });
        }
        Step::Set => request.data::<vfio_device_feature_mig_state>()?,
    };
    args.data_fd = -1;
    match migration.set_state(State::try_from(args.device_state)?) {
        Ok(stream) => {
            if let Some(stream) = stream {
                args.data_fd = request.call.caller.install(MigrationFile::new(stream)?)?;
            }
        }
        Err(errno) => {
            // The program learns where the device has stayed.
            args.device_state = migration.state().map_or(State::Error, |state| state) as u32;
            request.respond(&args)?;
            return Err(errno);
        }
    }
    request.respond(&args).inspect_err(|_| {
        if args.data_fd >= 0 {
            request.call.caller.uninstall(args.data_fd);
        }
    })
}

fn data_size(request: &Request<'_>) -> Result<()> {
    let migration = migrates(request)?;
    match request.step(GET, size_of::<vfio_device_feature_mig_data_size>())? {
        Step::Probed => Ok(()),
        _ => {
            let stop_copy_length = migration.stop_copy_length()?;
            request.respond(&vfio_device_feature_mig_data_size { stop_copy_length })
        }
    }
}

/// That a stream may say that it begins anew (`VFIO_PRECOPY_INFO_REINIT`), which none here does.
fn precopy_info_v2(request: &Request<'_>) -> Result<()> {
    let device = &request.call.file.slot.device;
    if device.migration().is_none_or(|migration| !migration.flags().contains(MigrationFlags::PRE_COPY)) {
        return Err(Errno::INVAL);
    }
    request.step(SET, 0).map(|_| ())
}

/// Changes the device's power state, if it has any (ENOTTY) and it is not only asked for.
fn power(request: &Request<'_>, size: usize, state: impl FnOnce() -> Result<LowPower>) -> Result<()> {
    let device = &request.call.file.slot.device;
    if !device.has_low_power() {
        return Err(Errno::NOTTY);
    }
    match request.step(SET, size)? {
        Step::Probed => Ok(()),
        _ => device.low_power(state()?),
    }
}

fn low_power(request: &Request<'_>) -> Result<()> {
    power(request, 0, || Ok(LowPower::Enter))
}

fn low_power_exit(request: &Request<'_>) -> Result<()> {
    power(request, 0, || Ok(LowPower::Exit))
}

fn low_power_with_wakeup(request: &Request<'_>) -> Result<()> {
    power(request, size_of::<vfio_device_low_power_entry_with_wakeup>(), || {
        let args: vfio_device_low_power_entry_with_wakeup = request.data()?;
        if args.wakeup_eventfd < 0 {
            return Err(Errno::INVAL);
        }
        Ok(LowPower::EnterWithWakeup(request.process().file(args.wakeup_eventfd)?))
    })
}

/// The device's log. ENOTTY when it has none.
fn logs<'a>(request: &'a Request<'_>) -> Result<&'a dyn DmaLogging> {
    request.call.file.slot.device.dma_logging().ok_or(Errno::NOTTY)
}

fn logging_start(request: &Request<'_>) -> Result<()> {
    let log = logs(request)?;
    if let Step::Probed = request.step(SET, size_of::<vfio_device_feature_dma_logging_control>())? {
        return Ok(());
    }
    let mut args: vfio_device_feature_dma_logging_control = request.data()?;
    if args.num_ranges == 0 || !args.page_size.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    if args.num_ranges > MOST_RANGES {
        return Err(Errno::TOOBIG);
    }
    let mut ranges = Vec::with_capacity(args.num_ranges as usize);
    for at in 0..args.num_ranges as usize {
        let mut range = vfio_device_feature_dma_logging_range::default();
        let size = size_of::<vfio_device_feature_dma_logging_range>();
        request.process().read(structure::plus(UserAddr(args.ranges), at * size)?, range.as_mut_bytes())?;
        if (range.iova | range.length) & (args.page_size - 1) != 0 {
            return Err(Errno::INVAL);
        }
        ranges.push(IovaRange::with_length(Iova(range.iova), range.length)?);
    }
    args.page_size = log.start(args.page_size, &ranges)?;
    request.respond(&args).inspect_err(|_| log.stop())
}

fn logging_stop(request: &Request<'_>) -> Result<()> {
    let log = logs(request)?;
    if !matches!(request.step(SET, 0)?, Step::Probed) {
        log.stop();
    }
    Ok(())
}

fn logging_report(request: &Request<'_>) -> Result<()> {
    let log = logs(request)?;
    if let Step::Probed = request.step(GET, size_of::<vfio_device_feature_dma_logging_report>())? {
        return Ok(());
    }
    let args: vfio_device_feature_dma_logging_report = request.data()?;
    if args.page_size < 4096 || !args.page_size.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    let range = IovaRange::with_length(Iova(args.iova), args.length)?;
    let mut bitmap = Bitmap {
        process: request.process(),
        at: UserAddr(args.bitmap),
        range,
        page_shift: args.page_size.trailing_zeros(),
        result: Ok(()),
    };
    log.report(range, &mut bitmap)?;
    bitmap.result
}

/// A bitmap in a caller's memory, in which bits are set.
struct Bitmap<'a> {
    process: &'a dyn Process,
    at: UserAddr,
    range: IovaRange,
    page_shift: u32,
    /// The first failure: after it nothing is set any more.
    result: Result<()>,
}

impl Bitmap<'_> {
    fn set(&self, first: u64, last: u64) -> Result<()> {
        let mut byte = first / 8;
        let mut buffer = [0; 512];
        while byte <= last / 8 {
            let count = (last / 8 - byte + 1).min(buffer.len() as u64);
            let part = buffer.get_mut(..count as usize).unwrap_or_default();
            let at = self.at.0.checked_add(byte).map(UserAddr).ok_or(Errno::FAULT)?;
            self.process.read(at, part)?;
            for (bits, number) in part.iter_mut().zip(byte..) {
                let low = first.saturating_sub(number * 8).min(7);
                let high = (last - number * 8).min(7);
                *bits |= u8::MAX << low & u8::MAX >> (7 - high);
            }
            self.process.write(at, part)?;
            byte += count;
        }
        Ok(())
    }
}

impl DirtySink for Bitmap<'_> {
    fn dirty(&mut self, iova: Iova, length: u64) {
        let last = Iova(iova.0.saturating_add(length.saturating_sub(1)));
        let part = IovaRange::new(iova, last).ok().and_then(|dirty| dirty.intersection(self.range));
        if let (Some(part), true) = (part, self.result.is_ok()) {
            let page = |iova: Iova| (iova.0 - self.range.start().0) >> self.page_shift;
            self.result = self.set(page(part.start()), page(part.last()));
        }
    }
}
