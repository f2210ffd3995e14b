//! Opens a device of the host's that its kernel's VFIO has, gives it memory, and reads what it is. What has to be done before is in
//! docs/vfio.md.
//!
//!     cargo run -p vfio --example host_device

use std::{error::Error, sync::Arc};

use iommufd::{domain::Prot, iova::Iova};
use vfio::{
    device::Device,
    kernel::{AddressSpace, HostDevice},
};
use vm_memory::MmapRegion;

fn main() -> Result<(), Box<dyn Error>> {
    let address = "0000:00:05.0".parse()?;
    let space = AddressSpace::new(HostDevice::door(address, None)?)?;
    let device = HostDevice::open_in(address, &space)?;
    let memory = Arc::new(MmapRegion::<()>::new(1 << 20)?);
    space.map(Iova(0x10_0000), &memory, Prot::READ | Prot::WRITE)?; // locked, until it is unmapped
    device.write(7, 4, &[6, 0])?; // memory, bus master
    let mut register = [0; 4];
    device.read(0, 0, &mut register)?;
    println!("{register:02x?}");
    Ok(())
}
