//! Fault records (VT-d 10.4.14).

use crate::soft::{Access, Fault, FaultReason};

/// An access that was not translated, as a fault recording register tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultRecord {
    /// The requester id of the device.
    pub source: u16,
    /// The fault reason (VT-d 7.1.3).
    pub reason: u8,
    /// What the device wanted.
    pub access: Access,
    /// Where: the address of the page.
    pub address: u64,
}

/// Fault reasons of second-stage translation.
mod reason {
    pub(super) const BEYOND_WIDTH: u8 = 4;
    pub(super) const NO_WRITE: u8 = 5;
    pub(super) const NO_READ: u8 = 6;
    pub(super) const TABLE: u8 = 7;
    pub(super) const RESERVED: u8 = 0xc;
}

impl FaultRecord {
    /// What the guest's IOMMU says of a fault; none when it had translated the access, or had not because of the address (which
    /// interrupt remapping would say, that there is not), or the device is attached to nothing (which only who knows the
    /// context entries can tell more of).
    #[must_use]
    pub fn new(source: u16, fault: &Fault) -> Option<Self> {
        let reason = match (fault.reason, fault.access) {
            (FaultReason::Unmapped | FaultReason::Permission, Access::Write) => reason::NO_WRITE,
            (FaultReason::Unmapped | FaultReason::Permission, Access::Read) => reason::NO_READ,
            (FaultReason::Range, _) => reason::BEYOND_WIDTH,
            (FaultReason::Table, _) => reason::TABLE,
            (FaultReason::Reserved, _) => reason::RESERVED,
            (
                FaultReason::Detached
                | FaultReason::Moving
                | FaultReason::Target
                | FaultReason::Interrupt
                | FaultReason::Foreign,
                _,
            ) => return None,
        };
        Some(Self { source, reason, access: fault.access, address: fault.iova.0 & !0xfff })
    }

    /// The register: its low and its high half, with the bit F set.
    #[must_use]
    pub fn to_words(self) -> [u64; 2] {
        let read = u64::from(self.access == Access::Read);
        let high = 1 << 63 | read << 62 | u64::from(self.reason) << 32 | u64::from(self.source);
        [self.address & !0xfff, high]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iova::Iova;

    #[test]
    fn a_record_is_what_the_register_has() {
        let fault = Fault { iova: Iova(0x1234_5678), access: Access::Read, reason: FaultReason::Unmapped };
        let record = FaultRecord::new(0x18, &fault).unwrap();
        assert_eq!(record.to_words(), [0x1234_5000, 0xc000_0006_0000_0018]);
        let fault = Fault { access: Access::Write, reason: FaultReason::Reserved, ..fault };
        assert_eq!(FaultRecord::new(1, &fault).unwrap().to_words()[1], 0x8000_000c_0000_0001);
        assert_eq!(FaultRecord::new(1, &Fault { reason: FaultReason::Target, ..fault }), None);
    }
}
