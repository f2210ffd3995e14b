//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//!
//! Wanted of the loader: long mode with the first 4 GiB mapped one to one, a GDT with `__BOOT_CS` (0x10) and
//! `__BOOT_DS` (0x18), interrupts off, and RSI pointing to `boot_params`, which is zero but for a copy
//! of the kernel's own setup header and what the loader adds: memory map, command line, initramfs,
//! RSDP.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use mmu::Gpa;
use vm_memory::{ByteValued, GuestMemory};

use super::image::SETUP_HEADER;
use super::{BootGdt, BootSegment, CODE64, DATA, KernelImage, LoadError, Placed, TSS, write, write_object};
use crate::layout;

/// A processor in long mode, as the 64-bit Linux protocol wants it. Interrupts are off, registers not
/// named here are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Long64 {
    /// Where to start.
    pub rip: u64,
    /// Physical and linear address of `boot_params`.
    pub rsi: u64,
    /// The end of a small stack. The protocol promises none.
    pub rsp: u64,
    /// RFLAGS: only the bit that is always set.
    pub rflags: u64,
    /// CR0: protection, extension type, numeric errors, write protection and paging.
    pub cr0: u64,
    /// The identity map's root.
    pub cr3: u64,
    /// CR4: PAE.
    pub cr4: u64,
    /// EFER: long mode enabled and active.
    pub efer: u64,
    /// The GDT.
    pub gdt: BootGdt,
    /// CS: 64-bit code.
    pub cs: BootSegment,
    /// SS, DS, ES, FS and GS: flat data.
    pub data: BootSegment,
    /// TR: a 64-bit TSS that nothing uses.
    pub tr: BootSegment,
}

// Control register bits (SDM 3A, 2.5; EFER: SDM 4, table 2-2).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// Page-table entry bits (SDM 3A, 4.5).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// "The boot loader has no assigned number."
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel was loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// The protocol version in a header made up for a vmlinux, which has none.
const PROTOCOL: u16 = 0x20f;

/// Writes page tables and `boot_params`; returns the vCPU's state.
pub(super) fn prepare<M: GuestMemory>(
    memory: &M,
    image: &KernelImage,
    placed: Placed<'_>,
    gdt: BootGdt,
) -> Result<Long64, LoadError> {
    write(memory, layout::PAGE_TABLES, &identity_map())?;
    write_object(memory, layout::BOOT_PARAMS, &make_boot_params(image, placed)?)?;
    Ok(Long64 {
        rip: image.elf.entry.0,
        rsi: layout::BOOT_PARAMS.0,
        rsp: layout::BOOT_STACK_TOP.0,
        rflags: 2,
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3: layout::PAGE_TABLES.0,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        gdt,
        cs: CODE64,
        data: DATA,
        tr: TSS,
    })
}

/// Page tables that map the first 4 GiB to themselves in pages of 2 MiB, as they lie from
/// [`layout::PAGE_TABLES`]: PML4, PDPT, four page directories.
fn identity_map() -> Vec<u8> {
    const ENTRIES: u64 = 512;
    let table = |n: u64| layout::PAGE_TABLES.0 + n * 0x1000;
    let directories = 4;
    let pml4 = (0..ENTRIES).map(|i| if i == 0 { table(1) | PRESENT | WRITABLE } else { 0 });
    let pdpt = (0..ENTRIES).map(|i| if i < directories { table(2 + i) | PRESENT | WRITABLE } else { 0 });
    let pages = (0..directories * ENTRIES).map(|i| i << 21 | PRESENT | WRITABLE | LARGE);
    pml4.chain(pdpt).chain(pages).flat_map(u64::to_le_bytes).collect()
}

fn make_boot_params(image: &KernelImage, placed: Placed<'_>) -> Result<boot_params, LoadError> {
    let request = placed.request;
    let mut params = boot_params::default();
    match &image.setup_header {
        Some(header) => {
            let end = SETUP_HEADER + header.len();
            if let Some(place) = params.as_mut_slice().get_mut(SETUP_HEADER..end) {
                place.copy_from_slice(header);
            }
        }
        None => {
            params.hdr.boot_flag = 0xaa55;
            params.hdr.header = u32::from_le_bytes(*b"HdrS");
            params.hdr.version = PROTOCOL;
            params.hdr.kernel_alignment = 0x20_0000;
            params.hdr.initrd_addr_max = image.initrd_addr_max;
            params.hdr.cmdline_size = image.cmdline_size;
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.setup_data = 0;
    // All of these are below 4 GiB: see `layout` and `place_initramfs`.
    params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some((Gpa(address), size)) = placed.initramfs {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    params.acpi_rsdp_addr = request.rsdp.0;
    let mut table = params.e820_table;
    let count = request.memory_map.len();
    if count > table.len() {
        return Err(LoadError::TooManyRanges { count, limit: table.len() });
    }
    for (entry, range) in table.iter_mut().zip(request.memory_map) {
        *entry = boot_e820_entry { addr: range.start.0, size: range.size, type_: range.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = count as u8;
    Ok(params)
}
