//! What `benches/peers.sh` runs as the first process of both virtual machines.
//!
//! It prints a line as soon as it runs, then `bench: begin NAME` and `bench: end NAME` around each measurement,
//! and powers off. The host takes the time of the lines as they arrive, so that the guest's own clock need not
//! be trusted; what the guest measured stands in the last line for comparison. With `bench=cmdline` on the
//! kernel's command line it only says what that line is.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Rounds of the integer loop; `bench-run` knows the number of instructions by it.
const ROUNDS: u64 = 20_000_000;
/// Instructions in a round.
const INSTRUCTIONS: u64 = 10;
/// Processes of the fork and exec measurement.
const SPAWNS: u32 = 500;
/// Bytes of the page-fault sweep, and how often it is made.
const SWEEP: usize = 64 << 20;
const SWEEPS: u32 = 3;

fn main() {
    if std::env::args().nth(1).as_deref() == Some("child") {
        return;
    }
    let mut guest = Guest { console: None };
    let _ = mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None);
    guest.console = File::options().write(true).open("/dev/console").ok();
    guest.say("bench: first line");

    let _ = mount("proc", "/proc", "proc", MountFlags::empty(), None);
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if command_line.split_whitespace().any(|word| word == "bench=cmdline") {
        guest.say(&format!("bench: cmdline {}", command_line.trim_end()));
    } else {
        guest.measure("integer", ROUNDS * INSTRUCTIONS, || integer_loop(ROUNDS));
        guest.measure("spawn", u64::from(SPAWNS), || (0..SPAWNS).for_each(|_| spawn()));
        guest.measure("sweep", u64::from(SWEEPS), || (0..SWEEPS).for_each(|_| sweep()));
        guest.say("bench: done");
    }
    let _ = reboot(RebootCommand::PowerOff);
}

struct Guest {
    console: Option<File>,
}

impl Guest {
    fn say(&mut self, line: &str) {
        if let Some(console) = &mut self.console {
            // One write: the kernel's own messages do not come in between.
            let _ = console.write_all(format!("{line}\n").as_bytes());
        }
    }

    /// Does `work`, which consists of so many units, between two lines.
    fn measure(&mut self, name: &str, units: u64, work: impl FnOnce()) {
        self.say(&format!("bench: begin {name}"));
        let start = Instant::now();
        work();
        let seconds = start.elapsed().as_secs_f64();
        self.say(&format!("bench: end {name} {units} {seconds:.6}"));
    }
}

/// Ten instructions a round: adds, shifts, logic, a multiplication and a branch.
#[inline(never)]
fn integer_loop(rounds: u64) {
    // SAFETY: needed so that the number of instructions is known; only the named registers change.
    unsafe {
        std::arch::asm!(
            "2:",
            "add {a}, {b}",
            "xor {b}, {a}",
            "lea {c}, [{a} + {b} * 2]",
            "shr {c}, 3",
            "imul {b}, {c}",
            "and {a}, {c}",
            "or {a}, 5",
            "sub {c}, {a}",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) 1u64 => _, b = inout(reg) 3u64 => _, c = out(reg) _, n = inout(reg) rounds => _,
            options(nomem, nostack)
        );
    }
}

/// Starts this program once more and waits for its end. A failure would make the guest look fast: it ends the
/// measurement.
fn spawn() {
    let status = std::process::Command::new("/init").arg("child").status();
    assert!(status.is_ok_and(|status| status.success()), "cannot start a process");
}

/// Maps fresh memory, touches each page once, and gives it back.
fn sweep() {
    // SAFETY: needed for anonymous memory of our own; the pointer stays inside the mapping, and nothing else
    // uses it.
    unsafe {
        let (access, kind) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let Ok(memory) = mmap_anonymous(std::ptr::null_mut(), SWEEP, access, kind) else {
            panic!("cannot map memory");
        };
        for offset in (0..SWEEP).step_by(4096) {
            memory.cast::<u8>().add(offset).write_volatile(1);
        }
        let _ = munmap(memory, SWEEP);
    }
}
