//! A guest's page table in the mock: it translates nothing, and has a few entries of an IOTLB to invalidate.

use core::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use uapi::iommufd_test::{
    IOMMU_HWPT_DATA_SELFTEST, IOMMU_HWPT_INVALIDATE_DATA_SELFTEST, IOMMU_TEST_INVALIDATE_FLAG_ALL,
    MOCK_NESTED_DOMAIN_IOTLB_NUM, iommu_hwpt_invalidate_selftest, iommu_hwpt_selftest,
};

use super::viommu::MockViommu;
use crate::{
    Errno, Result,
    caller::Caller,
    hardware::{Entries, Nested, UserData},
    inject,
};

/// A guest's page table.
#[derive(Debug)]
pub(super) struct MockNested {
    iotlb: Mutex<[u32; MOCK_NESTED_DOMAIN_IOTLB_NUM as usize]>,
    /// The vIOMMU that it was made of: devices must have a vDEVICE there.
    pub(super) viommu: Option<Arc<MockViommu>>,
}

impl MockNested {
    /// EOPNOTSUPP for data of another type.
    pub(super) fn new(caller: &dyn Caller, data: UserData, viommu: Option<Arc<MockViommu>>) -> Result<Self> {
        inject::check()?;
        if data.kind != IOMMU_HWPT_DATA_SELFTEST {
            return Err(Errno::OPNOTSUPP);
        }
        let known: iommu_hwpt_selftest = data.read(&**caller.process(), size_of::<u32>())?;
        Ok(Self { iotlb: Mutex::new([known.iotlb; MOCK_NESTED_DOMAIN_IOTLB_NUM as usize]), viommu })
    }

    /// Entry `index` of the IOTLB. EINVAL when there is none.
    pub(super) fn iotlb(&self, index: u32) -> Result<u32> {
        let iotlb = self.iotlb.lock().unwrap_or_else(PoisonError::into_inner);
        iotlb.get(index as usize).copied().ok_or(Errno::INVAL)
    }

    fn run(&self, request: &iommu_hwpt_invalidate_selftest) -> Result<()> {
        if request.flags & !IOMMU_TEST_INVALIDATE_FLAG_ALL != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let mut iotlb = self.iotlb.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = iotlb.get_mut(request.iotlb_id as usize).ok_or(Errno::INVAL)?;
        if request.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL == 0 {
            *entry = 0;
        } else {
            iotlb.fill(0);
        }
        Ok(())
    }
}

impl Nested for MockNested {
    fn invalidate(&self, caller: &dyn Caller, entries: Entries, done: &mut u32) -> Result<()> {
        if entries.kind != IOMMU_HWPT_INVALIDATE_DATA_SELFTEST {
            return Err(Errno::INVAL);
        }
        let length = size_of::<iommu_hwpt_invalidate_selftest>();
        for index in 0..entries.number {
            self.run(&entries.read(&**caller.process(), index, length)?)?;
            *done += 1;
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
