//! A mock device and the mock IOMMU that it is behind.

use core::any::Any;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use uapi::{
    iommufd::{IOMMU_HW_INFO_TYPE_DEFAULT, IOMMU_HWPT_DATA_NONE},
    iommufd_test::{
        IOMMU_HW_INFO_SELFTEST_REGVAL, IOMMU_HW_INFO_TYPE_SELFTEST, IOMMU_HWPT_DATA_SELFTEST,
        IOMMU_TEST_DEV_CACHE_DEFAULT, IOMMU_TEST_PASID_RESERVED, IOMMU_VIOMMU_TYPE_SELFTEST,
        MOCK_DEV_CACHE_NUM, MOCK_FLAGS_DEVICE_NO_DIRTY, MOCK_FLAGS_DEVICE_PASID, MOCK_IOMMUPT_DEFAULT,
        MOCK_IOMMUPT_HUGE, MOCK_PASID_WIDTH, iommu_hwpt_selftest, iommu_test_hw_info,
    },
};
use zerocopy::IntoBytes;

use super::{domain::MockDomain, nested::MockNested, viommu::MockViommu};
use crate::{
    DevicePort, Errno, PageRequest, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Attachment, Capabilities, DomainOptions, Hardware, Nested, UserData},
    inject,
    iova::IovaRange,
    viommu::{ViommuPort, VirtualIommu},
};

/// What mock devices call their IOMMU.
const IOMMU: u64 = u64::from_ne_bytes(*b"mockiomm");

/// The mock IOMMU: the page tables that it has made, so that they can be told again behind the trait.
#[derive(Debug, Default)]
pub(super) struct MockIommu {
    domains: Mutex<Vec<Weak<MockDomain>>>,
}

impl MockIommu {
    fn add(&self, domain: &Arc<MockDomain>) {
        let mut domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        domains.retain(|domain| domain.strong_count() > 0);
        domains.push(Arc::downgrade(domain));
    }

    /// `domain` as what it is. ENOENT when it is another IOMMU's.
    pub(super) fn domain(&self, domain: &Arc<dyn Domain>) -> Result<Arc<MockDomain>> {
        let domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        let found = domains.iter().find(|known| core::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(domain)));
        found.and_then(Weak::upgrade).ok_or(Errno::NOENT)
    }
}

/// A mock device.
#[derive(Debug)]
pub(super) struct MockHardware {
    iommu: Arc<MockIommu>,
    /// Each is alone in its group.
    group: u64,
    no_dirty: bool,
    pasids: bool,
    /// What is attached, by PASID.
    attached: Mutex<BTreeMap<Option<u32>, Attachment>>,
    caches: Mutex<[u32; MOCK_DEV_CACHE_NUM as usize]>,
    port: Mutex<Option<DevicePort>>,
}

impl MockHardware {
    /// One with `flags` (`MOCK_FLAGS_DEVICE_*`). EINVAL for unknown ones.
    pub(super) fn new(iommu: &Arc<MockIommu>, flags: u32) -> Result<Arc<Self>> {
        static NEXT_GROUP: AtomicU64 = AtomicU64::new(0);
        if flags & !(MOCK_FLAGS_DEVICE_NO_DIRTY | MOCK_FLAGS_DEVICE_PASID) != 0 {
            return Err(Errno::INVAL);
        }
        inject::check()?;
        Ok(Arc::new(Self {
            iommu: iommu.clone(),
            // Away from the numbers of other drivers' groups.
            group: IOMMU ^ NEXT_GROUP.fetch_add(1, Ordering::Relaxed),
            no_dirty: flags & MOCK_FLAGS_DEVICE_NO_DIRTY != 0,
            pasids: flags & MOCK_FLAGS_DEVICE_PASID != 0,
            attached: Mutex::default(),
            caches: Mutex::new([IOMMU_TEST_DEV_CACHE_DEFAULT; MOCK_DEV_CACHE_NUM as usize]),
            port: Mutex::default(),
        }))
    }

    fn attached(&self) -> MutexGuard<'_, BTreeMap<Option<u32>, Attachment>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn caches(&self) -> MutexGuard<'_, [u32; MOCK_DEV_CACHE_NUM as usize]> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cache entry `index`. EINVAL when there is none.
    pub(super) fn cache(&self, index: u32) -> Result<u32> {
        self.caches().get(index as usize).copied().ok_or(Errno::INVAL)
    }

    /// Invalidates cache entry `index`, or all. EINVAL when there is none of the index.
    pub(super) fn invalidate(&self, index: u32, all: bool) -> Result<()> {
        let mut caches = self.caches();
        let entry = caches.get_mut(index as usize).ok_or(Errno::INVAL)?;
        if all {
            caches.fill(0);
        } else {
            *entry = 0;
        }
        Ok(())
    }

    /// Asks for a page.
    pub(super) fn request(&self, request: PageRequest) -> Result<()> {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner).clone();
        port.ok_or(Errno::NODEV)?.report(request)
    }

    /// The vIOMMU that its plain DMA goes through. ENOENT when there is none.
    pub(super) fn viommu(&self) -> Result<Arc<MockViommu>> {
        match self.attached().get(&None) {
            Some(Attachment::Nested(nested)) => {
                nested.as_any().downcast_ref::<MockNested>().and_then(|nested| nested.viommu.clone())
            }
            _ => None,
        }
        .ok_or(Errno::NOENT)
    }

    /// Whether the device goes with a page table.
    fn check(&self, to: &Attachment) -> Result<()> {
        match to {
            Attachment::Paging(domain) => {
                let domain = self.iommu.domain(domain).map_err(|_| Errno::INVAL)?;
                if domain.tracks_writes && self.no_dirty { Err(Errno::INVAL) } else { Ok(()) }
            }
            Attachment::Nested(nested) => {
                let nested = nested.as_any().downcast_ref::<MockNested>().ok_or(Errno::INVAL)?;
                // Invalidations and events name the device by its vDEVICE.
                nested.viommu.as_ref().map_or(Ok(()), |viommu| viommu.virt_id(self).map(drop))
            }
        }
    }
}

impl Hardware for MockHardware {
    fn group(&self) -> u64 {
        self.group
    }

    fn iommu(&self) -> u64 {
        IOMMU
    }

    fn bound(&self, port: DevicePort) {
        *self.port.lock().unwrap_or_else(PoisonError::into_inner) = Some(port);
    }

    fn capabilities(&self) -> Capabilities {
        let common = Capabilities::NESTING | Capabilities::IOPF;
        if self.no_dirty { common } else { common | Capabilities::DIRTY_TRACKING }
    }

    fn reserved(&self) -> Vec<IovaRange> {
        Vec::new()
    }

    fn max_pasid_log2(&self) -> u8 {
        if self.pasids { MOCK_PASID_WIDTH as u8 } else { 0 }
    }

    fn alloc_paging(
        &self,
        caller: Option<&dyn Caller>,
        options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>> {
        inject::check()?;
        let kind = match (data.kind, caller) {
            (IOMMU_HWPT_DATA_NONE, _) => MOCK_IOMMUPT_DEFAULT,
            (IOMMU_HWPT_DATA_SELFTEST, Some(caller)) => {
                let known: iommu_hwpt_selftest = data.read(&**caller.process(), size_of::<u32>())?;
                known.pagetable_type
            }
            _ => return Err(Errno::OPNOTSUPP),
        };
        if !matches!(kind, MOCK_IOMMUPT_DEFAULT | MOCK_IOMMUPT_HUGE)
            || options.dirty_tracking && self.no_dirty
        {
            return Err(Errno::OPNOTSUPP);
        }
        let domain = Arc::new(MockDomain::new(kind == MOCK_IOMMUPT_HUGE, options.dirty_tracking));
        self.iommu.add(&domain);
        Ok(domain)
    }

    fn alloc_nested(
        &self,
        caller: &dyn Caller,
        _parent: &Arc<dyn Domain>,
        data: UserData,
    ) -> Result<Arc<dyn Nested>> {
        Ok(Arc::new(MockNested::new(caller, data, None)?))
    }

    fn alloc_viommu(
        &self,
        caller: &dyn Caller,
        _parent: &Arc<dyn Domain>,
        data: UserData,
        port: ViommuPort,
    ) -> Result<Arc<dyn VirtualIommu>> {
        if data.kind != IOMMU_VIOMMU_TYPE_SELFTEST {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(MockViommu::new(caller, data, port)?)
    }

    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()> {
        let Some(to) = to else {
            self.attached().remove(&pasid);
            return Ok(());
        };
        inject::check()?;
        self.check(to)?;
        let mut attached = self.attached();
        // So that the tests see how a replace is undone.
        let another = attached.get(&pasid).is_some_and(|before| !same(before, to));
        if pasid == Some(IOMMU_TEST_PASID_RESERVED) && another {
            return Err(Errno::NOMEM);
        }
        attached.insert(pasid, to.clone());
        Ok(())
    }

    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)> {
        if !matches!(kind, IOMMU_HW_INFO_TYPE_DEFAULT | IOMMU_HW_INFO_TYPE_SELFTEST) {
            return Err(Errno::OPNOTSUPP);
        }
        inject::check()?;
        let info = iommu_test_hw_info { flags: 0, test_reg: IOMMU_HW_INFO_SELFTEST_REGVAL };
        Ok((IOMMU_HW_INFO_TYPE_SELFTEST, info.as_bytes().to_vec()))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

fn same(one: &Attachment, other: &Attachment) -> bool {
    match (one, other) {
        (Attachment::Paging(one), Attachment::Paging(other)) => Arc::ptr_eq(one, other),
        (Attachment::Nested(one), Attachment::Nested(other)) => Arc::ptr_eq(one, other),
        _ => false,
    }
}
