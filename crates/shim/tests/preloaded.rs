//! The library before a program: each test runs itself once more, alone and with `LD_PRELOAD`, and there calls libc's functions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]
#![allow(unsafe_code, reason = "calls libc's functions as a C program does")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "the calls are what is tested; each is with pointers to locals"
)]

use std::{
    env,
    ffi::{CStr, CString, c_int, c_void},
    fs, io,
    path::PathBuf,
    process::Command,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

const INSIDE: &str = "RING3_SHIM_TEST";

/// Runs `body` with the library loaded.
fn preloaded(test: &str, body: fn()) {
    serving(test, "", body);
}

/// Runs `body` with the library loaded, which serves these items.
fn serving(test: &str, items: &str, body: fn()) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", library())
        .env("RING3_SHIM", items)
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{test}: {}\n{text}", output.status);
    assert!(text.contains("1 passed"), "{test} did not run:\n{text}");
}

fn library() -> PathBuf {
    let test = env::current_exe().unwrap();
    // Where Cargo puts what tests depend on.
    let file = test.parent().unwrap().join("libring3_shim.so");
    assert!(file.exists(), "{} has not been built", file.display());
    file
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn open(path: &CStr, flags: c_int) -> c_int {
    unsafe { libc::open(path.as_ptr(), flags) }
}

const IOMMU: &CStr = c"/dev/iommu";
const IOAS_ALLOC: libc::c_ulong = 0x3b81;
const IOAS_MAP: libc::c_ulong = 0x3b85;
const DESTROY: libc::c_ulong = 0x3b80;

/// Makes an I/O address space: its id, or the errno.
fn ioas_alloc(fd: c_int) -> Result<u32, c_int> {
    let mut alloc = [12_u32, 0, 0];
    match unsafe { libc::ioctl(fd, IOAS_ALLOC, alloc.as_mut_ptr()) } {
        0 => Ok(alloc[2]),
        _ => Err(errno()),
    }
}

fn destroy(fd: c_int, id: u32) -> Result<(), c_int> {
    let argument = [8_u32, id];
    match unsafe { libc::ioctl(fd, DESTROY, argument.as_ptr()) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

#[test]
fn the_device_is_there_and_answers() {
    preloaded("the_device_is_there_and_answers", || {
        let fd = open(IOMMU, libc::O_RDWR);
        assert!(fd >= 0, "{}", errno());
        assert_eq!(unsafe { libc::access(IOMMU.as_ptr(), libc::R_OK) }, 0);
        let id = ioas_alloc(fd).unwrap();
        assert_eq!(destroy(fd, id), Ok(()));
        assert_eq!(destroy(fd, id), Err(libc::ENOENT));
        assert_eq!(unsafe { libc::ioctl(fd, 0x3bff, 0) }, -1);
        assert_eq!(errno(), libc::ENOTTY);
        assert_eq!(unsafe { libc::close(fd) }, 0);
        assert_eq!(ioas_alloc(fd), Err(libc::EBADF));
    });
}

#[test]
fn its_metadata_is_a_devices() {
    preloaded("its_metadata_is_a_devices", || {
        let fd = open(IOMMU, libc::O_RDWR | libc::O_CLOEXEC);
        let mut by_path = unsafe { core::mem::zeroed::<libc::stat>() };
        let mut by_fd = by_path;
        assert_eq!(unsafe { libc::stat(IOMMU.as_ptr(), &raw mut by_path) }, 0);
        assert_eq!(unsafe { libc::fstat(fd, &raw mut by_fd) }, 0);
        for stat in [by_path, by_fd] {
            assert_eq!(stat.st_mode & libc::S_IFMT, libc::S_IFCHR);
            assert_eq!(libc::major(stat.st_rdev), 10);
        }
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, libc::FD_CLOEXEC);
        assert_eq!(open(IOMMU, libc::O_RDWR | libc::O_DIRECTORY), -1);
        assert_eq!(errno(), libc::ENOTDIR);
    });
}

#[test]
fn bad_pointers_are_efault_and_errno_is_kept() {
    preloaded("bad_pointers_are_efault_and_errno_is_kept", || {
        let fd = open(IOMMU, libc::O_RDWR);
        for bad in [0_usize, 8, 0x7fff_ffff_f000, usize::MAX - 4] {
            assert_eq!(unsafe { libc::ioctl(fd, IOAS_ALLOC, bad) }, -1);
            assert_eq!(errno(), libc::EFAULT, "{bad:#x}");
        }
        let page = unsafe {
            libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        // Readable, but all zeros: a size of 0.
        assert_eq!(unsafe { libc::ioctl(fd, IOAS_ALLOC, page) }, -1);
        assert_eq!(errno(), libc::EINVAL);
        assert_eq!(open(unsafe { CStr::from_ptr(c"".as_ptr()) }, 0), -1);
        assert_eq!(errno(), libc::ENOENT);
        assert_eq!(unsafe { libc::open(ptr::null(), 0) }, -1);
        assert_eq!(errno(), libc::EFAULT);
        unsafe { *libc::__errno_location() = 77 };
        ioas_alloc(fd).unwrap();
        assert_eq!(errno(), 77);
    });
}

#[test]
fn duplicates_share_what_they_have_open() {
    preloaded("duplicates_share_what_they_have_open", || {
        let first = open(IOMMU, libc::O_RDWR);
        let id = ioas_alloc(first).unwrap();
        let copies = unsafe {
            [libc::dup(first), libc::fcntl(first, libc::F_DUPFD_CLOEXEC, 500), libc::dup2(first, 600)]
        };
        assert!(copies[1] >= 500 && copies[2] == 600, "{copies:?}");
        unsafe { libc::close(first) };
        let other = open(IOMMU, libc::O_RDWR);
        assert_eq!(destroy(other, id), Err(libc::ENOENT));
        assert_eq!(destroy(copies[0], id), Ok(()));
        assert_eq!(destroy(copies[1], id), Err(libc::ENOENT));
        // Something ordinary over it.
        let null = open(c"/dev/null", libc::O_RDWR);
        assert_eq!(unsafe { libc::dup2(null, copies[2]) }, copies[2]);
        assert_eq!(ioas_alloc(copies[2]), Err(libc::ENOTTY));
        // And it over something ordinary.
        assert_eq!(unsafe { libc::dup2(other, null) }, null);
        assert!(ioas_alloc(null).is_ok());
        assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);
        assert_eq!(ioas_alloc(null), Err(libc::EBADF));
        assert_eq!(ioas_alloc(copies[0]), Err(libc::EBADF));
    });
}

#[test]
fn a_child_uses_what_its_parent_opened() {
    preloaded("a_child_uses_what_its_parent_opened", || {
        let fd = open(IOMMU, libc::O_RDWR);
        let id = ioas_alloc(fd).unwrap();
        let made = in_child(|| {
            assert_eq!(destroy(fd, id), Ok(()));
            let of_child = ioas_alloc(fd).unwrap();
            // A child of the child.
            in_child(|| {
                assert_eq!(destroy(fd, of_child), Ok(()));
                0
            });
            assert_eq!(destroy(fd, of_child), Err(libc::ENOENT));
            // One of its own is none of the parent's.
            let own = open(IOMMU, libc::O_RDWR);
            assert_eq!(ioas_alloc(own), Ok(1));
            c_int::try_from(ioas_alloc(fd).unwrap()).unwrap()
        });
        assert_eq!(destroy(fd, id), Err(libc::ENOENT));
        assert_eq!(destroy(fd, u32::try_from(made).unwrap()), Ok(()));
        // A child that is killed in the middle leaves the parent in order.
        in_child_that(
            || unsafe { libc::kill(libc::getpid(), libc::SIGKILL) },
            |status| {
                assert!(libc::WIFSIGNALED(status));
            },
        );
        assert!(ioas_alloc(fd).is_ok());
    });
}

/// The library's own descriptors are not among those that a program closes because it does not know them.
#[test]
fn who_closes_what_he_does_not_know_keeps_what_is_served() {
    preloaded("who_closes_what_he_does_not_know_keeps_what_is_served", || {
        let fd = open(IOMMU, libc::O_RDWR);
        // A child that has the connection to us.
        in_child(|| {
            for other in (3..2000).rev().filter(|other| *other != fd) {
                unsafe { libc::close(other) };
            }
            assert!(ioas_alloc(fd).is_ok());
            unsafe { libc::close_range(u32::try_from(fd).unwrap() + 1, u32::MAX, 0) };
            assert!(ioas_alloc(fd).is_ok());
            in_child(|| {
                assert!(ioas_alloc(fd).is_ok());
                // All, the last first.
                (3..2000).rev().for_each(|any| _ = unsafe { libc::close(any) });
                assert_eq!(ioas_alloc(fd), Err(libc::EBADF));
                let own = open(IOMMU, libc::O_RDWR);
                assert_eq!(ioas_alloc(own), Ok(1));
                0
            });
            0
        });
        // We, who serve a child.
        let (mut go, mut done) = ([0; 2], [0; 2]);
        assert_eq!(unsafe { [libc::pipe(go.as_mut_ptr()), libc::pipe(done.as_mut_ptr())] }, [0; 2]);
        let child = unsafe { libc::fork() };
        let wait = |end: c_int| unsafe { libc::read(end, ptr::from_mut(&mut 0_u8).cast(), 1) };
        let tell = |end: c_int| unsafe { libc::write(end, c"x".as_ptr().cast(), 1) };
        if child == 0 {
            let before = ioas_alloc(fd).is_ok() && tell(done[1]) == 1;
            let after = wait(go[0]) == 1 && ioas_alloc(fd).is_ok();
            unsafe { libc::_exit(c_int::from(!(before && after))) };
        }
        assert_eq!(wait(done[0]), 1);
        for other in (3..2000).filter(|other| ![fd, go[1]].contains(other)) {
            unsafe { libc::close(other) };
        }
        assert_eq!(tell(go[1]), 1);
        let mut status = 0;
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    });
}

/// Also when another child lives, which was made later and has inherited what its parent had.
#[test]
fn calls_fail_when_the_process_that_served_has_ended() {
    preloaded("calls_fail_when_the_process_that_served_has_ended", || {
        let pipe = || {
            let mut ends = [0; 2];
            assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
            ends
        };
        let (gate, answer, stop) = (pipe(), pipe(), pipe());
        let wait = |[from, to]: [c_int; 2]| unsafe {
            libc::close(to);
            libc::read(from, ptr::from_mut(&mut 0_u8).cast(), 1)
        };
        in_child(|| {
            let fd = open(IOMMU, libc::O_RDWR);
            if unsafe { libc::fork() } == 0 {
                unsafe { libc::close(stop[1]) };
                wait(gate);
                let answered = [u8::from(ioas_alloc(fd) == Err(libc::EIO))];
                unsafe { libc::write(answer[1], answered.as_ptr().cast(), 1) };
                unsafe { libc::_exit(0) };
            }
            if unsafe { libc::fork() } == 0 {
                unsafe { libc::close(gate[1]) };
                wait(stop);
                unsafe { libc::_exit(0) };
            }
            0
        });
        unsafe { libc::close(gate[1]) };
        let mut ready = libc::pollfd { fd: answer[0], events: libc::POLLIN, revents: 0 };
        assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 20_000) }, 1, "the call waits");
        let mut answered = [0_u8];
        assert_eq!(unsafe { libc::read(answer[0], answered.as_mut_ptr().cast(), 1) }, 1);
        assert_eq!(answered, [1]);
        unsafe { libc::close(stop[1]) };
    });
}

/// What a child of `vfork` closes and duplicates until it executes another program is its own, not its parent's.
#[test]
fn a_child_in_its_parents_memory_has_descriptors_of_its_own() {
    static DESCRIPTORS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

    /// As Python does between `vfork` and `exec`.
    extern "C" fn close_all(_argument: *mut c_void) -> c_int {
        let [served, ordinary] =
            [0, 1].map(|index| c_int::try_from(DESCRIPTORS[index].load(Ordering::Relaxed)).unwrap_or(-1));
        let made = unsafe {
            // A served one becomes an ordinary one, and an ordinary one served.
            [libc::dup2(served, ordinary), libc::dup2(0, served), libc::close(ordinary), libc::dup(0)]
        };
        let closed = unsafe { libc::close_range(3, u32::MAX, 0) };
        c_int::from(made != [ordinary, served, 0, ordinary] || closed != 0)
    }

    preloaded("a_child_in_its_parents_memory_has_descriptors_of_its_own", || {
        let served = open(IOMMU, libc::O_RDWR);
        let id = ioas_alloc(served).unwrap();
        let ordinary = open(c"/dev/null", libc::O_RDWR);
        for (place, descriptor) in DESCRIPTORS.iter().zip([served, ordinary]) {
            place.store(usize::try_from(descriptor).unwrap(), Ordering::Relaxed);
        }
        let mut stack = vec![0_u128; 16 << 10];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = stack.as_mut_ptr_range().end.cast();
        let child = unsafe { libc::clone(close_all, top, flags, ptr::null_mut()) };
        assert!(child > 0, "{}", errno());
        let mut status = 0;
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert_eq!(ioas_alloc(ordinary), Err(libc::ENOTTY));
        assert_eq!(destroy(served, id), Ok(()));
        // And a copy of the memory is a process like any other, however it was made.
        let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if child == 0 {
            let same = unsafe { [libc::close(served), libc::dup(0)] } == [0, served];
            let ordinary = ioas_alloc(served) == Err(libc::ENOTTY);
            unsafe { libc::_exit(c_int::from(!(same && ordinary))) };
        }
        assert_eq!(unsafe { libc::waitpid(-1, &raw mut status, 0) }, c_int::try_from(child).unwrap());
        assert_eq!(status, 0);
        assert!(ioas_alloc(served).is_ok());
    });
}

/// Runs `body` in a child and gives its exit status.
fn in_child(body: impl FnOnce() -> c_int) -> c_int {
    let mut result = -1;
    in_child_that(body, |status| {
        assert!(libc::WIFEXITED(status), "the child ended with {status:#x}");
        result = libc::WEXITSTATUS(status);
        assert_ne!(result, 255, "the child failed");
    });
    result
}

fn in_child_that(body: impl FnOnce() -> c_int, judge: impl FnOnce(c_int)) {
    let child = unsafe { libc::fork() };
    if child == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        unsafe { libc::_exit(result.unwrap_or(255)) };
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    judge(status);
}

#[test]
fn two_threads_race_for_one_descriptor() {
    preloaded("two_threads_race_for_one_descriptor", || {
        for _ in 0..200 {
            let fd = open(IOMMU, libc::O_RDWR);
            let ids: Vec<u32> = (0..8).map(|_| ioas_alloc(fd).unwrap()).collect();
            let won: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..2)
                    .map(|_| scope.spawn(|| ids.iter().filter(|id| destroy(fd, **id).is_ok()).count()))
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(won, ids.len());
            // One closes while the other calls: the call succeeds, or there is no such descriptor.
            std::thread::scope(|scope| {
                scope.spawn(|| unsafe { libc::close(fd) });
                match ioas_alloc(fd) {
                    Ok(_) | Err(libc::EBADF) => {}
                    Err(other) => panic!("errno {other}"),
                }
            });
        }
    });
}

#[test]
fn other_files_are_the_real_ones() {
    preloaded("other_files_are_the_real_ones", || {
        let directory = env::temp_dir().join(format!("ring3-shim-test-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("file");
        let name = CString::new(path.to_str().unwrap()).unwrap();
        let fd = unsafe { libc::open(name.as_ptr(), libc::O_CREAT | libc::O_RDWR | libc::O_EXCL, 0o640) };
        assert!(fd >= 0);
        assert_eq!(unsafe { libc::write(fd, c"hello".as_ptr().cast(), 5) }, 5);
        let mut buffer = [0_u8; 8];
        assert_eq!(unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), 8, 1) }, 4);
        assert_eq!(&buffer[..4], b"ello");
        assert_eq!(unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) }, 5);
        let mut stat = unsafe { core::mem::zeroed::<libc::stat>() };
        assert_eq!(unsafe { libc::fstat(fd, &raw mut stat) }, 0);
        assert_eq!((stat.st_mode & 0o777, stat.st_size), (0o640, 5));
        let at = unsafe { libc::mmap(ptr::null_mut(), 5, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0) };
        assert_eq!(unsafe { *at.cast::<[u8; 5]>() }, *b"hello");
        assert_eq!(unsafe { libc::munmap(at, 5) }, 0);
        fs::remove_dir_all(&directory).unwrap();
    });
}

/// Maps `length` bytes at `at` for devices: the address for them, or the errno.
fn ioas_map(fd: c_int, ioas: u32, at: *mut c_void, length: usize) -> Result<u64, c_int> {
    let flags = 1_u64 << 1 | 1 << 2;
    let mut map = [40 | flags << 32, u64::from(ioas), at as u64, length as u64, 0];
    match unsafe { libc::ioctl(fd, IOAS_MAP, map.as_mut_ptr()) } {
        0 => Ok(map[4]),
        _ => Err(errno()),
    }
}

#[test]
fn memory_is_mapped_for_devices() {
    preloaded("memory_is_mapped_for_devices", || {
        let fd = open(IOMMU, libc::O_RDWR);
        let ioas = ioas_alloc(fd).unwrap();
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = unsafe {
            libc::mmap(ptr::null_mut(), 1 << 16, libc::PROT_READ | libc::PROT_WRITE, private, -1, 0)
        };
        assert!(ioas_map(fd, ioas, at, 1 << 16).is_ok());
        assert_eq!(ioas_map(fd, ioas, at, 0), Err(libc::EINVAL));
        assert_eq!(ioas_map(fd, ioas, at, usize::MAX), Err(libc::EOVERFLOW));
    });
}

/// Whether the kernel can read a byte there on the program's behalf.
fn is_readable(at: *mut c_void) -> bool {
    let mut pipe = [0; 2];
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let done = unsafe { libc::write(pipe[1], at, 1) };
    pipe.iter().for_each(|end| assert_eq!(unsafe { libc::close(*end) }, 0));
    done == 1
}

#[test]
fn memory_that_devices_use_stays_accessible() {
    const TEST: libc::c_ulong = 0x3ba0;
    const MOCK_DOMAIN: u64 = 2;
    const UNMAP: libc::c_ulong = 0x3b86;
    const PAGE: usize = 4096;
    serving("memory_that_devices_use_stays_accessible", "mock-iommu", || {
        let fd = open(IOMMU, libc::O_RDWR);
        let ioas = ioas_alloc(fd).unwrap();
        let (flags, both) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_READ | libc::PROT_WRITE);
        let at = unsafe { libc::mmap(ptr::null_mut(), 4 * PAGE, both, flags, -1, 0) };
        let pages = [0, 1, 2, 3].map(|page| unsafe { at.byte_add(page * PAGE) });
        let mut device = [72 | MOCK_DOMAIN << 32, u64::from(ioas), 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(unsafe { libc::ioctl(fd, TEST, device.as_mut_ptr()) }, 0, "{}", errno());
        ioas_map(fd, ioas, pages[1], PAGE).unwrap();
        assert_eq!(unsafe { libc::mprotect(at, 4 * PAGE, libc::PROT_NONE) }, 0);
        assert_eq!(pages.map(is_readable), [false, true, false, false]);
        assert_eq!(unsafe { libc::mprotect(at, 4 * PAGE, both) }, 0);
        assert_eq!(pages.map(is_readable), [true; 4]);
        assert_eq!(unsafe { libc::mprotect(at.byte_add(1), PAGE, libc::PROT_NONE) }, -1);
        assert_eq!(errno(), libc::EINVAL);
        // Everything, when no device uses it any more.
        let mut unmap = [24 | u64::from(ioas) << 32, 0, u64::MAX];
        assert_eq!(unsafe { libc::ioctl(fd, UNMAP, unmap.as_mut_ptr()) }, 0, "{}", errno());
        assert_eq!(unsafe { libc::mprotect(at, 4 * PAGE, libc::PROT_NONE) }, 0);
        assert_eq!(pages.map(is_readable), [false; 4]);
    });
}

/// A card where no machine has one.
const CARD: &str = "device=ioat,addr=0000:7f:05.0";
const COUNT: &CStr = c"/sys/bus/pci/devices/0000:7f:05.0/sriov_numvfs";

fn count() -> String {
    fs::read_to_string(COUNT.to_str().unwrap()).unwrap()
}

#[test]
fn streams_write_to_attributes() {
    serving("streams_write_to_attributes", CARD, || {
        let write = |text: &CStr| {
            let stream = unsafe { libc::fopen(COUNT.as_ptr(), c"w".as_ptr()) };
            assert!(!stream.is_null(), "{}", errno());
            assert!(unsafe { libc::fputs(text.as_ptr(), stream) } >= 0);
            let closed = unsafe { libc::fclose(stream) };
            if closed == 0 { Ok(()) } else { Err(errno()) }
        };
        assert_eq!(write(c"2"), Ok(()));
        assert_eq!(count(), "2\n");
        assert_eq!(write(c"1000"), Err(libc::ERANGE));
        assert_eq!(write(c"0"), Ok(()));
        let vendor = c"/sys/bus/pci/devices/0000:7f:05.0/vendor";
        assert!(unsafe { libc::fopen(vendor.as_ptr(), c"w".as_ptr()) }.is_null());
        assert_eq!(errno(), libc::EACCES);
        let stream = unsafe { libc::fopen(COUNT.as_ptr(), c"r+".as_ptr()) };
        let mut line = [0; 8];
        assert!(!unsafe { libc::fgets(line.as_mut_ptr(), 8, stream) }.is_null());
        assert_eq!(unsafe { CStr::from_ptr(line.as_ptr()) }, c"0\n");
        assert_eq!(unsafe { libc::fclose(stream) }, 0);
    });
}

#[test]
fn the_working_directory_may_be_one_of_ours() {
    serving("the_working_directory_may_be_one_of_ours", CARD, || {
        let there = "/sys/bus/pci/devices/0000:7f:05.0";
        env::set_current_dir(there).unwrap();
        assert_eq!(env::current_dir().unwrap().to_str(), Some(there));
        fs::write("sriov_numvfs", "1").unwrap();
        assert_eq!(fs::canonicalize("virtfn0/physfn").unwrap().to_str(), Some(there));
        assert_eq!(fs::write("virtfn0/vendor", "1").unwrap_err().raw_os_error(), Some(libc::EACCES));
        env::set_current_dir("virtfn0").unwrap();
        fs::write("physfn/sriov_numvfs", "0").unwrap();
        assert_eq!(count(), "0\n");
    });
}

/// What a script of several programs writes stays, for all of them.
#[test]
fn processes_share_what_they_write() {
    const SCRIPT: &str = "cd /sys/bus/pci/devices/0000:7f:05.0 && echo 1 >sriov_numvfs && cat sriov_numvfs && \
        basename $(readlink virtfn0/driver) && ls /dev/vfio && echo 0000:7f:05.0 >driver/unbind && \
        cat sriov_numvfs && ls /dev/vfio && cd .. && echo 0000:7f:05.0 | tee ../drivers_probe && ls /dev/vfio";
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().canonicalize().unwrap().join("tree");
    let items = format!("{CARD}\ntree={} {}", std::process::id(), tree.display());
    let mut shell = Command::new("sh");
    shell.args(["-c", SCRIPT]).env("LD_PRELOAD", library()).env("RING3_SHIM", items);
    let output = shell.output().unwrap();
    let (text, problems) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {text}{problems}", output.status);
    let expected =
        "1\nvfio-pci\n1000\n1001\ndevices\nvfio\n0\ndevices\nvfio\n0000:7f:05.0\n1000\ndevices\nvfio\n";
    assert_eq!(text, expected, "{problems}");
}

#[test]
fn a_tree_goes_with_its_process() {
    let directory = tempfile::tempdir().unwrap();
    // However it ends: by `exit`, by `_exit` (a shell's last program), and while a child has looked first.
    for script in
        ["cat /sys/bus/pci/devices/0000:7f:05.0/vendor; true", "(cat /sys/bus/pci/devices/*/vendor); exit 0"]
    {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).env("LD_PRELOAD", library()).env("RING3_SHIM", CARD);
        let output = shell.env("TMPDIR", directory.path()).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("0x8086"), "{output:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{script}");
    }
}

/// The registers of the card's first BAR, mapped.
fn registers() -> *mut u8 {
    const BIND_IOMMUFD: libc::c_ulong = 0x3b76;
    let device = open(c"/dev/vfio/devices/vfio0", libc::O_RDWR);
    let iommu = open(IOMMU, libc::O_RDWR);
    assert!(device >= 0 && iommu >= 0, "{}", errno());
    let mut bind = [16_u32, 0, u32::try_from(iommu).unwrap(), 0];
    assert_eq!(unsafe { libc::ioctl(device, BIND_IOMMUFD, bind.as_mut_ptr()) }, 0, "{}", errno());
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let there = unsafe { libc::mmap(ptr::null_mut(), 4096, prot, libc::MAP_SHARED, device, 0) };
    assert_ne!(there, libc::MAP_FAILED, "{}", errno());
    there.cast()
}

/// The engine's version, which is what its register at 8 says.
fn version(registers: *mut u8) -> u8 {
    unsafe { registers.add(8).read_volatile() }
}

static CAUGHT: AtomicUsize = AtomicUsize::new(0);

/// Puts a page where there is none.
extern "C" fn put_a_page(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    unsafe {
        let at = (*info).si_addr() as usize & !4095;
        libc::mmap(at as *mut c_void, 4096, prot, flags, -1, 0);
    }
}

/// How a child ends that does `work`.
fn ends(work: impl FnOnce()) -> c_int {
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        work();
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}

#[test]
fn a_program_catches_its_own_faults_beside_mapped_registers() {
    serving("a_program_catches_its_own_faults_beside_mapped_registers", CARD, || {
        // On Rust's stack for signals, which is small.
        let registers = registers();
        assert_eq!(version(registers), 0x33);
        let ask = || {
            let mut now = unsafe { core::mem::zeroed::<libc::sigaction>() };
            assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), &raw mut now) }, 0);
            now
        };
        // Rust's own, for overflows of the stack, was there before.
        let first = ask();
        let mut action = unsafe { core::mem::zeroed::<libc::sigaction>() };
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = put_a_page;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        unsafe { libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR1) };
        let mut old = first;
        assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, &raw mut old) }, 0);
        assert_eq!(old.sa_sigaction, first.sa_sigaction);
        let now = ask();
        assert_eq!(now.sa_sigaction, action.sa_sigaction);
        assert_eq!(unsafe { libc::sigismember(&raw const now.sa_mask, libc::SIGUSR1) }, 1);
        // A page of nothing is the program's affair, registers are the library's.
        let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_NONE);
        let page = unsafe { libc::mmap(ptr::null_mut(), 4096, none, flags, -1, 0) }.cast::<u8>();
        assert_eq!(unsafe { page.read_volatile() }, 0);
        assert_eq!(version(registers), 0x33);
        assert_eq!(CAUGHT.load(Ordering::Relaxed), 1);
        // One that was sent, to a handler of the old kind and to none.
        assert_eq!(unsafe { libc::signal(libc::SIGSEGV, libc::SIG_IGN) }, action.sa_sigaction);
        assert_eq!(unsafe { libc::raise(libc::SIGSEGV) }, 0);
        assert_eq!(version(registers), 0x33);
        assert_eq!(unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) }, libc::SIG_IGN);
        let sent = ends(|| assert_eq!(unsafe { libc::raise(libc::SIGSEGV) }, 0));
        assert_eq!(libc::WTERMSIG(sent), libc::SIGSEGV);
        let faulted = ends(|| _ = unsafe { ptr::without_provenance::<u8>(8).read_volatile() });
        assert_eq!(libc::WTERMSIG(faulted), libc::SIGSEGV);
        assert_eq!(version(registers), 0x33);
    });
}

#[test]
fn a_descriptor_that_did_not_survive_exec_is_explained() {
    const NAME: &str = "a_descriptor_that_did_not_survive_exec_is_explained";
    if env::var_os(INSIDE).is_some() {
        for _ in 0..2 {
            assert_eq!(ioas_alloc(5), Err(libc::ENOTTY));
        }
        return;
    }
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 5<>/dev/iommu; exec \"$@\"", "sh"]).arg(env::current_exe().unwrap());
    shell.args(["--exact", NAME, "--nocapture", "--test-threads=1"]);
    let output = shell.env("LD_PRELOAD", library()).env("RING3_SHIM", "").env(INSIDE, "1").output().unwrap();
    let problems = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(problems.matches("descriptor 5 is of a device").count(), 1, "{problems}");
}

unsafe extern "C" {
    fn daemon(stay: c_int, keep: c_int) -> c_int;
    fn scandir(
        path: *const libc::c_char,
        list: *mut *mut *mut libc::dirent,
        select: Option<extern "C" fn(*const libc::dirent) -> c_int>,
        compare: Option<unsafe extern "C" fn(*mut *const libc::dirent, *mut *const libc::dirent) -> c_int>,
    ) -> c_int;
    fn alphasort(a: *mut *const libc::dirent, b: *mut *const libc::dirent) -> c_int;
}

fn name_of(entry: *const libc::dirent) -> String {
    unsafe { CStr::from_ptr((*entry).d_name.as_ptr()) }.to_str().unwrap().to_owned()
}

/// What `scandir` lists, in its order: names, and what they are.
fn scanned(path: &CStr) -> Vec<(String, u8)> {
    extern "C" fn is_shown(entry: *const libc::dirent) -> c_int {
        c_int::from(!name_of(entry).starts_with('.'))
    }
    let mut list = ptr::null_mut();
    let count = unsafe { scandir(path.as_ptr(), &raw mut list, Some(is_shown), Some(alphasort)) };
    let count = usize::try_from(count).unwrap_or_else(|_| panic!("{path:?}: {}", errno()));
    (0..count)
        .map(|index| unsafe {
            let entry = *list.add(index);
            let found = (name_of(entry), (*entry).d_type);
            libc::free(entry.cast());
            found
        })
        .collect()
}

/// What `readdir` lists until the end.
fn rest_of(stream: *mut libc::DIR) -> Vec<(String, u8)> {
    unsafe { *libc::__errno_location() = 0 };
    let mut entries = Vec::new();
    loop {
        let entry = unsafe { libc::readdir(stream) };
        if entry.is_null() {
            assert_eq!(errno(), 0);
            return entries;
        }
        entries.push((name_of(entry), unsafe { (*entry).d_type }));
    }
}

fn globbed(pattern: &CStr, flags: c_int) -> Vec<String> {
    let mut found = unsafe { core::mem::zeroed::<libc::glob_t>() };
    let result = unsafe { libc::glob(pattern.as_ptr(), flags, None, &raw mut found) };
    if result == libc::GLOB_NOMATCH {
        return Vec::new();
    }
    assert_eq!(result, 0, "{pattern:?}");
    let path = |index| unsafe { CStr::from_ptr(*found.gl_pathv.add(index)) }.to_str().unwrap().to_owned();
    let paths = (0..found.gl_pathc).map(path).collect();
    unsafe { libc::globfree(&raw mut found) };
    paths
}

#[test]
fn directories_list_what_is_served() {
    serving("directories_list_what_is_served", CARD, || {
        let device = |name: &str| (name.to_owned(), libc::DT_CHR);
        let directory = |name: &str| (name.to_owned(), libc::DT_DIR);
        assert_eq!(scanned(c"/dev/vfio"), [device("1000"), directory("devices"), device("vfio")]);
        assert_eq!(scanned(c"/dev/vfio/devices/"), [device("vfio0")]);
        assert!(scanned(c"/sys/bus/pci/devices").contains(&directory("0000:7f:05.0")));
        assert!(scanned(c"/sys/class").contains(&directory("vfio-dev")));
        let dev = scanned(c"/dev");
        for (entry, count) in [(device("iommu"), 1), (directory("vfio"), 1), (device("null"), 1)] {
            assert_eq!(dev.iter().filter(|other| **other == entry).count(), count, "{entry:?} in {dev:?}");
        }
        assert!(dev.is_sorted(), "{dev:?}");

        // However the directory was opened, and as often as it is read.
        let fd = unsafe { libc::openat(open(c"/", libc::O_PATH), c"dev".as_ptr(), libc::O_RDONLY) };
        for stream in unsafe { [libc::opendir(c"/dev/".as_ptr()), libc::fdopendir(fd)] } {
            let mut first = rest_of(stream);
            assert_eq!(rest_of(stream), []);
            unsafe { libc::rewinddir(stream) };
            assert_eq!(rest_of(stream), first);
            assert_eq!(unsafe { libc::closedir(stream) }, 0);
            first.retain(|(name, _)| !name.starts_with('.'));
            first.sort();
            assert_eq!(first, dev);
        }
        // More of them than are kept in mind show what the machine has; those after them show all again.
        let streams: Vec<_> = (0..40).map(|_| unsafe { libc::opendir(c"/dev".as_ptr()) }).collect();
        for stream in streams {
            assert!(rest_of(stream).contains(&device("null")));
            unsafe { libc::closedir(stream) };
        }
        assert_eq!(scanned(c"/dev"), dev);

        let none: [&str; 0] = [];
        assert_eq!(globbed(c"/dev/iomm[u]", 0), ["/dev/iommu"]);
        assert_eq!(globbed(c"/dev/iommu", 0), ["/dev/iommu"]);
        assert_eq!(globbed(c"/dev/vfio/devices/vfio*", 0), ["/dev/vfio/devices/vfio0"]);
        assert_eq!(
            globbed(c"/dev/vf*/*", libc::GLOB_MARK),
            ["/dev/vfio/1000", "/dev/vfio/devices/", "/dev/vfio/vfio"]
        );
        assert_eq!(
            globbed(c"/sys/bus/p[c]i/devices/0000:7f:*/vendor", 0),
            ["/sys/bus/pci/devices/0000:7f:05.0/vendor"]
        );
        assert_eq!(globbed(c"/dev/iommu/*", 0), none);
        assert_eq!(globbed(c"/dev/nul[l]", 0), ["/dev/null"]);
        assert_eq!(unsafe { scandir(c"/dev/iommu".as_ptr(), &mut ptr::null_mut(), None, None) }, -1);
        assert_eq!(errno(), libc::ENOTDIR);
    });
}

/// A process becomes a daemon after it has opened a device, and mapped memory for it: its child goes on with it.
#[test]
fn a_daemon_keeps_what_it_opened() {
    serving("a_daemon_keeps_what_it_opened", "mock-iommu", || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let goes_on = |mut said: std::os::unix::net::UnixStream| {
            let parent = unsafe { libc::getpid() };
            let fd = open(IOMMU, libc::O_RDWR);
            let ioas = ioas_alloc(fd).unwrap();
            let at = unsafe {
                let (prot, flags) =
                    (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(ptr::null_mut(), 8192, prot, flags, -1, 0)
            };
            unsafe { at.cast::<u8>().write(7) };
            ioas_map(fd, ioas, at, 8192).unwrap();
            assert_eq!(unsafe { daemon(1, 1) }, 0, "{}", errno());
            assert_ne!(unsafe { libc::getpid() }, parent);
            // The parent is gone, or is about to be: nobody waits for it.
            assert_eq!(destroy(fd, 77), Err(libc::ENOENT));
            let other = ioas_alloc(fd).unwrap();
            assert_eq!(destroy(fd, other), Ok(()));
            ioas_map(fd, ioas, at, 4096).unwrap();
            assert_eq!(destroy(fd, ioas), Ok(()));
            // And a child of its own uses what it has.
            in_child(|| {
                assert!(ioas_alloc(fd).is_ok());
                0
            });
            unsafe { libc::close(fd) };
            assert_eq!(ioas_alloc(fd), Err(libc::EBADF));
            io::Write::write_all(&mut said, b"it works").unwrap();
        };
        in_child(|| {
            drop(ours.try_clone());
            goes_on(theirs.try_clone().unwrap());
            0
        });
        drop(theirs);
        assert_eq!(io::read_to_string(ours).unwrap(), "it works");
    });
}

/// What another thread has begun does not go on in a child: there the device is gone, as the library says.
#[test]
fn a_daemon_of_several_threads_loses_what_it_opened() {
    serving("a_daemon_of_several_threads_loses_what_it_opened", "", || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        in_child(|| {
            let fd = open(IOMMU, libc::O_RDWR);
            let (release, wait) = std::sync::mpsc::channel::<()>();
            let thread = std::thread::spawn(move || wait.recv());
            // Of a thread that has ended nothing is left.
            let ended = std::thread::spawn(|| ());
            ended.join().unwrap();
            assert_eq!(unsafe { daemon(1, 1) }, 0, "{}", errno());
            let mut answer = ioas_alloc(fd);
            // Until the parent has ended.
            while answer.is_ok() {
                answer = ioas_alloc(fd);
            }
            io::Write::write_all(&mut &theirs, &answer.unwrap_err().to_ne_bytes()).unwrap();
            core::mem::forget((release, thread));
            0
        });
        drop(theirs);
        let mut answer = [0; size_of::<c_int>()];
        io::Read::read_exact(&mut &ours, &mut answer).unwrap();
        assert_eq!(c_int::from_ne_bytes(answer), libc::EIO);
    });
}
