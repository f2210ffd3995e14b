//! Migration: a device's state, and the stream in which it travels (version 2 of VFIO's migration protocol).

pub mod engine;

use std::sync::Arc;

use uapi::vfio::{
    VFIO_DEVICE_STATE_ERROR, VFIO_DEVICE_STATE_PRE_COPY, VFIO_DEVICE_STATE_PRE_COPY_P2P,
    VFIO_DEVICE_STATE_RESUMING, VFIO_DEVICE_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING_P2P,
    VFIO_DEVICE_STATE_STOP, VFIO_DEVICE_STATE_STOP_COPY, VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY,
    VFIO_MIGRATION_STOP_COPY,
};

use crate::{Errno, Result};

bitflags::bitflags! {
    /// Which states a device has beside STOP, RUNNING and RESUMING (`VFIO_MIGRATION_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct MigrationFlags: u64 {
        /// STOP_COPY. Every device that migrates has it.
        const STOP_COPY = VFIO_MIGRATION_STOP_COPY as u64;
        /// RUNNING_P2P, in which it starts no access to other devices.
        const P2P = VFIO_MIGRATION_P2P as u64;
        /// PRE_COPY, in which it gives its state while it runs.
        const PRE_COPY = VFIO_MIGRATION_PRE_COPY as u64;
    }
}

/// `enum vfio_device_mig_state`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the header names and explains them")]
pub enum State {
    Error = VFIO_DEVICE_STATE_ERROR,
    Stop = VFIO_DEVICE_STATE_STOP,
    Running = VFIO_DEVICE_STATE_RUNNING,
    StopCopy = VFIO_DEVICE_STATE_STOP_COPY,
    Resuming = VFIO_DEVICE_STATE_RESUMING,
    RunningP2p = VFIO_DEVICE_STATE_RUNNING_P2P,
    PreCopy = VFIO_DEVICE_STATE_PRE_COPY,
    PreCopyP2p = VFIO_DEVICE_STATE_PRE_COPY_P2P,
}

impl State {
    /// Every state, in the order of its numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];
}

impl TryFrom<u32> for State {
    type Error = Errno;

    /// EINVAL for a number that is no state.
    fn try_from(number: u32) -> Result<Self> {
        Self::ALL.into_iter().find(|state| *state as u32 == number).ok_or(Errno::INVAL)
    }
}

/// How much is still to be read while the device runs (`struct vfio_precopy_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PrecopyInfo {
    /// Of what should be sent before the device is stopped.
    pub initial_bytes: u64,
    /// Of what has changed since.
    pub dirty_bytes: u64,
}

/// The device's state as a stream of bytes: read while it saves, written while it resumes.
pub trait MigrationStream: Send + Sync {
    /// Reads what comes next; 0 at the end.
    ///
    /// # Errors
    /// ENOMSG in PRE_COPY when there is nothing just now, EINVAL for a stream that is being written, ENODEV after the
    /// device has left the state that the stream is of.
    fn read(&self, to: &mut [u8]) -> Result<usize>;

    /// Writes what comes next: how many bytes it took.
    ///
    /// # Errors
    /// EINVAL for a stream that is being read, or for bytes that no device has saved; ENODEV as above.
    fn write(&self, from: &[u8]) -> Result<usize>;

    /// How much is left (`VFIO_MIG_GET_PRECOPY_INFO`).
    ///
    /// # Errors
    /// EINVAL in any state but PRE_COPY and PRE_COPY_P2P.
    fn precopy_info(&self) -> Result<PrecopyInfo> {
        Err(Errno::INVAL)
    }
}

/// A device whose state can be taken to another.
pub trait Migration: Send + Sync {
    /// Which states it has.
    fn flags(&self) -> MigrationFlags;

    /// Its state.
    ///
    /// # Errors
    /// Of a device that must be asked.
    fn state(&self) -> Result<State>;

    /// Takes it to the state `to`, through the states that lie between. The stream is new when `to` is STOP_COPY,
    /// PRE_COPY, PRE_COPY_P2P or RESUMING and was not reached from one that shares its stream.
    ///
    /// # Errors
    /// EINVAL when there is no way from the present state. The device is then in the last state that it reached, or in
    /// ERROR, which only a reset ends.
    fn set_state(&self, to: State) -> Result<Option<Arc<dyn MigrationStream>>>;

    /// About how many bytes STOP_COPY would give now.
    ///
    /// # Errors
    /// Of a device that must be asked.
    fn stop_copy_length(&self) -> Result<u64>;
}
