//! Faults as the guest sees them: a ring of recording registers, a status register, and an interrupt (VT-d 7.2 and 10.4.9, 10.4.10,
//! 10.4.18).
//!
//! A fault is lost when the next recording register is not free: then it says so, and records none until the guest has
//! cleared that. The interrupt is sent for the first of several conditions; who handles it looks at all of them.

use iommufd::soft::vtd::FaultRecord;
use pci::msix::Message;

use super::event::Event;

/// How many recording registers there are.
pub(super) const RECORDS: usize = 8;

bitflags::bitflags! {
    /// The status register (VT-d 10.4.9), without the index of the first record.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Status: u32 {
        /// A fault was lost.
        const OVERFLOW = 1 << 0;
        /// There is a record. It is not written, but follows from the records.
        const PENDING = 1 << 1;
        /// The invalidation queue has a descriptor that makes no sense, or is not in memory.
        const QUEUE_ERROR = 1 << 4;
    }
}

/// Of a record's upper half: it is taken.
const TAKEN: u64 = 1 << 63;

/// Why the tables that come before page tables do not translate a request (VT-d 7.1.3). What is wrong with page tables is said
/// where they are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reason {
    /// The root entry is not present.
    RootNotPresent = 1,
    /// The context entry is not present.
    ContextNotPresent = 2,
    /// The context entry asks for what the unit has not.
    ContextInvalid = 3,
    /// The root table is not in memory.
    RootAccess = 8,
    /// A context table is not in memory.
    ContextAccess = 9,
    /// A reserved bit is set in a root entry.
    RootReserved = 0xa,
    /// A reserved bit is set in a context entry.
    ContextReserved = 0xb,
}

/// A recording register.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    low: u64,
    high: u64,
}

/// Everything that tells the guest of faults.
#[derive(Debug)]
pub(super) struct FaultLog {
    records: [Record; RECORDS],
    /// Which is filled next.
    next: usize,
    /// Which was filled first since there was none.
    first: usize,
    status: Status,
    event: Event,
}

impl FaultLog {
    /// Nothing is recorded, and the interrupt is masked.
    pub(super) fn new() -> Self {
        Self {
            records: [Record::default(); RECORDS],
            next: 0,
            first: 0,
            status: Status::empty(),
            event: Event::RESET,
        }
    }

    /// Records a fault: the interrupt to send.
    pub(super) fn record(&mut self, fault: FaultRecord) -> Option<Message> {
        let quiet = self.status.is_empty();
        let next = self.next;
        let record = self.records.get_mut(next)?;
        if self.status.contains(Status::OVERFLOW) {
            return None;
        }
        if record.high & TAKEN != 0 {
            self.status |= Status::OVERFLOW;
        } else {
            let [low, high] = fault.to_words();
            *record = Record { low, high: high | TAKEN };
            if !self.status.contains(Status::PENDING) {
                self.first = next;
            }
            self.status |= Status::PENDING;
            self.next = (next + 1) % RECORDS;
        }
        if quiet { self.event.raise() } else { None }
    }

    /// The invalidation queue has stopped: the interrupt to send.
    pub(super) fn queue_error(&mut self) -> Option<Message> {
        let quiet = self.status.is_empty();
        self.status |= Status::QUEUE_ERROR;
        if quiet { self.event.raise() } else { None }
    }

    /// The guest has not yet cleared the queue's error.
    pub(super) fn queue_has_failed(&self) -> bool {
        self.status.contains(Status::QUEUE_ERROR)
    }

    /// The status register.
    pub(super) fn status(&self) -> u32 {
        self.status.bits() | (self.first as u32) << 8
    }

    /// Clears what is written as one, but for [`Status::PENDING`].
    pub(super) fn clear(&mut self, value: u32) {
        self.status.remove(Status::from_bits_truncate(value) - Status::PENDING);
        self.settle();
    }

    /// Two fault-recording dwords in a row are one quadword: dword `index` of all of them.
    pub(super) fn read_record(&self, index: usize) -> u32 {
        let Some(record) = self.records.get(index / 4) else { return 0 };
        let half = if index % 4 < 2 { record.low } else { record.high };
        (half >> (32 * (index % 2))) as u32
    }

    /// Frees a record when its last dword is written with the bit that says that it is taken.
    pub(super) fn write_record(&mut self, index: usize, value: u32) {
        if index % 4 == 3
            && u64::from(value) << 32 & TAKEN != 0
            && let Some(record) = self.records.get_mut(index / 4)
        {
            record.high &= !TAKEN;
        }
        self.status.set(Status::PENDING, self.records.iter().any(|record| record.high & TAKEN != 0));
        self.settle();
    }

    fn settle(&mut self) {
        if self.status.is_empty() {
            self.event.settle();
        }
    }

    /// The interrupt's registers.
    pub(super) fn event(&mut self) -> &mut Event {
        &mut self.event
    }
}

#[cfg(test)]
mod tests {
    use iommufd::soft::Access;

    use super::*;

    const FAULT: FaultRecord =
        FaultRecord { source: 0x18, address: 0x1234_5678, access: Access::Read, reason: 6 };

    fn unmasked() -> FaultLog {
        let mut log = FaultLog::new();
        log.event().write(0, 0);
        log
    }

    #[test]
    fn a_fault_is_recorded_and_told_once() {
        let mut log = unmasked();
        assert!(log.record(FAULT).is_some());
        assert_eq!(log.status(), Status::PENDING.bits());
        let dwords: Vec<u32> = (0..4).map(|index| log.read_record(index)).collect();
        assert_eq!(dwords, [0x1234_5000, 0, 0x18, 0xc000_0006]);
        // The interrupt's handler has not run yet.
        let write = FaultRecord { access: Access::Write, reason: 5, ..FAULT };
        assert!(log.record(write).is_none());
        assert_eq!(log.read_record(7), 0x8000_0005);
        // Not by writing anything else, nor to the status.
        log.write_record(2, u32::MAX);
        log.write_record(3, u32::MAX >> 1);
        log.clear(Status::PENDING.bits());
        assert_eq!(log.status(), Status::PENDING.bits());
        log.write_record(3, 1 << 31);
        assert_eq!(log.status(), Status::PENDING.bits());
        log.write_record(7, 1 << 31);
        assert_eq!(log.status(), 0);
        // The next one is the first again.
        assert!(log.record(FAULT).is_some());
        assert_eq!(log.status(), Status::PENDING.bits() | 2 << 8);
    }

    #[test]
    fn what_finds_no_room_is_lost_until_that_is_cleared() {
        let mut log = unmasked();
        for _ in 0..RECORDS + 3 {
            log.record(FAULT);
        }
        assert_eq!(log.status(), (Status::PENDING | Status::OVERFLOW).bits());
        log.write_record(3, 1 << 31);
        // There is room now, but nothing is recorded.
        log.record(FaultRecord { source: 9, ..FAULT });
        assert_eq!(log.read_record(2), 0x18);
        log.clear(Status::OVERFLOW.bits());
        log.record(FaultRecord { source: 9, ..FAULT });
        assert_eq!(log.read_record(2), 9);
    }

    #[test]
    fn a_stopped_queue_is_a_condition_of_its_own() {
        let mut log = unmasked();
        assert!(log.queue_error().is_some());
        assert!(log.record(FAULT).is_none());
        log.clear(u32::MAX);
        assert!(!log.queue_has_failed());
        assert_eq!(log.status(), Status::PENDING.bits());
    }

    #[test]
    fn there_is_nothing_behind_the_last_record() {
        let mut log = unmasked();
        assert_eq!(log.read_record(RECORDS * 4), 0);
        log.write_record(RECORDS * 4 + 3, u32::MAX);
    }
}
