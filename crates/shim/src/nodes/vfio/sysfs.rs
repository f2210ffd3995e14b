//! What sysfs says of the functions, and what writing to it does: virtual functions, and who has a function.
//!
//! The answers are those of the kernel (7.3, vfio-pci with `enable_sriov`), which tests/selftests asks for them.

use std::{fs, sync::Arc};

use iommufd::{Errno, Result};
use vfio::device::Device;

use super::{
    DEVICE_MAJOR, devices,
    functions::{Function, Functions, group},
};
use crate::tree::{Attribute, Entry, Locked};

/// The directories of PCI, of groups and of VFIO's devices.
const BUS: &str = "/sys/bus/pci";
const GROUPS: &str = "/sys/kernel/iommu_groups";
const CLASS: &str = "/sys/class/vfio-dev";

/// The driver that all functions have, and its directory.
const DRIVER: &str = "vfio-pci";

/// The region that is the configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
const CONFIGURATION: u32 = 7;

/// Permissions of what can be read, read and written, and written.
const READ: u32 = 0o444;
const BOTH: u32 = 0o644;
const WRITE: u32 = 0o200;

/// The directories that are redirected.
pub(super) const TOPS: [&str; 4] = ["/dev/vfio", BUS, GROUPS, CLASS];

fn of_address(address: &str, name: &str) -> String {
    format!("{BUS}/devices/{address}/{name}")
}

/// A file of a function's directory.
pub(super) fn of(function: Function<'_>, name: &str) -> String {
    of_address(&function.at().to_string(), name)
}

fn line(text: impl core::fmt::Display, mode: u32) -> Entry {
    Entry::File(format!("{text}\n").into_bytes(), mode)
}

/// What there is before anybody has written anything.
pub(crate) fn entries() -> Vec<(String, Entry)> {
    let Some(devices) = devices() else { return Vec::new() };
    let mut entries = vec![
        ("/dev/vfio/devices".to_owned(), Entry::Directory),
        (format!("{BUS}/drivers_probe"), Entry::File(Vec::new(), WRITE)),
        (format!("{BUS}/drivers/{DRIVER}/bind"), Entry::File(Vec::new(), WRITE)),
        (format!("{BUS}/drivers/{DRIVER}/unbind"), Entry::File(Vec::new(), WRITE)),
        ("/dev/vfio/vfio".to_owned(), Entry::File(Vec::new(), BOTH)),
    ];
    for physical in &devices.physical {
        let function = Function::Physical(physical);
        entries.extend(of_function(function, &*physical.device));
        entries.extend(of_driver(function));
    }
    // The machine's own stay where the program looks for them.
    let directories = ["devices", "drivers", "slots"].map(|name| format!("{BUS}/{name}"));
    for directory in directories.iter().map(String::as_str).chain([GROUPS, CLASS]) {
        for own in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = format!("{directory}/{}", own.file_name().to_string_lossy());
            let taken = entries.iter().any(|(other, _)| {
                other.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            });
            if !taken && let Ok(target) = own.path().canonicalize() {
                entries.push((path, Entry::Link(target.to_string_lossy().into_owned())));
            }
        }
    }
    entries
}

/// A function as it is on its bus.
fn of_function(function: Function<'_>, device: &dyn Device) -> Vec<(String, Entry)> {
    let mut config = vec![0; 256];
    let read = device.read(CONFIGURATION, 0, &mut config);
    config.truncate(read.unwrap_or(0));
    let word = |at: usize| {
        let bytes = config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or([0xff; 4]))
    };
    let (ids, class, subsystem) = (word(0), word(8) >> 8, word(0x2c));
    let modalias = format!(
        "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}",
        ids & 0xffff,
        ids >> 16,
        subsystem & 0xffff,
        subsystem >> 16,
        class >> 16,
        class >> 8 & 0xff,
        class & 0xff
    );
    let group = group(function.number());
    let up = "../../../..";
    let mut named = vec![
        ("vendor", line(format_args!("{:#06x}", ids & 0xffff), READ)),
        ("device", line(format_args!("{:#06x}", ids >> 16), READ)),
        ("revision", line(format_args!("{:#04x}", word(8) & 0xff), READ)),
        ("class", line(format_args!("{class:#08x}"), READ)),
        ("subsystem_vendor", line(format_args!("{:#06x}", subsystem & 0xffff), READ)),
        ("subsystem_device", line(format_args!("{:#06x}", subsystem >> 16), READ)),
        ("modalias", line(modalias, READ)),
        ("numa_node", line(-1, READ)),
        ("driver_override", line(DRIVER, BOTH)),
        ("iommu_group", Entry::Link(format!("{up}/kernel/iommu_groups/{group}"))),
        ("subsystem", Entry::Link(format!("{up}/bus/pci"))),
    ];
    match function {
        Function::Physical(physical) => {
            if let Some(functions) = &physical.functions {
                named.extend([
                    ("sriov_totalvfs", line(functions.total(), READ)),
                    ("sriov_numvfs", line(0, BOTH)),
                    ("sriov_offset", line(functions.offset(), READ)),
                    ("sriov_stride", line(functions.stride(), READ)),
                    ("sriov_drivers_autoprobe", line(1, BOTH)),
                ]);
            }
        }
        Function::Virtual(physical, ..) => {
            named.push(("physfn", Entry::Link(format!("../{}", physical.at))));
        }
    }
    named.push(("config", Entry::File(config, READ)));
    let at = function.at();
    let mut entries: Vec<_> = named.into_iter().map(|(name, entry)| (of(function, name), entry)).collect();
    entries.push((format!("{GROUPS}/{group}/type"), line("DMA", READ)));
    let there = format!("{up}/bus/pci/devices/{at}");
    entries.push((format!("{GROUPS}/{group}/devices/{at}"), Entry::Link(there)));
    if let Function::Virtual(physical, _, index) = function {
        let link = of_address(&physical.at.to_string(), &format!("virtfn{index}"));
        entries.push((link, Entry::Link(format!("../{at}"))));
    }
    entries
}

/// What there is more while VFIO has it.
fn of_driver(function: Function<'_>) -> Vec<(String, Entry)> {
    let (at, number) = (function.at(), function.number());
    let node = format!("vfio-dev/vfio{number}");
    vec![
        (of(function, "driver"), Entry::Link(format!("../../drivers/{DRIVER}"))),
        (of(function, &format!("{node}/dev")), line(format_args!("{DEVICE_MAJOR}:{number}"), READ)),
        (format!("{BUS}/drivers/{DRIVER}/{at}"), Entry::Link(format!("../../devices/{at}"))),
        (format!("{CLASS}/vfio{number}"), Entry::Link(format!("../../bus/pci/devices/{at}/{node}"))),
        // Names for who lists the directory; who opens them gets a door.
        (format!("/dev/vfio/{}", group(number)), Entry::File(Vec::new(), BOTH)),
        (format!("/dev/vfio/devices/vfio{number}"), Entry::File(Vec::new(), BOTH)),
    ]
}

fn put(tree: &Locked, entries: Vec<(String, Entry)>) -> Result<()> {
    entries.iter().try_for_each(|(path, entry)| tree.put(path, entry))
}

/// Takes away what `of_driver` has: the directory of its node with all in it.
fn remove_driver(tree: &Locked, function: Function<'_>) {
    for (path, entry) in of_driver(function) {
        if let Entry::File(..) | Entry::Link(_) = entry {
            tree.remove(&path);
        }
    }
    tree.remove(&of(function, "vfio-dev"));
}

fn remove_function(tree: &Locked, function: Function<'_>) {
    remove_driver(tree, function);
    tree.remove(&of(function, ""));
    tree.remove(&format!("{GROUPS}/{}", group(function.number())));
    if let Function::Virtual(physical, _, index) = function {
        tree.remove(&of_address(&physical.at.to_string(), &format!("virtfn{index}")));
    }
}

/// What writing to the file at `path` means.
pub(crate) fn attribute(path: &str) -> Option<Arc<dyn Attribute>> {
    let rest = path.strip_prefix(BUS)?.strip_prefix('/')?;
    let parts: Vec<_> = rest.split('/').collect();
    let which = match parts[..] {
        ["devices", at, "sriov_numvfs"] => Written::Count(at.to_owned()),
        ["devices", at, "sriov_drivers_autoprobe"] => Written::Autoprobe(at.to_owned()),
        ["devices", at, "driver_override"] => Written::Override(at.to_owned()),
        ["drivers", DRIVER, "bind"] => Written::Bind,
        ["drivers", DRIVER, "unbind"] => Written::Unbind,
        ["drivers_probe"] => Written::Probe,
        _ => return None,
    };
    Some(Arc::new(which))
}

/// A file that can be written, of the function at an address where it is one's.
enum Written {
    Count(String),
    Autoprobe(String),
    Override(String),
    Bind,
    Unbind,
    Probe,
}

impl Attribute for Written {
    fn store(&self, tree: &Locked, text: &[u8]) -> Result<()> {
        let devices = devices().ok_or(Errno::NODEV)?;
        devices.follow(tree);
        let named = || {
            let text = core::str::from_utf8(text).ok()?;
            devices.find(text.strip_suffix('\n').unwrap_or(text))
        };
        match self {
            Self::Count(at) => {
                let count = number(text).ok_or(Errno::INVAL)?;
                set_count(tree, devices, devices.find(at).ok_or(Errno::NODEV)?, count)
            }
            Self::Autoprobe(at) => {
                // Virtual functions have the driver of the physical one by override, so the kernel binds them either way.
                let wanted = truth(text).ok_or(Errno::INVAL)?;
                tree.put(&of_address(at, "sriov_drivers_autoprobe"), &line(u8::from(wanted), BOTH))
            }
            Self::Override(at) => {
                // A page, with the ends of the line and of the string.
                const LONGEST: usize = 4094;
                if text.len() > LONGEST {
                    return Err(Errno::INVAL);
                }
                let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
                let first = core::str::from_utf8(first).map_err(|_| Errno::INVAL)?;
                let shown = if first.is_empty() { NO_OVERRIDE } else { first };
                tree.put(&of_address(at, "driver_override"), &line(shown, BOTH))
            }
            Self::Bind => match named() {
                Some(function) if matches(tree, function) => {
                    if function.is_bound() {
                        return Err(Errno::BUSY);
                    }
                    bind(tree, devices, function)
                }
                _ => Err(Errno::NODEV),
            },
            Self::Unbind => match named() {
                Some(function) if function.is_bound() => unbind(tree, devices, function),
                _ => Err(Errno::NODEV),
            },
            Self::Probe => match named() {
                Some(function) if !function.is_bound() && matches(tree, function) => {
                    bind(tree, devices, function)
                }
                Some(_) => Ok(()),
                None => Err(Errno::NODEV),
            },
        }
    }
}

/// What an override that there is not reads as.
const NO_OVERRIDE: &str = "(null)";

/// Whether the driver takes the function: only by override.
fn matches(tree: &Locked, function: Function<'_>) -> bool {
    tree.text(&of(function, "driver_override")).as_deref() == Some(DRIVER)
}

fn bind(tree: &Locked, devices: &Functions, function: Function<'_>) -> Result<()> {
    devices.bind(function, true)?;
    put(tree, of_driver(function))
}

fn unbind(tree: &Locked, devices: &Functions, function: Function<'_>) -> Result<()> {
    if let Function::Physical(physical) = function
        && physical.functions.is_some()
    {
        set_count(tree, devices, function, 0)?;
    }
    devices.bind(function, false)?;
    remove_driver(tree, function);
    Ok(())
}

/// What a write to `sriov_numvfs` does.
fn set_count(tree: &Locked, devices: &Functions, function: Function<'_>, count: u16) -> Result<()> {
    let Function::Physical(physical) = function else { return Err(Errno::NODEV) };
    let functions = physical.functions.as_ref().ok_or(Errno::NODEV)?;
    let before = functions.count();
    let driverless = !function.is_bound() && count != before;
    if driverless && count <= functions.total() {
        return Err(Errno::NOENT);
    }
    functions.set(count)?;
    if count == before {
        return Ok(());
    }
    for index in 0..before {
        remove_function(tree, Function::Virtual(physical, functions, index));
    }
    for index in 0..count {
        let function = Function::Virtual(physical, functions, index);
        let device = devices.system.device(function.number()).ok_or(Errno::NODEV)?;
        put(tree, of_function(function, &*device))?;
        put(tree, of_driver(function))?;
    }
    tree.put(&of(Function::Physical(physical), "sriov_numvfs"), &line(count, BOTH))
}

/// A number as sysfs takes it: decimal, octal after a 0, hexadecimal after 0x; a plus before it, a line's end after it.
fn number(text: &[u8]) -> Option<u16> {
    let text = core::str::from_utf8(text).ok()?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let digits = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    // The library's parser takes a sign of its own.
    if !digits.starts_with(|digit: char| digit.is_digit(radix)) {
        return None;
    }
    u16::from_str_radix(digits, radix).ok()
}

/// Yes or no, as sysfs takes it.
fn truth(text: &[u8]) -> Option<bool> {
    match text {
        [b'y' | b'Y' | b't' | b'T' | b'1', ..] | [b'o' | b'O', b'n' | b'N', ..] => Some(true),
        [b'n' | b'N' | b'f' | b'F' | b'0', ..] | [b'o' | b'O', b'f' | b'F', ..] => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_the_kernel_reads_them() {
        for (text, value) in [
            ("1", 1),
            ("0", 0),
            ("+1\n", 1),
            ("0x1F", 31),
            ("0X1", 1),
            ("010", 8),
            ("00", 0),
            ("65535", 65535),
        ] {
            assert_eq!(number(text.as_bytes()), Some(value), "{text}");
        }
        for bad in ["", "\n", "x", "-1", "++1", "1 ", " 1", "1\n\n", "0x", "0x+1", "08", "0b1", "65536", "é"]
        {
            assert_eq!(number(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn truth_is_read_as_the_kernel_reads_it() {
        for (text, value) in
            [("1", Some(true)), ("on", Some(true)), ("off\n", Some(false)), ("N", Some(false))]
        {
            assert_eq!(truth(text.as_bytes()), value);
        }
        assert_eq!((truth(b"2"), truth(b""), truth(b"o")), (None, None, None));
    }

    #[test]
    fn only_what_can_be_written_is_an_attribute() {
        for path in ["devices/0000:00:05.0/sriov_numvfs", "drivers/vfio-pci/bind", "drivers_probe"] {
            assert!(attribute(&format!("{BUS}/{path}")).is_some(), "{path}");
        }
        for path in ["devices/0000:00:05.0/vendor", "drivers/igb/bind", "devices", "x/y/sriov_numvfs"] {
            assert!(attribute(&format!("{BUS}/{path}")).is_none(), "{path}");
        }
    }
}
