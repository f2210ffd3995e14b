//! The file-system device: a directory of the host, read-only (virtio 1.2, section 5.11).
//!
//! # Theory of operation
//!
//! The driver sends FUSE requests over two queues: forgets on the high-priority queue, everything else on the
//! request queue. Each has a thread. `fuse-backend-rs` decodes a request straight from the chain's buffers,
//! `tree` answers it with system calls of the host, and file contents go by `preadv` from the host's page
//! cache into the guest's pages, up to 1 MiB at a time.
//!
//! The guest caches much, since the host's tree is taken for mostly constant: names, attributes and the absence
//! of names for a time that is set here, and pages until the attributes show a change.
//!
//! What the guest has looked up and opened ends with the driver: each activation starts with a fresh tree.

mod nodes;
mod tree;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice, read_config_bytes};
use crate::interrupt::Interrupts;
use crate::queue::Chain;
use crate::serve::serve_queue;
use crate::worker::Worker;
use tree::Tree;

/// Bytes of the tag in the configuration space.
const TAG_SIZE: usize = 36;
/// High-priority queue and request queue.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// Descriptors left to the rest of the process, and the most that this device uses.
const SPARE_FDS: u64 = 256;
const MAX_FDS: u64 = 1 << 16;
const MIN_FDS: u64 = 64;

/// How long the guest may use names and attributes without asking again.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// What to share.
#[derive(Debug, Clone)]
pub struct FsConfig {
    /// The name to mount it by, from 1 to 36 bytes.
    pub tag: String,
    /// The directory of the host.
    pub root: PathBuf,
    /// How long the guest may use names and attributes without asking again.
    pub timeout: Duration,
}

/// A directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit, or is empty.
    #[error("the tag \"{0}\" is not from 1 to {TAG_SIZE} bytes long")]
    Tag(String),
    /// The root is not a directory that this user may open.
    #[error("cannot share {path}", path = .path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The file-system device.
#[derive(Debug)]
pub struct Fs {
    tag: [u8; TAG_SIZE],
    root: OwnedFd,
    timeout: Duration,
    workers: Vec<Worker<()>>,
}

impl Fs {
    /// Opens the directory. The process's soft limit of descriptors is raised to the hard one, since the guest
    /// has its files open here.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(config: &FsConfig) -> Result<Self, FsError> {
        let mut tag = [0; TAG_SIZE];
        let bytes = config.tag.as_bytes();
        match tag.get_mut(..bytes.len()) {
            Some(start) if !bytes.is_empty() => start.copy_from_slice(bytes),
            _ => return Err(FsError::Tag(config.tag.clone())),
        }
        let root =
            open_root(&config.root).map_err(|source| FsError::Root { path: config.root.clone(), source })?;
        raise_fd_limit();
        Ok(Fs { tag, root, timeout: config.timeout, workers: Vec::new() })
    }
}

/// Opens the directory, and makes sure that it can be read.
fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags | OFlags::RDONLY, Mode::empty())?;
    Ok(open(path, flags | OFlags::PATH, Mode::empty())?)
}

fn raise_fd_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "cannot raise the limit of descriptors");
    }
}

/// How many descriptors the guest may make this process hold.
fn fd_budget() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // The guest's connections are sockets: they are the other half.
    let budget = (limit.saturating_sub(SPARE_FDS) / 2).clamp(MIN_FDS, MAX_FDS);
    usize::try_from(budget).unwrap_or(usize::MAX)
}

impl<M: GuestMem> VirtioDevice<M> for Fs {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn pci_class(&self) -> u32 {
        // Mass storage controller, other.
        0x01_80_00
    }

    fn name(&self) -> &str {
        "virtio-fs"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_fs_config: tag, num_request_queues.
        let mut config = [0; TAG_SIZE + 4];
        config[..TAG_SIZE].copy_from_slice(&self.tag);
        config[TAG_SIZE..].copy_from_slice(&1u32.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<(), ActivateError> {
        let tree = Tree::new(self.root.try_clone()?, self.timeout, fd_budget())?;
        let server = Arc::new(Server::new(tree));
        for (index, name) in [(0, "virtio-fs-hi"), (1, "virtio-fs")] {
            let queue = activation.take_queue(index).ok_or(ActivateError::MissingQueue(index))?;
            let mem = activation.mem.clone();
            let interrupts = Arc::clone(&activation.interrupts);
            let server = Arc::clone(&server);
            let answer = move |chain: &Chain<M>| answer(&server, &mem, &interrupts, chain);
            self.workers.push(serve_queue(name, queue, answer)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.clear();
    }
}

/// Answers one request; returns how many bytes it wrote.
fn answer<M: GuestMem>(server: &Server<Tree>, mem: &M, interrupts: &Interrupts, chain: &Chain<M>) -> usize {
    let mem = mem.memory();
    let Some(raw) = chain.raw() else { return 0 };
    let reader = Reader::from_descriptor_chain(&*mem, raw.clone());
    let writer = VirtioFsWriter::new(&*mem, raw);
    let (reader, writer) = match (reader, writer) {
        (Ok(reader), Ok(writer)) => (reader, writer),
        (Err(error), _) | (_, Err(error)) => {
            interrupts.warn(&format_args!("FUSE request in unusable buffers: {error}"));
            return 0;
        }
    };
    match server.handle_message(reader, writer.into(), None, None) {
        Ok(written) => written,
        Err(error) => {
            interrupts.warn(&format_args!("FUSE request that means nothing: {error}"));
            0
        }
    }
}
