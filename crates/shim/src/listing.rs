//! What a listing of a directory shows beside what the machine has in it.
//!
//! The directories that are served as a whole are real ones elsewhere ([`crate::tree`]), and are listed as they are. Two things are
//! missing then: what is served in a directory of the machine's (`iommu` in `/dev`), and that what stands for a device node in
//! the tree is an ordinary file. Both are mended on the way out: a directory that is open has a name (`/proc/self/fd`), and
//! by that it is known here, however the program came to it.

use core::ffi::CStr;
use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path, sync::OnceLock};

use crate::{errno, inside, tree};

/// A directory whose listing is not only the machine's.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Directory {
    path: String,
    /// What may have to be added: its name, and what it is (`DT_*`).
    added: Vec<(CString, u8)>,
    /// Whether the ordinary files in it stand for devices.
    pub devices: bool,
}

static DIRECTORIES: OnceLock<Vec<Directory>> = OnceLock::new();

/// The listings of a process that has `nodes` and, in the tree, everything at and below `tops`. Later calls change nothing.
pub(crate) fn set<'a>(nodes: impl Iterator<Item = &'a str>, tops: &[String]) {
    let _ = DIRECTORIES.set(directories(nodes, tops));
}

/// The directory of `/dev` that is served as a whole.
const DEVICES: &str = "/dev/vfio";

fn directories<'a>(nodes: impl Iterator<Item = &'a str>, tops: &[String]) -> Vec<Directory> {
    let mut all: Vec<Directory> = Vec::new();
    let tops = tops.iter().map(String::as_str);
    let entries = nodes.map(|path| (path, libc::DT_CHR)).chain(tops.clone().map(|path| (path, libc::DT_DIR)));
    for (path, kind) in entries {
        let Some((parent, name)) = path.rsplit_once('/') else { continue };
        let Ok(name) = CString::new(name) else { continue };
        match all.iter_mut().find(|directory| directory.path == parent) {
            Some(directory) => directory.added.push((name, kind)),
            None => {
                all.push(Directory { path: parent.to_owned(), added: vec![(name, kind)], devices: false });
            }
        }
    }
    for top in tops.filter(|top| *top == DEVICES) {
        let of_devices = |path| Directory { path, added: Vec::new(), devices: true };
        all.extend([top.to_owned(), format!("{top}/devices")].map(of_devices));
    }
    all
}

/// Whether there are such directories at all.
pub(crate) fn any() -> bool {
    DIRECTORIES.get().is_some_and(|directories| !directories.is_empty())
}

/// The one that descriptor `fd` is open for.
pub(crate) fn of(fd: i32) -> Option<&'static Directory> {
    let directories = DIRECTORIES.get().filter(|directories| !directories.is_empty())?;
    errno::preserved(|| {
        inside::run(|| {
            let there = rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new()).ok()?;
            let known = tree::outside(there.as_bytes()).unwrap_or(there.as_bytes());
            directories.iter().find(|directory| directory.path.as_bytes() == known)
        })
    })
}

impl Directory {
    /// The entry that is added after the first `shown` of them, and how many there are up to it. What the machine has itself is in
    /// its own listing.
    pub(crate) fn added(&self, shown: usize) -> Option<(usize, &CStr, u8)> {
        let is_missing = |name: &CStr| {
            let path = Path::new(&self.path).join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            rustix::fs::lstat(path).is_err()
        };
        let rest = self.added.iter().enumerate().skip(shown);
        errno::preserved(|| {
            inside::run(|| {
                let mut missing = rest.filter(|(_, (name, _))| is_missing(name));
                missing.next().map(|(index, (name, kind))| (index + 1, name.as_c_str(), *kind))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(path: &str, added: &[(&str, u8)], devices: bool) -> Directory {
        let added = added.iter().map(|(name, kind)| (CString::new(*name).unwrap(), *kind)).collect();
        Directory { path: path.to_owned(), added, devices }
    }

    #[test]
    fn what_is_served_is_in_the_directory_above_it() {
        let tops = ["/dev/vfio", "/sys/bus/pci", "/sys/class/vfio-dev"].map(str::to_owned);
        assert_eq!(
            directories(["/dev/iommu"].into_iter(), &tops),
            [
                directory("/dev", &[("iommu", libc::DT_CHR), ("vfio", libc::DT_DIR)], false),
                directory("/sys/bus", &[("pci", libc::DT_DIR)], false),
                directory("/sys/class", &[("vfio-dev", libc::DT_DIR)], false),
                directory("/dev/vfio", &[], true),
                directory("/dev/vfio/devices", &[], true),
            ]
        );
    }

    #[test]
    fn what_the_machine_has_is_not_added() {
        let there = tempfile::tempdir().unwrap();
        std::fs::write(there.path().join("b"), "").unwrap();
        let path = there.path().to_str().unwrap();
        let directory =
            directory(path, &[("a", libc::DT_CHR), ("b", libc::DT_CHR), ("c", libc::DT_DIR)], false);
        assert_eq!(directory.added(0), Some((1, c"a", libc::DT_CHR)));
        assert_eq!(directory.added(1), Some((3, c"c", libc::DT_DIR)));
        assert_eq!(directory.added(3), None);
    }
}
