//! Loading a kernel straight into guest memory, without firmware.
//!
//! [`KernelImage`] is a kernel file: a bzImage, whose payload is decompressed on the host, or an ELF vmlinux.
//! Both end as one ELF file with fixed physical addresses. [`load`] copies it to those addresses, puts
//! the initramfs as high as the kernel allows, writes the command line and what the boot
//! protocol hands over, and returns the [`BootState`] that the first vCPU starts with.
//!
//! The bzImage's own 64-bit entry point, its decompressor, is never run: the decompressed kernel's
//! entry point takes the same arguments. Its relocations (which follow the ELF file in the payload) are not applied, so
//! the kernel runs where it is linked: address space randomization of the kernel image is the decompressor's work.
//!
//! Two protocols:
//! - **Linux, 64-bit** ([`linux64`]): long mode, identity-mapped; RSI points to `boot_params`.
//! - **PVH** ([`pvh`]): 32-bit protected mode without paging; EBX points to `hvm_start_info`.
//!
//! The kernel file, the initramfs and the command line are all untrusted: errors, no panics, and memory
//! use is bounded by [`MAX_KERNEL`] and what the file really holds.

mod decompress;
mod elf;
mod image;
pub mod linux64;
pub mod pvh;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use mmu::Gpa;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryError};

pub use decompress::{Compression, DecompressError, MAX_KERNEL};
pub use elf::ElfError;
pub use image::{ImageError, KernelImage, MAX_FILE};
pub use linux64::Long64;
pub use pvh::Pvh;

use crate::layout::{self, MemoryKind, MemoryRange};

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootProtocol {
    /// The 64-bit Linux boot protocol, which every x86-64 Linux kernel has.
    #[default]
    Linux64,
    /// PVH, which Linux has with `CONFIG_PVH`, and some other kernels too.
    Pvh,
}

/// What a kernel is started with.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// How to enter it.
    pub protocol: BootProtocol,
    /// The initial file system, if any. Not empty.
    pub initramfs: Option<&'a [u8]>,
    /// The command line, without NUL.
    pub cmdline: &'a str,
    /// The memory map, as [`layout::memory_map`] makes it.
    pub memory_map: &'a [MemoryRange],
    /// Where the ACPI RSDP is; [`layout::ACPI_TABLES`].
    pub rsdp: Gpa,
}

/// What the first vCPU starts with. Plain data: the machine writes it into the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootState {
    /// Long mode, for the 64-bit Linux protocol.
    Long64(Long64),
    /// Protected mode, for PVH.
    Pvh(Pvh),
}

/// A segment register at the start: its selector and the descriptor in the GDT that it names, from which the
/// hidden part follows (SDM 3A, 3.4.5). The base of a 64-bit TSS is zero here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootSegment {
    /// The selector.
    pub selector: u16,
    /// The low 8 bytes of the descriptor.
    pub descriptor: u64,
}

/// The GDT for the first instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootGdt {
    /// Linear and physical address.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

/// Flat 32-bit code, for PVH.
const CODE32: BootSegment = BootSegment { selector: 0x08, descriptor: 0x00cf_9b00_0000_ffff };
/// Flat 64-bit code: Linux's `__BOOT_CS`.
const CODE64: BootSegment = BootSegment { selector: 0x10, descriptor: 0x00af_9b00_0000_ffff };
/// Flat data: Linux's `__BOOT_DS`.
const DATA: BootSegment = BootSegment { selector: 0x18, descriptor: 0x00cf_9300_0000_ffff };
/// A busy TSS of minimal size at address zero, which nothing uses; in long mode its upper half,
/// zero, follows.
const TSS: BootSegment = BootSegment { selector: 0x20, descriptor: 0x0000_8b00_0000_0067 };
/// The GDT, one for both protocols.
const GDT: [u64; 6] = [0, CODE32.descriptor, CODE64.descriptor, DATA.descriptor, TSS.descriptor, 0];

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A segment is outside RAM.
    #[error(
        "the kernel needs RAM at {start:#x}..{end:#x} and the machine has none there: give it at least {} MiB of memory",
        needed_mib(*.end)
    )]
    KernelOutsideRam {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// A segment would overwrite the boot structures.
    #[error(
        "the kernel wants to be loaded at {0:#x}, below 1 MiB, where the boot structures are: take a kernel that is linked higher"
    )]
    KernelTooLow(u64),
    /// The initramfs does not fit between the kernel and the end of usable memory.
    #[error(
        "the initramfs of {size} bytes does not fit between the kernel's end at {low:#x} and {high:#x}: give the machine more memory, or a smaller initramfs"
    )]
    InitramfsTooBig {
        /// Bytes of the initramfs.
        size: u64,
        /// End of the kernel.
        low: u64,
        /// End of the memory it could be in.
        high: u64,
    },
    /// The initramfs has no bytes.
    #[error("the initramfs is empty: give one with content, or none")]
    InitramfsEmpty,
    /// The command line is longer than the kernel takes.
    #[error("the kernel's command line is {length} bytes long, the kernel takes {limit} at most: shorten it")]
    CmdlineTooLong {
        /// Its length without NUL.
        length: usize,
        /// The limit.
        limit: u64,
    },
    /// The command line has a NUL in it.
    #[error("the kernel's command line has a NUL byte at position {0}, where it would end")]
    CmdlineNul(usize),
    /// PVH was asked for and the kernel has no such entry.
    #[error(
        "the kernel has no PVH entry point: boot it by the 64-bit Linux protocol, or build it with CONFIG_PVH"
    )]
    NoPvhEntry,
    /// The memory map has more ranges than the boot protocol can hand over.
    #[error("the memory map has {count} ranges, the boot protocol takes {limit} at most")]
    TooManyRanges {
        /// How many there are.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// Guest memory has a hole where the memory map has RAM.
    #[error("cannot write guest memory at {address:#x}")]
    Memory {
        /// Where.
        address: u64,
        /// Why.
        source: GuestMemoryError,
    },
}

fn needed_mib(end: u64) -> u64 {
    end.div_ceil(1 << 20)
}

fn write<M: GuestMemory>(memory: &M, address: Gpa, bytes: &[u8]) -> Result<(), LoadError> {
    memory
        .write_slice(bytes, GuestAddress(address.0))
        .map_err(|source| LoadError::Memory { address: address.0, source })
}

fn write_object<M: GuestMemory, T: ByteValued>(
    memory: &M,
    address: Gpa,
    object: &T,
) -> Result<(), LoadError> {
    write(memory, address, object.as_slice())
}

/// What [`load`] has placed so far, for the protocols to hand over.
#[derive(Clone, Copy, Debug)]
struct Placed<'a> {
    request: &'a BootRequest<'a>,
    /// Address and length of the initramfs.
    initramfs: Option<(Gpa, u64)>,
}

/// Loads a kernel into guest memory and returns what its first vCPU starts with.
///
/// The memory must read as zero where the kernel is loaded, as fresh memory does: what the kernel's file leaves out
/// (its `.bss`) is not written, so that it costs no host memory.
///
/// # Errors
/// When the kernel, the initramfs or the command line does not fit; nothing is started then, and the memory's content
/// is undefined.
pub fn load<M: GuestMemory>(
    memory: &M,
    image: &KernelImage,
    request: &BootRequest<'_>,
) -> Result<BootState, LoadError> {
    let kernel_end = load_segments(memory, image, request.memory_map)?;
    write_cmdline(memory, request.cmdline, image.cmdline_size)?;
    let initramfs = match request.initramfs {
        Some(content) => Some((
            place_initramfs(memory, content, kernel_end, image.initrd_addr_max, request.memory_map)?,
            content.len() as u64,
        )),
        None => None,
    };
    let mut gdt = [0; size_of_val(&GDT)];
    for (bytes, descriptor) in gdt.chunks_exact_mut(8).zip(GDT) {
        bytes.copy_from_slice(&descriptor.to_le_bytes());
    }
    write(memory, layout::GDT, &gdt)?;
    let gdt = BootGdt { base: layout::GDT.0, limit: (gdt.len() - 1) as u16 };
    let placed = Placed { request, initramfs };
    match request.protocol {
        BootProtocol::Linux64 => linux64::prepare(memory, image, placed, gdt).map(BootState::Long64),
        BootProtocol::Pvh => pvh::prepare(memory, image, placed, gdt).map(BootState::Pvh),
    }
}

/// The end of the RAM range that holds all of `start..end`.
fn ram_around(map: &[MemoryRange], start: u64, end: u64) -> Option<u64> {
    let mut ends = map.iter().filter(|r| r.kind == MemoryKind::Ram).filter_map(|r| {
        let range_end = r.start.0.checked_add(r.size)?;
        (r.start.0 <= start && end <= range_end).then_some(range_end)
    });
    ends.next()
}

/// Copies the kernel to its place; returns the end of the memory that is its own: its last segment's,
/// or what its setup header asks for.
fn load_segments<M: GuestMemory>(
    memory: &M,
    image: &KernelImage,
    map: &[MemoryRange],
) -> Result<u64, LoadError> {
    let kernel_start = image.elf.segments.iter().map(|s| s.address.0).min().unwrap_or(0);
    let mut kernel_end = kernel_start.saturating_add(image.init_size.into());
    if ram_around(map, kernel_start, kernel_end).is_none() && kernel_start >= layout::HIGH_MEMORY.0 {
        return Err(LoadError::KernelOutsideRam { start: kernel_start, end: kernel_end });
    }
    for segment in &image.elf.segments {
        let (start, end) = (segment.address.0, segment.end());
        if start < layout::HIGH_MEMORY.0 {
            return Err(LoadError::KernelTooLow(start));
        }
        if ram_around(map, start, end).is_none() {
            return Err(LoadError::KernelOutsideRam { start, end });
        }
        write(memory, segment.address, image.vmlinux.get(segment.file.clone()).unwrap_or_default())?;
        kernel_end = kernel_end.max(end);
    }
    Ok(kernel_end)
}

fn write_cmdline<M: GuestMemory>(memory: &M, cmdline: &str, kernel_limit: u32) -> Result<(), LoadError> {
    let length = cmdline.len();
    let limit = u64::from(kernel_limit).min(layout::CMDLINE_MAX - 1);
    if length as u64 > limit {
        return Err(LoadError::CmdlineTooLong { length, limit });
    }
    if let Some(at) = cmdline.bytes().position(|b| b == 0) {
        return Err(LoadError::CmdlineNul(at));
    }
    write(memory, layout::CMDLINE, cmdline.as_bytes())?;
    write(memory, Gpa(layout::CMDLINE.0 + length as u64), &[0])
}

/// Puts the initramfs at the top of the RAM that the kernel is in, or as high as the kernel takes it:
/// far from where the kernel grows.
fn place_initramfs<M: GuestMemory>(
    memory: &M,
    content: &[u8],
    kernel_end: u64,
    highest_byte: u32,
    map: &[MemoryRange],
) -> Result<Gpa, LoadError> {
    if content.is_empty() {
        return Err(LoadError::InitramfsEmpty);
    }
    let size = content.len() as u64;
    let ram_end = ram_around(map, layout::HIGH_MEMORY.0, layout::HIGH_MEMORY.0 + 1).unwrap_or(0);
    let high = ram_end.min(u64::from(highest_byte) + 1);
    let low = kernel_end.next_multiple_of(0x1000);
    let address = high.checked_sub(size).map(|a| Gpa(a).page()).filter(|a| a.0 >= low);
    let address = address.ok_or(LoadError::InitramfsTooBig { size, low, high })?;
    write(memory, address, content)?;
    Ok(address)
}

/// The body of the `kernel_load` fuzz target, and of a second of it in the tests: `file` as a kernel, loaded by
/// each protocol into `memory`, of `ram` bytes. Whatever it is, there is an answer.
///
/// # Errors
/// [`ImageError`] when it is no kernel.
#[cfg(any(test, feature = "testing"))]
pub fn load_anything<M: GuestMemory>(file: Vec<u8>, memory: &M, ram: u64) -> Result<(), ImageError> {
    let image = KernelImage::from_bytes(file)?;
    let map = layout::memory_map(ram);
    for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
        let request = BootRequest {
            protocol,
            initramfs: Some(b"cpio"),
            cmdline: "console=ttyS0 quiet",
            memory_map: &map,
            rsdp: layout::ACPI_TABLES,
        };
        // What does not fit is refused.
        let _ = load(memory, &image, &request);
    }
    Ok(())
}
