//! Signals to ring3 itself. They are the whole process's: this file holds one test.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clap::Parser;
use ring3::cli::{Cli, Task};
use ring3::run::run;
use ring3::run::spec::{Outcome, VmSpec};
use rustix::process::{Signal, getpid, kill_process};

#[test]
fn the_first_signal_is_the_commands_the_second_stops_the_machine() {
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(b"\x7fELF Linux version 0.0-test x virtio-pci virtio_console virtiofs overlay").unwrap();
    let Task::Run(args) =
        Cli::parse_from(["ring3", "run", "--isolation=off", "--kernel", kernel.path().to_str().unwrap()])
            .command
    else {
        panic!()
    };
    let status = run(&args, |vm: VmSpec| {
        let mut control = UnixStream::from(vm.ports.unwrap().control);
        control.write_all(b"ready\n").unwrap();
        // Whether ring3 knows yet that the command runs shows only in what it does with a harmless signal.
        control.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut lines = BufReader::new(control.try_clone().unwrap());
        let mut line = String::new();
        while line.is_empty() {
            kill_process(getpid(), Signal::USR1).unwrap();
            let _ = lines.read_line(&mut line);
        }
        control.set_read_timeout(None).unwrap();
        kill_process(getpid(), Signal::INT).unwrap();
        while line == "signal 10\n" {
            line.clear();
            lines.read_line(&mut line).unwrap();
        }
        assert_eq!(line, "signal 2\n");
        kill_process(getpid(), Signal::TERM).unwrap();
        File::from(vm.stop).read_exact(&mut [0; 8]).unwrap();
        Ok(Outcome::Interrupted)
    });
    assert_eq!(status.unwrap(), 128 + 15);
}
