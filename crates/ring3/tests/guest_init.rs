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
use guest_init::spec::{Root, Spec, ports};
use ring3::initramfs::{self, ModuleTree};

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
    let Some(image) = std::env::var_os("RING3_TEST_KERNEL").map(PathBuf::from) else {
        eprintln!("SKIPPED: RING3_TEST_KERNEL is not set");
        return None;
    };
    let release = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
    let modules = image.parent()?.parent()?.join("lib/modules").join(release);
    Some(TestKernel { image, modules: ModuleTree::open(&modules).unwrap() })
}

struct Guest {
    qemu: Child,
    virtiofsd: Option<Child>,
    dir: tempfile::TempDir,
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
            for program in ["sh", "cat", "head", "wc", "seq", "sleep", "stat", "tty", "stty", "id"] {
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
            .args(["-chardev", &format!("file,id=hvc,path={}", dir.path().join("hvc").display())])
            .args(["-device", "virtconsole,chardev=hvc"])
            .args(extra);
        let virtiofsd = (spec.root == Root::Virtiofs).then(|| share_root(&mut command, dir.path()));
        let mut listeners = Vec::new();
        for name in [ports::STDIN, ports::STDOUT, ports::STDERR, ports::CONTROL] {
            let path = dir.path().join(name);
            listeners.push(UnixListener::bind(&path).unwrap());
            command
                .args(["-chardev", &format!("socket,id={name},path={}", path.display())])
                .args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        let qemu = command.stdin(Stdio::null()).spawn().unwrap();
        let mut ends = listeners.iter().map(|listener| listener.accept().unwrap().0);
        let mut end = || ends.next().unwrap();
        let (stdin, stdout, stderr, control) = (Some(end()), end(), end(), BufReader::new(end()));
        Self { qemu, virtiofsd, dir, control, stdin, stdout, stderr }
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
