//! The initramfs of a run, made in memory: the first process, its job description, and the kernel modules that
//! the machine's devices need.

pub mod cpio;
pub mod modules;

use std::path::Path;

use guest_init::spec::{MODULE_DIR, SPEC_PATH, Spec, SpecError};

pub use cpio::Archive;
pub use modules::{Module, ModuleError, ModuleTree, module_name};

/// The first process of the guest: a static x86-64 ELF file, built by this crate's build script.
pub static GUEST_INIT: &[u8] = include_bytes!(env!("RING3_GUEST_INIT"));

/// Builds the archive: `/init`, the spec, and `modules` in the order in which they are to be loaded.
///
/// # Errors
/// [`SpecError::Nul`] when the command, environment or directory holds a NUL byte.
pub fn build(spec: &Spec, modules: &[Module]) -> Result<Archive, SpecError> {
    let mut spec = spec.clone();
    spec.modules = modules.iter().map(|module| module.file_name()).collect();
    let mut archive = Archive::new();
    archive.directory("/dev", 0o755);
    archive.character_device("/dev/console", 0o600, 5, 1);
    archive.file("/init", 0o755, GUEST_INIT);
    archive.file(SPEC_PATH, 0o600, &spec.to_bytes()?);
    archive.directory(MODULE_DIR, 0o755);
    for module in modules {
        archive.file(Path::new(MODULE_DIR).join(module.file_name()), 0o644, &module.bytes);
    }
    Ok(archive)
}
