//! From a path that the program names to what serves it.

use core::ffi::{c_char, c_int};
use std::{ffi::CString, sync::Arc};

use iommufd::Errno;

use crate::{
    errno, inside,
    node::Node,
    nodes::attribute::AttributeNode,
    served,
    tree::{self, Found},
    user,
};

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
    /// Nothing can be done with it so.
    Refused(Errno),
}

/// What `path` means to who looks at it. Most paths are told by their first bytes.
pub(crate) fn resolve(path: *const c_char) -> Target {
    if inside::is() {
        return Target::Real;
    }
    let mut buffer = [0; LONGEST];
    let Some(path) = text(path, &mut buffer, false) else { return Target::Real };
    errno::preserved(|| {
        inside::run(|| match served::node(path) {
            Some(node) => Target::Node(node),
            None => tree::find(path).map_or(Target::Real, Target::Elsewhere),
        })
    })
}

/// What `path` means to who opens it with `flags`; one that is not absolute, from `directory`.
pub(crate) fn resolve_to_open(directory: c_int, path: *const c_char, flags: c_int) -> Target {
    if inside::is() {
        return Target::Real;
    }
    // A file that is only read is found where it is.
    let relative =
        tree::is_planned() && flags & (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) != libc::O_RDONLY;
    let mut buffer = [0; LONGEST];
    let Some(path) = text(path, &mut buffer, relative) else { return Target::Real };
    errno::preserved(|| {
        inside::run(|| {
            let from_directory;
            let path = if path.starts_with('/') {
                path
            } else {
                let Some(whole) = from(directory, path) else { return Target::Real };
                from_directory = whole;
                &from_directory
            };
            if let Some(node) = served::node(path) {
                return Target::Node(node);
            }
            match tree::find_to_open(path, flags) {
                None => Target::Real,
                Some(Found::File(there)) => Target::Elsewhere(there),
                Some(Found::Attribute(attribute, file)) => {
                    Target::Node(Arc::new(AttributeNode::new(attribute, file)))
                }
                Some(Found::Refused(errno)) => Target::Refused(errno),
            }
        })
    })
}

/// `path` from a directory of the tree, by the name that the program knows it by. None from any other directory.
fn from(directory: c_int, path: &str) -> Option<String> {
    let there = match directory {
        libc::AT_FDCWD => rustix::process::getcwd(Vec::new()),
        number => rustix::fs::readlink(format!("/proc/self/fd/{number}"), Vec::new()),
    };
    let there = there.ok()?;
    let there = core::str::from_utf8(tree::outside(there.as_bytes())?).ok()?;
    Some(format!("{there}/{path}"))
}

/// The text of a path that may be served: an absolute one below one of [`TOPS`], or a relative one where that is wanted.
fn text(path: *const c_char, buffer: &mut [u8; LONGEST], relative: bool) -> Option<&str> {
    let below = |path: &[u8]| TOPS.iter().any(|top| path.starts_with(top));
    let begins =
        |head: &[u8]| TOPS.iter().any(|top| top.starts_with(head)) || relative && !head.starts_with(b"/");
    let path = user::c_string(path, buffer, begins)?;
    let wanted = match path.first() {
        Some(b'/') => below(path),
        Some(_) => relative,
        None => false,
    };
    core::str::from_utf8(path).ok().filter(|_| wanted)
}
