use crate::node::*;
use iommufd::{Errno, Result, caller::Caller, process::UserAddr};
use std::sync::Arc;
struct Stub;
struct StubFile;
impl Node for Stub {
    fn open(&self, _flags: i32) -> Result<Opened> {
        Ok(Opened::Served(Arc::new(StubFile)))
    }
    fn metadata(&self) -> Metadata {
        Metadata { mode: 0o020600, rdev: (10, 200) }
    }
}
impl ServedFile for StubFile {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        let mut bytes = [0; 32];
        caller.process().read(argument, &mut bytes)?;
        bytes[0] = 7;
        caller.process().write(argument, &bytes)?;
        if request == 77 { Err(Errno::NOTTY) } else { Ok(3) }
    }
}
pub(crate) fn all() -> Vec<(String, Arc<dyn Node>)> {
    vec![("/dev/iommu".to_owned(), Arc::new(Stub))]
}
