//! A first program: a device in software reads a file of memory by addresses of its own.
//!
//!     cargo run -p iommufd --example first_program

use std::{os::fd::OwnedFd, sync::Arc};

use iommufd::{
    Context, Errno,
    domain::Prot,
    hardware::Hardware,
    iova::Iova,
    process::{LocalProcess, Process},
};

fn first(device: Arc<dyn Hardware>, memory: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let context = Context::new();
    let process: Arc<dyn Process> = LocalProcess::get();

    // 1 MiB of the file at 16 MiB of the address space.
    let ioas = context.ioas_alloc()?;
    let at = Some(Iova(16 << 20));
    context.ioas_map_file(ioas, &process, memory, 0, 1 << 20, at, Prot::READ | Prot::WRITE)?;

    // The device sees what is mapped now, and what will be.
    let bound = context.bind(device)?;
    bound.attach(None, ioas)?;

    let mut bytes = vec![0; 512];
    bound.dma().read(Iova(16 << 20), &mut bytes)?;
    Ok(bytes)
    // `bound` is dropped: the device is unbound, the memory unpinned.
}

fn main() -> Result<(), Errno> {
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, 1 << 20)?;
    rustix::io::write(&memory, b"hello, device")?;
    let bytes = first(iommufd::soft::SoftDevice::new(1, Vec::new()), &memory)?;
    println!("{}", String::from_utf8_lossy(&bytes).trim_end_matches('\0'));
    Ok(())
}
