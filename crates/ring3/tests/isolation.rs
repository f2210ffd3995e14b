//! What a confined process can and cannot do. Confinement is for good, so each case is a process of its own: this
//! program again, told by the environment to run only [`child`].
//!
//! The last test runs a guest; it needs a kernel, as `guest_init.rs` does, and says so where there is none.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ring3::kernel;
use ring3::run::isolation::{Inherited, Measures, Use, confine};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

const CASE: &str = "RING3_TEST_CASE";
const ROOT: &str = "RING3_TEST_ROOT";
/// The signal of the kernel for a forbidden system call.
const SIGSYS: i32 = 31;

/// A root to share: a file, a directory, a link.
fn root() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "inside").unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
    dir
}

/// Runs a case of [`child`] in a new process.
fn in_child(case: &str, root: &Path) -> Output {
    command(case, root).output().unwrap()
}

fn command(case: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=2"])
        .env(CASE, case)
        .env(ROOT, root)
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// The case ran to its end, with no assertion failed.
fn passes(case: &str) {
    let root = root();
    let output = in_child(case, root.path());
    assert!(output.status.success(), "{case}: {output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{case}: {output:?}");
}

/// The process was ended by the filter.
fn is_killed(case: &str) {
    let root = root();
    let output = in_child(case, root.path());
    assert_eq!(output.status.signal(), Some(SIGSYS), "{case}: {output:?}");
}

#[test]
#[ignore = "the process that the other tests start"]
fn child() {
    let (Some(case), Some(root)) = (std::env::var_os(CASE), std::env::var_os(ROOT)) else { return };
    let root = PathBuf::from(root);
    // Before the case opens what it goes on to use.
    let inherited = Inherited::find();
    match case.to_str().unwrap() {
        "a run's work" => a_runs_work(inherited, &root),
        "files" => files(inherited, &root),
        "files, by Landlock alone" => files_by_landlock(inherited, &root),
        "no Landlock" => without_landlock(inherited, &root),
        "privileges" => privileges(inherited, &root),
        "descriptors" => {
            let _confined = confine(inherited, Some(&root), Use::Nothing);
            println!("confined");
            io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        "new process" => {
            sealed(inherited, &root);
            assert_eq!(os_error(Command::new("/bin/true").spawn()), Errno::NOSYS);
        }
        "exec" => {
            sealed(inherited, &root);
            panic!("{}", Command::new("/bin/true").exec());
        }
        "connect" => {
            sealed(inherited, &root);
            panic!("{:?}", TcpStream::connect("127.0.0.1:1"));
        }
        "network" => network(inherited, &root),
        "listen" => {
            let listener = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            let _ = confine(inherited, Some(&root), Use::Sockets).seal();
            panic!("{:?}", rustix::net::listen(&listener, 1));
        }
        "unlink" => {
            sealed(inherited, &root);
            panic!("{:?}", fs::remove_file(root.join("file")));
        }
        "in an older thread" => {
            let (go, wait) = mpsc::channel::<()>();
            let confined = confine(inherited, Some(&root), Use::Nothing);
            let thread = thread::spawn(move || {
                wait.recv().unwrap();
                TcpStream::connect("127.0.0.1:1")
            });
            let _ = confined.seal();
            go.send(()).unwrap();
            panic!("{:?}", thread.join().unwrap());
        }
        other => panic!("{other}"),
    }
}

fn sealed(inherited: Inherited, root: &Path) -> Measures {
    let measures = confine(inherited, Some(root), Use::Nothing).seal();
    assert!(measures.to_string().ends_with(", seccomp"), "{measures}");
    measures
}

fn os_error<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.unwrap_err()).unwrap()
}

/// What the machine, its devices and the session do while a guest runs.
fn a_runs_work(inherited: Inherited, root: &Path) {
    let mut disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let mut status = File::open("/proc/self/status").unwrap();
    sealed(inherited, root);

    // The shared root.
    assert_eq!(fs::read_to_string(root.join("link")).unwrap(), "inside");
    let link = rustix::fs::readlinkat(rustix::fs::CWD, root.join("link"), Vec::new()).unwrap();
    assert_eq!(link.as_bytes(), b"file");
    assert_eq!(fs::read_dir(root).unwrap().count(), 3);
    rustix::fs::fstatfs(File::open(root).unwrap()).unwrap();
    // A disk.
    disk.write_all_at(b"sector", 512).unwrap();
    disk.sync_data().unwrap();
    let mut buffer = [0; 6];
    disk.try_clone().unwrap().read_exact_at(&mut buffer, 512).unwrap();
    assert_eq!(&buffer, b"sector");
    disk.flush().unwrap();
    // Memory as the machine makes it.
    let memory = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    // Threads, large allocations in them, locks and clocks, a panic that is caught.
    let (to, from) = mpsc::channel();
    let thread = thread::Builder::new().name("virtio-test".into()).spawn(move || {
        let bytes = vec![1_u8; 64 << 20];
        thread::sleep(Duration::from_millis(1));
        to.send(bytes.iter().map(|&b| u64::from(b)).sum::<u64>()).unwrap();
    });
    assert_eq!(from.recv_timeout(Duration::from_secs(60)).unwrap(), 64 << 20);
    thread.unwrap().join().unwrap();
    assert!(thread::spawn(|| panic!("as expected")).join().is_err());
    // Events and our own sockets.
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let data = rustix::event::epoll::EventData::new_u64(1);
    rustix::event::epoll::add(&epoll, &theirs, data, rustix::event::epoll::EventFlags::IN).unwrap();
    ours.write_all(b"line\n").unwrap();
    let mut events = Vec::with_capacity(1);
    rustix::event::epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None).unwrap();
    theirs.read_exact(&mut [0; 5]).unwrap();
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    // Entropy, limits, the last report.
    assert_eq!(HashMap::from([(1, 2)]).get(&1), Some(&2));
    rustix::rand::getrandom(&mut [0_u8; 8][..], rustix::rand::GetRandomFlags::empty()).unwrap();
    let _ = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    assert!(text.contains("VmHWM:"));
}

/// Whether this kernel has Landlock, by what a child says of it.
fn has_landlock(measures: &Measures) -> bool {
    measures.to_string().contains(", Landlock ABI")
}

fn files(inherited: Inherited, root: &Path) {
    let mut inside = File::open(root.join("file")).unwrap();
    let measures = sealed(inherited, root);
    let write = |path: &Path| os_error(File::options().write(true).open(path));
    assert_eq!(write(&root.join("file")), Errno::NOSYS);
    assert_eq!(write(Path::new("/dev/null")), Errno::NOSYS);
    assert_eq!(os_error(File::create(root.join("new"))), Errno::NOSYS);
    assert_eq!(os_error(fs::create_dir(root.join("new"))), Errno::NOSYS);
    assert_eq!(os_error(inside.write(b"x")), Errno::BADF);
    if has_landlock(&measures) {
        for path in ["/etc/passwd", "/proc/self/maps", "/proc/self/mem"] {
            assert_eq!(os_error(File::open(path)), Errno::ACCESS, "{path}");
        }
        assert_eq!(os_error(fs::read_dir("/")), Errno::ACCESS);
    }
    inside.read_to_string(&mut String::new()).unwrap();
}

fn files_by_landlock(inherited: Inherited, root: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let measures = confine(inherited, Some(root), Use::Nothing);
    let text = format!("{measures:?}");
    if !text.contains("Landlock ABI") {
        eprintln!("SKIPPED: no Landlock in this kernel");
        return;
    }
    assert_eq!(os_error(File::options().write(true).open(root.join("file"))), Errno::ACCESS);
    assert_eq!(os_error(File::create(root.join("new"))), Errno::ACCESS);
    assert_eq!(os_error(fs::remove_file(root.join("file"))), Errno::ACCESS);
    assert_eq!(os_error(File::open("/etc/passwd")), Errno::ACCESS);
    assert_eq!(os_error(Command::new("/bin/true").spawn()), Errno::ACCESS);
    File::open(root.join("file")).unwrap();
    // From ABI 4 on.
    if !["1", "2", "3"].iter().any(|old| text.contains(&format!("ABI {old}\""))) {
        assert_eq!(os_error(TcpStream::connect(listener.local_addr().unwrap())), Errno::ACCESS);
        assert_eq!(os_error(TcpListener::bind("127.0.0.1:0")), Errno::ACCESS);
    }
}

/// As in a container whose own filter knows no Landlock: the other measures still hold.
fn without_landlock(inherited: Inherited, root: &Path) {
    let calls =
        [libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule, libc::SYS_landlock_restrict_self];
    let rules: BTreeMap<i64, _> = calls.into_iter().map(|call| (call, vec![])).collect();
    let refuse = SeccompAction::Errno(Errno::PERM.raw_os_error().unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
    let confined = confine(inherited, Some(root), Use::Nothing);
    assert!(format!("{confined:?}").contains("no Landlock"), "{confined:?}");
    File::open("/etc/passwd").unwrap();
    let measures = confined.seal().to_string();
    assert!(measures.contains("no_new_privs") && measures.ends_with(", seccomp"), "{measures}");
}

/// What the guest's network does, and what it does not.
fn network(inherited: Inherited, root: &Path) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let measures = confine(inherited, Some(root), Use::Sockets).seal();
    assert!(measures.to_string().ends_with(", seccomp"), "{measures}");
    let mut there = TcpStream::connect(address).unwrap();
    let (mut here, _) = listener.accept().unwrap();
    there.write_all(b"through").unwrap();
    here.read_exact(&mut [0; 7]).unwrap();
    there.set_nodelay(true).unwrap();
    let (one, other) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    one.connect(other.local_addr().unwrap()).unwrap();
    one.send(b"datagram").unwrap();
    assert_eq!(other.recv(&mut [0; 20]).unwrap(), 8);
    // Other kinds and families of sockets are as unknown as in a kernel without them.
    let kinds = [
        (AddressFamily::INET, SocketType::RAW),
        (AddressFamily::PACKET, SocketType::RAW),
        (AddressFamily::NETLINK, SocketType::RAW),
        (AddressFamily::UNIX, SocketType::STREAM),
        (AddressFamily::VSOCK, SocketType::STREAM),
    ];
    for (family, kind) in kinds {
        assert_eq!(rustix::net::socket(family, kind, None).unwrap_err(), Errno::NOSYS, "{family:?}");
    }
    // From Landlock's ABI 4 on, no port of TCP can be had.
    let text = measures.to_string();
    if has_landlock(&measures) && !["1", "2", "3"].iter().any(|old| text.contains(&format!("ABI {old},"))) {
        assert_eq!(os_error(TcpListener::bind("127.0.0.1:0")), Errno::ACCESS);
    }
}

fn privileges(inherited: Inherited, root: &Path) {
    let mut status = File::open("/proc/thread-self/status").unwrap();
    let confined = confine(inherited, Some(root), Use::Nothing);
    let dumpable = rustix::process::dumpable_behavior().unwrap();
    assert_eq!(dumpable, rustix::process::DumpableBehavior::NotDumpable);
    let _ = confined.seal();
    let mut text = String::new();
    status.read_to_string(&mut text).unwrap();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()));
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        let set = u64::from_str_radix(&field(set), 16).unwrap();
        assert_eq!(set & !rustix::thread::CapabilitySet::DAC_READ_SEARCH.bits(), 0);
    }
}

#[test]
fn a_run_can_do_its_work() {
    passes("a run's work");
}

#[test]
fn files_outside_the_root_and_all_writing_are_out_of_reach() {
    passes("files");
    passes("files, by Landlock alone");
}

#[test]
fn a_measure_that_the_host_refuses_leaves_the_others() {
    passes("no Landlock");
}

#[test]
fn privileges_are_gone() {
    passes("privileges");
}

#[test]
fn a_guest_with_a_network_has_sockets_of_the_internet_alone() {
    passes("network");
    is_killed("listen");
}

#[test]
fn no_process_is_made() {
    passes("new process");
}

#[test]
fn what_only_an_intruder_does_ends_the_process() {
    for case in ["exec", "connect", "unlink", "in an older thread"] {
        is_killed(case);
    }
}

#[test]
fn descriptors_of_the_parent_are_closed() {
    let root = root();
    let (mut reader, writer) = io::pipe().unwrap();
    fcntl_setfd(&writer, FdFlags::empty()).unwrap();
    let mut child = command("descriptors", root.path()).stdin(Stdio::piped()).spawn().unwrap();
    fcntl_setfd(&writer, FdFlags::CLOEXEC).unwrap();
    drop(writer);
    // The end of file comes while the child lives: it waits for us.
    reader.read_to_end(&mut Vec::new()).unwrap();
    assert!(child.try_wait().unwrap().is_none());
    drop(child.stdin.take());
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn a_guest_runs_in_a_confined_process() {
    let kernel = match std::env::var_os("RING3_TEST_KERNEL").map(PathBuf::from) {
        Some(file) => Some(kernel::choose(Some(&file)).unwrap()),
        None => kernel::installed().unwrap_or_default(),
    };
    let Some(kernel) = kernel else {
        eprintln!("SKIPPED: no kernel: set RING3_TEST_KERNEL, or run `ring3 kernel fetch`");
        return;
    };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let script = "ls /; echo disk > /dev/vda && sync && seq 100000 | tail -1";
    let output = Command::new(env!("CARGO_BIN_EXE_ring3"))
        .args(["run", "-v", "--stats", "--cpus", "2", "--timeout", "5m", "--kernel"])
        .arg(&kernel.image)
        .arg("--disk")
        .arg(disk.path())
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.starts_with("bin\n") && stdout.ends_with("\n100000\n"), "{stdout}");
    assert!(fs::read(disk.path()).unwrap().starts_with(b"disk\n"));
    for line in ["ring3: isolation: no_new_privs", "isolation      ", "host memory at peak"] {
        assert!(stderr.contains(line), "{line:?} in\n{stderr}");
    }
}
