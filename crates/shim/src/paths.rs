//! From a path that the program names to what serves it.

use core::ffi::c_char;
use std::sync::Arc;

use crate::{node::Node, served, user};

/// Longer paths are none of ours.
const LONGEST: usize = 512;

/// The directories below which something may be served.
const TOPS: [&[u8]; 3] = [b"/dev/", b"/sys/", b"/proc/"];

/// The node that `path` names. None for all paths that the real libc serves.
pub(crate) fn node(path: *const c_char) -> Option<Arc<dyn Node>> {
    let mut buffer = [0; LONGEST];
    served::node(text(path, &mut buffer)?)
}

/// The text of a path that may be served: an absolute one below one of [`TOPS`].
fn text(path: *const c_char, buffer: &mut [u8; LONGEST]) -> Option<&str> {
    let path = user::c_string(path, buffer)?;
    if !TOPS.iter().any(|top| path.starts_with(top)) {
        return None;
    }
    core::str::from_utf8(path).ok()
}
