//! A connection whose two ends are this process.

use std::sync::Mutex;

use iommufd::{Errno, caller::Deliver, process::UserAddr};
use vfio::doors::Caller;

use super::*;
use crate::node::ServedFile;

/// Has records, each of which is taken by who has room for it.
struct Queue(Mutex<Vec<[u8; 4]>>);

impl ServedFile for Queue {
    fn ioctl(&self, _caller: &dyn Caller, _request: u32, _argument: UserAddr) -> Result<i32> {
        Err(Errno::NOTTY)
    }

    fn read_to(&self, _to: UserAddr, room: usize, deliver: Deliver<'_>) -> Result<usize> {
        let mut records = self.0.lock().unwrap();
        let mut done = 0;
        while let Some(record) = records.last().filter(|_| room - done >= 4) {
            deliver(done, record)?;
            records.pop();
            done += 4;
        }
        Ok(done)
    }
}

#[test]
fn what_a_child_has_no_memory_for_stays_to_be_read() {
    let queue = Arc::new(Queue(Mutex::new(vec![[3; 4], [2; 4], [1; 4]])));
    let (ours, theirs) = server::connection().unwrap();
    let mut shared = server::Shared::default();
    let id = shared.add(Arc::clone(&queue) as _);
    server::start(ours, shared);
    let file = RemoteFile::new(Link::new(theirs), id);
    let mut nowhere = |_: usize, _: &[u8]| -> Result<()> { unreachable!("the server delivers") };
    assert_eq!(file.read_to(UserAddr(8), 12, &mut nowhere), Err(Errno::FAULT));
    assert_eq!(queue.0.lock().unwrap().len(), 3);
    let mut bytes = [0_u8; 11];
    let at = UserAddr(bytes.as_mut_ptr() as u64);
    assert_eq!(file.read_to(at, bytes.len(), &mut nowhere), Ok(8));
    assert_eq!(bytes, [1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]);
    assert_eq!(queue.0.lock().unwrap().len(), 1);
}
