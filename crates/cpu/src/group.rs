//! The vCPUs that share one RAM, and the two things that they must agree on: which pages hold decoded code, and
//! who may write memory while one of them changes what no host instruction changes atomically.
//!
//! # Theory of operation
//! A vCPU is *inside* while its thread runs guest code, which is when it uses its TLB and touches RAM. It is
//! outside before and after that, while the platform answers an exit (which may take as long as it likes), and
//! while it waits for others in this module. Whoever is outside is waited for by nobody: it does what it was
//! asked for when it comes back, before it uses its TLB.
//!
//! **Watching a page.** The vCPU that wants to decode a page leaves, queues the page for every other vCPU, raises
//! [`attention::WATCH`] there, and waits until each of them has served its queue or has been seen outside. The
//! others look at their attention word before each block.
//!
//! **Stopping the others.** The vCPU that wants to be alone leaves, takes the group's lock, raises
//! [`attention::STOP`] for every other vCPU, and waits until all of them are outside. The bit stays until the
//! operation is over; a vCPU that finds it when it wants to come back waits for the lock.
//!
//! Neither can deadlock: who waits is outside, and nobody waits for those.
//!
//! An answer takes a running vCPU less than a microsecond, and one without a host CPU as long as the host's scheduler
//! wants. So whoever waits spins for a moment, then sleeps and leaves its own CPU to those that it waits for.
//!
//! Lock order: `VcpuGroup::alone`, then `VcpuGroup::members`, then one member's queue.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::attention::{self, Attention};
use crate::ram::{Ram, RamPage};

/// The vCPUs that share one RAM.
#[derive(Debug, Default)]
pub(crate) struct VcpuGroup {
    members: Mutex<Vec<Arc<Member>>>,
    /// Held by the vCPU that has stopped the others.
    alone: Mutex<()>,
}

/// One vCPU's part in a [`VcpuGroup`].
#[derive(Debug)]
pub(crate) struct Member {
    attention: Arc<Attention>,
    /// Whether the vCPU's thread may be using its TLB and RAM.
    inside: AtomicBool,
    queue: Mutex<Queue>,
    /// `Queue::requests` as it was when the queue was served last. Written under the queue's lock.
    served: AtomicU64,
    /// Signalled, for those who wait with `queue`, when the queue was served or the vCPU left.
    answered: Condvar,
}

/// More pages than this are not told apart any more: a vCPU that sleeps for long does not serve its queue.
const MOST_QUEUED: usize = 64;

/// What to drop from a TLB's writable entries.
#[derive(Debug, Default)]
struct Queue {
    /// Pages by host address.
    pages: Vec<usize>,
    /// All pages.
    all: bool,
    /// How many pages were ever queued.
    requests: u64,
}

impl Queue {
    /// Queues a page; returns the number of the request.
    fn push(&mut self, page: usize) -> u64 {
        if self.all || self.pages.len() >= MOST_QUEUED {
            self.pages.clear();
            self.all = true;
        } else {
            self.pages.push(page);
        }
        self.requests += 1;
        self.requests
    }
}

/// What [`Member::enter`] asks for: to take the right to write from TLB entries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protect {
    /// For the page at this host address.
    Page(usize),
    /// For all pages.
    All,
}

/// How often a waiting vCPU looks before it sleeps: some microseconds, the time of several blocks.
const SPINS: u32 = 100;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Member {
    /// The vCPU's thread is about to run guest code: returns when it may. What was asked of it meanwhile goes
    /// to `protect`.
    pub(crate) fn enter(&self, group: &VcpuGroup, mut protect: impl FnMut(Protect)) {
        loop {
            self.inside.store(true, Ordering::SeqCst);
            let word = self.attention.look();
            if word & attention::STOP == 0 {
                if word & attention::WATCH != 0 {
                    self.serve(&mut protect);
                }
                return;
            }
            self.leave();
            drop(lock(&group.alone));
        }
    }

    /// The vCPU's thread does not run guest code any more.
    pub(crate) fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
        if self.attention.look() & (attention::WATCH | attention::STOP) != 0 {
            self.tell();
        }
    }

    /// Whether the vCPU's thread may be using its TLB and RAM now.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    /// Hands what is queued to `protect` and answers.
    fn serve(&self, protect: &mut impl FnMut(Protect)) {
        let mut queue = lock(&self.queue);
        if std::mem::take(&mut queue.all) {
            protect(Protect::All);
        }
        for host in queue.pages.drain(..) {
            protect(Protect::Page(host));
        }
        // Under the lock: a page queued after this raises the bit again.
        self.attention.take(attention::WATCH);
        self.served.store(queue.requests, Ordering::SeqCst);
        self.answered.notify_all();
    }

    /// Wakes those who wait for this vCPU.
    fn tell(&self) {
        // Taking the lock orders this wake-up after a sleeper's last look.
        drop(lock(&self.queue));
        self.answered.notify_all();
    }

    /// Waits until `done`, which becomes true by [`Self::serve`] or [`Self::leave`].
    fn wait(&self, done: impl Fn(&Self) -> bool) {
        for _ in 0..SPINS {
            if done(self) {
                return;
            }
            std::hint::spin_loop();
        }
        let mut queue = lock(&self.queue);
        while !done(self) {
            queue = self.answered.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A vCPU's membership, for as long as the vCPU exists. If its thread panics, this is what ends the others' waiting
/// for it.
#[derive(Debug)]
pub(crate) struct Membership {
    ram: Arc<Ram>,
    member: Arc<Member>,
}

impl Membership {
    /// Makes the vCPU with this attention word one of those that share `ram`.
    pub(crate) fn new(ram: &Arc<Ram>, attention: Arc<Attention>) -> Self {
        Self { member: ram.group().join(attention), ram: Arc::clone(ram) }
    }
}

impl std::ops::Deref for Membership {
    type Target = Arc<Member>;

    fn deref(&self) -> &Arc<Member> {
        &self.member
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        lock(&self.ram.group().members).retain(|m| !Arc::ptr_eq(m, &self.member));
        self.member.leave();
    }
}

impl VcpuGroup {
    /// Adds a vCPU, outside.
    fn join(&self, attention: Arc<Attention>) -> Arc<Member> {
        let member = Member {
            attention,
            inside: AtomicBool::new(false),
            queue: Mutex::default(),
            served: AtomicU64::new(0),
            answered: Condvar::new(),
        };
        let member = Arc::new(member);
        // Not while a vCPU is alone: it would not know about this one.
        let _alone = lock(&self.alone);
        lock(&self.members).push(Arc::clone(&member));
        member
    }

    fn others(&self, own: &Arc<Member>) -> Vec<Arc<Member>> {
        lock(&self.members).iter().filter(|m| !Arc::ptr_eq(m, own)).cloned().collect()
    }

    /// Makes `page` watched: returns when no vCPU but `own` can write it unnoticed. `own` is outside, and has
    /// dropped its own writable TLB entries for the page.
    pub(crate) fn watch(&self, own: &Arc<Member>, page: RamPage<'_>) {
        let stamp = page.watch();
        let others = self.others(own);
        let asked: Vec<_> = others
            .iter()
            .map(|member| {
                let mut queue = lock(&member.queue);
                let request = queue.push(page.host);
                member.attention.mark(attention::WATCH);
                request
            })
            .collect();
        for (member, request) in others.iter().zip(asked) {
            member.wait(|m| !m.is_inside() || m.served.load(Ordering::SeqCst) >= request);
        }
        page.set_ready(stamp);
    }

    /// Stops all vCPUs but `own`, which is outside, until the result is dropped.
    pub(crate) fn stop_others(&self, own: &Arc<Member>) -> Alone<'_> {
        let guard = lock(&self.alone);
        let stopped = self.others(own);
        for member in &stopped {
            member.attention.mark(attention::STOP);
        }
        for member in &stopped {
            member.wait(|m| !m.is_inside());
        }
        Alone { stopped, _guard: guard }
    }
}

/// As long as this exists, all vCPUs but one are outside.
#[must_use]
pub(crate) struct Alone<'a> {
    stopped: Vec<Arc<Member>>,
    _guard: MutexGuard<'a, ()>,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        for member in &self.stopped {
            member.attention.take(attention::STOP);
        }
    }
}

#[cfg(test)]
mod tests {
    use mmu::Gpa;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::GuestRam;

    const PAGES: usize = 200;

    fn ram() -> Arc<Ram> {
        Arc::new(Ram::new(GuestRam::from_ranges(&[(GuestAddress(0), PAGES << 12)]).unwrap()))
    }

    fn member(ram: &Arc<Ram>) -> Membership {
        Membership::new(ram, Arc::new(Attention::new()))
    }

    #[test]
    fn a_vcpu_that_does_not_run_queues_a_bounded_number_of_pages() {
        let ram = ram();
        let (own, parked) = (member(&ram), member(&ram));
        for page in 0..PAGES {
            ram.group().watch(&own, ram.page(Gpa((page << 12) as u64)).unwrap());
        }
        let (mut pages, mut all) = (0, 0);
        parked.enter(ram.group(), |what| match what {
            Protect::Page(_) => pages += 1,
            Protect::All => all += 1,
        });
        assert_eq!((pages, all), (0, 1));
        parked.leave();
        parked.enter(ram.group(), |_| panic!("served twice"));
    }

    #[test]
    fn a_vcpu_that_leaves_or_goes_away_is_not_waited_for() {
        let ram = ram();
        let own = member(&ram);
        for goes_away in [false, true] {
            let other = member(&ram);
            other.enter(ram.group(), |_| ());
            std::thread::scope(|scope| {
                let watching = scope.spawn(|| ram.group().watch(&own, ram.page(Gpa(0)).unwrap()));
                let stopping = scope.spawn(|| drop(ram.group().stop_others(&own)));
                let both = attention::WATCH | attention::STOP;
                while other.attention.peek() & both != both {
                    std::thread::yield_now();
                }
                assert!(!watching.is_finished() && !stopping.is_finished());
                if goes_away {
                    drop(other);
                } else {
                    other.leave();
                }
            });
        }
    }

    #[test]
    fn whoever_is_alone_is_alone() {
        let ram = ram();
        let alone = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let own = member(&ram);
                    for _ in 0..200 {
                        own.enter(ram.group(), |_| ());
                        assert_eq!(alone.load(Ordering::SeqCst), 0);
                        own.leave();
                        let guard = ram.group().stop_others(&own);
                        assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0);
                        own.enter(ram.group(), |_| ());
                        own.leave();
                        assert_eq!(alone.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(guard);
                    }
                });
            }
        });
    }
}
