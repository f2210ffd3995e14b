//! `ring3 vfio serve`.
//!
//! # Theory of operation
//! What a client says is taken apart in this process, and what a guest says goes through it. So everything that needs the
//! host's files is done first: the disk is opened, the socket is made, and a process that knows its name is left behind to
//! take it away ([`Keeper`]). Then the process is confined as one that runs a guest is, threads are started, and the
//! system call filter is put on all of them before the first client is listened to.
//!
//! **The end.** A signal shuts down the listening socket and the client's: the device is closed as when a client goes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use ::vfio::device::Device;
use ::vfio::devices::{nvme, test};
use ::vfio::user::server::{Options, Server};
use ::vfio::user::transport::Broken;
use disk::Disk;
use rustix::net::{Shutdown, shutdown};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::VfioError;
use crate::cli::{Isolation, NvmeArgs, ServeArgs, ServedDevice};
use crate::net::local::{Access, Keeper, listen};
use crate::run::isolation::{Inherited, Measures, Use, confine};

pub(super) fn serve(device: &ServedDevice) -> Result<(), VfioError> {
    let inherited = Inherited::find();
    match device {
        ServedDevice::Nvme(args) => {
            let disk = open(args)?;
            serve_device(inherited, &args.serve, || nvme_controller(args, disk))
        }
        ServedDevice::Test(args) => {
            serve_device(inherited, args, || Ok(Arc::new(test::function().map_err(VfioError::Test)?)))
        }
    }
}

/// Opens the file, which tells early that it cannot be.
fn open(args: &NvmeArgs) -> Result<Disk, VfioError> {
    let file = File::options().read(true).write(!args.read_only).open(&args.file);
    let file = file.map_err(|error| VfioError::Open(args.file.clone(), error))?;
    Disk::new(file, args.read_only).map_err(|error| VfioError::Disk(args.file.clone(), error))
}

fn nvme_controller(args: &NvmeArgs, disk: Disk) -> Result<Arc<dyn Device>, VfioError> {
    let named = args.file.file_name().map(|name| name.to_string_lossy().into_owned());
    let options = nvme::Options {
        serial: args.serial.clone().or(named).unwrap_or_default(),
        queues: args.queues,
        workers: args.workers.into(),
    };
    Ok(Arc::new(nvme::new(disk, &options)?))
}

/// What the end is told to.
#[derive(Debug)]
struct Sockets {
    listener: OwnedFd,
    client: Mutex<Option<OwnedFd>>,
    ended: AtomicBool,
}

impl Sockets {
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = shutdown(&self.listener, Shutdown::Both);
        if let Some(client) = &*self.client.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = shutdown(client, Shutdown::Both);
        }
    }

    /// The client is this one from now on, or there is none.
    fn set_client(&self, client: Option<OwnedFd>) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
        if self.ended.load(Ordering::SeqCst) {
            self.end();
        }
    }
}

/// Serves clients until the end.
fn serve_device(
    inherited: Inherited,
    args: &ServeArgs,
    make: impl FnOnce() -> Result<Arc<dyn Device>, VfioError>,
) -> Result<(), VfioError> {
    let refused = |error| VfioError::Listen(args.socket.clone(), error);
    let (listener, name) = listen(&args.socket, Access::Owner).map_err(refused)?;
    let _keeper = Keeper::start(name).map_err(refused)?;
    // Before the first thread, so that all of them have the signals blocked that one waits for.
    let confined = (args.isolation == Isolation::On).then(|| confine(inherited, None, Use::Clients));
    let duplicate = listener.try_clone().map_err(refused)?;
    let sockets =
        Arc::new(Sockets { listener: duplicate, client: Mutex::default(), ended: AtomicBool::new(false) });
    let mut signals =
        Signals::new([SIGINT, SIGTERM]).map_err(|error| VfioError::Host("wait for signals", error))?;
    let ender = Arc::clone(&sockets);
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                ender.end();
            }
        })
        .map_err(|error| VfioError::Host("start a thread", error))?;
    let mut server = Server::new(make()?, Options::default());
    let measures = confined.map_or_else(Measures::off, |confined| confined.seal());
    if args.verbose {
        eprintln!("ring3: serving on {}; isolation: {measures}", args.socket.display());
    }
    let listener = UnixListener::from(listener);
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(_) if sockets.ended.load(Ordering::SeqCst) => return Ok(()),
            // The client may have gone already, or descriptors are short for a moment.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(VfioError::Host("accept a client", error)),
        };
        let client = OwnedFd::from(client);
        let duplicate = client.as_fd().try_clone_to_owned();
        sockets.set_client(Some(duplicate.map_err(|error| VfioError::Host("serve a client", error))?));
        if args.verbose {
            eprintln!("ring3: a client has come");
        }
        let broken = server.serve(client);
        sockets.set_client(None);
        match broken {
            Broken::Closed if args.verbose => eprintln!("ring3: the client has gone"),
            Broken::Closed => {}
            broken => eprintln!("ring3: the client is disconnected: {broken}"),
        }
        if args.once || sockets.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
    }
}
