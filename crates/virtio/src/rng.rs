//! The entropy device (virtio 1.2, section 5.4): each buffer is filled from the host's getrandom.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice};
use crate::queue::Chain;
use crate::serve::serve_queue;
use crate::worker::Worker;

const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes for one request. The driver takes what it gets and asks again.
const MAX_BYTES: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker<()>>,
}

impl Rng {
    /// A device at rest.
    #[must_use]
    pub fn new() -> Self {
        Rng::default()
    }
}

impl<M: GuestMem> VirtioDevice<M> for Rng {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn name(&self) -> &str {
        "virtio-rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut activation: Activation<M>) -> Result<(), ActivateError> {
        let queue = activation.take_queue(0).ok_or(ActivateError::MissingQueue(0))?;
        let mem = activation.mem;
        self.worker = Some(serve_queue("virtio-rng", queue, move |chain| fill(&mem, chain))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Fills the chain; returns how many bytes it wrote.
fn fill<M: GuestMem>(mem: &M, chain: &Chain<M>) -> usize {
    let mut bytes = [0; MAX_BYTES];
    let wanted = chain.writable.len().min(MAX_BYTES);
    let bytes = bytes.get_mut(..wanted).unwrap_or(&mut []);
    match getrandom(&mut *bytes, GetRandomFlags::empty()) {
        Ok(len) => chain.writable.write(&*mem.memory(), 0, bytes.get(..len).unwrap_or(&[])),
        Err(error) => {
            tracing::error!(%error, "the host has no random bytes");
            0
        }
    }
}
