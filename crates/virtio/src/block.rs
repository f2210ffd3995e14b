//! The block device on a raw file or block device of the host (virtio 1.2, section 5.2).
//!
//! # Theory of operation
//!
//! A request is a 16-byte header, data in one direction, and a status byte that the device writes last. The
//! data moves with `preadv` and `pwritev` between the file and the guest's own pages. Writes are cached by the
//! host until the driver flushes (`fdatasync`); the feature FLUSH tells it so. Discarding punches a hole, and
//! writing zeroes asks the file system for zeroes; where the file cannot do that, zeroes are written.
//!
//! One thread serves one queue, one request after the other. Requests outside the disk, of odd length or
//! unknown type, and writes to a read-only disk fail with a status; a request too broken to have a status byte
//! is given back empty.

use std::fs::File;
use std::io;

use disk::{Clear, Disk as HostDisk, SECTOR};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice, feature, read_config_bytes};
use crate::queue::{Buffers, Chain, mark_dirty};
use crate::serve::serve_queue;
use crate::worker::Worker;

/// Logical block size shown to the guest. The physical one is 4096.
const BLOCK_SIZE: u32 = 512;
const QUEUE_SIZES: [u16; 1] = [256];
/// Data segments of one request: the queue less header and status.
const SEG_MAX: u32 = 254;
/// Sectors of one discard or write-zeroes segment: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Segments of one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: usize = 16;
/// Most pieces of one vectored read or write (`IOV_MAX` of Linux).
const IOV_MAX: usize = 1024;
const HEADER_SIZE: usize = 16;

pub use disk::DiskError as BlockError;

/// The file behind the device.
#[derive(Debug)]
struct Disk {
    host: HostDisk,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    worker: Option<Worker<()>>,
}

impl Block {
    /// A disk of the whole sectors of `file`, which is open for reading, and for writing unless `read_only`.
    /// `id` is the serial number that the guest sees, cut to 20 bytes.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn new(file: File, read_only: bool, id: &str) -> Result<Self, BlockError> {
        let host = HostDisk::new(file, read_only)?;
        let mut id_bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id_bytes.iter_mut().zip(id.as_bytes()) {
            *to = *from;
        }
        let disk = Disk { host, id: id_bytes };
        Ok(Block { disk, worker: None })
    }

    /// `struct virtio_blk_config` up to the write-zeroes fields (virtio 1.2, section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &self.disk.host.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &BLOCK_SIZE.to_le_bytes());
        // Topology: 2^3 logical blocks in a physical one, aligned, best in units of 8.
        put(24, &[3, 0]);
        put(26, &8u16.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // Discard alignment, in sectors.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl<M: GuestMem> VirtioDevice<M> for Block {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn pci_class(&self) -> u32 {
        // Mass storage controller, other.
        0x01_80_00
    }

    fn name(&self) -> &str {
        "virtio-blk"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_FLUSH];
        let writable = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let rest: &[u32] = if self.disk.host.read_only() { &[VIRTIO_BLK_F_RO] } else { &writable };
        always.iter().chain(rest).fold(0, |features, bit| features | feature(*bit))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<(), ActivateError> {
        let queue = activation.take_queue(0).ok_or(ActivateError::MissingQueue(0))?;
        let mem = activation.mem;
        let mut disk = self.disk.try_clone()?;
        self.worker = Some(serve_queue("virtio-blk", queue, move |chain| disk.handle(&mem, chain))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// How a request ends, other than well.
enum Failure {
    Unsupported,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Io(error)
    }
}

fn out_of_range() -> Failure {
    Failure::Io(io::Error::new(io::ErrorKind::InvalidInput, "request outside the disk"))
}

impl Disk {
    /// The same disk for a thread of its own.
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Disk { host: self.host.try_clone()?, id: self.id })
    }

    /// Carries out one request; returns how many bytes of the writable part are filled.
    fn handle<M: GuestMem>(&mut self, mem: &M, chain: &Chain<M>) -> usize {
        let mem = mem.memory();
        // The status is the last writable byte, what is before it is data.
        let Some(room) = chain.writable.len().checked_sub(1) else { return 0 };
        let mut header = [0; HEADER_SIZE];
        let whole = chain.readable.read(&*mem, 0, &mut header) == HEADER_SIZE;
        let result = if whole { self.execute(&*mem, header, chain, room) } else { Err(out_of_range()) };
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io(error)) => {
                tracing::debug!(%error, "disk request fails");
                VIRTIO_BLK_S_IOERR
            }
        };
        chain.writable.write(&*mem, room, &[status as u8]);
        // The length used counts from the start of the writable part, so it always spans to the status.
        room + 1
    }

    fn execute<M: GuestMem>(
        &mut self,
        mem: &M::M,
        header: [u8; HEADER_SIZE],
        chain: &Chain<M>,
        room: usize,
    ) -> Result<(), Failure> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => self.transfer(mem, &chain.writable, 0, room, sector, true),
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let len = chain.readable.len() - HEADER_SIZE;
                self.transfer(mem, &chain.readable, HEADER_SIZE, len, sector, false)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.host.flush()?;
                Ok(())
            }
            VIRTIO_BLK_T_GET_ID => {
                let id = self.id.get(..self.id.len().min(room)).unwrap_or(&[]);
                chain.writable.write(mem, 0, id);
                Ok(())
            }
            VIRTIO_BLK_T_DISCARD => self.ranges(mem, &chain.readable, true),
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(mem, &chain.readable, false),
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.host.read_only() {
            Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into())
        } else {
            Ok(())
        }
    }

    /// The place in the file of a range, if it is on the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let sectors = len / SECTOR;
        let end = sector.checked_add(sectors).filter(|end| *end <= self.host.sectors());
        match end {
            Some(_) if len.is_multiple_of(SECTOR) => Ok(sector * SECTOR),
            _ => Err(out_of_range()),
        }
    }

    /// Moves `len` bytes between the disk at `sector` and a part of the chain.
    fn transfer<G: vm_memory::GuestMemory>(
        &mut self,
        mem: &G,
        buffers: &Buffers,
        skip: usize,
        len: usize,
        sector: u64,
        to_guest: bool,
    ) -> Result<(), Failure> {
        let place = self.place(sector, len as u64)?;
        let mut done = 0;
        while done < len {
            let slices = buffers.slices(mem, skip + done, len - done);
            let slices = slices.get(..IOV_MAX).unwrap_or(&slices);
            let parts: Vec<_> = slices.iter().map(FileVolatileSlice::from_volatile_slice).collect();
            let at = place + done as u64;
            let result = if to_guest {
                self.host.file_mut().read_vectored_at_volatile(&parts, at)
            } else {
                self.host.file_mut().write_vectored_at_volatile(&parts, at)
            };
            match result {
                Ok(0) => return Err(Failure::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(moved) => {
                    if to_guest {
                        mark_dirty(slices, moved);
                    }
                    done += moved;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Discards ranges, or makes them zero.
    fn ranges<G: vm_memory::GuestMemory>(
        &self,
        mem: &G,
        readable: &Buffers,
        discard: bool,
    ) -> Result<(), Failure> {
        self.check_writable()?;
        let len = readable.len() - HEADER_SIZE;
        let count = len / RANGE_SIZE;
        if !len.is_multiple_of(RANGE_SIZE) || count == 0 || count > MAX_RANGES as usize {
            return Err(out_of_range());
        }
        for number in 0..count {
            let mut range = [0; RANGE_SIZE];
            readable.read(mem, HEADER_SIZE + number * RANGE_SIZE, &mut range);
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
                return Err(Failure::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(out_of_range());
            }
            let bytes = u64::from(sectors) * SECTOR;
            let place = self.place(sector, bytes)?;
            let how = match (discard, unmap) {
                (true, _) => Clear::Discard,
                (false, true) => Clear::ZeroAndUnmap,
                (false, false) => Clear::Zero,
            };
            self.host.clear(place, bytes, how)?;
        }
        Ok(())
    }
}
