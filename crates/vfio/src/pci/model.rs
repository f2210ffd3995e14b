//! What differs from device to device.

use core::fmt;

use crate::migration::Migration;

/// The registers of a device, and what they do.
///
/// Calls may come from any thread, several at once. A model reaches memory and interrupts by the
/// [`Link`](super::function::Link) that it was made with.
pub trait Model: Send + Sync + fmt::Debug {
    /// Reads registers of a BAR: 1, 2, 4 or 8 bytes at a multiple of as many, all in the BAR.
    fn read(&self, bar: u8, offset: u64, to: &mut [u8]);

    /// Writes registers, as above.
    fn write(&self, bar: u8, offset: u64, from: &[u8]);

    /// Back to the state after power-up. No access to memory is under way when this returns.
    fn reset(&self);

    /// Its state as something that migrates.
    fn migration(&self) -> Option<&dyn Migration> {
        None
    }
}
