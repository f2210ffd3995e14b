//! `/proc/PID/status` with the pages that are pinned on behalf of the process, which the machine's kernel does not know.

use std::os::fd::OwnedFd;

use iommufd::{Result, iova::PAGE_SIZE};
use rustix::fs::{MemfdFlags, Mode, OFlags};

use crate::{
    node::{Metadata, Node, Opened},
    share,
};

/// The file of one process.
pub(crate) struct StatusNode {
    pid: i32,
}

impl StatusNode {
    /// What `path` names, when it is such a file.
    pub(crate) fn find(path: &str) -> Option<Self> {
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/status")?;
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let pid = if pid == "self" { own } else { pid.parse().ok()? };
        Some(Self { pid })
    }
}

impl Node for StatusNode {
    fn open(&self, _flags: i32) -> Result<Opened> {
        let text = read(&format!("/proc/{}/status", self.pid))?;
        let (pinned, locked) = share::usage_of(self.pid);
        let text = with_usage(&String::from_utf8_lossy(&text), pinned, locked);
        let file = rustix::fs::memfd_create(c"status", MemfdFlags::CLOEXEC)?;
        rustix::io::write(&file, text.as_bytes())?;
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
        Ok(Opened::Plain(file))
    }

    fn metadata(&self) -> Metadata {
        Metadata { mode: libc::S_IFREG | 0o444, rdev: (0, 0) }
    }
}

fn read(path: &str) -> Result<Vec<u8>> {
    let file: OwnedFd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(&file, &mut buffer)? {
            0 => return Ok(text),
            done => text.extend(buffer.iter().take(done)),
        }
    }
}

/// The text of a status with `pinned` and `locked` pages more.
fn with_usage(text: &str, pinned: u64, locked: u64) -> String {
    let mut result = String::with_capacity(text.len() + 16);
    for line in text.lines() {
        let more = match line.split_once(':') {
            Some(("VmPin", value)) => Some((value, pinned)),
            Some(("VmLck", value)) => Some((value, locked)),
            _ => None,
        };
        let kilobytes = |value: &str| value.trim().strip_suffix(" kB")?.parse::<u64>().ok();
        match more.and_then(|(value, pages)| Some((kilobytes(value)?, pages))) {
            Some((before, pages)) => {
                let name = line.get(..6).unwrap_or_default();
                result += &format!("{name}\t{:8} kB\n", before + pages * PAGE_SIZE / 1024);
            }
            None => {
                result += line;
                result.push('\n');
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_added_to_what_the_kernel_says() {
        let text =
            "Name:\tx\nVmPeak:\t    1000 kB\nVmLck:\t      64 kB\nVmPin:\t       0 kB\nVmHWM:\t 12 kB\n";
        let after = with_usage(text, 3, 1);
        assert_eq!(
            after,
            "Name:\tx\nVmPeak:\t    1000 kB\nVmLck:\t      68 kB\nVmPin:\t      12 kB\nVmHWM:\t 12 kB\n"
        );
    }

    #[test]
    fn only_status_files_are_taken() {
        assert!(StatusNode::find("/proc/12/status").is_some_and(|node| node.pid == 12));
        assert!(StatusNode::find("/proc/self/status").is_some());
        for other in ["/proc/status", "/proc/12/task/12/status", "/proc/x/status", "/proc/12/statusx"] {
            assert!(StatusNode::find(other).is_none(), "{other}");
        }
    }
}
