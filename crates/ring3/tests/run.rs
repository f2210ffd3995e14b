//! The host's side of a run, with a machine played by the test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::fs::File;
use std::io::{Read, Write};

use clap::Parser;
use guest_init::control::FromGuest;
use ring3::cli::{Cli, RunArgs, Task};
use ring3::run::spec::{Outcome, VmSpec};
use ring3::run::vm::VmError;
use ring3::run::{RunError, run};

/// A file that looks like a kernel with every driver built in.
fn kernel() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"\x7fELF Linux version 0.0-test x virtio-pci virtio_console virtiofs overlay virtio_blk")
        .unwrap();
    file
}

fn args(kernel: &tempfile::NamedTempFile, more: &[&str]) -> RunArgs {
    let mut words = vec!["ring3", "run", "--isolation=off", "--kernel", kernel.path().to_str().unwrap()];
    words.extend(more);
    match Cli::parse_from(words).command {
        Task::Run(args) => *args,
        other => panic!("{other:?}"),
    }
}

/// Runs with a guest that says these messages and then ends so.
fn play(
    more: &[&str],
    messages: Vec<FromGuest>,
    console: &'static str,
    outcome: Outcome,
) -> Result<u8, RunError> {
    let kernel = kernel();
    run(&args(&kernel, more), move |vm: VmSpec| {
        let mut control = File::from(vm.ports.unwrap().control);
        for message in messages {
            control.write_all(format!("{message}\n").as_bytes()).unwrap();
        }
        File::from(vm.serial.output).write_all(console.as_bytes()).unwrap();
        Ok(outcome)
    })
}

#[test]
fn the_commands_status_is_ours() {
    for (message, status) in [
        (FromGuest::Exit(0), 0),
        (FromGuest::Exit(7), 7),
        (FromGuest::Signal(9), 137),
        (FromGuest::NotRun(127, "x: command not found".into()), 127),
    ] {
        let messages = vec![FromGuest::Stage("init".into()), FromGuest::Ready, message];
        assert_eq!(play(&["--", "x"], messages, "", Outcome::PowerOff).unwrap(), status);
    }
}

#[test]
fn the_first_report_counts() {
    let messages = vec![FromGuest::Ready, FromGuest::Exit(3), FromGuest::Exit(0)];
    assert_eq!(play(&[], messages, "", Outcome::PowerOff).unwrap(), 3);
}

#[test]
fn a_guest_that_dies_is_an_error_with_its_last_words() {
    for (outcome, console, words) in [
        (Outcome::PowerOff, "one\ntwo\n", "powered off"),
        (Outcome::Reset, "one\ntwo\n", "reset itself"),
        (Outcome::Reset, "Kernel panic - not syncing: two\n", "kernel panicked"),
        (Outcome::Panic { console: vec![] }, "one\ntwo\n", "kernel panicked"),
        (Outcome::TripleFault(None), "one\ntwo\n", "triple fault"),
    ] {
        let error = play(&[], vec![FromGuest::Ready], console, outcome).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("two"), "{error}");
    }
    let failed = vec![FromGuest::Failed("no \x1b[2Jroot".into())];
    let error = play(&[], failed, "", Outcome::PowerOff).unwrap_err().to_string();
    assert!(error.contains("no [2Jroot"), "{error}");
}

#[test]
fn a_guest_that_talks_nonsense_is_stopped() {
    let kernel = kernel();
    let error = run(&args(&kernel, &[]), |vm: VmSpec| {
        File::from(vm.ports.unwrap().control).write_all(b"rm -rf /\n").unwrap();
        // The machine runs until it is told to stop.
        File::from(vm.stop).read_exact(&mut [0; 8]).unwrap();
        Ok(Outcome::Interrupted)
    });
    assert!(error.unwrap_err().to_string().contains("rm -rf"));
}

#[test]
fn a_timeout_asks_the_command_first() {
    let kernel = kernel();
    let status = run(&args(&kernel, &["--timeout", "0.2"]), |vm: VmSpec| {
        let mut control = File::from(vm.ports.unwrap().control);
        control.write_all(b"ready\n").unwrap();
        let mut line = [0; 10];
        control.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"signal 15\n");
        control.write_all(b"signal 15\n").unwrap();
        Ok(Outcome::PowerOff)
    });
    assert_eq!(status.unwrap(), 124);
}

#[test]
fn a_timeout_while_booting_stops_the_machine() {
    let kernel = kernel();
    let status = run(&args(&kernel, &["--timeout", "0.1"]), |vm: VmSpec| {
        File::from(vm.stop).read_exact(&mut [0; 8]).unwrap();
        Ok(Outcome::Interrupted)
    });
    assert_eq!(status.unwrap(), 124);
}

#[test]
fn a_machine_that_cannot_start_says_why() {
    let kernel = kernel();
    let error =
        run(&args(&kernel, &[]), |vm: VmSpec| Err(VmError::Thread(std::io::Error::other(vm.engine.name()))));
    assert!(matches!(error, Err(RunError::Vm(VmError::Thread(_)))));
}

#[test]
fn the_machine_is_told_what_the_user_said() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(4096).unwrap();
    let disk_option = format!("{}:ro", disk.path().display());
    let kernel = kernel();
    let options =
        ["--cpus", "2", "--memory", "1G", "--disk", &disk_option, "--append", "a=b", "--timeout", "60"];
    let path = disk.path().to_owned();
    let status = run(&args(&kernel, &options), move |vm: VmSpec| {
        assert_eq!((vm.cpus, vm.memory), (2, 1 << 30));
        assert!(vm.disks[0].readonly && vm.disks[0].path == path);
        assert!(vm.command_line.ends_with("quiet a=b"), "{}", vm.command_line);
        assert_eq!(vm.shared_root.as_deref(), Some("/".as_ref()));
        assert!(vm.initramfs.unwrap().starts_with(b"070701"));
        File::from(vm.ports.unwrap().control).write_all(b"ready\nexit 0\n").unwrap();
        Ok(Outcome::PowerOff)
    });
    assert_eq!(status.unwrap(), 0);
}
