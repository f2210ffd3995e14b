//! What is changed of a whole address space: huge pages, cuts, the process.

use std::sync::Arc;

use super::{
    Ioas,
    area::{Area, Areas},
    domains::Domains,
    unmap::Closed,
};
use crate::{
    Errno, Result, inject,
    iova::{Iova, IovaRange},
    pages::Pages,
    process::Process,
};

impl Ioas {
    /// Whether pages that lie together may be mapped as larger ones (`IOMMU_OPTION_HUGE_PAGES`): at first they may.
    pub fn huge_pages(&self) -> bool {
        self.read_areas().huge_pages
    }

    /// Changes it. Without huge pages everything must be aligned to the host's page, and areas can be [cut](Self::cut).
    /// EINVAL when they are to be given up while a domain has areas, EADDRINUSE when an area is not aligned.
    pub fn set_huge_pages(&self, allowed: bool) -> Result<()> {
        inject::check()?;
        let domains = self.write_domains();
        let mut areas = self.write_areas();
        if areas.huge_pages == allowed {
            return Ok(());
        }
        if !allowed && !domains.is_empty() && !areas.map.is_empty() {
            return Err(Errno::INVAL);
        }
        let needed = self.needed_alignment(&domains, allowed);
        areas.set_alignment(needed)?;
        areas.huge_pages = allowed;
        Ok(())
    }

    /// Cuts the areas that begin before and end after one of `at` in two there, so that the parts can be unmapped alone: as
    /// VFIO's type 1 version 1 does. EINVAL when huge pages are allowed and a domain has the area, or `at` is not
    /// aligned; EBUSY when an access has pages of the area pinned.
    pub fn cut(&self, at: &[Iova]) -> Result<()> {
        let mut closed = Closed::default();
        for &at in at {
            while let Some(busy) = self.cut_at(at)? {
                closed.close(&busy);
                self.await_idle(&busy);
            }
        }
        Ok(())
    }

    /// The area at `at` when it must not be busy for that.
    fn cut_at(&self, at: Iova) -> Result<Option<Arc<Area>>> {
        let Some(before) = at.0.checked_sub(1).map(Iova) else { return Ok(None) };
        let domains = self.write_domains();
        let mut areas = self.write_areas();
        let Ok(here) = IovaRange::new(before, at) else { return Ok(None) };
        let found = areas.overlapping(here).find(|area| area.range.covers(here)).cloned();
        let Some(area) = found else { return Ok(None) };
        if (areas.huge_pages && !domains.is_empty()) || at.0 & (areas.alignment - 1) != 0 {
            return Err(Errno::INVAL);
        }
        if area.is_pinned() {
            return Err(Errno::BUSY);
        }
        if area.is_busy() {
            return Ok(Some(area));
        }
        inject::check()?;
        areas.cut(&domains, &area, at)?;
        Ok(None)
    }

    /// Counts the pinned pages of all areas in `spaces` with process `to` from now on. EINVAL when one of them is of a
    /// process's memory and not of a file; ENOMEM when they go past the limit of `to`. Nothing has changed then.
    pub fn change_process(spaces: &[Arc<Self>], to: &Arc<dyn Process>) -> Result<()> {
        let mut spaces: Vec<_> = spaces.iter().collect();
        // Several are locked at once, so in one order.
        spaces.sort_by_key(|space| Arc::as_ptr(space));
        spaces.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let locked: Vec<_> = spaces.iter().map(|space| space.write_domains()).collect();
        let mut stores: Vec<Arc<Pages>> = Vec::new();
        for space in &spaces {
            stores.extend(space.read_areas().map.values().map(|area| area.pages.clone()));
        }
        stores.sort_by_key(Arc::as_ptr);
        stores.dedup_by(|a, b| Arc::ptr_eq(a, b));
        if !stores.iter().all(|store| store.is_file()) {
            return Err(Errno::INVAL);
        }
        let mut changed: Vec<(&Arc<Pages>, Arc<dyn Process>)> = Vec::new();
        for store in &stores {
            match inject::check().and_then(|()| store.change_process(to, true)) {
                Ok(before) => changed.push((store, before)),
                Err(errno) => {
                    for (store, before) in changed {
                        // They were counted there a moment ago, so no limit is asked.
                        store.change_process(&before, false)?;
                    }
                    return Err(errno);
                }
            }
        }
        drop(locked);
        Ok(())
    }
}

impl Areas {
    /// Makes two of `area`, the second of which begins at `at`.
    fn cut(&mut self, domains: &Domains, area: &Arc<Area>, at: Iova) -> Result<()> {
        let first = IovaRange::new(area.range.start(), Iova(at.0 - 1))?;
        let rest = IovaRange::new(at, area.range.last())?;
        let first = Arc::new(area.part(first));
        let rest = Arc::new(area.part(rest));
        for domain in domains.iter() {
            let (first, rest) = (first.placement(self.huge_pages), rest.placement(self.huge_pages));
            area.pages.split_entry(domain, area.range, first, rest);
        }
        self.insert(first);
        self.insert(rest);
        Ok(())
    }
}
