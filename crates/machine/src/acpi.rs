//! ACPI tables: what the machine tells a kernel about itself.
//!
//! The machine is "hardware-reduced" (ACPI 4.1): no PM timer, no event registers, no SCI, and by that, for
//! Linux, no PIC and no PIT either. Kernels find here: processors and interrupt controllers (MADT), PCI
//! configuration space (MCFG), which devices are behind an IOMMU (VIOT, DMAR), how to power off (`_S5` and the sleep control register) and reset
//! (reset register), the PCI host bridge with its windows, the serial port and pvpanic (DSDT).
//!
//! Everything that depends on the configuration is data in the tables; the only method is `_OSC`.
//! Devices on PCI are found by enumeration. Where those that have a wire interrupt is in `_PRT`: I/O APIC pins, no links.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Memory32Fixed, Method, Name, ONE, Or, Package, Path, ResourceTemplate, Return, Scope, Store,
    Uuid, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};
use acpi_tables::xsdt::XSDT;
use mmu::Gpa;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use crate::layout;
use crate::pci::SLOTS;
use crate::power::SLEEP_TYPE_S5;
use crate::serial;

const OEM_ID: [u8; 6] = *b"RING3 ";
const OEM_TABLE_ID: [u8; 8] = *b"RING3PC ";
const OEM_REVISION: u32 = 1;

/// Most processors that the tables describe; their devices' names have three digits.
pub const MAX_CPUS: u32 = 0x1000;
/// The I/O APIC's ID. It answers the global system interrupts from 0.
pub const IO_APIC_ID: u8 = 0;

/// What the tables say that is not the same for every machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Processors; the APIC ID of each is its index.
    pub cpus: u32,
    /// The 64-bit PCI window, [`layout::mmio64_window`].
    pub mmio64: Range<u64>,
    /// The IOMMU, if there is one.
    pub iommu: Option<Iommu>,
}

/// An IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// Virtio's, on bus 0.
    Virtio {
        /// Its PCI slot.
        slot: usize,
        /// The slots of the functions behind it.
        behind: Vec<usize>,
    },
    /// Intel VT-d at [`layout::VTD`], with all of PCI behind it.
    Intel,
}

/// Why the tables could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// No processor, or too many.
    #[error("a machine with {0} processors cannot be described in ACPI: from 1 to {MAX_CPUS}")]
    Cpus(u32),
    /// The tables are larger than their place.
    #[error("the ACPI tables are {size} bytes long, there is room for {room}: use fewer processors")]
    TooLong {
        /// Their size.
        size: usize,
        /// The room for them.
        room: usize,
    },
    /// There is no guest memory at [`layout::ACPI_TABLES`].
    #[error("cannot write the ACPI tables to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes the tables to guest memory and returns where the RSDP is.
///
/// # Errors
/// When there are too many processors, or guest memory lacks the place.
pub fn write<M: GuestMemory>(memory: &M, config: &AcpiConfig) -> Result<Gpa, AcpiError> {
    let tables = build(config)?;
    memory.write_slice(&tables, GuestAddress(layout::ACPI_TABLES.0))?;
    Ok(layout::ACPI_TABLES)
}

/// Makes the tables as they lie from [`layout::ACPI_TABLES`], where the RSDP is.
///
/// # Errors
/// When there are too many processors.
pub fn build(config: &AcpiConfig) -> Result<Vec<u8>, AcpiError> {
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        return Err(AcpiError::Cpus(config.cpus));
    }
    let mut tables = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let dsdt = append(&mut tables, &dsdt(config));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(append(&mut tables, &bytes(&fadt(dsdt))));
    xsdt.add_entry(append(&mut tables, &madt(config.cpus)));
    xsdt.add_entry(append(&mut tables, &bytes(&mcfg())));
    match &config.iommu {
        None => {}
        Some(Iommu::Virtio { slot, behind }) => {
            xsdt.add_entry(append(&mut tables, &bytes(&viot(*slot, behind))));
        }
        Some(Iommu::Intel) => xsdt.add_entry(append(&mut tables, &dmar())),
    }
    let xsdt = append(&mut tables, &bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    for (place, byte) in tables.iter_mut().zip(rsdp) {
        *place = byte;
    }
    let (size, room) = (tables.len(), (layout::ACPI_TABLES_END.0 - layout::ACPI_TABLES.0) as usize);
    if size > room { Err(AcpiError::TooLong { size, room }) } else { Ok(tables) }
}

/// Alignment of each table, in bytes; the specification wants none.
const ALIGN: usize = 64;

/// Puts a table behind the others and returns its address.
fn append(tables: &mut Vec<u8>, table: &[u8]) -> u64 {
    let at = tables.len();
    tables.extend_from_slice(table);
    tables.resize(tables.len().next_multiple_of(ALIGN), 0);
    layout::ACPI_TABLES.0 + at as u64
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// An 8-bit register at an I/O port.
fn port_register(port: u16) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// `IAPC_BOOT_ARCH` (ACPI 5.2.9.3): no VGA, do not touch it.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// `IAPC_BOOT_ARCH`: leave active-state power management alone.
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;
/// `IAPC_BOOT_ARCH`: no clock at ports 0x70 and 0x71 that anybody should use. (What is there: [`crate::rtc`].)
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The fixed table. Not set in `IAPC_BOOT_ARCH`: legacy devices and a keyboard controller.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Neither button is a fixed one.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port_register(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port_register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port_register(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Interrupt controllers. An APIC ID of 255 and more does not fit a local APIC structure and has an
/// x2APIC one (ACPI 5.2.12.12).
fn madt(cpus: u32) -> Vec<u8> {
    let mut body = (layout::LOCAL_APIC.0 as u32).to_le_bytes().to_vec();
    // Flags: no 8259 pair.
    body.extend(0u32.to_le_bytes());
    for id in 0..cpus {
        match u8::try_from(id) {
            Ok(id) if id < 0xff => {
                ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => {
                const X2APIC: [u8; 4] = [9, 16, 0, 0];
                const ENABLED: u32 = 1;
                body.extend(X2APIC);
                for word in [id, ENABLED, id] {
                    body.extend(word.to_le_bytes());
                }
            }
        }
    }
    IoApic::new(IO_APIC_ID, layout::IO_APIC.0 as u32, 0).to_aml_bytes(&mut body);
    table(*b"APIC", 5, &body)
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.0, 0, 0, layout::ECAM_BUSES - 1);
    mcfg
}

/// What is behind the virtio IOMMU (ACPI 6.5, 5.2.34). Each function is a range of its own, because others, in between,
/// may not be behind it. The number of an endpoint is that of bus, device and function.
fn viot(slot: usize, behind: &[usize]) -> VIOT {
    let function = |slot: usize| PciDevice::new(0, 0, (slot as u8) & 0x1f, 0);
    let mut viot = VIOT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let handle = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(function(slot)));
    for slot in behind.iter().copied() {
        viot.add_pci_range(PciRange::new(function(slot), function(slot), &handle));
    }
    viot
}

/// The remapping hardware (VT-d 8.1, 8.3): one unit for all of PCI, and for the I/O APIC, which has the number of a function that is
/// not there. Interrupts are not remapped.
fn dmar() -> Vec<u8> {
    const DRHD: u16 = 0;
    const INCLUDE_PCI_ALL: u8 = 1;
    const IO_APIC: u8 = 3;
    const IO_APIC_BUS: u8 = 0xff;
    // Type, length, flags, reserved, identity, bus, and a path of one device and function.
    let scope = [IO_APIC, 8, 0, 0, IO_APIC_ID, IO_APIC_BUS, 0, 0];
    let mut unit = Vec::new();
    unit.extend(DRHD.to_le_bytes());
    unit.extend((16 + scope.len() as u16).to_le_bytes());
    // Flags, size (one page), segment.
    unit.extend([INCLUDE_PCI_ALL, 0, 0, 0]);
    unit.extend(layout::VTD.0.to_le_bytes());
    unit.extend(scope);
    // Width of addresses less one, flags, reserved.
    let mut body = vec![layout::PHYS_BITS as u8 - 1, 0];
    body.extend([0; 10]);
    body.extend(unit);
    table(*b"DMAR", 1, &body)
}

/// A table of this signature and revision with this content after the header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 36;
    let mut table = Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// The namespace.
fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = Vec::new();
    for cpu in 0..config.cpus {
        let name = format!("C{cpu:03X}");
        Device::new(
            Path::new(&name),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &cpu)],
        )
        .to_aml_bytes(&mut devices);
    }
    host_bridge(config, &mut devices);
    ecam_reservation(&mut devices);
    serial_port(&mut devices);
    pvpanic(&mut devices);
    let mut body = Scope::raw(Path::new("_SB_"), devices);
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);
    // Revision 2: integers have 64 bits.
    table(*b"DSDT", 2, &body)
}

/// The PCI Express root: its buses and windows.
///
/// `_OSC` (PCI Firmware Specification 3.3, 4.5) grants control of nothing: native hot-plug, power
/// management events, error reporting and the like do not exist on this bus.
fn host_bridge(config: &AcpiConfig, out: &mut Vec<u8>) {
    let (low, high) = (layout::MMIO32, &config.mmio64);
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, u16::from(layout::ECAM_BUSES) - 1),
            // The configuration ports are the bridge's own, not a window.
            &IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8),
            &AddressSpace::new_memory(not_cacheable, true, low.start as u32, (low.end - 1) as u32, None),
            &AddressSpace::new_memory(not_cacheable, true, high.start, high.end.saturating_sub(1), None),
        ]),
    );
    let host_bridge_osc = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let routes = interrupt_routes();
    let routes: Vec<Package<'_>> =
        routes.iter().map(|row| Package::new(row.iter().map(|x| x as _).collect())).collect();
    let routes = Name::new("_PRT".into(), &Package::new(routes.iter().map(|row| row as _).collect()));
    // Offsets of the first and the third double word of the capabilities buffer, argument 3.
    let (status_at, control_at) = (ZERO, 8u8);
    let unrecognized_uuid = 4u8;
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &resources,
            &routes,
            &Method::new(
                "_OSC".into(),
                4,
                true,
                vec![
                    &CreateDWordField::new(&status, &Arg(3), &status_at),
                    &If::new(
                        &Equal::new(&Arg(0), &host_bridge_osc),
                        vec![
                            &CreateDWordField::new(&control, &Arg(3), &control_at),
                            &Store::new(&control, &ZERO),
                        ],
                    ),
                    &Else::new(vec![&Or::new(&status, &status, &unrecognized_uuid)]),
                    &Return::new(&Arg(3)),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The rows of `_PRT` (ACPI 6.5, 6.2.13): device, pin, no link, global system interrupt.
fn interrupt_routes() -> Vec<[u32; 4]> {
    let any_function = 0xffff;
    let row = |slot: usize, pin: u8| {
        [(slot as u32) << 16 | any_function, pin.into(), 0, layout::intx_gsi(slot, pin)]
    };
    // Slot 0 is the bridge itself.
    (1..SLOTS).flat_map(|slot| (0..4).map(move |pin| row(slot, pin))).collect()
}

/// Reserves the ECAM, without which Linux does not use it.
fn ecam_reservation(out: &mut Vec<u8>) {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&Memory32Fixed::new(
            true,
            layout::ECAM.0 as u32,
            layout::ECAM_SIZE as u32,
        )]),
    );
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &resources,
        ],
    )
    .to_aml_bytes(out);
}

/// COM1, interrupting by edges.
fn serial_port(out: &mut Vec<u8>) {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &Interrupt::new(consumer, edge, active_low, shared, layout::SERIAL_GSI),
            &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, serial::PORTS as u8),
        ]),
    );
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &resources,
        ],
    )
    .to_aml_bytes(out);
}

/// The pvpanic device, by the name that Linux's driver knows.
fn pvpanic(out: &mut Vec<u8>) {
    let resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1)]),
    );
    let present_and_working = 0xfu8;
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &present_and_working),
            &resources,
        ],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cpus: u32) -> AcpiConfig {
        AcpiConfig { cpus, mmio64: layout::mmio64_window(4 << 30), iommu: None }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    /// Follows the pointers from the RSDP, as a kernel does, and checks every checksum.
    fn tables(blob: &[u8]) -> Vec<&[u8]> {
        let at = |address: u64| {
            let table = &blob[(address - layout::ACPI_TABLES.0) as usize..];
            let table = &table[..u32_at(table, 4) as usize];
            assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
            table
        };
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = at(u64_at(blob, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut found: Vec<&[u8]> = xsdt[36..].chunks(8).map(|p| at(u64_at(p, 0))).collect();
        let fadt = found.iter().find(|t| t.starts_with(b"FACP")).unwrap();
        found.push(at(u64_at(fadt, 140)));
        found
    }

    #[test]
    fn tables_are_found_from_the_rsdp() {
        for cpus in [1, 2, 300] {
            let blob = build(&config(cpus)).unwrap();
            let names: Vec<_> =
                tables(&blob).iter().map(|t| String::from_utf8_lossy(&t[..4]).into_owned()).collect();
            assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT"]);
        }
        assert!(matches!(build(&config(0)), Err(AcpiError::Cpus(0))));
        assert!(matches!(build(&config(MAX_CPUS + 1)), Err(AcpiError::Cpus(_))));
        assert!(matches!(build(&config(MAX_CPUS)), Err(AcpiError::TooLong { .. })));
    }

    #[test]
    fn fixed_table_names_the_power_registers() {
        let blob = build(&config(1)).unwrap();
        let fadt = tables(&blob)[0];
        assert_eq!(fadt.len(), 276);
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "hardware-reduced, has a reset register");
        assert_eq!(u64_at(fadt, 120), u64::from(layout::RESET_PORT));
        assert_eq!(fadt[128], layout::RESET_VALUE);
        assert_eq!(fadt[109] & 0x3f, 0x34, "no VGA, no clock, no keyboard controller");
        assert_eq!(u64_at(fadt, 248), u64::from(layout::SLEEP_CONTROL_PORT));
        assert_eq!(u64_at(fadt, 260), u64::from(layout::SLEEP_STATUS_PORT));
        assert_eq!(fadt[244], 1, "an I/O port");
    }

    #[test]
    fn every_processor_is_listed_once() {
        let blob = build(&config(300)).unwrap();
        let madt = tables(&blob)[1];
        let mut entries = &madt[44..];
        let (mut ids, mut io_apics) = (Vec::new(), 0);
        while let [kind, length, ..] = *entries {
            let (entry, rest) = entries.split_at(length.into());
            match kind {
                0 => ids.push(u32::from(entry[3])),
                9 => ids.push(u32_at(entry, 4)),
                1 => {
                    io_apics += 1;
                    assert_eq!((u32_at(entry, 4), u32_at(entry, 8)), (layout::IO_APIC.0 as u32, 0));
                }
                other => panic!("entry of type {other}"),
            }
            entries = rest;
        }
        assert_eq!(ids, (0..300).collect::<Vec<_>>());
        assert_eq!(io_apics, 1);
    }

    #[test]
    fn an_iommu_is_described() {
        let with = |iommu| build(&AcpiConfig { iommu: Some(iommu), ..config(1) }).unwrap();
        let blob = with(Iommu::Intel);
        let dmar = tables(&blob)[3];
        assert_eq!((&dmar[..4], dmar.len()), (&b"DMAR"[..], 48 + 24));
        assert_eq!(dmar[36..38], [39, 0], "40 bits, no interrupt remapping");
        assert_eq!(dmar[48..56], [0, 0, 24, 0, 1, 0, 0, 0]);
        assert_eq!(u64_at(dmar, 56), layout::VTD.0);
        assert_eq!(dmar[64..], [3, 8, 0, 0, IO_APIC_ID, 0xff, 0, 0]);
        let blob = with(Iommu::Virtio { slot: 0, behind: vec![1, 2] });
        assert!(tables(&blob)[3].starts_with(b"VIOT"));
    }

    #[test]
    fn ecam_is_described() {
        let blob = build(&config(1)).unwrap();
        let mcfg = tables(&blob)[2];
        assert_eq!(u64_at(mcfg, 44), layout::ECAM.0);
        assert_eq!(mcfg[52..56], [0, 0, 0, layout::ECAM_BUSES - 1]);
    }

    /// Intel's compiler takes the DSDT apart and puts it together again without errors.
    #[test]
    fn disassembles() {
        let directory = std::env::temp_dir().join(format!("ring3-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let blob = build(&AcpiConfig { iommu: Some(Iommu::Intel), ..config(2) }).unwrap();
        let run = |args: &[&str]| {
            std::process::Command::new("iasl").args(args).current_dir(&directory).output().ok()
        };
        for table in tables(&blob) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            std::fs::write(directory.join(format!("{name}.aml")), table).unwrap();
            let Some(output) = run(&["-d", &format!("{name}.aml")]) else {
                eprintln!("skipped: no iasl");
                break;
            };
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !said.to_lowercase().contains("error"), "{name}: {said}");
            if name == "DSDT" {
                let output = run(&["DSDT.dsl"]).unwrap();
                let said = String::from_utf8_lossy(&output.stdout);
                assert!(said.contains("0 Errors, 0 Warnings"), "{said}");
                let source = std::fs::read_to_string(directory.join("DSDT.dsl")).unwrap();
                for part in ["_S5", "PNP0A08", "PNP0C02", "PNP0501", "QEMU0001", "ACPI0007", "_OSC", "_PRT"] {
                    assert!(source.contains(part), "{part} is not in {source}");
                }
            }
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
