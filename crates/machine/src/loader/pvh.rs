//! PVH: entering a kernel by its `XEN_ELFNOTE_PHYS32_ENTRY` note (Xen's `docs/misc/pvh.pandoc`).
//!
//! Wanted of the loader: 32-bit protected mode without paging, flat segments, interrupts off, a TSS in TR,
//! and EBX pointing to `hvm_start_info`, which in turn points to the command line, the initramfs as
//! the only module, the memory map and the RSDP.

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use mmu::Gpa;
use vm_memory::GuestMemory;

use super::{BootGdt, BootSegment, CODE32, DATA, KernelImage, LoadError, Placed, TSS, write_object};
use crate::layout;

/// A processor in protected mode, as PVH wants it. Interrupts are off, registers not named here are
/// zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pvh {
    /// Where to start.
    pub eip: u32,
    /// Physical address of `hvm_start_info`.
    pub ebx: u32,
    /// EFLAGS: only the bit that is always set.
    pub eflags: u32,
    /// CR0: protection and extension type; no paging.
    pub cr0: u32,
    /// CR4: nothing.
    pub cr4: u32,
    /// The GDT. The protocol promises none.
    pub gdt: BootGdt,
    /// CS: flat 32-bit code.
    pub cs: BootSegment,
    /// SS, DS, ES, FS and GS: flat data.
    pub data: BootSegment,
    /// TR: a 32-bit TSS that nothing uses.
    pub tr: BootSegment,
}

/// `hvm_start_info.magic`: "xEn3", the E with its highest bit set.
const MAGIC: u32 = 0x336e_c578;
/// The version of `hvm_start_info` that has a memory map.
const VERSION: u32 = 1;

// The page at `layout::PVH_START_INFO`: the structure, then its module list, then its memory map.
const MODULES_OFFSET: u64 = 0x40;
const MEMORY_MAP_OFFSET: u64 = 0x80;
/// Ranges that fit in the rest of the page.
const MAX_RANGES: usize = (0x1000 - MEMORY_MAP_OFFSET as usize) / size_of::<hvm_memmap_table_entry>();

/// Writes `hvm_start_info`; returns the vCPU's state.
pub(super) fn prepare<M: GuestMemory>(
    memory: &M,
    image: &KernelImage,
    placed: Placed<'_>,
    gdt: BootGdt,
) -> Result<Pvh, LoadError> {
    let eip = image.elf.pvh_entry.ok_or(LoadError::NoPvhEntry)?;
    let request = placed.request;
    let base = layout::PVH_START_INFO.0;
    let count = request.memory_map.len();
    if count > MAX_RANGES {
        return Err(LoadError::TooManyRanges { count, limit: MAX_RANGES });
    }
    let mut start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: request.rsdp.0,
        memmap_paddr: base + MEMORY_MAP_OFFSET,
        memmap_entries: count as u32,
        ..Default::default()
    };
    if let Some((Gpa(paddr), size)) = placed.initramfs {
        start_info.nr_modules = 1;
        start_info.modlist_paddr = base + MODULES_OFFSET;
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        write_object(memory, Gpa(base + MODULES_OFFSET), &module)?;
    }
    let entry_size = size_of::<hvm_memmap_table_entry>() as u64;
    for (i, range) in (0..).zip(request.memory_map) {
        let entry = hvm_memmap_table_entry {
            addr: range.start.0,
            size: range.size,
            type_: range.kind as u32,
            ..Default::default()
        };
        write_object(memory, Gpa(base + MEMORY_MAP_OFFSET + i * entry_size), &entry)?;
    }
    write_object(memory, layout::PVH_START_INFO, &start_info)?;
    const CR0_PE: u32 = 1 << 0;
    const CR0_ET: u32 = 1 << 4;
    Ok(Pvh {
        eip,
        ebx: base as u32,
        eflags: 2,
        cr0: CR0_PE | CR0_ET,
        cr4: 0,
        gdt,
        cs: CODE32,
        data: DATA,
        tr: TSS,
    })
}
