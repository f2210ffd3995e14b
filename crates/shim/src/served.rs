//! What this process is served: made once, from the environment, before the program's first line runs.

use std::sync::{Arc, OnceLock};

use iommufd::{Errno, Result};

use crate::{
    node::{Metadata, Node, Opened, ServedFile},
    nodes::{faults::FailNthNode, status::StatusNode, vfio},
    table,
};

/// The device nodes, by path, and what else there is.
pub(crate) struct Served {
    pub nodes: Vec<(String, Arc<dyn Node>)>,
    /// Whether threads have a `fail-nth`.
    pub fail_nth: bool,
}

static SERVED: OnceLock<Served> = OnceLock::new();

/// Serves this from now on. Later calls change nothing.
pub(crate) fn set(served: Served) {
    let _ = SERVED.set(served);
}

/// The node at `path`.
pub(crate) fn node(path: &str) -> Option<Arc<dyn Node>> {
    let served = SERVED.get()?;
    if let Some((_, node)) = served.nodes.iter().find(|(name, _)| name == path) {
        return Some(Arc::clone(node));
    }
    if served.fail_nth
        && let Some(node) = FailNthNode::find(path)
    {
        return Some(Arc::new(node));
    }
    if let Some(node) = vfio::find(path).or_else(|| reopened(path)) {
        return Some(node);
    }
    // Nothing can be pinned by a process that has nothing open.
    if table::serves_any()
        && let Some(node) = StatusNode::find(path)
    {
        return Some(Arc::new(node));
    }
    None
}

/// A served descriptor by its name in `/proc/self/fd`, when that can be opened again.
fn reopened(path: &str) -> Option<Arc<dyn Node>> {
    let number = path.strip_prefix("/proc/self/fd/").or_else(|| path.strip_prefix("/dev/fd/"))?;
    let description = table::get_full(number.parse().ok()?)?;
    description.file.metadata()?;
    Some(Arc::new(Reopened(Arc::clone(&description.file))))
}

struct Reopened(Arc<dyn ServedFile>);

impl Node for Reopened {
    fn open(&self, _flags: i32) -> Result<Opened> {
        self.0.reopen().unwrap_or(Err(Errno::NXIO))
    }

    fn metadata(&self) -> Metadata {
        self.0.metadata().unwrap_or(Metadata { mode: libc::S_IFCHR | 0o600, rdev: (0, 0) })
    }
}
