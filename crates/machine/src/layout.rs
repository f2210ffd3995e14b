//! The guest-physical map: every fixed address of the machine, each with its reason.
//!
//! ```text
//! 0                  low RAM: boot structures in the first 640 KiB, the kernel from 1 MiB
//! 0x000a_0000        the hole of the PC: no RAM in the map; ACPI tables in its upper part
//! 0x0010_0000        RAM up to at most 3 GiB
//! 0xc000_0000        32-bit PCI MMIO window
//! 0xe000_0000        PCI Express configuration space (ECAM)
//! 0xfec0_0000        I/O APIC
//! 0xfed9_0000        Intel VT-d's registers, if there is such an IOMMU
//! 0xfee0_0000        local APICs; message-signalled interrupts
//! 0x1_0000_0000      the rest of RAM
//! next GiB boundary  64-bit PCI MMIO window
//! ```
//!
//! All of it fits in [`PHYS_BITS`] address bits, which the processor has to offer.

use std::ops::Range;

use mmu::Gpa;

/// Physical address bits that the map may use; the processor's MAXPHYADDR must not be less.
pub const PHYS_BITS: u32 = 40;

/// Least RAM, in bytes, that has room for the boot structures and for something above 1 MiB.
pub const MIN_RAM: u64 = 8 << 20;
/// Most RAM, in bytes, that leaves the 64-bit PCI window below `1 << PHYS_BITS`.
pub const MAX_RAM: u64 = 512 << 30;

/// Where the initial global descriptor table is. Page 0 stays free, as on any PC: the interrupt
/// vectors of real mode and the BIOS data area, where a kernel may look for hints.
pub const GDT: Gpa = Gpa(0x1000);
/// PVH `hvm_start_info`, its module list and its memory map. One page.
pub const PVH_START_INFO: Gpa = Gpa(0x6000);
/// The Linux `boot_params` ("zero page"). One page.
pub const BOOT_PARAMS: Gpa = Gpa(0x7000);
/// Top of a small stack for the first instructions of a kernel; grows down to [`BOOT_PARAMS`]' end.
pub const BOOT_STACK_TOP: Gpa = Gpa(0x9000);
/// Initial page tables: one PML4, one PDPT and four page directories, which map the first 4 GiB.
pub const PAGE_TABLES: Gpa = Gpa(0x9000);
/// Bytes of the initial page tables.
pub const PAGE_TABLES_SIZE: u64 = 6 * 0x1000;
/// The kernel's command line with its final NUL.
pub const CMDLINE: Gpa = Gpa(0x2_0000);
/// Room for the command line, in bytes, NUL included. The kernel's own limit is usually smaller.
pub const CMDLINE_MAX: u64 = 0x1_0000;

/// Start of the extended BIOS data area: 1 KiB below 640 KiB, reserved as firmware does, because
/// kernels look there for tables.
pub const EBDA: Gpa = Gpa(0x9_fc00);
/// End of conventional memory; from here to [`HIGH_MEMORY`] there is no RAM in the memory map.
pub const HOLE_640K: Gpa = Gpa(0xa_0000);
/// ACPI tables, RSDP first. In the range that the ACPI specification (5.2.5.1) tells a system to
/// search, so that one that is not told the RSDP's address finds it.
pub const ACPI_TABLES: Gpa = Gpa(0xe_0000);
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: Gpa = Gpa(0xf_fff0);
/// The 8086's reset vector, 16 bytes, to which a kernel jumps in real mode to reset by firmware; see
/// [`crate::power`].
pub const REAL_MODE_RESET: Gpa = ACPI_TABLES_END;
/// 1 MiB: where RAM starts again, and the lowest address a kernel may be loaded to.
pub const HIGH_MEMORY: Gpa = Gpa(0x10_0000);

/// End of low RAM at most: above it are the devices of the 32-bit address space.
pub const LOW_RAM_END: Gpa = Gpa(0xc000_0000);
/// 32-bit PCI MMIO window, from the end of low RAM to the ECAM.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express enhanced configuration space, segment 0, one MiB for a bus.
pub const ECAM: Gpa = Gpa(0xe000_0000);
/// Buses in the ECAM. All devices are on bus 0; the rest is room for bridges.
pub const ECAM_BUSES: u8 = 16;
/// Bytes of the ECAM.
pub const ECAM_SIZE: u64 = (ECAM_BUSES as u64) << 20;
/// The I/O APIC's registers.
pub const IO_APIC: Gpa = Gpa(0xfec0_0000);
/// Bytes that the I/O APIC answers.
pub const IO_APIC_SIZE: u64 = 0x1000;
/// The registers of Intel VT-d, where other machines have them too. One page.
pub const VTD: Gpa = Gpa(0xfed9_0000);
/// The local APICs' registers at reset, and the range that MSIs are written to (SDM 3A, 11.11.1).
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);
/// Bytes of the MSI address range.
pub const LOCAL_APIC_SIZE: u64 = 0x10_0000;
/// The page that holds the reset vector of a 32-bit processor (SDM 3A, 10.1.4). No firmware is
/// there: kernels are entered straight.
pub const RESET_VECTOR: Gpa = Gpa(0xffff_fff0);
/// 4 GiB, where RAM above [`LOW_RAM_END`] continues.
pub const HIGH_RAM: Gpa = Gpa(0x1_0000_0000);
/// Bytes of the 64-bit PCI MMIO window.
pub const MMIO64_SIZE: u64 = 16 << 30;

/// First of the ports of the serial port COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's interrupt, as a global system interrupt.
pub const SERIAL_GSI: u32 = 4;
/// First of the global system interrupts of PCI's wires: those below are a PC's ISA interrupts.
pub const INTX_GSI: u32 = 16;
/// How many there are: the rest of the I/O APIC's pins.
pub const INTX_GSIS: u32 = 8;
/// The ACPI sleep control register (ACPI 4.8.3.7); see [`crate::power`].
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The ACPI reset register (ACPI 4.8.3.6).
pub const RESET_PORT: u16 = 0x602;
/// The value that resets when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// The pvpanic device's only port, where other machines have it too.
pub const PVPANIC_PORT: u16 = 0x505;
/// PCI configuration address and data, `0xcf8..0xd00`; `0xcf9` is the reset control register.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The clock's index port; its data port follows.
pub const RTC_PORT: u16 = 0x70;
/// The keyboard controller's status and command port; see [`crate::power`].
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// The global system interrupt of a wire, INTA# (0) to INTD# (3) of a slot: neighbours have different ones.
pub fn intx_gsi(slot: usize, pin: u8) -> u32 {
    INTX_GSI + (slot as u32).wrapping_add(pin.into()) % INTX_GSIS
}

/// Where RAM is, as address and length: one region, or two when there is more than
/// [`LOW_RAM_END`] holds.
pub fn ram_regions(bytes: u64) -> Vec<(Gpa, u64)> {
    let low = bytes.min(LOW_RAM_END.0);
    let mut regions = vec![(Gpa(0), low)];
    if bytes > low {
        regions.push((HIGH_RAM, bytes - low));
    }
    regions
}

/// The first address above all RAM and above 4 GiB.
fn ram_end(bytes: u64) -> u64 {
    HIGH_RAM.0.saturating_add(bytes.saturating_sub(LOW_RAM_END.0))
}

/// The 64-bit PCI MMIO window of a machine with so many bytes of RAM: from the next GiB boundary
/// above RAM, so that growing RAM a little does not move devices.
pub fn mmio64_window(ram_bytes: u64) -> Range<u64> {
    let start = ram_end(ram_bytes.min(MAX_RAM)).next_multiple_of(1 << 30);
    start..start + MMIO64_SIZE
}

/// What a range of the memory map is good for. The numbers are those of the E820 interface
/// (ACPI 15, table of address range types), which PVH uses too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Nothing that the guest may use as memory.
    Reserved = 2,
    /// ACPI tables; RAM once they are read.
    Acpi = 3,
}

/// One range of the memory map given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: Gpa,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The memory map (E820) of a machine with so many bytes of RAM, in rising order.
///
/// The ECAM is in it as reserved: Linux uses an ECAM only where the map or the ACPI namespace
/// reserves it, and looks at the map before it has a namespace.
pub fn memory_map(ram_bytes: u64) -> Vec<MemoryRange> {
    use MemoryKind::{Ram, Reserved};
    let range = |start: Gpa, end: u64, kind| MemoryRange { start, size: end.saturating_sub(start.0), kind };
    let low_end = ram_bytes.min(LOW_RAM_END.0);
    let mut map = vec![
        range(Gpa(0), EBDA.0, Ram),
        range(EBDA, HOLE_640K.0, Reserved),
        range(ACPI_TABLES, HIGH_MEMORY.0, Reserved),
        range(HIGH_MEMORY, low_end, Ram),
        range(ECAM, ECAM.0 + ECAM_SIZE, Reserved),
    ];
    if ram_bytes > low_end {
        map.push(range(HIGH_RAM, ram_end(ram_bytes), Ram));
    }
    map.retain(|r| r.size != 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_splits_at_the_device_hole() {
        assert_eq!(ram_regions(512 << 20), [(Gpa(0), 512 << 20)]);
        assert_eq!(ram_regions(LOW_RAM_END.0), [(Gpa(0), LOW_RAM_END.0)]);
        assert_eq!(ram_regions(LOW_RAM_END.0 + 4096), [(Gpa(0), LOW_RAM_END.0), (HIGH_RAM, 4096)]);
    }

    #[test]
    fn map_is_sorted_disjoint_and_inside_ram() {
        for bytes in [MIN_RAM, 512 << 20, 3 << 30, (3 << 30) + 4096, 64 << 30, MAX_RAM] {
            let map = memory_map(bytes);
            let regions = ram_regions(bytes);
            for pair in map.windows(2) {
                assert!(pair[0].start.0 + pair[0].size <= pair[1].start.0, "{pair:?}");
            }
            let mut usable = 0;
            for r in map.iter().filter(|r| r.kind == MemoryKind::Ram) {
                usable += r.size;
                assert!(
                    regions.iter().any(|(s, n)| s.0 <= r.start.0 && r.start.0 + r.size <= s.0 + n),
                    "{r:?} is not RAM of {regions:?}"
                );
            }
            assert_eq!(usable, bytes - (HIGH_MEMORY.0 - EBDA.0), "all but the hole is usable");
            let window = mmio64_window(bytes);
            assert!(window.start >= map.last().unwrap().start.0 + map.last().unwrap().size);
            assert!(window.end <= 1 << PHYS_BITS, "{window:x?}");
        }
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        let areas = [
            (GDT.0, 0x1000),
            (PVH_START_INFO.0, 0x1000),
            (BOOT_PARAMS.0, 0x1000),
            (BOOT_PARAMS.0 + 0x1000, BOOT_STACK_TOP.0 - BOOT_PARAMS.0 - 0x1000),
            (PAGE_TABLES.0, PAGE_TABLES_SIZE),
            (CMDLINE.0, CMDLINE_MAX),
            (EBDA.0, HOLE_640K.0 - EBDA.0),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
