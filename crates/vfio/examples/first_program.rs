//! A first program: a device in software, and a program that opens it by its own node, in one process.
//!
//!     cargo run -p vfio --example first_program --features device-cdev,testing

use std::{error::Error, sync::Arc};

use iommufd::soft::SoftDevice;
use uapi::vfio::{
    VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_GET_REGION_INFO, VFIO_PCI_CONFIG_REGION_INDEX,
    vfio_device_bind_iommufd, vfio_region_info,
};
use vfio::{
    devices::test,
    doors::{Registration, System, Token, testing::Program},
};

fn main() -> Result<(), Box<dyn Error>> {
    let system = System::new(false);
    let number = system.add(Registration {
        name: "0000:00:05.0".into(),
        address: Some((0, 0, 0x28)),
        device: Arc::new(test::function()?),
        hardware: Some(SoftDevice::new(5, Vec::new())),
        reset_set: None,
        token: Token::none(),
        number: None,
    })?;

    let program = Program::default();
    let (device, iommufd) = (program.device(&system, number)?, program.iommufd());
    let argsz = size_of::<vfio_device_bind_iommufd>() as u32;
    let mut bind = vfio_device_bind_iommufd { argsz, iommufd, ..Default::default() };
    program.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &mut bind)?;
    let argsz = size_of::<vfio_region_info>() as u32;
    let mut config = vfio_region_info { argsz, index: VFIO_PCI_CONFIG_REGION_INDEX, ..Default::default() };
    program.ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &mut config)?;
    let mut id = [0; 4];
    program.file(device).read_at(config.offset, &mut id)?;
    println!("{:04x}:{:04x}", u16::from_le_bytes([id[0], id[1]]), u16::from_le_bytes([id[2], id[3]]));
    Ok(())
}
