//! The guest's first process, booted by QEMU's TCG: no part of ring3's own machine takes part.
//!
//! Needs `qemu-system-x86_64` and a kernel: `RING3_TEST_KERNEL` (with its modules where `ring3 run --kernel`
//! would look), else what `ring3 run` would choose without fetching. Where one is missing, the tests say so
//! and pass.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use guest_init::control::{FromGuest, ToGuest};
use guest_init::spec::{Root, Spec, Stream, ports};
use ring3::initramfs::{self, ModuleTree};
use ring3::kernel::{self, Kernel};

const QEMU: &str = "qemu-system-x86_64";

struct TestKernel {
    image: PathBuf,
    modules: ModuleTree,
}

/// `None`, and a line on standard error, when this host cannot run the test.
fn test_kernel() -> Option<TestKernel> {
    if Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("SKIPPED: no {QEMU}");
        return None;
    }
    let kernel = match std::env::var_os("RING3_TEST_KERNEL").map(PathBuf::from) {
        Some(file) => Some(kernel::choose(Some(&file)).unwrap()),
        None => kernel::installed().unwrap_or_default(),
    };
    let Some(Kernel { image, modules: Some(modules), .. }) = kernel else {
        eprintln!("SKIPPED: no kernel with modules: set RING3_TEST_KERNEL, or run `ring3 kernel fetch`");
        return None;
    };
    Some(TestKernel { image, modules: ModuleTree::open(&modules).unwrap() })
}

struct Guest {
    qemu: Child,
    virtiofsd: Option<Child>,
    dir: tempfile::TempDir,
    terminal: UnixStream,
    control: BufReader<UnixStream>,
    stdin: Option<UnixStream>,
    stdout: UnixStream,
    stderr: UnixStream,
}

struct Ended {
    messages: Vec<FromGuest>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    console: String,
}

impl Guest {
    fn boot(kernel: &TestKernel, spec: &Spec, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let modules = kernel
            .modules
            .load(&["virtio_pci", "virtio_console"], &["virtiofs", "overlay", "virtio_rng"])
            .unwrap();
        let mut archive = initramfs::build(spec, &modules).unwrap();
        if spec.root == Root::Initramfs {
            for program in ["sh", "cat", "wc", "sleep", "tty", "stty"] {
                add_program(&mut archive, program);
            }
        }
        let initrd = dir.path().join("initrd");
        fs::write(&initrd, archive.finish()).unwrap();
        let mut command = Command::new(QEMU);
        command
            .args([
                "-machine",
                "q35,memory-backend=ram",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "512M",
                "-smp",
                "1",
            ])
            .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on"])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", &append()])
            .arg("-serial")
            .arg(format!("file:{}", dir.path().join("serial").display()))
            .args(["-device", "virtio-serial-pci"])
            .args(extra);
        let virtiofsd = (spec.root == Root::Virtiofs).then(|| share_root(&mut command, dir.path()));
        let mut listeners = Vec::new();
        for name in ["terminal", ports::STDIN, ports::STDOUT, ports::STDERR, ports::CONTROL] {
            let path = dir.path().join(name);
            listeners.push(UnixListener::bind(&path).unwrap());
            command.args(["-chardev", &format!("socket,id={name},path={}", path.display())]).args([
                "-device",
                &match name {
                    "terminal" => format!("virtconsole,chardev={name}"),
                    _ => format!("virtserialport,chardev={name},name={name}"),
                },
            ]);
        }
        let qemu = command.stdin(Stdio::null()).spawn().unwrap();
        let mut ends = listeners.iter().map(|listener| listener.accept().unwrap().0);
        let mut end = || ends.next().unwrap();
        let (terminal, stdin) = (end(), Some(end()));
        let (stdout, stderr, control) = (end(), end(), BufReader::new(end()));
        Self { qemu, terminal, virtiofsd, dir, control, stdin, stdout, stderr }
    }

    /// Reads messages until one that is not a stage.
    fn next_message(&mut self) -> Option<FromGuest> {
        loop {
            let mut line = String::new();
            if self.control.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match FromGuest::parse(line.trim_end()).unwrap_or_else(|| panic!("bad line {line:?}")) {
                FromGuest::Stage(_) => {}
                message => return Some(message),
            }
        }
    }

    fn send(&mut self, message: ToGuest) {
        self.control.get_mut().write_all(format!("{message}\n").as_bytes()).unwrap();
    }

    /// Sends `input`, then waits for the end.
    fn finish(mut self, input: &[u8]) -> Ended {
        let mut stdin = self.stdin.take();
        let (mut stdout, mut stderr) = (self.stdout.try_clone().unwrap(), self.stderr.try_clone().unwrap());
        let mut ended = Ended { messages: vec![], stdout: vec![], stderr: vec![], console: String::new() };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The command may end without reading all. Only half is closed: QEMU drops what it has not read
                // yet when the whole socket is.
                if let Some(stdin) = &mut stdin {
                    let _ = stdin.write_all(input);
                    let _ = stdin.shutdown(std::net::Shutdown::Write);
                }
            });
            let out = scope.spawn(move || read_all(&mut stdout));
            let err = scope.spawn(move || read_all(&mut stderr));
            while let Some(message) = self.next_message() {
                ended.messages.push(message);
            }
            ended.stdout = out.join().unwrap();
            ended.stderr = err.join().unwrap();
        });
        assert!(self.qemu.wait().unwrap().success());
        if let Some(mut virtiofsd) = self.virtiofsd.take() {
            // It ends when QEMU hangs up.
            virtiofsd.wait().unwrap();
        }
        ended.console = read_text(&self.dir.path().join("serial"));
        ended
    }
}

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Starts a virtiofsd for the host's root and adds its device to the command.
fn share_root(command: &mut Command, dir: &Path) -> Child {
    let path = dir.join("fs");
    let socket = UnixListener::bind(&path).unwrap();
    // The daemon inherits the listening socket: it exists before QEMU looks for it.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).unwrap();
    let daemon = Command::new(VIRTIOFSD)
        .arg(format!("--fd={}", std::os::fd::AsRawFd::as_raw_fd(&socket)))
        .args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "no_posix_lock", "-f"])
        .stdin(Stdio::null())
        .stderr(fs::File::create(dir.join("virtiofsd")).unwrap())
        .spawn()
        .unwrap();
    command
        .args(["-chardev", &format!("socket,id=fs,path={}", path.display())])
        .args(["-device", "vhost-user-fs-pci,chardev=fs,tag=ring3root"]);
    daemon
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn append() -> String {
    let extra = std::env::var("RING3_TEST_APPEND").unwrap_or_default();
    format!("console=ttyS0 panic=-1 random.trust_cpu=on tsc=reliable no_timer_check mitigations=off {extra}")
}

/// Puts a program of the host and the libraries that it needs into the archive.
fn add_program(archive: &mut initramfs::Archive, name: &str) {
    let path = ["/bin", "/usr/bin"].iter().map(|dir| Path::new(dir).join(name)).find(|p| p.exists()).unwrap();
    let libraries = Command::new("ldd").arg(&path).output().unwrap();
    for library in
        String::from_utf8(libraries.stdout).unwrap().split_whitespace().filter(|w| w.starts_with('/'))
    {
        archive.file_once(library, 0o755, || fs::read(library).unwrap());
    }
    archive.file_once(Path::new("/bin").join(name), 0o755, || fs::read(&path).unwrap());
}

/// Reads a stream up to the end of its next line.
fn line(mut stream: &UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8_lossy(&line).into_owned()
}

fn shell(script: &str) -> Spec {
    Spec {
        argv: ["sh", "-c", script].map(Into::into).to_vec(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("GREETING".into(), "a b".into())],
        workdir: "/".into(),
        hostname: "ring3".into(),
        root: Root::Initramfs,
        ..Spec::default()
    }
}

#[test]
fn streams_environment_and_status() {
    let Some(kernel) = test_kernel() else { return };
    let script = "echo out $GREETING; echo err >&2; cat | wc -c; echo again > /dev/stderr; exit 7";
    let ended = Guest::boot(&kernel, &shell(script), &[]).finish(&[b'x'; 300_000]);
    assert_eq!(ended.messages, [FromGuest::Ready, FromGuest::Exit(7)], "{}", ended.console);
    assert_eq!(String::from_utf8_lossy(&ended.stdout), "out a b\n300000\n");
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "err\nagain\n");
}

#[test]
fn the_hosts_root_is_under_an_overlay() {
    let Some(kernel) = test_kernel() else { return };
    if !Path::new(VIRTIOFSD).exists() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: no {VIRTIOFSD}, or not root, which it needs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("old"), "host").unwrap();
    let script = "pwd; cat old; echo guest > old; echo guest > new; cat old new; ls /dev/fd/0 /run; hostname; \
                  grep -c . /proc/mounts >/dev/null && stat -f -c %T /; cat /sys/class/net/lo/flags; kill -9 $$";
    let spec =
        Spec { root: Root::Virtiofs, workdir: dir.path().into(), workdir_required: true, ..shell(script) };
    let ended = Guest::boot(&kernel, &spec, &[]).finish(b"");
    assert_eq!(ended.messages, [FromGuest::Ready, FromGuest::Signal(9)], "{}", ended.console);
    let expected =
        format!("{}\nhostguest\nguest\n/dev/fd/0\n\n/run:\nring3\noverlayfs\n0x9\n", dir.path().display());
    assert_eq!(
        String::from_utf8_lossy(&ended.stdout),
        expected,
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert_eq!(fs::read_to_string(dir.path().join("old")).unwrap(), "host");
    assert!(!dir.path().join("new").exists());
}

#[test]
fn a_command_that_cannot_run_is_told_apart() {
    let Some(kernel) = test_kernel() else { return };
    for (command, status, words) in
        [("nosuch", 127, "nosuch: command not found"), ("/dev/null", 126, "denied")]
    {
        let spec = Spec { argv: vec![command.into()], ..shell("") };
        let ended = Guest::boot(&kernel, &spec, &[]).finish(b"");
        match ended.messages.as_slice() {
            [FromGuest::Ready, FromGuest::NotRun(code, why)] if *code == status && why.contains(words) => {}
            other => panic!("{other:?}: {}", ended.console),
        }
    }
}

#[test]
fn a_terminal_has_size_echo_and_signals() {
    let Some(kernel) = test_kernel() else { return };
    let script = "tty; stty size; read x; echo got $x; trap 'echo int' INT; trap 'stty size; exit 5' WINCH; \
                  echo set; while :; do sleep 0.1; done";
    let spec = Spec { streams: [Stream::Terminal; 3], winsize: Some((30, 100)), ..shell(script) };
    let mut guest = Guest::boot(&kernel, &spec, &[]);
    assert_eq!(guest.next_message(), Some(FromGuest::Ready));
    assert_eq!(line(&guest.terminal), "/dev/hvc0\r\n");
    assert_eq!(line(&guest.terminal), "30 100\r\n");
    guest.terminal.write_all(b"hello\r").unwrap();
    assert_eq!(line(&guest.terminal), "hello\r\n");
    assert_eq!(line(&guest.terminal), "got hello\r\n");
    assert_eq!(line(&guest.terminal), "set\r\n");
    guest.terminal.write_all(b"\x03").unwrap();
    assert_eq!(line(&guest.terminal), "^Cint\r\n");
    guest.send(ToGuest::Winsize(40, 120));
    assert_eq!(line(&guest.terminal), "40 120\r\n");
    assert_eq!(guest.finish(b"").messages, [FromGuest::Exit(5)]);
}

#[test]
fn signals_reach_the_commands_group() {
    let Some(kernel) = test_kernel() else { return };
    let script = "trap 'echo caught; exit 3' USR1; echo set; while :; do sleep 0.1; done";
    let mut guest = Guest::boot(&kernel, &shell(script), &[]);
    assert_eq!(line(&guest.stdout), "set\n");
    guest.send(ToGuest::Signal(10));
    let ended = guest.finish(b"");
    assert_eq!(String::from_utf8_lossy(&ended.stdout), "caught\n");
    assert_eq!(ended.messages, [FromGuest::Ready, FromGuest::Exit(3)]);
}

#[test]
fn a_closed_output_is_a_broken_pipe() {
    let Some(kernel) = test_kernel() else { return };
    let guest = Guest::boot(&kernel, &shell("while :; do echo y; done"), &[]);
    assert_eq!(line(&guest.stdout), "y\n");
    guest.stdout.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(guest.finish(b"").messages, [FromGuest::Ready, FromGuest::Signal(13)]);
}

#[test]
fn megabytes_pass_unchanged_and_errors_keep_their_place() {
    let Some(kernel) = test_kernel() else { return };
    let mut input: Vec<u8> =
        (0..1_000_000_u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let spec = Spec {
        streams: [Stream::Port, Stream::Port, Stream::Stdout],
        ..shell("cat; echo a; echo b >&2; echo c; exec 0<&-; sleep 100 & exit 0")
    };
    let ended = Guest::boot(&kernel, &spec, &[]).finish(&input);
    input.extend(b"a\nb\nc\n");
    assert_eq!(ended.messages, [FromGuest::Ready, FromGuest::Exit(0)], "{}", ended.console);
    assert_eq!(ended.stdout.len(), input.len());
    assert!(ended.stdout == input);
}
