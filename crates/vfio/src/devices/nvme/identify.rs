//! What the controller and its namespace are: the data of Identify (section 5.15) and of log pages (section 5.14).

use std::sync::atomic::{AtomicU64, Ordering};

use super::admin::{MAX_EVENT_REQUESTS, WARNING_TEMPERATURE};
use super::controller::{Shared, VERSION};
use super::spec::{
    ALL_NAMESPACES, BLOCK, CQ_ENTRY_BITS, MAX_TRANSFER_BITS, NAMESPACE, SQ_ENTRY_BITS, Status, admin, io, log,
};

/// Bytes of every structure of Identify.
const SIZE: usize = 4096;
/// The model's name.
const MODEL: &str = "ring3 NVMe controller";

/// Bytes of a structure.
struct Data(Vec<u8>);

impl Data {
    fn new(size: usize) -> Self {
        Self(vec![0; size])
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// Text, filled with spaces.
    fn text(&mut self, offset: usize, size: usize, text: &str) {
        let padded = text.bytes().chain(std::iter::repeat(b' '));
        for (to, from) in self.0.iter_mut().skip(offset).take(size).zip(padded) {
            *to = from;
        }
    }
}

/// The data for `what` (CNS).
///
/// # Errors
/// INVALID_FIELD for what does not exist, INVALID_NAMESPACE for a namespace that cannot be.
pub(super) fn data(shared: &Shared, what: u32, namespace: u32) -> Result<Vec<u8>, Status> {
    match what {
        0x00 => match namespace {
            NAMESPACE => Ok(self::namespace(shared)),
            ALL_NAMESPACES => Ok(common(shared)),
            _ => Err(Status::INVALID_NAMESPACE),
        },
        0x01 => Ok(controller(shared)),
        // The namespaces above the given one.
        0x02 => {
            let mut data = Data::new(SIZE);
            if namespace >= ALL_NAMESPACES - 1 {
                return Err(Status::INVALID_NAMESPACE);
            }
            if namespace < NAMESPACE {
                data.put(0, &NAMESPACE.to_le_bytes());
            }
            Ok(data.0)
        }
        // How the namespace is called.
        0x03 if namespace == NAMESPACE => {
            const UUID: u8 = 3;
            let mut data = Data::new(SIZE);
            data.put(0, &[UUID, 16]);
            data.put(4, &uuid(&shared.serial));
            Ok(data.0)
        }
        0x03 => Err(Status::INVALID_NAMESPACE),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// A name made of the serial number: a UUID of version 8 (RFC 9562), of an FNV-1a hash of 128 bits.
fn uuid(serial: &str) -> [u8; 16] {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let hash = serial.bytes().fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let mut uuid = hash.to_be_bytes();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn controller(shared: &Shared) -> Vec<u8> {
    let mut data = Data::new(SIZE);
    data.put(0, &super::VENDOR.to_le_bytes());
    data.put(2, &super::VENDOR.to_le_bytes());
    data.text(4, 20, &shared.serial);
    data.text(24, 40, MODEL);
    data.text(64, 8, env!("CARGO_PKG_VERSION"));
    data.put(77, &[MAX_TRANSFER_BITS]);
    data.put(80, &VERSION.to_le_bytes());
    // An I/O controller.
    data.put(111, &[1]);
    // One command may be aborted at a time, zero-based; events, zero-based.
    data.put(258, &[0, MAX_EVENT_REQUESTS as u8 - 1]);
    // One slot of firmware, read-only.
    data.put(260, &[3]);
    // Log pages: the effects of commands, and offsets.
    data.put(261, &[0b110]);
    // Temperatures: warning, critical.
    data.put(266, &WARNING_TEMPERATURE.to_le_bytes());
    data.put(268, &373u16.to_le_bytes());
    // Sizes of queue entries: required and largest.
    let (sq, cq) = (SQ_ENTRY_BITS as u8, CQ_ENTRY_BITS as u8);
    data.put(512, &[sq << 4 | sq, cq << 4 | cq]);
    data.put(516, &NAMESPACE.to_le_bytes());
    // Optional commands: compare, dataset management, write zeroes, verify.
    data.put(520, &0b1000_1101u16.to_le_bytes());
    // There is a volatile write cache; Flush takes all namespaces.
    data.put(525, &[0b111]);
    // What a write is atomic for, zero-based: one block.
    let name = format!(
        "nqn.2014.08.org.nvmexpress:{vendor:04x}{vendor:04x}{serial:<20}{MODEL:<40}",
        vendor = super::VENDOR,
        serial = shared.serial
    );
    data.put(768, name.as_bytes());
    // The one power state: 25 W.
    data.put(2048, &2500u16.to_le_bytes());
    data.0
}

/// What holds for every namespace that there could be.
fn common(shared: &Shared) -> Vec<u8> {
    let mut data = Data::new(SIZE);
    // Thin provisioning; hints for good performance are valid.
    data.put(24, &[0b1_0001]);
    // What was deallocated reads as zero; write zeroes may deallocate.
    data.put(33, &[0b1001]);
    // Best in units of 4 KiB, and of 128 KiB at a time; zero-based blocks.
    for offset in [64, 66, 68, 70] {
        data.put(offset, &7u16.to_le_bytes());
    }
    data.put(72, &255u16.to_le_bytes());
    data.put(99, &[u8::from(shared.disk.read_only())]);
    // The format: blocks of 512 bytes.
    data.put(128, &(BLOCK.trailing_zeros() << 16).to_le_bytes());
    data.0
}

fn namespace(shared: &Shared) -> Vec<u8> {
    let mut data = Data(common(shared));
    let blocks = shared.disk.sectors().to_le_bytes();
    for offset in [0, 8, 16] {
        data.put(offset, &blocks);
    }
    data.put(48, &(shared.disk.sectors() * BLOCK).to_le_bytes());
    data.0
}

/// A log page.
///
/// # Errors
/// INVALID_LOG_PAGE.
pub(super) fn log_page(shared: &Shared, id: u8) -> Result<Vec<u8>, Status> {
    match id {
        // No error is kept.
        log::ERRORS => Ok(Data::new(64).0),
        log::HEALTH => Ok(health(shared)),
        log::FIRMWARE => {
            let mut data = Data::new(512);
            data.put(0, &[1]);
            data.text(8, 8, env!("CARGO_PKG_VERSION"));
            Ok(data.0)
        }
        log::EFFECTS => Ok(effects()),
        _ => Err(Status::INVALID_LOG_PAGE),
    }
}

fn health(shared: &Shared) -> Vec<u8> {
    let mut data = Data::new(512);
    // 37 degrees Celsius. All of the spare blocks; a warning at a tenth.
    data.put(1, &310u16.to_le_bytes());
    data.put(3, &[100, 10]);
    let counters = &shared.counters;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    // Data is counted in thousands of blocks, rounded up.
    data.put(32, &count(&counters.blocks_read).div_ceil(1000).to_le_bytes());
    data.put(48, &count(&counters.blocks_written).div_ceil(1000).to_le_bytes());
    data.put(64, &count(&counters.reads).to_le_bytes());
    data.put(80, &count(&counters.writes).to_le_bytes());
    data.0
}

/// Which commands there are, and which change the namespace's contents.
fn effects() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES: u32 = 3;
    let mut data = Data::new(4096);
    for opcode in [
        admin::DELETE_SQ,
        admin::CREATE_SQ,
        admin::GET_LOG_PAGE,
        admin::DELETE_CQ,
        admin::CREATE_CQ,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
    ] {
        data.put(4 * usize::from(opcode), &SUPPORTED.to_le_bytes());
    }
    for (opcode, effect) in [
        (io::FLUSH, SUPPORTED),
        (io::WRITE, CHANGES),
        (io::READ, SUPPORTED),
        (io::COMPARE, SUPPORTED),
        (io::WRITE_ZEROES, CHANGES),
        (io::DATASET_MANAGEMENT, CHANGES),
        (io::VERIFY, SUPPORTED),
    ] {
        data.put(1024 + 4 * usize::from(opcode), &effect.to_le_bytes());
    }
    data.0
}
