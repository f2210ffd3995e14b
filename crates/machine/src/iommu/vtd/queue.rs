//! The invalidation queue (VT-d 6.5.2): a ring of descriptors in guest memory, which the guest fills and the unit empties.
//!
//! A descriptor that makes no sense, or that is not in memory, stops the queue where it is, and the head says where, until the guest
//! has cleared the error. The wait descriptor is how the guest learns that all descriptors before it have been carried
//! out: each is, before the next one is looked at.

use cpu::GuestRam;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

use super::scope::{ContextScope, IotlbScope};

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Where the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    /// The guest-physical address of its first descriptor.
    pub base: u64,
    /// Bytes, a power of two.
    pub size: u64,
}

impl Ring {
    /// By the queue's base register (VT-d 10.4.21).
    pub(super) fn new(register: u64) -> Self {
        Self { base: register & !0xfff, size: 0x1000 << (register & 7) }
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Descriptor {
    Context(ContextScope),
    Iotlb(IotlbScope),
    Wait { status: Option<(GuestAddress, u32)>, interrupt: bool },
}

impl Descriptor {
    /// None for types that the unit has not, and for what is reserved.
    fn parse(low: u64, high: u64) -> Option<Self> {
        let (granularity, domain) = (low >> 4 & 3, (low >> 16) as u16);
        // The type has three more bits than there used to be.
        match low & 0xf | (low >> 9 & 7) << 4 {
            1 if low & 0xfffc_0000_0000_f1c0 == 0 && high == 0 => {
                let (source, mask) = ((low >> 32) as u16, low >> 48 & 3);
                ContextScope::new(granularity, domain, source, mask).map(Self::Context)
            }
            2 if low & 0xffff_ffff_0000_f100 == 0 && high & 0xf80 == 0 => {
                IotlbScope::new(granularity, domain, high & !0xfff, high & 0x3f).map(Self::Iotlb)
            }
            5 if low & 0xffff_f100 == 0 && high & 3 == 0 => Some(Self::Wait {
                status: (low >> 5 & 1 != 0).then_some((GuestAddress(high), (low >> 32) as u32)),
                interrupt: low >> 4 & 1 != 0,
            }),
            _ => None,
        }
    }
}

/// Who carries out what the descriptors ask for. Nothing uses what was there before when a call returns.
pub(super) trait Invalidate {
    /// Looks at context entries again.
    fn context(&self, scope: ContextScope);
    /// Forgets translations.
    fn iotlb(&self, scope: IotlbScope);
    /// Tells the guest that a wait descriptor has completed.
    fn completed(&self);
}

/// The queue cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped;

/// The queue, as far as it has been served.
#[derive(Debug, Default)]
pub(super) struct Queue {
    ring: Option<Ring>,
    head: u64,
    tail: u64,
    stopped: bool,
}

impl Queue {
    /// Begins with another ring, or has none.
    pub(super) fn set_ring(&mut self, ring: Option<Ring>) {
        *self = Self { ring, ..Self::default() };
    }

    /// The offset of the descriptor that is next.
    pub(super) fn head(&self) -> u64 {
        self.head
    }

    /// There are descriptors up to the offset `tail`.
    pub(super) fn set_tail(&mut self, tail: u64) {
        self.tail = tail;
    }

    /// The guest has cleared the error.
    pub(super) fn resume(&mut self) {
        self.stopped = false;
    }

    /// Carries out what there is. What the guest appends meanwhile is another call's.
    pub(super) fn serve(&mut self, memory: &GuestRam, to: &dyn Invalidate) -> Result<(), Stopped> {
        let Some(ring) = self.ring.filter(|_| !self.stopped) else { return Ok(()) };
        if self.tail >= ring.size {
            self.stopped = true;
            return Err(Stopped);
        }
        while self.head != self.tail {
            if one(memory, ring.base.checked_add(self.head), to).is_none() {
                self.stopped = true;
                return Err(Stopped);
            }
            self.head = (self.head + DESCRIPTOR) % ring.size;
        }
        Ok(())
    }
}

/// Carries out the descriptor at `at`.
fn one(memory: &GuestRam, at: Option<u64>, to: &dyn Invalidate) -> Option<()> {
    let at = GuestAddress(at?);
    let low = memory.load(at, Ordering::Acquire).ok()?;
    let high = memory.load(GuestAddress(at.0.checked_add(8)?), Ordering::Acquire).ok()?;
    match Descriptor::parse(low, high)? {
        Descriptor::Context(scope) => to.context(scope),
        Descriptor::Iotlb(scope) => to.iotlb(scope),
        Descriptor::Wait { status, interrupt } => {
            if let Some((at, value)) = status {
                memory.store(value, at, Ordering::Release).ok()?;
            }
            if interrupt {
                to.completed();
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[derive(Debug, PartialEq)]
    enum Done {
        Context(ContextScope),
        Iotlb(IotlbScope),
        Completed,
    }

    #[derive(Default)]
    struct Log(RefCell<Vec<Done>>);

    impl Invalidate for Log {
        fn context(&self, scope: ContextScope) {
            self.0.borrow_mut().push(Done::Context(scope));
        }

        fn iotlb(&self, scope: IotlbScope) {
            self.0.borrow_mut().push(Done::Iotlb(scope));
        }

        fn completed(&self) {
            self.0.borrow_mut().push(Done::Completed);
        }
    }

    const BASE: u64 = 0x4000;

    fn memory(descriptors: &[(u64, u64)]) -> GuestRam {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        for (index, (low, high)) in descriptors.iter().enumerate() {
            let at = BASE + index as u64 * DESCRIPTOR;
            memory.write_obj(*low, GuestAddress(at)).unwrap();
            memory.write_obj(*high, GuestAddress(at + 8)).unwrap();
        }
        memory
    }

    fn queue(register: u64, tail: u64) -> Queue {
        let mut queue = Queue::default();
        queue.set_ring(Some(Ring::new(register)));
        queue.set_tail(tail);
        queue
    }

    #[test]
    fn descriptors_are_carried_out_in_order() {
        let memory = memory(&[
            (1 | 1 << 4, 0),
            (1 | 3 << 4 | 7 << 16 | 0x18 << 32, 0),
            (2 | 3 << 4 | 0b11 << 6 | 7 << 16, 0x1234_5000 | 1 << 6 | 1),
            (5 | 1 << 4 | 1 << 5 | 1 << 6 | 0xabcd << 32, 0x8004),
        ]);
        let log = Log::default();
        let mut queue = queue(BASE, 0x40);
        assert_eq!(queue.serve(&memory, &log), Ok(()));
        assert_eq!(queue.head(), 0x40);
        let expected = [
            Done::Context(ContextScope::All),
            Done::Context(ContextScope::Device { source: 0x18, ignored: 0 }),
            Done::Iotlb(IotlbScope::Pages { domain: 7, first: 0x1234_4000, order: 1 }),
            Done::Completed,
        ];
        assert_eq!(*log.0.borrow(), expected);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0x8004)).unwrap(), 0xabcd);
        // Nothing is done twice.
        assert_eq!(queue.serve(&memory, &log), Ok(()));
        assert_eq!(log.0.borrow().len(), 4);
    }

    #[test]
    fn the_ring_wraps() {
        let memory = memory(&[(2 | 1 << 4, 0); 256]);
        let log = Log::default();
        let mut queue = queue(BASE, 0xff0);
        queue.serve(&memory, &log).unwrap();
        queue.set_tail(0x20);
        queue.serve(&memory, &log).unwrap();
        assert_eq!((queue.head(), log.0.borrow().len()), (0x20, 255 + 3));
    }

    #[test]
    fn what_makes_no_sense_stops_it_until_the_guest_has_seen_that() {
        let nonsense = [
            (0, 0),
            // Device TLBs, interrupt remapping, and a type of the newer bits.
            (3, 0),
            (4, 0),
            (1 | 1 << 4 | 1 << 9, 0),
            // Reserved granularities and bits.
            (1, 0),
            (1 | 1 << 4, 1),
            (1 | 1 << 4 | 1 << 6, 0),
            (2, 0),
            (2 | 3 << 4, 19),
            (2 | 1 << 4 | 1 << 63, 0),
            (2 | 1 << 4, 1 << 7),
            (5 | 1 << 5, 0x8002),
            (5 | 1 << 8, 0),
            // Status outside memory.
            (5 | 1 << 5, 0x1_0000),
            (5 | 1 << 5, !3),
        ];
        for descriptor in nonsense {
            let memory = memory(&[(2 | 1 << 4, 0), descriptor, (2 | 1 << 4, 0)]);
            let log = Log::default();
            let mut queue = queue(BASE, 0x30);
            assert_eq!(queue.serve(&memory, &log), Err(Stopped), "{descriptor:x?}");
            assert_eq!((queue.head(), log.0.borrow().len()), (0x10, 1));
            assert_eq!(queue.serve(&memory, &log), Ok(()));
            assert_eq!(queue.head(), 0x10);
            memory.write_obj([2u64 | 1 << 4, 0], GuestAddress(BASE + 0x10)).unwrap();
            queue.resume();
            assert_eq!(queue.serve(&memory, &log), Ok(()));
            assert_eq!((queue.head(), log.0.borrow().len()), (0x30, 3));
        }
    }

    #[test]
    fn a_queue_that_is_not_in_memory_stops() {
        let memory = memory(&[]);
        let log = Log::default();
        for base in [0x1_0000, 0xffff_ffff_ffff_f007, 0xf000 | 7] {
            let mut queue = queue(base, 0x10);
            assert_eq!(queue.serve(&memory, &log), Err(Stopped), "{base:#x}");
        }
        // The tail is past the end.
        let mut queue = queue(BASE, 0x1000);
        assert_eq!(queue.serve(&memory, &log), Err(Stopped));
        queue.set_ring(None);
        assert_eq!(queue.serve(&memory, &log), Ok(()));
        assert_eq!(*log.0.borrow(), []);
    }
}
