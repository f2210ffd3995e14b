//! From a path that the program names to what serves it.

use core::ffi::c_char;
use std::{ffi::CString, sync::Arc};

use crate::{inside, node::Node, served, tree, user};

/// Longer paths are none of ours.
const LONGEST: usize = 512;

/// The directories below which something may be served.
const TOPS: [&[u8]; 3] = [b"/dev/", b"/sys/", b"/proc/"];

/// What a path means.
pub(crate) enum Target {
    /// What the real libc finds there.
    Real,
    /// A device or file that this library serves.
    Node(Arc<dyn Node>),
    /// A file at another path.
    Elsewhere(CString),
}

/// What `path` means. Most paths are told by their first bytes.
pub(crate) fn resolve(path: *const c_char) -> Target {
    if inside::is() {
        return Target::Real;
    }
    let mut buffer = [0; LONGEST];
    let Some(path) = text(path, &mut buffer) else { return Target::Real };
    crate::errno::preserved(|| {
        inside::run(|| match served::node(path) {
            Some(node) => Target::Node(node),
            None => tree::find(path).map_or(Target::Real, Target::Elsewhere),
        })
    })
}

/// The text of a path that may be served: an absolute one below one of [`TOPS`].
fn text(path: *const c_char, buffer: &mut [u8; LONGEST]) -> Option<&str> {
    let path = user::c_string(path, buffer, |head| TOPS.iter().any(|top| top.starts_with(head)))?;
    if !TOPS.iter().any(|top| path.starts_with(top)) {
        return None;
    }
    core::str::from_utf8(path).ok()
}
