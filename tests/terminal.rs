//! `ring3 run` on a terminal: size, echo, keys that make signals, and the terminal's state afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use support::kernels::kernels;
use support::process::{Output, PATIENCE, Running, run};

/// A terminal: the side of the person before it, and the side of the programs.
fn terminal() -> (OwnedFd, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (ours, theirs)
}

fn resize(terminal: &OwnedFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn a_terminal_is_a_terminal_in_the_guest() {
    let Some(kernels) = kernels() else { return };
    let (ours, theirs) = terminal();
    resize(&ours, 41, 123);
    let before = format!("{:?}", tcgetattr(&theirs).unwrap());
    let job = "
        trap 'echo interrupted' INT; trap 'stty size' WINCH
        test -t 0 && test -t 1 && test -t 2 && stty size && echo TERM=$TERM ready
        while ! read word; do :; done; echo got=$word
        stty -echo; echo hide; read hidden; echo hidden=$hidden
        exit 5";
    let mut command = run(kernels.newer(), &[], &["sh", "-c", job]);
    command.env("TERM", "vt220");
    let running = Running::boot_on_terminal(command, &theirs);
    let mut keys = File::from(ours.try_clone().unwrap());
    let mut screen = Output::new(ours.try_clone().unwrap());

    assert!(screen.wait_for("ready\r\n").contains("41 123\r\nTERM=vt220"));
    let during = tcgetattr(&theirs).unwrap().local_modes;
    assert!(!during.intersects(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO), "{during:?}");
    keys.write_all(b"\x03").unwrap();
    screen.wait_for("interrupted\r\n");
    resize(&ours, 50, 132);
    running.signal(Signal::WINCH);
    screen.wait_for("50 132\r\n");
    keys.write_all(b"word\r").unwrap();
    assert!(screen.wait_for("got=word\r\n").contains("word\r\n"), "the guest's terminal echoes");
    screen.wait_for("hide\r\n");
    keys.write_all(b"secret\r").unwrap();
    assert!(!screen.wait_for("hidden=").contains("secret"), "the guest's terminal does not echo");
    running.finish(PATIENCE).expect(5);
    assert_eq!(format!("{:?}", tcgetattr(&theirs).unwrap()), before);
}

#[test]
fn keys_reach_the_command_and_a_killed_run_restores_the_terminal() {
    let Some(kernels) = kernels() else { return };
    let (ours, theirs) = terminal();
    let before = format!("{:?}", tcgetattr(&theirs).unwrap());
    let job = "trap 'echo interrupted; n=1' INT; echo go; while [ -z \"$n\" ]; do sleep 0.1; done; \
               echo ready; while :; do sleep 0.1; done";
    let running = Running::boot_on_terminal(run(kernels.older(), &[], &["sh", "-c", job]), &theirs);
    let mut screen = Output::new(ours.try_clone().unwrap());
    screen.wait_for("go\r\n");
    File::from(ours.try_clone().unwrap()).write_all(b"\x03").unwrap();
    screen.wait_for("interrupted\r\n");
    screen.wait_for("ready\r\n");
    // To ring3 itself: the first for the command, which goes on, the second for the machine.
    running.signal(Signal::INT);
    running.signal(Signal::TERM);
    let end = running.finish(PATIENCE);
    assert!([Some(128 + 15), Some(128 + 2)].contains(&end.code), "{end:?}");
    assert_eq!(format!("{:?}", tcgetattr(&theirs).unwrap()), before);
}
