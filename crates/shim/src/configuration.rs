//! What the environment asks for.
//!
//! `RING3_SHIM` has one item a line: `mock-iommu` for the IOMMU of the kernel's own tests, `device=SPEC` for a VFIO device.

use std::sync::Arc;

use crate::{node::Node, nodes, served};

/// The variable that `ring3 shim` sets.
pub(crate) const VARIABLE: &str = "RING3_SHIM";

/// Makes what the environment asks for.
pub(crate) fn apply() {
    let nodes: Vec<(String, Arc<dyn Node>)> = nodes::all();
    served::set(nodes);
}
