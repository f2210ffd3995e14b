//! Files, accounting, the change of process, and memory that is taken back.

use std::sync::{Arc, Weak};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, memory_file, pattern},
    range, store,
};
use crate::{
    Errno, Result,
    account::Accounting,
    domain::{Domain, Prot},
    hostmem::PinnedPages,
    ioas::Ioas,
    iova::Iova,
    memory::Memory,
    pages::Pages,
    process::{LocalProcess, PinObserver, Process, UserAddr},
};

const RW: Prot = Prot::READ.union(Prot::WRITE);

fn attach(ioas: &Ioas) -> Arc<TestDomain> {
    let table = TestDomain::new(2048, range(0, 1 << 40));
    let domain: Arc<dyn Domain> = table.clone();
    ioas.attach_domain(&domain).unwrap();
    table
}

#[test]
fn a_file_is_the_same_pages_wherever_it_is_mapped() {
    let (process, file, ioas) = (TestProcess::new(), memory_file(16), Ioas::new());
    let buffer = Buffer::of(&file, 16);
    buffer.number();
    let table = attach(&ioas);
    for (start, length) in [(0, 16 * PAGE), (2048, PAGE), (3 * PAGE, 2048), (15 * PAGE, PAGE)] {
        let dynamic: Arc<dyn Process> = process.clone();
        let pages = Pages::file(dynamic, &file, start, length, true, Accounting::None).unwrap();
        let at = ioas.map(&pages, 0, length, None, RW).unwrap();
        for offset in (0..length).step_by(2048) {
            let host = table.lookup(Iova(at.0 + offset)).unwrap();
            let here = UserAddr(buffer.start().0 + start + offset);
            assert_eq!(process.host_page_id(host), process.page_id(here));
            assert_eq!(process.pin_count(here), Ok(1));
        }
        let mut byte = [0];
        ioas.read(at, &mut byte).unwrap();
        assert_eq!(byte, [pattern(start)]);
        ioas.unmap(range(at.0, length)).unwrap();
        assert_eq!(process.pin_count(UserAddr(buffer.start().0 + start)), Ok(0));
    }
}

#[test]
fn what_a_file_is_counts_when_it_is_pinned() {
    let process: Arc<dyn Process> = TestProcess::new();
    let open =
        |file: &_, start, length| Pages::file(process.clone(), file, start, length, true, Accounting::None);
    let (file, ioas) = (memory_file(4), Ioas::new());
    assert_eq!(open(&file, 0, 0).map(|_| ()), Err(Errno::INVAL));
    assert_eq!(open(&file, u64::MAX, 2).map(|_| ()), Err(Errno::OVERFLOW));
    let pin = |pages: &Arc<Pages>| {
        let at = ioas.map(pages, 0, pages.length(), None, RW).unwrap();
        let pinned = ioas.pin(at, 1, true, false).map(|_| ());
        ioas.unmap(range(at.0, pages.length())).unwrap();
        pinned
    };
    let whole = open(&file, 0, 4 * PAGE).unwrap();
    let longer = open(&file, 0, 4 * PAGE + 1).unwrap();
    assert_eq!((pin(&whole), pin(&longer)), (Ok(()), Err(Errno::INVAL)));
    rustix::fs::ftruncate(&file, 5 * PAGE).unwrap();
    assert_eq!((pin(&whole), pin(&longer)), (Ok(()), Ok(())));
    rustix::fs::ftruncate(&file, 0).unwrap();
    assert_eq!((pin(&whole), pin(&longer)), (Err(Errno::INVAL), Err(Errno::INVAL)));
    let device = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap().into();
    assert_eq!(pin(&open(&device, 0, PAGE).unwrap()), Err(Errno::INVAL));
}

#[test]
fn a_file_that_may_not_be_written_to_is_pinned_nevertheless() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let process: Arc<dyn Process> = TestProcess::new();
    let ioas = Ioas::new();
    let table = attach(&ioas);
    let map = |file: &_| {
        let pages = Pages::file(process.clone(), file, 0, PAGE, true, Accounting::None).unwrap();
        ioas.map(&pages, 0, PAGE, None, RW).unwrap()
    };
    let file = memory_file(1);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    for access in [(true, false), (false, true)] {
        let opened = std::fs::File::options().read(access.0).write(access.1).open(&path).unwrap();
        let at = map(&opened.into());
        ioas.write(at, &[5]).unwrap();
        assert_eq!(table.prot(at.0), Some(RW));
    }
    let sealed = memfd_create("iommufd-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&sealed, PAGE).unwrap();
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let at = map(&sealed);
    assert_eq!(table.prot(at.0), Some(Prot::READ), "devices get what there is");
    assert_eq!(ioas.write(at, &[5]), Err(Errno::PERM));
    assert_eq!(ioas.read(at, &mut [0]), Ok(()));
}

#[test]
fn a_file_that_grew_is_mapped_again() {
    let process: Arc<dyn Process> = TestProcess::new();
    let (file, ioas) = (memory_file(1), Ioas::new());
    let open = |start| Pages::file(process.clone(), &file, start, PAGE, true, Accounting::None);
    let first = open(0).unwrap();
    rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
    let second = open(PAGE).unwrap();
    ioas.map(&first, 0, PAGE, Some(Iova(0)), RW).unwrap();
    ioas.map(&second, 0, PAGE, Some(Iova(PAGE)), RW).unwrap();
    ioas.write(Iova(PAGE - 1), &[1, 2]).unwrap();
    assert_eq!(Buffer::of(&file, 2).bytes(PAGE - 1, 2), [1, 2]);
}

#[test]
fn pins_count_against_the_limit_of_the_user_or_the_process() {
    let buffer = Buffer::new(8);
    for accounting in [Accounting::None, Accounting::User, Accounting::Process] {
        let process = TestProcess::new();
        let dynamic: Arc<dyn Process> = process.clone();
        process.limit(4);
        let open = || Pages::user(dynamic.clone(), buffer.start(), 8 * PAGE, true, accounting).unwrap();
        let (ioas, pages) = (Ioas::new(), open());
        ioas.map(&pages, 0, 8 * PAGE, Some(Iova(0)), RW).unwrap();
        let pin = |page, pages| ioas.pin(Iova(page * PAGE), pages * PAGE, true, false);
        let first = pin(0, 3).unwrap();
        let again = pin(1, 3).unwrap();
        assert_eq!(process.usage().pinned(), 4, "each page counts once");
        let more = pin(3, 2).map(|_| ());
        let limited = accounting != Accounting::None;
        assert_eq!(more, if limited { Err(Errno::NOMEM) } else { Ok(()) });
        assert_eq!(process.usage().pinned(), 4);
        assert_eq!(process.usage().locked(), if accounting == Accounting::Process { 4 } else { 0 });
        let domain: Arc<dyn Domain> = TestDomain::any();
        assert_eq!(ioas.attach_domain(&domain).is_err(), limited);
        assert_eq!(process.usage().pinned(), if limited { 4 } else { 8 });
        ioas.detach_domain(&domain);
        drop(first);
        assert_eq!(process.usage().pinned(), 3);
        drop(again);
        assert_eq!((process.usage().pinned(), process.usage().locked()), (0, 0));
    }
}

#[test]
fn the_processes_of_a_user_count_together_in_its_mode() {
    let buffer = Buffer::new(4);
    let one = TestProcess::new();
    let two = TestProcess::of_user(one.user());
    one.limit(3);
    two.limit(3);
    for (accounting, pinned) in [(Accounting::User, Err(Errno::NOMEM)), (Accounting::Process, Ok(()))] {
        let ioas = Ioas::new();
        for (process, at) in [(&one, 0), (&two, 2 * PAGE)] {
            let process: Arc<dyn Process> = process.clone();
            let pages = Pages::user(process, buffer.start(), 2 * PAGE, true, accounting).unwrap();
            ioas.map(&pages, 0, 2 * PAGE, Some(Iova(at)), RW).unwrap();
        }
        let _first = ioas.pin(Iova(0), 2 * PAGE, true, false).unwrap();
        assert_eq!(ioas.pin(Iova(2 * PAGE), 2 * PAGE, true, false).map(|_| ()), pinned);
    }
    assert_eq!((one.usage().pinned(), two.usage().pinned()), (0, 0));
}

#[test]
fn files_can_be_counted_with_another_process() {
    for accounting in [Accounting::None, Accounting::User, Accounting::Process] {
        let (before, after, file, ioas) =
            (TestProcess::new(), TestProcess::new(), memory_file(4), Ioas::new());
        let (from, to): (Arc<dyn Process>, Arc<dyn Process>) = (before.clone(), after.clone());
        attach(&ioas);
        for page in 0..2 {
            let pages = Pages::file(from.clone(), &file, page * PAGE, PAGE, true, accounting).unwrap();
            ioas.map(&pages, 0, PAGE, Some(Iova(page * PAGE)), RW).unwrap();
        }
        let locked = |process: &TestProcess| (process.usage().pinned(), process.usage().locked());
        let counted = if accounting == Accounting::Process { 2 } else { 0 };
        if accounting == Accounting::None {
            Ioas::change_process(std::slice::from_ref(&ioas), &to).unwrap();
            assert_eq!((locked(&before), locked(&after)), ((2, 0), (0, 0)), "nobody counts them");
            continue;
        }
        assert_eq!(locked(&before), (2, counted));
        Ioas::change_process(&[ioas.clone(), ioas.clone()], &from).unwrap();
        assert_eq!(locked(&before), (2, counted), "to where they are counted");

        after.limit(1);
        assert_eq!(Ioas::change_process(std::slice::from_ref(&ioas), &to), Err(Errno::NOMEM));
        assert_eq!((locked(&before), locked(&after)), ((2, counted), (0, 0)));
        after.limit(2);
        Ioas::change_process(std::slice::from_ref(&ioas), &to).unwrap();
        assert_eq!((locked(&before), locked(&after)), ((0, 0), (2, counted)));

        let buffer = Buffer::new(1);
        let of_user = Pages::user(to.clone(), buffer.start(), PAGE, true, accounting).unwrap();
        let other = Ioas::new();
        other.map(&of_user, 0, PAGE, None, RW).unwrap();
        assert_eq!(Ioas::change_process(&[ioas.clone(), other], &from), Err(Errno::INVAL));
        assert_eq!(locked(&after), (2, counted));
        drop(ioas);
        assert_eq!(locked(&after), (0, 0));
    }
}

/// Memory of a process that somebody exports.
#[derive(Debug)]
struct Exported(Buffer);

impl Memory for Exported {
    fn pin(
        &self,
        first: u64,
        pages: u64,
        writable: bool,
        _: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let nobody: Weak<Pages> = Weak::new();
        LocalProcess::get().pin(self.0.page(first), pages, writable, nobody)
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        LocalProcess::get().read(UserAddr(self.0.start().0 + offset), to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        LocalProcess::get().write(UserAddr(self.0.start().0 + offset), from)
    }
}

#[test]
fn memory_that_was_revoked_is_nowhere_and_its_areas_stay() {
    let ioas = Ioas::new();
    let buffer = Buffer::new(4);
    let start = buffer.start();
    let pages = Pages::exported(Box::new(Exported(buffer)), 0, 4 * PAGE, true).unwrap();
    let table = attach(&ioas);
    let at = ioas.map(&pages, 0, 4 * PAGE, None, RW).unwrap();
    let pinned = ioas.pin(at, PAGE, true, false).unwrap();
    assert_eq!(table.bytes(), 4 * PAGE);
    let pins = |page| LocalProcess::get().pin_count(UserAddr(start.0 + page * PAGE));
    assert_eq!((pins(0), pins(3)), (Ok(1), Ok(1)));

    pages.revoke();
    pages.revoke();
    assert_eq!(table.bytes(), 0);
    assert_eq!((pins(0), pins(3)), (Ok(0), Ok(0)));
    assert_eq!(pinned.read(0, &mut [0]), Err(Errno::NODEV));
    assert_eq!(pinned.runs(), []);
    drop(pinned);
    assert_eq!(ioas.pin(at, PAGE, true, false).map(|_| ()), Err(Errno::NODEV));
    assert_eq!(ioas.read(at, &mut [0]), Err(Errno::NODEV));
    let second: Arc<dyn Domain> = TestDomain::any();
    ioas.attach_domain(&second).unwrap();
    assert_eq!(second.lookup(at), None);
    ioas.detach_domain(&second);
    assert_eq!(ioas.unmap(range(at.0, 4 * PAGE)), Ok(4 * PAGE));
}

#[test]
fn a_page_is_pinned_for_its_users_and_no_longer() {
    let (process, buffer, ioas) = (TestProcess::new(), Buffer::new(512), Ioas::new());
    ioas.map(&store(&process, buffer.start(), 512 * PAGE), 0, 512 * PAGE, Some(Iova(0)), RW).unwrap();
    let pins = |page| process.pin_count(buffer.page(page)).unwrap();
    let table = attach(&ioas);
    let table: Arc<dyn Domain> = table;
    let pinned = ioas.pin(Iova(100 * PAGE), 2 * PAGE, true, false).unwrap();
    assert_eq!(process.usage().pinned(), 512);
    ioas.detach_domain(&table);
    assert_eq!((pins(99), pins(100), pins(101), pins(102)), (0, 1, 1, 0));
    assert_eq!(process.usage().pinned(), 2);
    ioas.attach_domain(&table).unwrap();
    assert_eq!((pins(99), pins(100), pins(101), pins(102)), (1, 1, 1, 1));
    drop(pinned);
    assert_eq!(process.usage().pinned(), 512);
    ioas.detach_domain(&table);
    assert_eq!((pins(99), pins(100)), (0, 0));
}

#[test]
fn a_private_page_of_a_file_stays_what_it_is_when_it_is_written_to() {
    let file = vm_memory::FileOffset::new(std::fs::File::open("/proc/self/exe").unwrap(), 0);
    let region = vm_memory::mmap::MmapRegionBuilder::<()>::new(PAGE as usize)
        .with_file_offset(file)
        .with_mmap_prot(read_and_write())
        .with_mmap_flags(private())
        .build()
        .unwrap();
    let at = UserAddr(region.as_ptr() as u64);
    let (process, ioas) = (TestProcess::new(), Ioas::new());
    let dynamic: Arc<dyn Process> = process.clone();
    let pages = Pages::user(dynamic, at, PAGE, false, Accounting::None).unwrap();
    let table = attach(&ioas);
    let iova = ioas.map(&pages, 0, PAGE, None, Prot::READ).unwrap();
    let id = process.host_page_id(table.lookup(iova).unwrap());
    assert_eq!(process.page_id(at), id);
    process.write(at, &[7; 64]).unwrap();
    assert_eq!((process.page_id(at), process.pin_count(at)), (id, Ok(1)));
    let mut bytes = [0; 64];
    ioas.read(iova, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 64]);
}

/// PROT_READ and PROT_WRITE.
fn read_and_write() -> i32 {
    rustix::mm::ProtFlags::READ.union(rustix::mm::ProtFlags::WRITE).bits() as i32
}

/// MAP_PRIVATE.
fn private() -> i32 {
    rustix::mm::MapFlags::PRIVATE.bits() as i32
}
