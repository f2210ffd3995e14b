//! The thread of a queue where each chain is a request that is answered at once.

use std::io;

use rustix::event::epoll::{self, EventData, EventFlags};

use crate::device::GuestMem;
use crate::queue::{Chain, Virtq};
use crate::worker::{Stop, Worker};

/// Starts a thread that answers each chain of `queue` by `handle`, which returns how many bytes it wrote into
/// the chain's writable part.
pub(crate) fn serve_queue<M: GuestMem>(
    name: &'static str,
    mut queue: Virtq<M>,
    mut handle: impl FnMut(&Chain<M>) -> usize + Send + 'static,
) -> io::Result<Worker<()>> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, queue.kick(), EventData::new_u64(0), EventFlags::IN)?;
    Worker::spawn(name, move |stop: Stop| {
        if let Err(error) = epoll::add(&epoll, stop.event(), EventData::new_u64(1), EventFlags::IN) {
            tracing::error!(%error, name, "a device's thread cannot start");
            return;
        }
        let mut events = Vec::with_capacity(2);
        while !stop.requested() {
            queue.serve(&|| stop.requested(), &mut handle);
            events.clear();
            match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, name, "a device's thread ends");
                    return;
                }
            }
        }
    })
}
