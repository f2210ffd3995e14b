//! A device's thread that ends when asked to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::event::Event;

/// Tells a worker to end. Cheap to ask, and an eventfd to wait for.
#[derive(Debug, Clone)]
pub(crate) struct Stop(Arc<(AtomicBool, Event)>);

impl Stop {
    /// A request that nobody has made yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Stop(Arc::new((AtomicBool::new(false), Event::new()?))))
    }

    /// The worker was asked to end.
    pub(crate) fn requested(&self) -> bool {
        self.0.0.load(Ordering::SeqCst)
    }

    /// Readable from the request on; the worker does not read it.
    pub(crate) fn event(&self) -> &Event {
        &self.0.1
    }

    /// Asks.
    pub(crate) fn request(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.signal();
    }
}

/// A running thread. Dropping it asks the thread to end and waits for that.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    stop: Stop,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `run` on a thread named `name`.
    pub(crate) fn spawn(name: &str, run: impl FnOnce(Stop) -> T + Send + 'static) -> io::Result<Self> {
        let stop = Stop::new()?;
        let theirs = stop.clone();
        // The kernel keeps 15 bytes of a thread's name.
        let name = name.chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || run(theirs))?;
        Ok(Worker { stop, thread: Some(thread) })
    }

    /// Ends the thread and returns what it left, or `None` if it panicked.
    pub(crate) fn join(mut self) -> Option<T> {
        self.finish()
    }
}

impl<T> Worker<T> {
    fn finish(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        self.stop.request();
        thread.join().ok()
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.finish();
    }
}
