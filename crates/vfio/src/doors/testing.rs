//! A caller to test with, and the bodies of fuzz targets.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use iommufd::{
    Context,
    caller::{Capability, File},
    hardware::Hardware,
    iova::{Iova, IovaRange},
    process::{LocalProcess, Process, UserAddr},
    soft::SoftDevice,
};
use zerocopy::{Immutable, IntoBytes};

use super::{Caller, DeviceFile, Opened, Registration, System, Token};
use crate::{Errno, Result, device::Device, eventfd::lock};

/// What a program has open, by numbers of its own; other numbers are descriptors of this process.
#[derive(Debug, Default)]
enum Entry {
    #[default]
    Nothing,
    Iommufd(Arc<Context>),
    #[cfg(feature = "container")]
    Container(Arc<super::container::Container>),
    #[cfg(feature = "group")]
    Group(Arc<super::group::GroupFile>),
    Device(Arc<DeviceFile>),
}

/// A program in this process.
pub struct Program {
    process: Arc<dyn Process>,
    entries: Mutex<BTreeMap<i32, Entry>>,
    files: Mutex<BTreeMap<i32, Arc<dyn File>>>,
    /// Whether it has every capability.
    pub privileged: bool,
}

impl Default for Program {
    fn default() -> Self {
        let process = LocalProcess::separate();
        Self { process, entries: Mutex::default(), files: Mutex::default(), privileged: true }
    }
}

/// The first number that is not a descriptor of this process.
const FIRST: i32 = 1 << 20;

impl Program {
    fn add(&self, entry: Entry) -> i32 {
        let mut entries = lock(&self.entries);
        let fd = entries.keys().next_back().map_or(FIRST, |last| last + 1);
        entries.insert(fd, entry);
        fd
    }

    /// Opens `/dev/iommu`.
    pub fn iommufd(&self) -> i32 {
        self.add(Entry::Iommufd(Context::new()))
    }

    /// Opens `/dev/vfio/vfio`.
    #[cfg(feature = "container")]
    pub fn container(&self, system: &System) -> i32 {
        self.add(Entry::Container(system.open_container()))
    }

    /// Opens a group.
    ///
    /// # Errors
    /// As [`System::open_group`].
    #[cfg(feature = "group")]
    pub fn group(&self, system: &Arc<System>, number: u32) -> Result<i32> {
        Ok(self.add(Entry::Group(system.open_group(self, number)?)))
    }

    /// Opens a device's own node.
    ///
    /// # Errors
    /// As [`System::open_device`].
    #[cfg(feature = "device-cdev")]
    pub fn device(&self, system: &System, number: u32) -> Result<i32> {
        Ok(self.add(Entry::Device(system.open_device(number)?)))
    }

    /// Closes what it has open.
    pub fn close(&self, fd: i32) {
        let entry = lock(&self.entries).remove(&fd);
        drop(entry);
        let file = lock(&self.files).remove(&fd);
        drop(file);
    }

    /// The device that it has open.
    ///
    /// # Panics
    /// When it is another file.
    pub fn file(&self, fd: i32) -> Arc<DeviceFile> {
        match self.opened(fd) {
            Ok(Opened::Device(device)) => device,
            other => panic!("{other:?}"),
        }
    }

    /// What [`iommufd::caller::Caller::install`] gave it.
    pub fn given(&self, fd: i32) -> Option<Arc<dyn File>> {
        lock(&self.files).get(&fd).cloned()
    }

    /// `ioctl` with a number.
    ///
    /// # Errors
    /// What the call says; EBADF.
    pub fn call(&self, fd: i32, cmd: u32, arg: u64) -> Result<i32> {
        let arg = UserAddr(arg);
        match self.opened(fd)? {
            Opened::Iommufd(context) => context.ioctl(self, cmd, arg),
            #[cfg(feature = "container")]
            Opened::Container(container) => container.ioctl(self, cmd, arg),
            #[cfg(feature = "group")]
            Opened::Group(group) => group.ioctl(self, cmd, arg),
            Opened::Device(device) => device.ioctl(self, cmd, arg),
            Opened::Other => Err(Errno::NOTTY),
        }
    }

    /// `ioctl` with a structure.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn ioctl<T: IntoBytes + Immutable + ?Sized>(&self, fd: i32, cmd: u32, arg: &mut T) -> Result<i32> {
        self.call(fd, cmd, std::ptr::from_mut(arg).cast::<u8>().addr() as u64)
    }
}

impl iommufd::caller::Caller for Program {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, _capability: Capability) -> bool {
        self.privileged
    }

    fn install(&self, file: Arc<dyn File>) -> Result<i32> {
        let fd = self.add(Entry::Nothing);
        lock(&self.files).insert(fd, file);
        Ok(fd)
    }

    fn uninstall(&self, fd: i32) {
        self.close(fd);
    }

    fn installed(&self, fd: i32) -> Result<Arc<dyn File>> {
        self.given(fd).ok_or(Errno::BADF)
    }
}

impl Caller for Program {
    fn opened(&self, fd: i32) -> Result<Opened> {
        match lock(&self.entries).get(&fd) {
            Some(Entry::Iommufd(context)) => Ok(Opened::Iommufd(Arc::clone(context))),
            #[cfg(feature = "container")]
            Some(Entry::Container(container)) => Ok(Opened::Container(Arc::clone(container))),
            #[cfg(feature = "group")]
            Some(Entry::Group(group)) => Ok(Opened::Group(Arc::clone(group))),
            Some(Entry::Device(device)) => Ok(Opened::Device(Arc::clone(device))),
            Some(Entry::Nothing) => Ok(Opened::Other),
            None if (0..FIRST).contains(&fd) => self.process.file(fd).map(|_| Opened::Other),
            None => Err(Errno::BADF),
        }
    }

    fn install_device(&self, device: Arc<DeviceFile>) -> Result<i32> {
        Ok(self.add(Entry::Device(device)))
    }
}

/// A registration of `device` in a group of its own, behind a software IOMMU with the window for messages of a PC.
///
/// # Panics
/// Never.
pub fn registration(name: &str, group: u64, device: Arc<dyn Device>) -> Registration {
    let window = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).into_iter().collect();
    let hardware: Arc<dyn Hardware> = SoftDevice::new(group, window);
    Registration {
        name: name.to_owned(),
        address: Some((0, 0, group as u8)),
        device,
        hardware: Some(hardware),
        reset_set: None,
        token: Token::none(),
        number: None,
    }
}

/// Feeds bytes to a test device as accesses of its regions: whatever they are, it answers.
///
/// # Panics
/// When an access claims to be longer than it was asked for: that is the finding.
pub fn fuzz_regions(bytes: &[u8]) {
    let Ok(function) = crate::devices::test::function() else { return };
    let device: Arc<dyn Device> = Arc::new(function);
    let _ = device.open(Arc::new(crate::dma::NoDma));
    for step in bytes.chunks(8) {
        let byte = |at: usize| step.get(at).copied().unwrap_or(0);
        let region = u32::from(byte(0) % 12);
        // Mostly near the start or the end of what may be there.
        let offset = match byte(1) {
            0xff => u64::MAX - u64::from(byte(2)),
            high => u64::from(high) << 8 | u64::from(byte(2)),
        };
        let length = usize::from(byte(3) % 17);
        let result = if byte(4) & 1 == 0 {
            device.read(region, offset, &mut vec![0; length])
        } else {
            device.write(region, offset, step.get(..length.min(step.len())).unwrap_or_default())
        };
        assert!(result.is_ok_and(|count| count <= length) || result.is_err());
        if byte(4) & 0x80 != 0 {
            let _ = device.reset();
        }
    }
    device.close();
}

/// Feeds bytes to an open device as ioctls: the command, and what its argument points to.
///
/// # Panics
/// When the device cannot be opened, which does not depend on the bytes.
#[cfg(feature = "device-cdev")]
pub fn fuzz_ioctl(bytes: &[u8]) {
    use uapi::vfio::{
        VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_FEATURE, VFIO_DEVICE_GET_INFO, vfio_device_bind_iommufd,
    };

    let Ok(function) = crate::devices::test::function() else { return };
    let system = System::new(true);
    let Ok(number) = system.add(registration("0000:00:01.0", 1, Arc::new(function))) else { return };
    let program = Program::default();
    let Ok(fd) = program.device(&system, number) else { return };
    let iommufd = program.iommufd();
    let mut bind = vfio_device_bind_iommufd {
        argsz: size_of::<vfio_device_bind_iommufd>() as u32,
        iommufd,
        ..Default::default()
    };
    assert!(program.ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &mut bind).is_ok());
    for step in bytes.chunks(48) {
        let Some((command, rest)) = step.split_first() else { return };
        let mut argument = [0u8; 64];
        for (to, byte) in argument.iter_mut().zip(rest) {
            *to = *byte;
        }
        // The sizes that get past the first check are few.
        if command & 0x80 == 0
            && let Some(argsz) = argument.get_mut(..4)
        {
            argsz.copy_from_slice(&64u32.to_ne_bytes());
        }
        let range = VFIO_DEVICE_FEATURE - VFIO_DEVICE_GET_INFO + 2;
        let command = VFIO_DEVICE_GET_INFO + u32::from(command & 0x7f) % range;
        let _ = program.ioctl(fd, command, &mut argument);
    }
}
