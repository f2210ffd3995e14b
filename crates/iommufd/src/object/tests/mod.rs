//! Tests of objects and ioctls by a program, on the mock.

mod compat;
mod failures;
mod faults;
mod objects;
mod queues;
mod races;

use std::sync::Arc;

use uapi::{iommufd::*, iommufd_test::*};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::{
    Context, Errno, Result, mock,
    testing::{MEMORY, Program},
};

pub(crate) const APERTURE: u64 = MOCK_APERTURE_START as u64;
pub(crate) const PAGE: u64 = crate::iova::PAGE_SIZE;

/// The number of an ioctl of iommufd's.
pub(crate) const fn number(command: u32) -> u32 {
    (IOMMUFD_TYPE as u32) << 8 | command
}

/// The size that a structure says of itself.
pub(crate) fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// A program with an open `/dev/iommu`.
pub(crate) struct World {
    pub(crate) context: Arc<Context>,
    pub(crate) program: Program,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { context: mock::open(), program: Program::new().unwrap() }
    }

    pub(crate) fn call<T: FromBytes + IntoBytes + Immutable>(
        &self,
        command: u32,
        args: &mut T,
    ) -> Result<()> {
        self.program.ioctl(&self.context, number(command), args).map(drop)
    }

    pub(crate) fn ioas(&self) -> u32 {
        let mut args = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        self.call(IOMMUFD_CMD_IOAS_ALLOC, &mut args).unwrap();
        args.out_ioas_id
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<()> {
        self.call(IOMMUFD_CMD_DESTROY, &mut iommu_destroy { size: size::<iommu_destroy>(), id })
    }

    /// Maps `length` bytes of the program's memory from `offset` on at `iova`.
    pub(crate) fn map(&self, ioas_id: u32, offset: u64, length: u64, iova: u64) -> Result<()> {
        let flags = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE;
        let user_va = MEMORY + offset;
        let mut args = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags,
            ioas_id,
            user_va,
            length,
            iova,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_IOAS_MAP, &mut args)
    }

    pub(crate) fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Result<u64> {
        let mut args = iommu_ioas_unmap { size: size::<iommu_ioas_unmap>(), ioas_id, iova, length };
        self.call(IOMMUFD_CMD_IOAS_UNMAP, &mut args)?;
        Ok(args.length)
    }

    /// An operation of the mock: its member afterwards.
    pub(crate) fn test<T: FromBytes + IntoBytes + Immutable>(
        &self,
        op: u32,
        id: u32,
        member: T,
    ) -> Result<T> {
        let mut args = iommu_test_cmd::new_zeroed();
        (args.size, args.op, args.id) = (size::<iommu_test_cmd>(), op, id);
        assert!(args.__bindgen_anon_1.set_member(&member));
        self.program.ioctl(&self.context, IOMMU_TEST_CMD, &mut args)?;
        args.__bindgen_anon_1.as_member().ok_or(Errno::INVAL)
    }

    /// A mock device attached to `pt_id`: mock device, HWPT and device.
    pub(crate) fn device(&self, pt_id: u32, dev_flags: u32) -> Result<(u32, u32, u32)> {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_3 { dev_flags, ..Default::default() };
        let member = self.test(IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, pt_id, member)?;
        Ok((member.out_stdev_id, member.out_hwpt_id, member.out_idev_id))
    }

    pub(crate) fn replace(&self, stdev: u32, pt_id: u32) -> Result<u32> {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_4 { pt_id };
        Ok(self.test(IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE, stdev, member)?.pt_id)
    }

    /// A HWPT; a nested one when `nested`.
    pub(crate) fn hwpt(
        &self,
        dev_id: u32,
        pt_id: u32,
        flags: u32,
        nested: bool,
        fault_id: u32,
    ) -> Result<u32> {
        let at = crate::process::UserAddr(MEMORY + 0x100);
        let data = iommu_hwpt_selftest { iotlb: IOMMU_TEST_IOTLB_DEFAULT, pagetable_type: 0 };
        self.program.put(at, data.as_bytes()).unwrap();
        let mut args = iommu_hwpt_alloc {
            size: size::<iommu_hwpt_alloc>(),
            flags,
            dev_id,
            pt_id,
            fault_id,
            ..Default::default()
        };
        if nested {
            (args.data_type, args.data_len, args.data_uptr) = (IOMMU_HWPT_DATA_SELFTEST, 8, at.0);
        }
        self.call(IOMMUFD_CMD_HWPT_ALLOC, &mut args)?;
        Ok(args.out_hwpt_id)
    }

    pub(crate) fn viommu(&self, dev_id: u32, hwpt_id: u32) -> Result<u32> {
        let mut args = iommu_viommu_alloc {
            size: size::<iommu_viommu_alloc>(),
            type_: IOMMU_VIOMMU_TYPE_SELFTEST,
            dev_id,
            hwpt_id,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_VIOMMU_ALLOC, &mut args)?;
        Ok(args.out_viommu_id)
    }

    pub(crate) fn vdevice(&self, viommu_id: u32, dev_id: u32, virt_id: u64) -> Result<u32> {
        let mut args = iommu_vdevice_alloc {
            size: size::<iommu_vdevice_alloc>(),
            viommu_id,
            dev_id,
            virt_id,
            ..Default::default()
        };
        self.call(IOMMUFD_CMD_VDEVICE_ALLOC, &mut args)?;
        Ok(args.out_vdevice_id)
    }
}
