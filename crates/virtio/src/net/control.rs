//! The control queue: how many pairs the driver uses (virtio 1.2, section 5.1.6.5.5).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::tap::Link;
use crate::device::GuestMem;
use crate::queue::Virtq;
use crate::serve::serve_queue;
use crate::worker::Worker;

/// Starts the thread that answers the driver's commands. It may use up to `most` pairs.
pub(super) fn serve<M: GuestMem>(
    queue: Virtq<M>,
    mem: M,
    links: Vec<Arc<Link<M>>>,
    most: usize,
) -> io::Result<Worker<()>> {
    serve_queue("virtio-net ctl", queue, move |chain| {
        let mem = mem.memory();
        // Class, command, and a number.
        let mut command = [0; 4];
        let length = chain.readable.read(&*mem, 0, &mut command);
        let [class, what, low, high] = command;
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        let known = length == command.len()
            && (u32::from(class), u32::from(what)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        let answer = if known && (1..=most).contains(&pairs) {
            for (number, link) in links.iter().enumerate() {
                link.set_used(number < pairs);
            }
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        chain.writable.write(&*mem, 0, &[answer as u8])
    })
}
