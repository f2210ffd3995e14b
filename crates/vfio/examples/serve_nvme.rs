//! A first program: gives a disk to a vfio-user client, for example QEMU.
//!
//! ```text
//! truncate -s 1G disk.img
//! cargo run -p vfio --example serve_nvme -- disk.img /tmp/nvme.sock
//! ```

use std::error::Error;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use disk::Disk;
use vfio::devices::nvme;
use vfio::user::server::{Options, Server};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().collect();
    let [_, image, socket] = &*arguments else { return Err("usage: serve_nvme DISK SOCKET".into()) };
    let disk = Disk::new(File::options().read(true).write(true).open(image)?, false)?;
    let device = Arc::new(nvme::new(disk, &nvme::Options::default())?);
    let (client, _) = UnixListener::bind(socket)?.accept()?;
    let end = Server::new(device, Options::default()).serve(client.into());
    println!("{end}");
    Ok(())
}
