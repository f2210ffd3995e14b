//! Domains: page tables that have all areas.

use std::sync::Arc;

use super::{Ioas, Owner, area::Area};
use crate::{
    Errno, Result,
    domain::Domain,
    inject,
    iova::{Iova, IovaRange, PAGE_SIZE},
};

/// The domains of an address space.
#[derive(Debug, Default)]
pub(super) struct Domains {
    attached: Vec<Attached>,
}

#[derive(Debug)]
struct Attached {
    domain: Arc<dyn Domain>,
    /// Who has reserved what it cannot translate.
    owner: Owner,
    alignment: u64,
}

/// Takes `areas` out of `domain`, and lets go of their pages when no device can reach them any more.
pub(super) fn empty(domain: &Arc<dyn Domain>, areas: &[Arc<Area>]) {
    if areas.is_empty() {
        return;
    }
    for area in areas {
        area.pages.leave(domain, area.range);
    }
    domain.sync();
    for area in areas {
        area.pages.left(domain, area.range);
    }
}

impl Domains {
    pub(super) fn is_empty(&self) -> bool {
        self.attached.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<dyn Domain>> {
        self.attached.iter().map(|attached| &attached.domain)
    }

    /// Whether `domain` is attached.
    pub(super) fn has(&self, domain: &Arc<dyn Domain>) -> bool {
        self.position(domain).is_some()
    }

    fn position(&self, domain: &Arc<dyn Domain>) -> Option<usize> {
        self.iter().position(|attached| Arc::ptr_eq(attached, domain))
    }

    /// What everything must be aligned to for the domains' sake.
    pub(super) fn alignment(&self) -> u64 {
        self.attached.iter().map(|attached| attached.alignment).max().unwrap_or(1)
    }
}

impl Ioas {
    /// Enters all areas into `domain`, and from now on all that are mapped, until [`Self::detach_domain`]. What is
    /// outside its aperture is reserved.
    ///
    /// - EADDRINUSE: something outside the aperture is mapped or allowed, or an area is not aligned to the domain's
    ///   smallest page.
    /// - EINVAL: the domain's smallest page is larger than the host's.
    /// - EEXIST: it is attached.
    /// - ENOMEM, EFAULT: pages cannot be pinned, or entered.
    ///
    /// Nothing has changed when it fails.
    pub fn attach_domain(&self, domain: &Arc<dyn Domain>) -> Result<()> {
        let geometry = domain.geometry();
        let alignment = geometry.page_sizes & geometry.page_sizes.wrapping_neg();
        if !(1..=PAGE_SIZE).contains(&alignment) {
            return Err(Errno::INVAL);
        }
        inject::check()?;
        let mut domains = self.write_domains();
        if domains.has(domain) {
            return Err(Errno::EXIST);
        }
        let owner = Owner::new();
        // Nobody maps or unmaps while we have the lock of the domains.
        let (areas, huge_pages) = {
            let mut map = self.write_areas();
            let before = map.alignment;
            map.set_alignment(before.max(alignment))?;
            for outside in outside(geometry.aperture) {
                if let Err(errno) = inject::check().and_then(|()| map.reserve(outside, owner)) {
                    map.ranges.unreserve(owner);
                    map.set_alignment(before)?;
                    return Err(errno);
                }
            }
            (map.map.values().cloned().collect::<Vec<_>>(), map.huge_pages)
        };
        for (done, area) in areas.iter().enumerate() {
            if let Err(errno) = area.pages.enter(domain, area.placement(huge_pages)) {
                empty(domain, areas.get(..done).unwrap_or_default());
                self.write_areas().ranges.unreserve(owner);
                self.realign(&domains);
                return Err(errno);
            }
        }
        domains.attached.push(Attached { domain: domain.clone(), owner, alignment });
        Ok(())
    }

    /// Takes everything out of `domain`, and forgets it. Pages that nobody else needs are unpinned.
    pub fn detach_domain(&self, domain: &Arc<dyn Domain>) {
        let mut domains = self.write_domains();
        let Some(index) = domains.position(domain) else { return };
        let areas: Vec<_> = self.read_areas().map.values().cloned().collect();
        empty(domain, &areas);
        let attached = domains.attached.swap_remove(index);
        self.write_areas().ranges.unreserve(attached.owner);
        self.realign(&domains);
    }

    /// Sets the alignment to what is needed now, which is not more than before.
    pub(super) fn realign(&self, domains: &Domains) {
        let mut areas = self.write_areas();
        let needed = self.needed_alignment(domains, areas.huge_pages);
        let done = areas.set_alignment(needed);
        debug_assert_eq!(done, Ok(()));
    }

    /// What everything must be aligned to.
    pub(super) fn needed_alignment(&self, domains: &Domains, huge_pages: bool) -> u64 {
        let option = if huge_pages { 1 } else { PAGE_SIZE };
        domains.alignment().max(self.access_alignment()).max(option)
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        let domains: Vec<_> = self.read_domains().iter().cloned().collect();
        for domain in domains {
            self.detach_domain(&domain);
        }
    }
}

/// The addresses below and above `aperture`.
fn outside(aperture: IovaRange) -> impl Iterator<Item = IovaRange> {
    let below = aperture.start().0.checked_sub(1).and_then(|last| IovaRange::new(Iova(0), Iova(last)).ok());
    let above = aperture.last().0.checked_add(1);
    let above = above.and_then(|first| IovaRange::new(Iova(first), Iova(u64::MAX)).ok());
    below.into_iter().chain(above)
}
