//! Failure injection as the kernel offers it (Documentation/fault-injection): `/proc/self/task/TID/fail-nth`, which makes the n-th
//! fallible step of a thread fail, and the directories in debugfs by which programs know that there is such a thing.

use std::sync::Arc;

use iommufd::{Errno, Result, inject, process::UserAddr};
use vfio::doors::Caller;

use crate::{
    node::{Metadata, Node, Opened, ServedFile},
    tree::{Entry, Plan},
};

/// Where debugfs is.
const DEBUGFS: &str = "/sys/kernel/debug";

/// The kinds of failures, and what can be set for each. Here the settings change nothing: only `fail-nth` makes anything fail.
const KINDS: [(&str, &[&str]); 2] = [
    ("failslab", &["ignore-gfp-wait", "verbose"]),
    ("fail_page_alloc", &["ignore-gfp-wait", "ignore-gfp-highmem", "verbose"]),
];

/// Adds the directories.
pub(crate) fn plan(plan: &mut Plan) {
    plan.tops.push(DEBUGFS.to_owned());
    plan.entries.push(entries);
}

fn entries() -> Vec<(String, Entry)> {
    let file = |kind, setting| (format!("{DEBUGFS}/{kind}/{setting}"), Entry::File(b"N\n".to_vec(), 0o600));
    KINDS
        .iter()
        .flat_map(|(kind, settings)| settings.iter().map(move |setting| file(kind, setting)))
        .collect()
}

/// `fail-nth` of the thread that opens it.
pub(crate) struct FailNthNode;

impl FailNthNode {
    /// What `path` names, when it is this file of the calling thread.
    pub(crate) fn find(path: &str) -> Option<Self> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let process = rustix::process::getpid().as_raw_nonzero().get();
        let rest = path.strip_prefix("/proc/")?;
        let (whose, rest) = rest.split_once('/')?;
        let own = whose == "self" || whose.parse() == Ok(process);
        let of_thread = match rest.strip_prefix("task/") {
            Some(rest) => rest.strip_suffix("/fail-nth")?.parse() == Ok(thread),
            None => rest == "fail-nth" && thread == process,
        };
        (own && of_thread).then_some(Self)
    }
}

impl Node for FailNthNode {
    fn open(&self, _flags: i32) -> Result<Opened> {
        Ok(Opened::Served(Arc::new(FailNth)))
    }

    fn metadata(&self) -> Metadata {
        Metadata { mode: libc::S_IFREG | 0o644, rdev: (0, 0) }
    }
}

struct FailNth;

impl ServedFile for FailNth {
    fn ioctl(&self, _caller: &dyn Caller, _request: u32, _argument: UserAddr) -> Result<i32> {
        Err(Errno::NOTTY)
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.read_at(0, to)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.write_at(0, from)
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        let text = format!("{}\n", inject::remaining());
        let rest =
            usize::try_from(offset).ok().and_then(|offset| text.as_bytes().get(offset..)).unwrap_or(&[]);
        let done = rest.len().min(to.len());
        to.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Ok(done)
    }

    fn write_at(&self, _offset: u64, from: &[u8]) -> Result<usize> {
        let text = core::str::from_utf8(from).map_err(|_| Errno::INVAL)?;
        inject::fail_nth(text.trim().parse().map_err(|_| Errno::INVAL)?);
        Ok(from.len())
    }
}
