//! Unmapping.

use std::sync::{Arc, PoisonError};

use super::{
    Ioas,
    area::{Area, Areas},
    domains::{Domains, empty},
};
use crate::{Errno, Result, iova::IovaRange};

/// How many areas are unmapped at a time: their domains are synchronized once for all of them.
const BATCH: usize = 512;

/// How often accesses are asked to let go of one area.
const ASKS: u32 = 100;

/// What stands in the way of unmapping more.
enum Obstacle {
    /// Nothing.
    None,
    /// There is more.
    More,
    /// A pin is being made there, or a copy done.
    Busy(Arc<Area>),
    /// Accesses have pages of it pinned.
    Pinned(Arc<Area>),
}

impl Ioas {
    /// Unmaps all areas in `range`: how many bytes they had; 0 when there was none.
    ///
    /// - ENOENT: an area is only partly in `range`.
    /// - EBUSY: an owner has pages of an area pinned, or the area is just being mapped or unmapped.
    /// - EDEADLK: accesses were asked to let go, again and again, and did not.
    ///
    /// Areas before the one that it fails at are unmapped.
    pub fn unmap(&self, range: IovaRange) -> Result<u64> {
        let mut bytes = 0;
        self.unmap_counting(range, &mut bytes).map(|()| bytes)
    }

    /// As [`Self::unmap`]; the bytes that are unmapped are added to `bytes` also when it fails after some areas.
    pub fn unmap_counting(&self, range: IovaRange, bytes: &mut u64) -> Result<()> {
        let mut closed = Closed::default();
        let mut asked = 0;
        loop {
            match self.unmap_some(range, bytes)? {
                Obstacle::None => return Ok(()),
                Obstacle::More => {}
                Obstacle::Busy(area) => {
                    closed.close(&area);
                    self.await_idle(&area);
                }
                Obstacle::Pinned(area) => {
                    if asked == ASKS {
                        return Err(Errno::DEADLK);
                    }
                    asked += 1;
                    closed.close(&area);
                    for ops in self.access_ops() {
                        ops.unmap(area.range);
                    }
                    // A pin that another thread holds ends when that runs.
                    std::thread::yield_now();
                }
            }
        }
    }

    fn unmap_some(&self, range: IovaRange, bytes: &mut u64) -> Result<Obstacle> {
        let domains = self.read_domains();
        let (taken, obstacle) = {
            let mut areas = self.write_areas();
            let (taken, obstacle) = areas.take(range)?;
            if domains.is_empty() {
                for area in &taken {
                    areas.remove(area.range);
                }
            } else {
                taken.iter().for_each(|area| area.set_ready(false));
            }
            (taken, obstacle)
        };
        if !domains.is_empty() && !taken.is_empty() {
            domains.unfill(&taken);
            let mut areas = self.write_areas();
            for area in &taken {
                areas.remove(area.range);
            }
        }
        *bytes += taken.iter().map(|area| area.length).sum::<u64>();
        Ok(obstacle)
    }

    pub(super) fn await_idle(&self, area: &Area) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while area.is_busy() {
            idle = self.became_idle.wait(idle).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn end_busy(&self, area: &Area) {
        if area.end_busy() {
            drop(self.idle.lock().unwrap_or_else(PoisonError::into_inner));
            self.became_idle.notify_all();
        }
    }
}

/// Areas that nobody may pin or copy from meanwhile, so that waiting for those who do comes to an end.
#[derive(Default)]
pub(super) struct Closed(Vec<Arc<Area>>);

impl Closed {
    pub(super) fn close(&mut self, area: &Arc<Area>) {
        area.set_closing(true);
        if !self.0.iter().any(|closed| Arc::ptr_eq(closed, area)) {
            self.0.push(area.clone());
        }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        // Those that were unmapped nobody finds any more.
        self.0.iter().for_each(|area| area.set_closing(false));
    }
}

impl Domains {
    fn unfill(&self, areas: &[Arc<Area>]) {
        for domain in self.iter() {
            empty(domain, areas);
        }
    }
}

impl Areas {
    /// The areas in `range` that can be unmapped now, and why not more. An error only when that is none.
    fn take(&self, range: IovaRange) -> Result<(Vec<Arc<Area>>, Obstacle)> {
        let mut taken = Vec::new();
        for area in self.overlapping(range) {
            let stop = |errno| if taken.is_empty() { Err(errno) } else { Ok(Obstacle::More) };
            let obstacle = if !area.is_ready() || area.is_owned() {
                stop(Errno::BUSY)?
            } else if !range.covers(area.range) {
                stop(Errno::NOENT)?
            } else if area.is_busy() {
                Obstacle::Busy(area.clone())
            } else if area.is_pinned() {
                Obstacle::Pinned(area.clone())
            } else if taken.len() == BATCH {
                Obstacle::More
            } else {
                taken.push(area.clone());
                continue;
            };
            return Ok((taken, obstacle));
        }
        Ok((taken, Obstacle::None))
    }
}
