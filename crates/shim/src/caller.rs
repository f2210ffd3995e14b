//! Who calls: this process, as `iommufd` and `vfio` see it.

use std::sync::{Arc, OnceLock};

use iommufd::{
    Errno, Result,
    caller::{Caller, Capability, File},
    process::{Process, UserAddr},
};

use crate::{
    calls,
    node::{Mapping, ServedFile},
    process::ShimProcess,
    table,
};

/// The program in whose process we are.
pub(crate) struct ShimCaller {
    process: Arc<dyn Process>,
}

impl ShimCaller {
    /// The one of this process.
    pub(crate) fn get() -> &'static Self {
        static CALLER: OnceLock<ShimCaller> = OnceLock::new();
        CALLER.get_or_init(|| Self { process: Arc::new(ShimProcess::default()) })
    }
}

impl Caller for ShimCaller {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, capability: Capability) -> bool {
        use rustix::thread::CapabilitySet;
        let wanted = match capability {
            Capability::IpcLock => CapabilitySet::IPC_LOCK,
            Capability::SysResource => CapabilitySet::SYS_RESOURCE,
            Capability::SysRawio => CapabilitySet::SYS_RAWIO,
        };
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(wanted))
    }

    fn install(&self, file: Arc<dyn File>) -> Result<i32> {
        let descriptor = file.readiness().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        calls::install(descriptor, Arc::new(Given(file)), true)
    }

    fn installed(&self, fd: i32) -> Result<Arc<dyn File>> {
        table::get_full(fd).and_then(|description| description.file.given()).ok_or(Errno::BADF)
    }
}

/// A file that an ioctl gave out.
struct Given(Arc<dyn File>);

impl ServedFile for Given {
    fn ioctl(&self, _caller: &dyn Caller, _request: u32, _argument: UserAddr) -> Result<i32> {
        Err(Errno::NOTTY)
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.0.read(to)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.0.write(from)
    }

    fn mmap(&self, _offset: u64, _length: u64, _prot: i32, _shared: bool) -> Result<Mapping> {
        Err(Errno::NODEV)
    }

    fn given(&self) -> Option<Arc<dyn File>> {
        Some(Arc::clone(&self.0))
    }
}
