//! Pipes: what splice(2) needs between two sockets.
//!
//! A pipe is used by one direction of one connection as long as bytes are in it, and goes back when it is empty, so that
//! few of them serve many connections. Both their number and what they may pin of memory are bounded: a user has
//! [`/proc/sys/fs/pipe-user-pages-soft`](https://man7.org/linux/man-pages/man5/proc_sys_fs.5.html) pages for all of
//! its pipes, and somebody who takes them all leaves one page to each pipe of the user's other programs. So only the
//! first [`LARGE`] are made large; who gets none at all has to copy.

use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Pipes that are made large.
const LARGE: usize = 16;
/// How large, in bytes: the most that a user may ask for if the system's limit is its default (pipe(7)).
const SIZE: usize = 1 << 20;
/// Pipes that there are at most: with 16 pages for each that is not large, half of what a user has by default.
const MOST: usize = 256;
/// Empty pipes that are kept at most.
const MOST_IDLE: usize = 32;

/// A pipe.
#[derive(Debug)]
pub(super) struct Pipe {
    pub(super) read: OwnedFd,
    pub(super) write: OwnedFd,
    large: bool,
}

/// All pipes of a splicer.
#[derive(Debug)]
pub(super) struct Pipes {
    idle: Vec<Pipe>,
    made: usize,
    large: usize,
    most: usize,
}

impl Pipes {
    pub(super) fn new() -> Self {
        Self::with_most(MOST)
    }

    /// With room for so many. None at all has everything copied.
    pub(super) fn with_most(most: usize) -> Self {
        Self { idle: Vec::new(), made: 0, large: 0, most }
    }

    /// An empty pipe, unless there are too many, or no descriptors.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.pop() {
            return Some(pipe);
        }
        if self.made >= self.most {
            return None;
        }
        // syscalls(pasta): pipe2 fcntl
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // Refused to a user who has too many: then it stays as it is.
        let large = self.large < LARGE && fcntl_setpipe_size(&write, SIZE).is_ok();
        self.made += 1;
        self.large += usize::from(large);
        Some(Pipe { read, write, large })
    }

    /// Takes a pipe back. It must be empty.
    pub(super) fn give_back(&mut self, pipe: Pipe) {
        if self.idle.len() < MOST_IDLE {
            // The large ones are taken first.
            let place = if pipe.large { self.idle.len() } else { 0 };
            self.idle.insert(place, pipe);
        } else {
            self.discard(pipe);
        }
    }

    /// Closes a pipe that may still hold something.
    pub(super) fn discard(&mut self, pipe: Pipe) {
        self.made -= 1;
        self.large -= usize::from(pipe.large);
    }

    /// Closes what is not used: somebody needs the descriptors.
    pub(super) fn shrink(&mut self) {
        while let Some(pipe) = self.idle.pop() {
            self.discard(pipe);
        }
    }

    /// How many are in use.
    #[cfg(test)]
    pub(super) fn in_use(&self) -> usize {
        self.made - self.idle.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_used_again_and_bounded() {
        let mut pipes = Pipes::with_most(2);
        let first = pipes.take().unwrap();
        let second = pipes.take().unwrap();
        assert!(pipes.take().is_none());
        pipes.give_back(first);
        assert_eq!(pipes.in_use(), 1);
        let first = pipes.take().unwrap();
        assert!(pipes.take().is_none());
        pipes.discard(second);
        assert!(pipes.take().is_some());
        pipes.give_back(first);
        pipes.shrink();
        assert_eq!((pipes.idle.len(), pipes.in_use()), (0, 1));
    }

    #[test]
    fn a_large_pipe_is_preferred() {
        let mut pipes = Pipes::new();
        let mut taken: Vec<_> = (0..LARGE + 2).map(|_| pipes.take().unwrap()).collect();
        if !taken[0].large {
            eprintln!("SKIPPED a_large_pipe_is_preferred: this user may not have large pipes");
            return;
        }
        assert!(!taken[LARGE].large);
        let small = taken.pop().unwrap();
        let large = taken.remove(0);
        pipes.give_back(large);
        pipes.give_back(small);
        assert!(pipes.take().unwrap().large);
    }
}
