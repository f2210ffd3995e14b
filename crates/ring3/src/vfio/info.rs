//! `ring3 vfio info`.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use ::vfio::Errno;
use ::vfio::device::{Device, DeviceFlags, Mappable, RegionFlags, RegionInfo};
use ::vfio::irq::{IrqFlags, IrqInfo};
use ::vfio::kernel::{HostDevice, HostDeviceName};
use ::vfio::migration::MigrationFlags;
use ::vfio::user::client::{Options, RemoteDevice};

use super::VfioError;

/// Names of a PCI function's regions, by index.
const REGIONS: [&str; 9] = ["BAR0", "BAR1", "BAR2", "BAR3", "BAR4", "BAR5", "ROM", "config", "VGA"];
/// Names of a PCI function's interrupts, by index.
const INTERRUPTS: [&str; 5] = ["INTx", "MSI", "MSI-X", "error", "request"];
/// The region that is the configuration space.
const CONFIG: u32 = 7;

pub(super) fn of_a_server(socket: &Path) -> Result<(), VfioError> {
    let stream = UnixStream::connect(socket).map_err(|error| VfioError::Connect(socket.to_owned(), error))?;
    let text = RemoteDevice::connect(stream.into(), Options { export: None, ..Default::default() })
        .and_then(|device| Ok(describe(&device)? + &describe_server(&device)))
        .map_err(|errno| VfioError::Server(socket.to_owned(), errno.into()))?;
    print(&text);
    Ok(())
}

pub(super) fn of_the_host(name: HostDeviceName) -> Result<(), VfioError> {
    let device = HostDevice::connect(name.address, name.door)?;
    let text = describe(&device).map_err(|errno| VfioError::Silent(name.address, errno.into()))?;
    print(&(text + &describe_place(&device)));
    Ok(())
}

fn print(text: &str) {
    // Nobody may be reading.
    let _ = io::stdout().write_all(text.as_bytes());
}

/// A line of what is printed. Writing to a string does not fail.
fn add_line(text: &mut String, what: &str, value: &str) {
    let _ = writeln!(text, "{what:<12} {value}");
}

/// What a server can do.
fn describe_server(device: &RemoteDevice) -> String {
    let server = device.capabilities();
    let mut text = String::new();
    add_line(&mut text, "transfers", &format!("up to {} bytes", server.max_transfer));
    add_line(&mut text, "descriptors", &format!("up to {} in a message", server.max_fds));
    add_line(&mut text, "DMA windows", &format!("up to {}", server.max_dma_maps));
    add_line(&mut text, "write-multi", &yes(server.write_multiple));
    add_line(&mut text, "twin socket", &yes(server.twin_socket));
    text
}

/// Where a device of the host is.
fn describe_place(device: &HostDevice) -> String {
    let mut text = String::new();
    add_line(&mut text, "address", &device.address().to_string());
    add_line(&mut text, "IOMMU group", &device.group().to_string());
    if let Some(space) = device.space() {
        add_line(&mut text, "door", &space.door().to_string());
        for range in space.ranges().unwrap_or_default() {
            add_line(&mut text, "DMA", &format!("{:#x} to {:#x}", range.start().0, range.last().0));
        }
    }
    text
}

fn describe(device: &dyn Device) -> Result<String, Errno> {
    let info = device.info()?;
    let pci = info.flags.contains(DeviceFlags::PCI);
    let mut text = String::new();
    let mut line = |what: &str, value: String| add_line(&mut text, what, &value);
    let mut ids = [0; 16];
    if pci && device.read(CONFIG, 0, &mut ids) == Ok(ids.len()) {
        let [v0, v1, d0, d1, .., revision, interface, sub, base, _, _, _, _] = ids;
        line(
            "device",
            format!("PCI {:04x}:{:04x}", u16::from_le_bytes([v0, v1]), u16::from_le_bytes([d0, d1])),
        );
        line("class", format!("{base:02x}{sub:02x}{interface:02x}, revision {revision:02x}"));
    }
    line("reset", yes(info.flags.contains(DeviceFlags::RESET)));
    for index in 0..info.regions {
        let region = device.region(index)?;
        if region.size > 0 {
            line(&name(&REGIONS, pci, index, "region"), describe_region(&region));
        }
    }
    for index in 0..info.irqs {
        let irq = device.irq(index)?;
        if irq.count > 0 {
            line(&name(&INTERRUPTS, pci, index, "interrupt"), describe_irq(irq));
        }
    }
    line(
        "migration",
        device.migration().map_or("no".into(), |migration| {
            let states = [(MigrationFlags::STOP_COPY, "stop-copy"), (MigrationFlags::PRE_COPY, "pre-copy")];
            let states = states.into_iter().chain([(MigrationFlags::P2P, "p2p")]);
            list(states.map(|(flag, name)| (migration.flags().contains(flag), name)))
        }),
    );
    line("DMA logging", yes(device.dma_logging().is_some()));
    Ok(text)
}

fn yes(yes: bool) -> String {
    if yes { "yes" } else { "no" }.into()
}

fn name(names: &[&str], pci: bool, index: u32, kind: &str) -> String {
    let name = usize::try_from(index).ok().and_then(|index| names.get(index)).filter(|_| pci);
    name.map_or_else(|| format!("{kind} {index}"), |name| (*name).to_owned())
}

fn list<'a>(words: impl IntoIterator<Item = (bool, &'a str)>) -> String {
    words.into_iter().filter(|(yes, _)| *yes).map(|(_, word)| word).collect::<Vec<_>>().join(", ")
}

fn describe_region(region: &RegionInfo) -> String {
    let flags = list([
        (region.flags.contains(RegionFlags::READ), "read"),
        (region.flags.contains(RegionFlags::WRITE), "write"),
        (region.mappable == Mappable::All, "mappable"),
        (region.msix_mappable, "MSI-X mappable"),
    ]);
    let mut text = format!("{:#x} bytes: {flags}", region.size);
    if let Mappable::Areas(areas) = &region.mappable {
        for area in areas {
            let _ = write!(text, ", mappable {:#x}+{:#x}", area.offset, area.size);
        }
    }
    if let Some((kind, subtype)) = region.kind {
        let _ = write!(text, ", type {kind:#x}/{subtype:#x}");
    }
    text
}

fn describe_irq(irq: IrqInfo) -> String {
    let flags = list([
        (irq.flags.contains(IrqFlags::EVENTFD), "eventfd"),
        (irq.flags.contains(IrqFlags::MASKABLE), "maskable"),
        (irq.flags.contains(IrqFlags::AUTOMASKED), "automasked"),
        (irq.flags.contains(IrqFlags::NORESIZE), "all at once"),
    ]);
    format!("{}: {flags}", irq.count)
}
