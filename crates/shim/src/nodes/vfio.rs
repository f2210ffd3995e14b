//! `/dev/vfio`: the devices that the program was given, and what sysfs says of them.
//!
//! They are made when the program first looks for one, not in each process that only starts another: a device may hold a file
//! open.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::fd::OwnedFd,
    sync::{Arc, OnceLock},
};

use iommufd::{
    Errno, Result,
    iova::{Iova, IovaRange},
    process::UserAddr,
    soft::SoftDevice,
};
use vfio::{
    device::Device,
    devices::{ioat, nvme, test},
    doors::{
        Caller, DeviceFile, Mapping as DeviceMapping, Node as VfioNode, Opened as VfioOpened, Registration,
        System, Token, container::Container, group::GroupFile,
    },
};

use crate::{
    caller::ShimCaller,
    node::{Mappable, Mapping, Metadata, Node, Opened, ServedFile},
    tree::Entry,
};

/// The major numbers that the nodes show: such as Linux leaves to drivers that ask for any.
const GROUP_MAJOR: u32 = 510;
const DEVICE_MAJOR: u32 = 511;

/// `/dev/vfio/vfio` is one of the miscellaneous devices.
const CONTAINER: (u32, u32) = (10, 196);

/// The group of the first device: a number that a machine's own groups rarely have.
const FIRST_GROUP: u32 = 1000;

/// The region that is the configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
const CONFIGURATION: u32 = 7;

/// Where interrupts are written to on x86: nothing can be mapped there.
const MSI_WINDOW: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// What `--device` may be.
const SPECIFICATIONS: &str = "nvme,file=PATH[,ro][,addr=BDF], ioat[,addr=BDF] or test[,addr=BDF]";

static SPECIFIED: OnceLock<Vec<String>> = OnceLock::new();
static DEVICES: OnceLock<Devices> = OnceLock::new();

/// The devices, and where they are.
struct Devices {
    system: Arc<System>,
    /// By PCI address, the number of the node.
    numbers: BTreeMap<String, u32>,
}

/// The devices will be these.
pub(crate) fn set(specifications: Vec<String>) {
    let _ = SPECIFIED.set(specifications);
}

fn devices() -> Option<&'static Devices> {
    let specifications = SPECIFIED.get().filter(|specifications| !specifications.is_empty())?;
    Some(DEVICES.get_or_init(|| make(specifications)))
}

fn make(specifications: &[String]) -> Devices {
    let system = System::new(true);
    let mut numbers = BTreeMap::new();
    for (index, specification) in specifications.iter().enumerate() {
        match add(&system, specification, u8::try_from(index).unwrap_or(u8::MAX)) {
            Ok((address, number)) => {
                numbers.insert(address, number);
            }
            Err(problem) => crate::complain(&format!("--device {specification}: {problem}")),
        }
    }
    Devices { system, numbers }
}

/// Makes one device: its PCI address, and the number of its node.
fn add(system: &Arc<System>, specification: &str, index: u8) -> core::result::Result<(String, u32), String> {
    let (kind, options) = specification.split_once(',').unwrap_or((specification, ""));
    let mut address = (0_u16, 0_u8, index.saturating_add(0x10) << 3);
    let (mut file, mut read_only) = (None, false);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("file", path)) if kind == "nvme" => file = Some(path),
            None if kind == "nvme" && option == "ro" => read_only = true,
            Some(("addr", text)) => {
                address = parse_address(text)
                    .ok_or_else(|| format!("{text:?} is no PCI address like 0000:00:05.0"))?;
            }
            _ => return Err(format!("{option:?} is no option of it; it is {SPECIFICATIONS}")),
        }
    }
    let device: Arc<dyn Device> = match (kind, file) {
        ("nvme", Some(path)) => {
            let file = File::options().read(true).write(!read_only).open(path);
            let file = file.map_err(|error| format!("cannot open {path}: {error}"))?;
            let disk = disk::Disk::new(file, read_only).map_err(|error| error.to_string())?;
            Arc::new(nvme::new(disk, &nvme::Options::default()).map_err(|error| error.to_string())?)
        }
        ("nvme", None) => return Err(format!("an NVMe controller needs a file; it is {SPECIFICATIONS}")),
        ("ioat", _) => Arc::new(ioat::physical().map_err(|error| error.to_string())?),
        ("test", _) => Arc::new(test::function().map_err(|error| error.to_string())?),
        _ => return Err(format!("there is no device {kind:?}; it is {SPECIFICATIONS}")),
    };
    let msi = IovaRange::new(Iova(MSI_WINDOW.0), Iova(MSI_WINDOW.1)).map_err(|error| error.to_string())?;
    let group = FIRST_GROUP + u32::from(index);
    let (segment, bus, function) = address;
    let name = format!("{segment:04x}:{bus:02x}:{:02x}.{}", function >> 3, function & 7);
    let registration = Registration {
        name: name.clone(),
        address: Some(address),
        device,
        hardware: Some(SoftDevice::new(u64::from(group), vec![msi])),
        reset_set: Some(u32::from(bus)),
        token: Token::none(),
    };
    let number = system.add(registration).map_err(|error| error.to_string())?;
    Ok((name, number))
}

/// `0000:00:05.0`, with or without the segment.
fn parse_address(text: &str) -> Option<(u16, u8, u8)> {
    let (segment, rest) = match text.matches(':').count() {
        2 => text.split_once(':')?,
        _ => ("0", text),
    };
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let slot = u8::from_str_radix(slot, 16).ok().filter(|slot| *slot < 32)?;
    let function = function.parse::<u8>().ok().filter(|function| *function < 8)?;
    Some((u16::from_str_radix(segment, 16).ok()?, u8::from_str_radix(bus, 16).ok()?, slot << 3 | function))
}

/// The node at `path`.
pub(crate) fn find(path: &str) -> Option<Arc<dyn Node>> {
    let name = path.strip_prefix("/dev/vfio/")?;
    let devices = devices()?;
    let node = devices.system.nodes().into_iter().find(|node| {
        let there = node.to_string();
        there.strip_prefix("/dev/vfio/") == Some(name)
    })?;
    Some(Arc::new(DoorNode { system: Arc::clone(&devices.system), node }))
}

/// The directories that are redirected, when there are devices.
pub(crate) fn tops() -> Vec<String> {
    if SPECIFIED.get().is_none_or(Vec::is_empty) {
        return Vec::new();
    }
    ["/dev/vfio", "/sys/bus/pci/devices", "/sys/kernel/iommu_groups", "/sys/class/vfio-dev"]
        .map(str::to_owned)
        .into()
}

/// What sysfs says of the devices.
pub(crate) fn entries() -> Vec<(String, Entry)> {
    let Some(devices) = devices() else { return Vec::new() };
    let directories = ["/dev/vfio/devices", "/sys/bus/pci/drivers/vfio-pci"];
    let mut entries: Vec<_> = directories.map(|path| (path.to_owned(), Entry::Directory)).into();
    let nodes = devices.system.nodes();
    let paths = nodes.iter().map(VfioNode::to_string).filter(|path| path.starts_with("/dev/vfio/"));
    entries.extend(paths.map(|path| (path, Entry::File(Vec::new()))));
    for (address, &number) in &devices.numbers {
        let Some(group) = devices.system.group_of(number) else { continue };
        let directory = format!("/sys/bus/pci/devices/{address}");
        let mut attribute = |name: &str, text: String| {
            entries.push((format!("{directory}/{name}"), Entry::File(format!("{text}\n").into_bytes())));
        };
        let word = |offset| configuration(devices, number, offset);
        attribute("vendor", format!("{:#06x}", word(0) & 0xffff));
        attribute("device", format!("{:#06x}", word(0) >> 16));
        attribute("revision", format!("{:#04x}", word(8) & 0xff));
        attribute("class", format!("{:#08x}", word(8) >> 8));
        attribute("subsystem_vendor", format!("{:#06x}", word(0x2c) & 0xffff));
        attribute("subsystem_device", format!("{:#06x}", word(0x2c) >> 16));
        attribute("numa_node", "-1".to_owned());
        attribute(&format!("vfio-dev/vfio{number}/dev"), format!("{DEVICE_MAJOR}:{number}"));
        let device = format!("../../../../bus/pci/devices/{address}");
        let links = [
            (format!("{directory}/iommu_group"), format!("../../../../kernel/iommu_groups/{group}")),
            (format!("{directory}/driver"), "../../drivers/vfio-pci".to_owned()),
            (format!("/sys/kernel/iommu_groups/{group}/devices/{address}"), format!("../{device}")),
            (format!("/sys/class/vfio-dev/vfio{number}"), format!("{device}/vfio-dev/vfio{number}")),
        ];
        entries.extend(links.map(|(path, target)| (path, Entry::Link(target))));
        entries.push((format!("/sys/kernel/iommu_groups/{group}/type"), Entry::File(b"DMA\n".to_vec())));
    }
    // The machine's own stay where the program looks for them.
    for own in fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten() {
        if let (Some(name), Ok(target)) = (own.file_name().to_str(), own.path().canonicalize())
            && !devices.numbers.contains_key(name)
            && let Some(target) = target.to_str()
        {
            entries.push((format!("/sys/bus/pci/devices/{name}"), Entry::Link(target.to_owned())));
        }
    }
    entries
}

/// Four bytes of a device's configuration space.
fn configuration(devices: &Devices, number: u32, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    match devices.system.device(number).map(|device| device.read(CONFIGURATION, offset, &mut bytes)) {
        Some(Ok(4)) => u32::from_le_bytes(bytes),
        _ => u32::MAX,
    }
}

/// A node of `/dev/vfio`.
struct DoorNode {
    system: Arc<System>,
    node: VfioNode,
}

impl Node for DoorNode {
    fn open(&self, _flags: i32) -> Result<Opened> {
        let metadata = self.metadata();
        Ok(Opened::Served(match &self.node {
            VfioNode::Container => Arc::new(Door::Container(self.system.open_container())),
            VfioNode::Group { number, .. } => {
                Arc::new(Door::Group(self.system.open_group(&*ShimCaller::get(), *number)?))
            }
            VfioNode::Device { number } => {
                Arc::new(Door::Device(self.system.open_device(*number)?, metadata))
            }
            VfioNode::Iommufd | VfioNode::IommufdContainer => return Err(Errno::NOENT),
        }))
    }

    fn metadata(&self) -> Metadata {
        let rdev = match &self.node {
            VfioNode::Group { number, .. } => (GROUP_MAJOR, *number),
            VfioNode::Device { number } => (DEVICE_MAJOR, *number),
            _ => CONTAINER,
        };
        Metadata { mode: libc::S_IFCHR | 0o600, rdev }
    }
}

/// What opening such a node gives, or a group gave out.
enum Door {
    Container(Arc<Container>),
    Group(Arc<GroupFile>),
    Device(Arc<DeviceFile>, Metadata),
}

/// What serves a device that a group gave out.
pub(crate) fn device(device: Arc<DeviceFile>) -> Arc<dyn ServedFile> {
    Arc::new(Door::Device(device, Metadata { mode: libc::S_IFREG | 0o600, rdev: (0, 0) }))
}

impl ServedFile for Door {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        match self {
            Self::Container(container) => container.ioctl(caller, request, argument),
            Self::Group(group) => group.ioctl(caller, request, argument),
            Self::Device(device, _) => device.ioctl(caller, request, argument),
        }
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.read_at(0, to)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.write_at(0, from)
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        match self {
            Self::Device(device, _) => device.read_at(offset, to),
            _ => Err(Errno::INVAL),
        }
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        match self {
            Self::Device(device, _) => device.write_at(offset, from),
            _ => Err(Errno::INVAL),
        }
    }

    fn mmap(&self, offset: u64, length: u64, prot: i32, shared: bool) -> Result<Mapping> {
        match self.map(offset, length, prot, shared)? {
            Mappable::Pages(mapping) => Ok(mapping),
            // Of a program that another process serves: nothing catches its accesses.
            Mappable::Registers(_) => Err(Errno::INVAL),
        }
    }

    fn map(&self, offset: u64, length: u64, _prot: i32, shared: bool) -> Result<Mappable> {
        let Self::Device(device, _) = self else { return Err(Errno::NODEV) };
        Ok(match device.mmap(offset, length, shared)? {
            DeviceMapping::Memory { file, offset } => {
                let fd: OwnedFd = file;
                Mappable::Pages(Mapping { fd, offset, guard: Arc::clone(device) as _ })
            }
            DeviceMapping::Registers => Mappable::Registers(Arc::clone(device)),
        })
    }

    fn metadata(&self) -> Option<Metadata> {
        match self {
            Self::Device(_, metadata) => Some(*metadata),
            _ => None,
        }
    }

    fn opened(&self) -> VfioOpened {
        match self {
            Self::Container(container) => VfioOpened::Container(Arc::clone(container)),
            Self::Group(group) => VfioOpened::Group(Arc::clone(group)),
            Self::Device(device, _) => VfioOpened::Device(Arc::clone(device)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_a_segment() {
        assert_eq!(parse_address("0000:00:05.0"), Some((0, 0, 0x28)));
        assert_eq!(parse_address("1:02:1f.7"), Some((1, 2, 0xff)));
        assert_eq!(parse_address("03:00.1"), Some((0, 3, 1)));
        for bad in ["", "5.0", "00:20.0", "00:05.8", "00:05", "x:00:05.0", "0:0:0:05.0"] {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_bad_specification_says_what_is_wrong() {
        let system = System::new(false);
        for (bad, words) in [
            ("tape", "no device"),
            ("nvme", "needs a file"),
            ("nvme,file=/nowhere/at/all", "cannot open"),
            ("ioat,addr=1", "no PCI address"),
            ("ioat,size=1", "no option"),
        ] {
            let problem = add(&system, bad, 0).unwrap_err();
            assert!(problem.contains(words), "{bad}: {problem}");
        }
        assert_eq!(add(&system, "ioat,addr=00:05.0", 0), Ok(("0000:00:05.0".to_owned(), 0)));
        assert_eq!(add(&system, "test", 1), Ok(("0000:00:11.0".to_owned(), 1)));
    }
}
