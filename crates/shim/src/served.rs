//! What this process is served: made once, from `RING3_SHIM`, before the program's first line runs.

use std::sync::{Arc, OnceLock};

use crate::node::Node;

/// The device nodes, by path.
type Nodes = Vec<(String, Arc<dyn Node>)>;

static NODES: OnceLock<Nodes> = OnceLock::new();

/// Serves `nodes` from now on. Later calls change nothing.
pub(crate) fn set(nodes: Nodes) {
    let _ = NODES.set(nodes);
}

/// The node at `path`.
pub(crate) fn node(path: &str) -> Option<Arc<dyn Node>> {
    NODES.get()?.iter().find(|(name, _)| name == path).map(|(_, node)| Arc::clone(node))
}
