//! The driver that the kernel's own tests of iommufd talk to (`drivers/iommu/iommufd/iommufd_test.h`): one more ioctl,
//! `IOMMU_TEST_CMD`, whose operations make mock devices, look into page tables, and do what devices would do.
//!
//! A mock device is an object of the context (`MockDevice`): who destroys it unbinds the device. Page tables have pages
//! of 2 KiB between 16 MiB and 2 GiB.

mod access;
mod check;
mod domain;
mod hardware;
mod nested;
mod viommu;

use std::{any::Any, sync::Arc};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use uapi::iommufd_test::*;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use access::AccessFile;
use domain::MockDomain;
use hardware::{MockHardware, MockIommu};
use nested::MockNested;

use crate::{
    Context, Errno, Extension, PageRequest, PageRequestFlags, Result,
    caller::Caller,
    dmabuf::DmaBuf,
    ioas::Owner,
    ioctl,
    iova::{Iova, IovaRange, PAGE_SIZE},
    memory::FileMemory,
    object::{
        Foreign, Pending,
        device::{Binding, Device},
        table::Short,
    },
    process::UserAddr,
};

/// How long the structure must be: up to and with the field `last`.
const MINIMUM: usize = core::mem::offset_of!(iommu_test_cmd, last) + size_of::<u32>();

/// The union's members, which are generated without names.
type AddReserved = iommu_test_cmd__bindgen_ty_1__bindgen_ty_1;
type NewDevice = iommu_test_cmd__bindgen_ty_1__bindgen_ty_3;
type Replace = iommu_test_cmd__bindgen_ty_1__bindgen_ty_4;
type CheckMap = iommu_test_cmd__bindgen_ty_1__bindgen_ty_5;
type CheckRefs = iommu_test_cmd__bindgen_ty_1__bindgen_ty_6;
type CreateAccess = iommu_test_cmd__bindgen_ty_1__bindgen_ty_7;
type DestroyPages = iommu_test_cmd__bindgen_ty_1__bindgen_ty_8;
type AccessPages = iommu_test_cmd__bindgen_ty_1__bindgen_ty_9;
type AccessRw = iommu_test_cmd__bindgen_ty_1__bindgen_ty_10;
type ReplaceIoas = iommu_test_cmd__bindgen_ty_1__bindgen_ty_12;
type Dirty = iommu_test_cmd__bindgen_ty_1__bindgen_ty_13;
type CheckIotlb = iommu_test_cmd__bindgen_ty_1__bindgen_ty_14;
type TriggerIopf = iommu_test_cmd__bindgen_ty_1__bindgen_ty_15;
type CheckCache = iommu_test_cmd__bindgen_ty_1__bindgen_ty_16;
type TriggerEvent = iommu_test_cmd__bindgen_ty_1__bindgen_ty_17;
type PasidAttach = iommu_test_cmd__bindgen_ty_1__bindgen_ty_18;
type PasidDetach = iommu_test_cmd__bindgen_ty_1__bindgen_ty_20;
type PasidCheck = iommu_test_cmd__bindgen_ty_1__bindgen_ty_21;
type DmabufGet = iommu_test_cmd__bindgen_ty_1__bindgen_ty_22;
type DmabufRevoke = iommu_test_cmd__bindgen_ty_1__bindgen_ty_23;

/// One open `/dev/iommu` of a kernel with the mock driver.
pub fn open() -> Arc<Context> {
    Context::with_extension(Box::new(Mock::default()))
}

/// The mock driver of one context.
#[derive(Debug, Default)]
struct Mock {
    iommu: Arc<MockIommu>,
}

/// A mock device as an object. Dropping it unbinds the device.
#[derive(Debug)]
struct MockDevice {
    binding: Binding,
}

impl Extension for Mock {
    fn ioctl(
        &self,
        context: &Arc<Context>,
        caller: &dyn Caller,
        cmd: u32,
        arg: UserAddr,
    ) -> Option<Result<i32>> {
        (cmd == IOMMU_TEST_CMD).then(|| {
            let mut words = ioctl::Words::default();
            let size =
                ioctl::copy_in(&**caller.process(), arg, size_of::<iommu_test_cmd>(), MINIMUM, &mut words)?;
            let args = ioctl::view::<iommu_test_cmd>(&mut words)?;
            Operation { mock: self, context, caller, arg, size, args }.run()
        })
    }
}

/// One operation.
struct Operation<'a> {
    mock: &'a Mock,
    context: &'a Arc<Context>,
    caller: &'a dyn Caller,
    arg: UserAddr,
    size: usize,
    args: &'a mut iommu_test_cmd,
}

impl Operation<'_> {
    fn run(&mut self) -> Result<i32> {
        match self.args.op {
            IOMMU_TEST_OP_ADD_RESERVED => self.add_reserved(),
            IOMMU_TEST_OP_MOCK_DOMAIN => self.new_device(0),
            IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS => self.new_device(self.member::<NewDevice>()?.dev_flags),
            IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE => self.replace(),
            IOMMU_TEST_OP_MD_CHECK_MAP => self.check_map(),
            IOMMU_TEST_OP_MD_CHECK_REFS => self.check_refs(),
            IOMMU_TEST_OP_CREATE_ACCESS => self.create_access(),
            IOMMU_TEST_OP_DESTROY_ACCESS_PAGES => self.destroy_access_pages(),
            IOMMU_TEST_OP_ACCESS_PAGES => self.access_pages(),
            IOMMU_TEST_OP_ACCESS_RW => self.access_rw(),
            IOMMU_TEST_OP_ACCESS_REPLACE_IOAS => self.access_replace(),
            // It limits what the kernel takes for a moment while it fills page tables; nothing is taken here.
            IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT => Ok(()),
            IOMMU_TEST_OP_DIRTY => self.dirty(),
            IOMMU_TEST_OP_MD_CHECK_IOTLB => self.check_iotlb(),
            IOMMU_TEST_OP_DEV_CHECK_CACHE => self.check_cache(),
            IOMMU_TEST_OP_TRIGGER_IOPF => self.trigger_iopf(),
            IOMMU_TEST_OP_TRIGGER_VEVENT => self.trigger_event(),
            IOMMU_TEST_OP_PASID_ATTACH => self.pasid_attach(),
            IOMMU_TEST_OP_PASID_REPLACE => self.pasid_replace(),
            IOMMU_TEST_OP_PASID_DETACH => self.pasid_detach(),
            IOMMU_TEST_OP_PASID_CHECK_HWPT => self.pasid_check(),
            IOMMU_TEST_OP_DMABUF_GET => return self.get_dmabuf(),
            IOMMU_TEST_OP_DMABUF_REVOKE => self.revoke_dmabuf(),
            _ => Err(Errno::OPNOTSUPP),
        }?;
        Ok(0)
    }

    /// The union's member.
    fn member<T: FromBytes>(&self) -> Result<T> {
        self.args.__bindgen_anon_1.as_member().ok_or(Errno::INVAL)
    }

    /// Gives the program the structure back with a member changed.
    fn respond<T: IntoBytes + Immutable>(&mut self, member: &T) -> Result<()> {
        if !self.args.__bindgen_anon_1.set_member(member) {
            return Err(Errno::INVAL);
        }
        let bytes = self.args.as_bytes();
        self.caller.process().write(self.arg, bytes.get(..self.size).unwrap_or(bytes))
    }

    /// The mock device that the operation is about. ENOENT.
    fn device(&self) -> Result<(Short<Foreign>, Arc<Device>)> {
        let object = self.context.table().get::<Foreign>(self.args.id)?;
        let any: &(dyn Any + Send + Sync) = &*object.0;
        let device = any.downcast_ref::<MockDevice>().ok_or(Errno::NOENT)?.binding.device()?.clone();
        Ok((object, device))
    }

    /// The hardware of the bound device `id`. ENOENT.
    fn hardware(&self, id: u32) -> Result<Arc<MockHardware>> {
        let device = self.context.table().get::<Device>(id)?;
        device.hardware.clone().as_any().downcast().map_err(|_| Errno::NOENT)
    }

    /// The page table of the mock behind HWPT `id`. ENOENT.
    fn domain(&self, id: u32) -> Result<Arc<MockDomain>> {
        self.mock.iommu.domain(&self.context.hwpt(id)?.domain)
    }

    fn add_reserved(&self) -> Result<()> {
        let AddReserved { start, length } = self.member()?;
        let range = IovaRange::with_length(Iova(start), length)?;
        self.context.ioas(self.args.id)?.space.reserve(range, Owner::new())
    }

    fn new_device(&mut self, flags: u32) -> Result<()> {
        let hardware = MockHardware::new(&self.mock.iommu, flags)?;
        let reservation = self.context.table().reserve()?;
        let binding = self.context.bind_unowned(hardware)?;
        let hwpt = binding.device()?.attach(None, self.args.id)?;
        let mut member: NewDevice = self.member()?;
        (member.out_stdev_id, member.out_idev_id, member.out_hwpt_id) =
            (reservation.id(), binding.id(), hwpt);
        let device = Pending::new(reservation, Foreign(Arc::new(MockDevice { binding })));
        self.respond(&member)?;
        device.finish();
        Ok(())
    }

    fn replace(&mut self) -> Result<()> {
        let (_object, device) = self.device()?;
        let Replace { pt_id } = self.member()?;
        let pt_id = device.replace(None, pt_id)?;
        self.respond(&Replace { pt_id })
    }

    fn create_access(&mut self) -> Result<()> {
        let mut member: CreateAccess = self.member()?;
        ioctl::known_flags(member.flags, MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES)?;
        let pins = member.flags & MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES != 0;
        let access = AccessFile::new(self.context, self.args.id, pins)?;
        let fd = self.caller.install(access)?;
        member.out_access_fd = u32::try_from(fd).map_err(|_| Errno::BADF)?;
        self.respond(&member).inspect_err(|_| self.caller.uninstall(fd))
    }

    fn destroy_access_pages(&self) -> Result<()> {
        let DestroyPages { access_pages_id } = self.member()?;
        AccessFile::of(self.caller, self.args.id)?.unpin(access_pages_id)
    }

    fn access_pages(&mut self) -> Result<()> {
        let mut member: AccessPages = self.member()?;
        AccessFile::bounded(member.length)?;
        // Not MOCK_FLAGS_ACCESS_SYZ: addresses in the form of the fuzzer syzkaller.
        ioctl::known_flags(member.flags, MOCK_FLAGS_ACCESS_WRITE)?;
        let access = AccessFile::of(self.caller, self.args.id)?;
        let (iova, user) = (Iova(member.iova), UserAddr(member.uptr));
        let write = member.flags & MOCK_FLAGS_ACCESS_WRITE != 0;
        let id = access.pin(self.caller, iova, member.length, user, write)?;
        member.out_access_pages_id = id;
        self.respond(&member).inspect_err(|_| {
            // The program does not know of it.
            let _ = access.unpin(id);
        })
    }

    fn access_rw(&self) -> Result<()> {
        let AccessRw { iova, length, uptr, flags, .. } = self.member()?;
        let length = AccessFile::bounded(length)?;
        ioctl::known_flags(flags, MOCK_ACCESS_RW_WRITE | MOCK_ACCESS_RW_SLOW_PATH)?;
        let write = flags & MOCK_ACCESS_RW_WRITE != 0;
        AccessFile::of(self.caller, self.args.id)?.copy(
            self.caller,
            Iova(iova),
            length,
            UserAddr(uptr),
            write,
        )
    }

    fn access_replace(&self) -> Result<()> {
        let ReplaceIoas { ioas_id } = self.member()?;
        AccessFile::of(self.caller, self.args.id)?.replace(ioas_id)
    }

    fn check_iotlb(&self) -> Result<()> {
        let CheckIotlb { id, iotlb } = self.member()?;
        let hwpt = self.context.nested_hwpt(self.args.id)?;
        let nested = hwpt.nested.as_any().downcast_ref::<MockNested>().ok_or(Errno::NOENT)?;
        if nested.iotlb(id)? == iotlb { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn check_cache(&self) -> Result<()> {
        let CheckCache { id, cache } = self.member()?;
        if self.hardware(self.args.id)?.cache(id)? == cache { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn trigger_iopf(&self) -> Result<()> {
        let TriggerIopf { dev_id, pasid, grpid, perm, addr } = self.member()?;
        let perm = PageRequestFlags::from_bits_retain(perm);
        let request = PageRequest { pasid: Some(pasid), group: grpid, last: true, perm, addr };
        // A device does not learn whether anybody wants its page requests.
        let _ = self.hardware(dev_id)?.request(request);
        Ok(())
    }

    fn trigger_event(&self) -> Result<()> {
        let TriggerEvent { dev_id } = self.member()?;
        let hardware = self.hardware(dev_id)?;
        hardware.viommu()?.report(&hardware)
    }

    fn pasid_attach(&self) -> Result<()> {
        let PasidAttach { pasid, pt_id } = self.member()?;
        let (_object, device) = self.device()?;
        device.attach(Some(pasid), pt_id).map(drop)
    }

    fn pasid_replace(&self) -> Result<()> {
        let PasidAttach { pasid, pt_id } = self.member()?;
        let (_object, device) = self.device()?;
        device.replace(Some(pasid), pt_id).map(drop)
    }

    fn pasid_detach(&self) -> Result<()> {
        let PasidDetach { pasid } = self.member()?;
        let (_object, device) = self.device()?;
        device.detach(Some(pasid));
        Ok(())
    }

    fn pasid_check(&self) -> Result<()> {
        let PasidCheck { pasid, hwpt_id } = self.member()?;
        let (_object, device) = self.device()?;
        let attached = device.target(Some(pasid)).map_or(0, |target| target.id());
        if attached == hwpt_id { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn get_dmabuf(&self) -> Result<i32> {
        let DmabufGet { length, .. } = self.member()?;
        let length = u64::from(length);
        let file = memfd_create("mock dma-buf", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, length.next_multiple_of(PAGE_SIZE))?;
        let memory = Arc::new(FileMemory::new(&file, 0, length, true)?);
        self.caller.install(DmaBuf::new(file, memory, length)?)
    }

    fn revoke_dmabuf(&self) -> Result<()> {
        let DmabufRevoke { dmabuf_fd, revoked } = self.member()?;
        let file = self.caller.installed(dmabuf_fd).map_err(|_| Errno::INVAL)?;
        let buffer = file.as_any().downcast::<DmaBuf>().map_err(|_| Errno::INVAL)?;
        if revoked == 0 {
            buffer.restore();
        } else {
            buffer.revoke();
        }
        Ok(())
    }
}
