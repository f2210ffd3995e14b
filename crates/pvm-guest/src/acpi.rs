//! As much of ACPI as it takes to turn the machine off and to count its processors.
//!
//! The tables are read where they are, each length checked; tables past 4 GiB count as absent.

use crate::insn::{port_in16, port_out8, port_out16};
use crate::memory::{self, Physical};

/// A table: where it is and its length.
#[derive(Clone, Copy, Debug)]
struct Table {
    at: u64,
    length: u32,
}

impl Table {
    const HEADER: u32 = 36;

    fn at(at: u64) -> Option<Self> {
        let length = memory::read::<u32>(Physical(at + 4));
        (at != 0 && (Self::HEADER..1 << 24).contains(&length)).then_some(Self { at, length })
    }

    fn signature(&self) -> [u8; 4] {
        memory::read::<u32>(Physical(self.at)).to_le_bytes()
    }

    /// A value at an offset; `None` behind the end.
    fn get<T: memory::Plain>(&self, offset: u32) -> Option<T> {
        (offset + size_of::<T>() as u32 <= self.length)
            .then(|| memory::read(Physical(self.at + u64::from(offset))))
    }
}

/// Where firmware puts the RSDP if nobody says where (ACPI 5.2.5.1).
const BIOS_AREA: core::ops::Range<u64> = 0xe_0000..0x10_0000;
const RSDP: u64 = u64::from_le_bytes(*b"RSD PTR ");

fn find_rsdp(told: u64) -> Option<u64> {
    let is_rsdp = |at: &u64| memory::read::<u64>(Physical(*at)) == RSDP;
    Some(told).filter(|at| *at != 0 && is_rsdp(at)).or_else(|| BIOS_AREA.step_by(16).find(is_rsdp))
}

fn find_table(rsdp: u64, signature: &[u8; 4]) -> Option<Table> {
    let revision: u8 = memory::read(Physical(rsdp + 15));
    let xsdt = if revision >= 2 { memory::read::<u64>(Physical(rsdp + 24)) } else { 0 };
    let (root, size) =
        if xsdt != 0 { (xsdt, 8) } else { (memory::read::<u32>(Physical(rsdp + 16)).into(), 4) };
    let root = Table::at(root)?;
    (Table::HEADER..root.length)
        .step_by(size)
        .filter_map(|offset| match size {
            8 => root.get::<u64>(offset),
            _ => root.get::<u32>(offset).map(u64::from),
        })
        .filter_map(Table::at)
        .find(|table| &table.signature() == signature)
}

/// The local APIC identifiers of the processors that can be used, up to the length of `ids`; how many there are.
pub fn processors(rsdp: u64, ids: &mut [u32]) -> usize {
    let Some(madt) = find_rsdp(rsdp).and_then(|r| find_table(r, b"APIC")) else { return 0 };
    let mut offset = Table::HEADER + 8;
    let mut count = 0;
    while let (Some(kind), Some(length @ 2..)) = (madt.get::<u8>(offset), madt.get::<u8>(offset + 1)) {
        let (id, flags) = match kind {
            // Processor local APIC, processor local x2APIC.
            0 => (madt.get::<u8>(offset + 3).map(u32::from), madt.get::<u32>(offset + 4)),
            9 => (madt.get::<u32>(offset + 4), madt.get::<u32>(offset + 8)),
            _ => (None, None),
        };
        if let (Some(id), Some(flags)) = (id, flags)
            && flags & 1 != 0
        {
            if let Some(place) = ids.get_mut(count) {
                *place = id;
            }
            count += 1;
        }
        offset += u32::from(length);
    }
    count
}

/// SLP_TYPa in the DSDT's `_S5` package: `Name(_S5, Package(n) { a, ... })` in AML.
fn sleep_type(dsdt: Table) -> Option<u8> {
    const NAME: u32 = u32::from_le_bytes(*b"_S5_");
    const PACKAGE_OP: u8 = 0x12;
    const BYTE_PREFIX: u8 = 0x0a;
    let at = (Table::HEADER..dsdt.length).find(|at| dsdt.get::<u32>(*at) == Some(NAME))?;
    (dsdt.get::<u8>(at + 4)? == PACKAGE_OP).then_some(())?;
    // The package's length takes one byte more for each step of its first byte's top two bits; then the count.
    let element = at + 5 + 1 + u32::from(dsdt.get::<u8>(at + 5)? >> 6) + 1;
    match dsdt.get::<u8>(element)? {
        BYTE_PREFIX => dsdt.get(element + 1),
        // ZeroOp and OneOp are their values.
        value => Some(value),
    }
}

/// A generic address structure in I/O space: its port.
fn port(table: &Table, offset: u32) -> Option<u16> {
    let space: u8 = table.get(offset)?;
    let address: u64 = table.get(offset + 4)?;
    (space == 1 && address != 0).then(|| u16::try_from(address).ok())?
}

/// Turns the machine off (ACPI 7.4.2, 4.8.3.7), or resets it, or breaks it: what works first.
pub fn power_off(rsdp: u64) -> ! {
    // FADT fields (ACPI 5.2.9).
    const DSDT: u32 = 40;
    const PM1A_CONTROL: u32 = 64;
    const X_DSDT: u32 = 140;
    const X_PM1A_CONTROL: u32 = 172;
    const SLEEP_CONTROL: u32 = 244;
    if let Some(fadt) = find_rsdp(rsdp).and_then(|r| find_table(r, b"FACP")) {
        let dsdt =
            fadt.get::<u64>(X_DSDT).filter(|at| *at != 0).or_else(|| fadt.get::<u32>(DSDT).map(u64::from));
        let s5 = dsdt.and_then(Table::at).and_then(sleep_type).unwrap_or(5) & 7;
        if let Some(port) = port(&fadt, SLEEP_CONTROL) {
            port_out8(port, 1 << 5 | s5 << 2);
        }
        let pm1 = port(&fadt, X_PM1A_CONTROL)
            .or_else(|| fadt.get::<u32>(PM1A_CONTROL).and_then(|p| u16::try_from(p).ok()))
            .filter(|p| *p != 0);
        if let Some(port) = pm1 {
            port_out16(port, port_in16(port) & !0x1c00 | 1 << 13 | u16::from(s5) << 10);
        }
    }
    // The keyboard controller's reset line, and the chipset's: the only way out of small machines.
    port_out8(0x64, 0xfe);
    port_out8(0xcf9, 0x02);
    port_out8(0xcf9, 0x06);
    crate::insn::triple_fault()
}
