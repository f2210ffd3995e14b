//! The interpreter against the host CPU.
#![allow(clippy::unwrap_used, reason = "a test that fails to unwrap has failed")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use oracle::{Engine, EngineError, Family, Generator, HostCpu, Interpret, Mode, compare, known, report};

/// The seed of the test suite. The binary runs others.
const SEED: u64 = 0x1234_5678;
/// How many cases of the test suite are for all families together.
const CASES: u64 = 200_000;
/// How many reports a failure shows.
const SHOWN: usize = 8;

/// Prepares the host, or says aloud why it cannot.
fn host() -> Option<HostCpu> {
    for feature in oracle::generate::lacking() {
        eprintln!("the host CPU has no {feature:?}: not tested");
    }
    match HostCpu::new() {
        Ok(host) => Some(host),
        Err(e @ EngineError::Lacks(_)) => {
            eprintln!("SKIPPED: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Runs cases on both; panics with reports where they differ in a way that is not known.
fn agree(generator: &Generator, cases: u64) -> BTreeMap<Family, u64> {
    let mut counts = BTreeMap::new();
    let Some(mut host) = host() else { return counts };
    let mut interpret = Interpret::new().unwrap();
    let mut reports = Vec::new();
    for number in 0..cases {
        let case = generator.case(number);
        *counts.entry(case.family).or_default() += 1;
        let expected = host.run(&case).unwrap();
        match interpret.run(&case) {
            Ok(actual) => {
                let differences = compare(&case, &expected, &actual);
                if !differences.is_empty()
                    && known::explain(&case, &expected, &actual, &differences).is_none()
                {
                    reports.push(report(&case, &differences));
                }
            }
            Err(e) => {
                let mut text = report(&case, &[]);
                let _ = writeln!(text, "  {e}");
                reports.push(text);
                interpret = Interpret::new().unwrap();
            }
        }
    }
    assert!(
        reports.is_empty(),
        "{} of {cases} cases differ:\n{}",
        reports.len(),
        reports.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("\n")
    );
    counts
}

#[test]
fn interpreter_agrees_with_the_host_cpu() {
    let counts = agree(&Generator::new(SEED, Mode::Bits64), CASES);
    if !counts.is_empty() {
        assert_eq!(counts.keys().copied().collect::<Vec<_>>(), Family::ALL);
        assert!(counts.values().all(|&n| n > CASES / 100), "{counts:?}");
    }
}

#[test]
fn interpreter_agrees_with_the_host_cpu_in_compatibility_mode() {
    let counts = agree(&Generator::new(SEED, Mode::Bits32), CASES / 4);
    assert!(counts.is_empty() || counts.len() == Family::ALL.len(), "{counts:?}");
}

/// The host CPU with a mistake, to see that mistakes are found.
struct Wrong<F>(HostCpu, F);

impl<F: Fn(&mut oracle::Outcome)> Engine for Wrong<F> {
    fn run(&mut self, case: &oracle::Case) -> Result<oracle::Outcome, EngineError> {
        let mut outcome = self.0.run(case)?;
        (self.1)(&mut outcome);
        Ok(outcome)
    }
}

#[test]
fn a_mistake_in_any_part_is_found() {
    let Some(mut cpu) = host() else { return };
    let generator = Generator::only(SEED, Mode::Bits64, |c| c == iced_x86::Code::Add_rm64_r64).unwrap();
    type Mistake = fn(&mut oracle::Outcome);
    let mistakes: [(&str, Mistake); 10] = [
        ("R9", |o| o.registers.gpr[9] ^= 1 << 40),
        ("RIP", |o| o.registers.rip += 1),
        ("RFLAGS", |o| o.registers.rflags ^= 1 << 4),
        ("RFLAGS", |o| o.registers.rflags ^= 1 << 10),
        ("MXCSR", |o| o.registers.vector.mxcsr ^= 1),
        ("FSW", |o| o.registers.vector.fsw ^= 1 << 14),
        ("ST3", |o| o.registers.vector.st[3][9] ^= 1),
        ("YMM15", |o| o.registers.vector.ymm[15][31] ^= 1),
        ("memory at 0x10002fff", |o| o.memory[0x2fff] ^= 1),
        ("exception", |o| {
            o.exception = match o.exception {
                Some(_) => None,
                None => Some(oracle::case::Exception { vector: 13, error_code: 0, address: 0 }),
            }
        }),
    ];
    for (part, mistake) in mistakes {
        let mut wrong = Wrong(cpu, mistake);
        for number in 0..200 {
            let case = generator.case(number);
            let actual = wrong.run(&case).unwrap();
            let expected = wrong.0.run(&case).unwrap();
            let differences = compare(&case, &expected, &actual);
            let parts: Vec<_> = differences.iter().map(|d| d.part.as_str()).collect();
            assert_eq!(parts, [part], "case {number}");
            assert!(report(&case, &differences).contains("the host CPU has"));
        }
        cpu = wrong.0;
    }
}

#[test]
fn the_host_cpu_answers_the_same_twice() {
    let Some(mut host) = host() else { return };
    let generator = Generator::new(SEED ^ 1, Mode::Bits64);
    for number in 0..20_000 {
        let case = generator.case(number);
        let (first, second) = (host.run(&case).unwrap(), host.run(&case).unwrap());
        assert_eq!(compare(&case, &first, &second), [], "{}", report(&case, &[]));
        assert_eq!(first.exception, second.exception);
    }
}

#[test]
fn a_case_depends_on_its_seed_and_number_only() {
    let one = Generator::new(7, Mode::Bits64);
    let other = Generator::new(7, Mode::Bits64);
    let forward: Vec<_> = (0..500).map(|n| one.case(n)).collect();
    for (n, a) in forward.iter().enumerate().rev() {
        let b = other.case(n as u64);
        assert_eq!((&a.bytes, &a.registers, &a.memory), (&b.bytes, &b.registers, &b.memory));
    }
    assert_ne!(Generator::new(8, Mode::Bits64).case(0).registers, forward[0].registers);
}

/// Every form of the catalog must come up, or the generator cannot make it.
#[test]
fn every_form_can_be_generated() {
    for mode in [Mode::Bits64, Mode::Bits32] {
        let codes: Vec<_> = Generator::new(1, mode).codes().flat_map(|(_, codes)| codes.to_vec()).collect();
        assert!(codes.len() > 1500, "{}", codes.len());
        for code in codes {
            let generator = Generator::only(1, mode, |c| c == code).unwrap();
            assert!(
                (0..200).any(|n| generator.try_case(n).is_some_and(|c| c.instruction.code() == code)),
                "{mode:?} {code:?}"
            );
        }
    }
}
