//! A device of a host that is none.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use iommufd::Errno;
use iommufd::caller::Caller;
use iommufd::domain::{Domain, Geometry, HostAddr, Prot};
use iommufd::hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData};
use iommufd::iova::{Iova, IovaRange};

use super::PAGE_SIZES;
use crate::vcpu::lock;

/// An IOMMU that has as many mappings as it is let, in tables that are lists. It has 39 bits.
#[derive(Debug, Default)]
pub(super) struct Fake {
    attached: Mutex<Option<Arc<dyn Domain>>>,
    /// The most mappings of a table.
    pub(super) limit: Arc<Mutex<Option<usize>>>,
}

#[derive(Debug, Default)]
struct Table {
    mapped: Mutex<BTreeMap<u64, (u64, Prot)>>,
    limit: Arc<Mutex<Option<usize>>>,
}

fn bits39() -> IovaRange {
    IovaRange::new(Iova(0), Iova((1 << 39) - 1)).unwrap()
}

impl Domain for Table {
    fn geometry(&self) -> Geometry {
        Geometry { aperture: bits39(), page_sizes: PAGE_SIZES }
    }

    fn map(&self, iova: Iova, _host: HostAddr, length: u64, prot: Prot) -> Result<(), Errno> {
        let mut mapped = lock(&self.mapped);
        if lock(&self.limit).is_some_and(|limit| mapped.len() >= limit) {
            return Err(Errno::NOSPC);
        }
        assert!(mapped.insert(iova.0, (length, prot)).is_none());
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        lock(&self.mapped).retain(|at, _| !range.contains(Iova(*at)));
    }

    fn sync(&self) {}

    fn lookup(&self, _iova: Iova) -> Option<HostAddr> {
        None
    }
}

impl Hardware for Fake {
    fn group(&self) -> u64 {
        // As the number of an endpoint in software.
        8
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::CACHE_COHERENCY
    }

    fn reserved(&self) -> Vec<IovaRange> {
        let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
        vec![range(0xfee0_0000, 0xfeef_ffff), range(0x20_0000_0000, 0x20_0000_ffff)]
    }

    fn alloc_paging(
        &self,
        _caller: Option<&dyn Caller>,
        _options: DomainOptions,
        _data: UserData,
    ) -> Result<Arc<dyn Domain>, Errno> {
        Ok(Arc::new(Table { limit: Arc::clone(&self.limit), ..Table::default() }))
    }

    fn attach(&self, _pasid: Option<u32>, to: Option<&Attachment>) -> Result<(), Errno> {
        *lock(&self.attached) = match to {
            Some(Attachment::Paging(domain)) if (&**domain as &dyn Any).is::<Table>() => Some(domain.clone()),
            Some(_) => return Err(Errno::INVAL),
            None => None,
        };
        Ok(())
    }

    fn info(&self, _kind: u32) -> Result<(u32, Vec<u8>), Errno> {
        Ok((0, Vec::new()))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl Fake {
    /// What the device reaches: where, how much, and for what; none when it is attached to nothing.
    pub(super) fn reaches(&self) -> Option<Vec<(u64, u64, Prot)>> {
        let attached = lock(&self.attached).clone()?;
        let table = (&*attached as &dyn Any).downcast_ref::<Table>()?;
        Some(lock(&table.mapped).iter().map(|(at, (length, prot))| (*at, *length, *prot)).collect())
    }
}

pub(super) const BOTH: Prot = Prot::READ.union(Prot::WRITE);
