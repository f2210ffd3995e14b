//! The seam to the machine: one run's [`VmSpec`] in, its [`Outcome`] out.

use super::spec::{Outcome, VmSpec};

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// This build has no machine.
    #[error("this build of ring3 has no machine to run {} on (engine {})", kernel.display(), engine)]
    NoMachine {
        /// The kernel that was to boot.
        kernel: std::path::PathBuf,
        /// The engine that was asked for.
        engine: &'static str,
    },
}

/// Builds the machine, runs it to its end and says how it ended. Called on a thread of its own.
///
/// # Errors
/// A [`VmError`] when the machine cannot be built, or fails by itself rather than by what the guest does.
pub fn launch(spec: VmSpec) -> Result<Outcome, VmError> {
    Err(VmError::NoMachine { kernel: spec.kernel_path, engine: spec.engine.name() })
}
