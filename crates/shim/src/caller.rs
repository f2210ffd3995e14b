//! Who calls: this process, as `iommufd` and `vfio` see it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use iommufd::{
    Errno, Result,
    caller::{Caller, Capability, File},
    process::{Process, UserAddr},
};

use rustix::thread::CapabilitySet;

use vfio::doors::{self, DeviceFile, Opened};

use crate::{calls, process::ShimProcess, table};

/// The program in whose process we are.
pub(crate) struct ShimCaller {
    process: Arc<dyn Process>,
}

static CALLER: ArcSwapOption<ShimCaller> = ArcSwapOption::const_empty();

impl ShimCaller {
    /// The one of this process.
    pub(crate) fn get() -> Arc<Self> {
        if let Some(caller) = &*CALLER.load() {
            return Arc::clone(caller);
        }
        // Who is second takes what the first made.
        CALLER.compare_and_swap(&None::<Arc<Self>>, Some(Arc::new(Self::new())));
        CALLER.load_full().unwrap_or_else(|| Arc::new(Self::new()))
    }

    fn new() -> Self {
        Self { process: Arc::new(ShimProcess::new()) }
    }

    /// In a child after `fork`: another process calls, with nothing pinned.
    pub(crate) fn renew() {
        core::mem::forget(CALLER.swap(Some(Arc::new(Self::new()))));
    }
}

impl Caller for ShimCaller {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, capability: Capability) -> bool {
        // A container's root may lack these altogether. On a machine of its own it would have them, and nothing of this
        // machine's is at stake: the limits and devices that they are for are served here.
        let (wanted, of_root) = match capability {
            Capability::IpcLock => (CapabilitySet::IPC_LOCK, false),
            Capability::SysResource => (CapabilitySet::SYS_RESOURCE, true),
            Capability::SysRawio => (CapabilitySet::SYS_RAWIO, true),
        };
        let withheld = || {
            rustix::process::geteuid().is_root()
                && rustix::thread::capability_is_in_bounding_set(wanted).is_ok_and(|is_in| !is_in)
        };
        let has = rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(wanted));
        has || (of_root && withheld())
    }

    fn install(&self, file: Arc<dyn File>) -> Result<i32> {
        let descriptor = file.readiness().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        calls::install(descriptor, calls::given(file), true)
    }

    fn uninstall(&self, fd: i32) {
        calls::uninstall(fd);
    }

    fn installed(&self, fd: i32) -> Result<Arc<dyn File>> {
        table::get_full(fd).and_then(|description| description.file.given()).ok_or(Errno::BADF)
    }
}

impl doors::Caller for ShimCaller {
    fn opened(&self, fd: i32) -> Result<Opened> {
        match table::get(fd).as_deref().and_then(Option::as_ref) {
            Some(description) => Ok(description.file.opened()),
            // Something real, or nothing.
            None => self.process.file(fd).map(|_| Opened::Other),
        }
    }

    fn install_device(&self, device: Arc<DeviceFile>) -> Result<i32> {
        calls::install_device(device)
    }

    fn has_registers(&self, at: UserAddr, length: u64) -> bool {
        crate::registers::are(at, length)
    }
}
