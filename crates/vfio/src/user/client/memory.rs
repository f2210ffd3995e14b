//! The server's commands: DMA_READ and DMA_WRITE.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use iommufd::iova::Iova;
use zerocopy::IntoBytes;

use crate::dma::{Dma, DmaFault};
use crate::user::connection::Connection;
use crate::user::transport::Message;
use crate::user::wire::{self, Command, DmaAccess};
use crate::user::{Errno, Result};

/// The memory that the device may access now.
#[derive(Default)]
pub(super) struct Memory(RwLock<Option<Arc<dyn Dma>>>);

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memory")
    }
}

impl Memory {
    /// Changes it: no access to what was there before is under way when this returns.
    pub(super) fn set(&self, dma: Option<Arc<dyn Dma>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = dma;
    }

    fn access(&self, access: impl FnOnce(&dyn Dma) -> Result<(), DmaFault>) -> Result<()> {
        let dma = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let dma = dma.as_ref().ok_or(Errno::FAULT)?;
        access(&**dma).map_err(|fault| match fault {
            DmaFault::Forbidden(_) => Errno::PERM,
            DmaFault::Remote(errno) | DmaFault::File(errno) => errno,
            DmaFault::Unmapped(_) | DmaFault::Overflow(_) | DmaFault::Disabled => Errno::FAULT,
        })
    }
}

/// Serves the server's commands until the connection ends.
pub(super) fn serve(channel: &Connection, memory: &Memory, max_transfer: usize) {
    while let Ok(message) = channel.next_command() {
        let sent = match answer(memory, &message, max_transfer) {
            Ok(payload) => channel.reply(&message.header, &[&payload], &[]),
            Err(errno) => channel.reply_failure(&message.header, errno),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// # Errors
/// EFAULT for memory that is not there, EPERM for what the device may not do with it, EINVAL for a transfer that is
/// not as long as it says or too long, ENOTSUP for any other command.
fn answer(memory: &Memory, message: &Message, max_transfer: usize) -> Result<Vec<u8>> {
    let command = Command::from_number(message.header.command)?;
    if !matches!(command, Command::DmaRead | Command::DmaWrite) {
        return Err(Errno::NOTSUP);
    }
    let (access, data) = wire::split::<DmaAccess>(&message.payload)?;
    let count =
        usize::try_from(access.count).ok().filter(|count| *count <= max_transfer).ok_or(Errno::INVAL)?;
    let mut reply = access.as_bytes().to_vec();
    if command == Command::DmaRead {
        let head = reply.len();
        reply.resize(head + count, 0);
        let to = reply.get_mut(head..).unwrap_or_default();
        memory.access(|dma| dma.read(Iova(access.address), to))?;
    } else {
        if data.len() != count {
            return Err(Errno::INVAL);
        }
        memory.access(|dma| dma.write(Iova(access.address), data))?;
    }
    Ok(reply)
}
