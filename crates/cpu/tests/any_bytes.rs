//! Any bytes as code, in any mode: the processor has an answer, and takes no memory for it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::{Duration, Instant};

use cpu::testing::Subject;
use mmu::testing::Choices;

/// Resident memory of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// A second (or `RING3_FUZZ_SECONDS`) of the fuzz target, from a fixed seed.
#[test]
fn a_second_of_fuzzing() {
    let mut subject = Subject::new().unwrap();
    let seconds = std::env::var("RING3_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut seed, mut executed) = (0, 0);
    for _ in 0..200 {
        executed += subject.execute_anything(&mut Choices::seeded(seed));
        seed += 1;
    }
    let before = resident();
    // On a busy host a second is not much.
    while Instant::now() < end || seed <= 500 {
        executed += subject.execute_anything(&mut Choices::seeded(seed));
        seed += 1;
    }
    let grown = resident().saturating_sub(before);
    eprintln!("{seed} cases, {executed} instructions, {grown} KiB more");
    assert!(executed > seed, "{seed} cases, {executed} instructions");
    assert!(grown < 32 << 10, "{grown} KiB more after {seed} cases");
}

/// PVM mode, where each case is to come to something: every way in and out of it was taken.
#[test]
fn a_thousand_cases_in_pvm_mode() {
    let mut subject = Subject::new().unwrap();
    for seed in 0..1000 {
        subject.execute_in_pvm_mode(&mut Choices::seeded(seed));
    }
    let s = subject.pvm_stats();
    eprintln!("{s:?}");
    let ways = [s.user_events, s.supervisor_exceptions, s.supervisor_interrupts, s.syscalls];
    let back = [s.user_returns, s.supervisor_returns, s.kvm_hypercalls, s.interrupt_windows];
    assert!(ways.into_iter().chain(back).chain(s.hypercalls).all(|n| n >= 5), "{s:?}");
}
