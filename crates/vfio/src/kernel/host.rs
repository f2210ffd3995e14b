//! What sysfs tells of a device (Documentation/ABI/testing/sysfs-bus-pci, sysfs-devices-vfio-dev,
//! sysfs-kernel-iommu_groups).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Door, KernelError, PciAddress};

/// Where the host's files are.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) sys: PathBuf,
    pub(super) dev: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into() }
    }
}

/// A device that VFIO's driver has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Found {
    pub(super) address: PciAddress,
    /// The number of its IOMMU group.
    pub(super) group: u32,
    /// Its own node.
    pub(super) node: Option<PathBuf>,
}

/// The last part of where a link leads.
fn link_name(link: &Path) -> io::Result<Option<String>> {
    match fs::read_link(link) {
        Ok(to) => Ok(to.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Host {
    fn device(&self, address: PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    fn unreadable(path: PathBuf) -> impl FnOnce(io::Error) -> KernelError {
        move |source| KernelError::Open { path, source }
    }

    /// Looks for a device.
    pub(super) fn find(&self, address: PciAddress) -> Result<Found, KernelError> {
        let directory = self.device(address);
        if !directory.exists() {
            return Err(KernelError::Absent(address));
        }
        let driver = directory.join("driver");
        match link_name(&driver).map_err(Self::unreadable(driver))? {
            None => return Err(KernelError::NoDriver(address)),
            // Drivers for one kind of device only (mlx5-vfio-pci, qat_vfio_pci) have it in their names.
            Some(driver) if !driver.replace('_', "-").contains("vfio-pci") => {
                return Err(KernelError::OtherDriver { address, driver });
            }
            Some(_) => {}
        }
        let link = directory.join("iommu_group");
        let group = link_name(&link).map_err(Self::unreadable(link))?;
        let group = group.and_then(|name| name.parse().ok()).ok_or(KernelError::NoIommu(address))?;
        Ok(Found { address, group, node: self.node(&directory) })
    }

    /// `/dev/vfio/devices/vfioN`, if the kernel makes such nodes.
    fn node(&self, directory: &Path) -> Option<PathBuf> {
        let names = fs::read_dir(directory.join("vfio-dev")).ok()?;
        let name = names
            .flatten()
            .map(|entry| entry.file_name())
            .find(|name| name.to_str().is_some_and(|name| name.starts_with("vfio")))?;
        // A kernel without this door has the name in sysfs all the same.
        Some(self.dev.join("vfio/devices").join(name)).filter(|node| node.exists())
    }

    /// Which door to take.
    pub(super) fn door(&self, found: &Found, wanted: Option<Door>) -> Result<Door, KernelError> {
        let address = found.address;
        let device = match (&found.node, self.dev.join("iommu").exists()) {
            (Some(_), true) => Ok(Door::Device),
            (None, _) => Err("the kernel has no /dev/vfio/devices (CONFIG_VFIO_DEVICE_CDEV)"),
            (_, false) => Err("there is no /dev/iommu: `modprobe iommufd`"),
        };
        let group = if self.group(found.group).exists() {
            Ok(Door::Group)
        } else {
            Err("the kernel has no /dev/vfio/N (CONFIG_VFIO_GROUP)")
        };
        let refused = |door| move |why| KernelError::NoDoor { address, door, why };
        match wanted {
            Some(Door::Device) => device.map_err(refused(Door::Device)),
            Some(Door::Group) => group.map_err(refused(Door::Group)),
            None => device.or(group).map_err(refused(Door::Group)),
        }
    }

    /// `/dev/vfio/N`.
    pub(super) fn group(&self, group: u32) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// `/dev/vfio/vfio`.
    pub(super) fn container(&self) -> PathBuf {
        self.dev.join("vfio/vfio")
    }

    /// The other devices of a group that drivers of the kernel's have.
    pub(super) fn others(&self, found: &Found) -> Vec<String> {
        let devices = self.sys.join("kernel/iommu_groups").join(found.group.to_string()).join("devices");
        let names = fs::read_dir(&devices).into_iter().flatten().flatten();
        let mut others: Vec<_> = names
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let driver =
                    link_name(&self.sys.join("bus/pci/devices").join(&name).join("driver")).ok()??;
                let free = driver.contains("vfio") || matches!(&*driver, "pcieport" | "pci-stub");
                (!free && name != found.address.to_string()).then(|| format!("{name} ({driver})"))
            })
            .collect();
        others.sort();
        others
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A host with one device.
    fn host(driver: Option<&str>, group: Option<&str>) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let host = Host { sys: root.path().join("sys"), dev: root.path().join("dev") };
        let device = host.sys.join("bus/pci/devices/0000:00:04.0");
        fs::create_dir_all(device.join("vfio-dev/vfio3")).unwrap();
        fs::create_dir_all(host.dev.join("vfio/devices")).unwrap();
        for (link, to) in [("driver", driver), ("iommu_group", group)] {
            if let Some(to) = to {
                symlink(Path::new("../../somewhere").join(to), device.join(link)).unwrap();
            }
        }
        (root, host)
    }

    fn address() -> PciAddress {
        "00:04.0".parse().unwrap()
    }

    #[test]
    fn what_is_wrong_comes_with_its_way_out() {
        let (_root, none) = host(None, Some("7"));
        let said = none.find(address()).unwrap_err().to_string();
        assert!(
            said.contains("0000:00:04.0 is bound to no driver") && said.contains("drivers_probe"),
            "{said}"
        );
        let (_root, other) = host(Some("e1000e"), Some("7"));
        let said = other.find(address()).unwrap_err().to_string();
        assert!(said.contains("is bound to e1000e") && said.contains("drivers/e1000e/unbind"), "{said}");
        let (_root, alone) = host(Some("vfio-pci"), None);
        let said = alone.find(address()).unwrap_err().to_string();
        assert!(said.contains("intel_iommu=on"), "{said}");
        let said = alone.find("00:05.0".parse().unwrap()).unwrap_err().to_string();
        assert!(said.contains("0000:00:05.0 is not on this host"), "{said}");
    }

    #[test]
    fn doors_are_there_when_their_nodes_are() {
        let (_root, host) = host(Some("vfio-pci"), Some("7"));
        let none = host.find(address()).unwrap();
        assert_eq!((none.group, &none.node), (7, &None));
        assert!(matches!(host.door(&none, None), Err(KernelError::NoDoor { .. })));
        fs::write(host.group(7), "").unwrap();
        assert_eq!(host.door(&none, None).unwrap(), Door::Group);
        let said = host.door(&none, Some(Door::Device)).unwrap_err().to_string();
        assert!(said.contains("/dev/vfio/devices"), "{said}");
        fs::write(host.dev.join("vfio/devices/vfio3"), "").unwrap();
        let both = host.find(address()).unwrap();
        let said = host.door(&both, Some(Door::Device)).unwrap_err().to_string();
        assert!(said.contains("modprobe iommufd"), "{said}");
        fs::write(host.dev.join("iommu"), "").unwrap();
        assert_eq!(host.door(&both, None).unwrap(), Door::Device);
        assert_eq!(host.door(&both, Some(Door::Group)).unwrap(), Door::Group);
    }

    #[test]
    fn who_keeps_a_group_from_being_used_is_named() {
        let (_root, host) = host(Some("vfio-pci"), Some("7"));
        let group = host.sys.join("kernel/iommu_groups/7/devices");
        for (name, driver) in
            [("0000:00:04.0", "vfio-pci"), ("0000:00:05.0", "e1000e"), ("0000:00:01.0", "pcieport")]
        {
            fs::create_dir_all(group.join(name)).unwrap();
            let device = host.sys.join("bus/pci/devices").join(name);
            fs::create_dir_all(&device).unwrap();
            let _ = symlink(Path::new("..").join(driver), device.join("driver"));
        }
        let found = host.find(address()).unwrap();
        assert_eq!(host.others(&found), ["0000:00:05.0 (e1000e)"]);
    }
}
