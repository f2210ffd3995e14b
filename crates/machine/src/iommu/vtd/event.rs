//! An interrupt that the unit itself sends: a control, a data, and two address registers (VT-d 10.4.11 to 10.4.14 and 10.4.24 to
//! 10.4.27).
//!
//! The message is sent at once, or, while it is masked, kept as pending until it is unmasked or its reason is gone.

use pci::msix::Message;

/// Control: the interrupt is masked.
const MASK: u32 = 1 << 31;
/// Control: it is masked, and there is one to send.
const PENDING: u32 = 1 << 30;

/// The registers of one interrupt, by their distance from the first one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    control: u32,
    data: u32,
    address: u32,
    upper: u32,
}

impl Event {
    /// After reset it is masked.
    pub(super) const RESET: Self = Self { control: MASK, data: 0, address: 0, upper: 0 };

    /// The register `offset` bytes from the control register.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0 => self.control,
            4 => self.data,
            8 => self.address,
            12 => self.upper,
            _ => 0,
        }
    }

    /// Writes that register; unmasking may send the message.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Option<Message> {
        match offset {
            0 => {
                self.control = self.control & PENDING | value & MASK;
                if self.control == PENDING {
                    self.control = 0;
                    return Some(self.message());
                }
            }
            4 => self.data = value,
            8 => self.address = value & !3,
            12 => self.upper = value,
            _ => {}
        }
        None
    }

    /// There is a reason for it.
    pub(super) fn raise(&mut self) -> Option<Message> {
        if self.control & MASK != 0 {
            self.control |= PENDING;
            return None;
        }
        Some(self.message())
    }

    /// There is no reason for it any more.
    pub(super) fn settle(&mut self) {
        self.control &= !PENDING;
    }

    fn message(&self) -> Message {
        Message { address: u64::from(self.upper) << 32 | u64::from(self.address), data: self.data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programmed() -> Event {
        let mut event = Event::RESET;
        for (offset, value) in [(4, 0x31), (8, 0xfee0_1003), (12, 2)] {
            assert_eq!(event.write(offset, value), None);
        }
        event
    }

    const MESSAGE: Message = Message { address: 0x2_fee0_1000, data: 0x31 };

    #[test]
    fn it_is_sent_when_nothing_masks_it() {
        let mut event = programmed();
        assert_eq!(event.write(0, 0), None);
        assert_eq!(event.raise(), Some(MESSAGE));
        assert_eq!(event.read(0), 0);
    }

    #[test]
    fn one_that_is_masked_waits_and_is_forgotten_with_its_reason() {
        let mut event = programmed();
        assert_eq!(event.raise(), None);
        assert_eq!(event.read(0), MASK | PENDING);
        // Pending is not for software to set or clear.
        assert_eq!(event.write(0, MASK), None);
        assert_eq!(event.read(0), MASK | PENDING);
        assert_eq!(event.write(0, PENDING), Some(MESSAGE));
        assert_eq!(event.read(0), 0);
        event.write(0, MASK);
        event.raise();
        event.settle();
        assert_eq!(event.write(0, 0), None);
    }
}
