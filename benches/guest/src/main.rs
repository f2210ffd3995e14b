//! What `benches/peers.sh` runs as the first process of both virtual machines.
//!
//! It prints one line as soon as it runs, then one line for each measurement, and powers off. Times are the
//! guest's own CLOCK_MONOTONIC, which both machines keep in step with the host's.

use std::io::Write;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Rounds of the integer loop, and instructions in each.
const ROUNDS: u64 = 20_000_000;
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
    let _ = mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None);
    let mut console = std::fs::OpenOptions::new().write(true).open("/dev/console").ok();
    let mut say = |line: String| {
        if let Some(console) = &mut console {
            let _ = writeln!(console, "{line}");
        }
    };
    say("bench: first line".into());
    let start = Instant::now();
    integer_loop(ROUNDS);
    let seconds = start.elapsed().as_secs_f64();
    say(format!("bench: integer {seconds:.6} s {:.1} M/s", (ROUNDS * INSTRUCTIONS) as f64 / seconds / 1e6));

    let start = Instant::now();
    let mut failed = 0;
    for _ in 0..SPAWNS {
        let status = std::process::Command::new("/init").arg("child").status();
        failed += u32::from(!status.is_ok_and(|s| s.success()));
    }
    say(format!("bench: spawn {:.6} s {failed} failed", start.elapsed().as_secs_f64()));

    let start = Instant::now();
    for _ in 0..SWEEPS {
        sweep();
    }
    say(format!("bench: sweep {:.6} s", start.elapsed().as_secs_f64() / f64::from(SWEEPS)));
    if std::process::id() == 1 {
        let _ = reboot(RebootCommand::PowerOff);
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

/// Maps fresh memory, touches each page once, and gives it back.
fn sweep() {
    // SAFETY: needed for anonymous memory of our own; the pointer stays inside the mapping, and nothing else
    // uses it.
    unsafe {
        let Ok(memory) = mmap_anonymous(
            std::ptr::null_mut(),
            SWEEP,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        ) else {
            return;
        };
        for offset in (0..SWEEP).step_by(4096) {
            memory.cast::<u8>().add(offset).write_volatile(1);
        }
        let _ = munmap(memory, SWEEP);
    }
}
