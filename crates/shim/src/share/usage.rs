//! How much is pinned on behalf of which process, as this process knows: of itself, and of those that it serves.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use iommufd::{
    account::Usage,
    caller::Caller,
    process::{Process, RemoteProcess},
};

use super::wire::Message;
use crate::caller::ShimCaller;

/// The processes that we serve.
static SERVED: Mutex<Vec<Weak<RemoteProcess>>> = Mutex::new(Vec::new());

/// `process` is served from now on.
pub(super) fn add(process: &Arc<RemoteProcess>) {
    let mut served = SERVED.lock().unwrap_or_else(PoisonError::into_inner);
    served.retain(|process| process.strong_count() > 0);
    served.push(Arc::downgrade(process));
}

/// Keeps the processes as they are until the result is dropped: for the time of a fork.
pub(super) fn quiet() -> impl Sized {
    SERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// In a child after `fork`: it serves nobody.
pub(super) fn forget() {
    SERVED.clear_poison();
    if let Ok(mut served) = SERVED.try_lock() {
        served.clear();
    }
}

/// Pages that are pinned, and locked, on behalf of process `pid`.
pub(super) fn of(pid: i32) -> (u64, u64) {
    let both = |usage: &Usage| (usage.pinned(), usage.locked());
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let mut sum = if pid == own { both(ShimCaller::get().process().usage()) } else { (0, 0) };
    let served = SERVED.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for process in
        served.iter().filter_map(Weak::upgrade).filter(|process| process.pid().as_raw_nonzero().get() == pid)
    {
        let (pinned, locked) = both(process.usage());
        sum = (sum.0 + pinned, sum.1 + locked);
    }
    sum
}

/// [`of`], for a process that asks.
pub(super) fn answer(pid: i32) -> Message {
    let (pinned, locked) = of(pid);
    let mut answer = Message::answer(Ok(0));
    answer.words[2] = pinned;
    answer.words[3] = locked;
    answer
}
