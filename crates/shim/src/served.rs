//! What this process is served: made once, from the environment, before the program's first line runs.

use std::sync::{Arc, OnceLock};

use crate::{
    node::Node,
    nodes::{faults::FailNthNode, status::StatusNode},
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
    // Nothing can be pinned by a process that has nothing open.
    if table::serves_any()
        && let Some(node) = StatusNode::find(path)
    {
        return Some(Arc::new(node));
    }
    None
}
