//! Comparing outcomes, and telling a reader how they differ.

use std::fmt::{self, Write as _};

use iced_x86::{Formatter as _, IntelFormatter, OpKind};

use crate::case::{Case, DATA, Outcome, PF_PRESENT, Registers};
use crate::generate;
use crate::undefined::Undefined;

const NAMES: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
    "R15",
];
/// The first address that Linux gives no user mapping. It reports faults from there on as protection faults,
/// whatever the page tables say.
const USER_END: u64 = 0x7fff_ffff_f000;

/// One part of two outcomes that differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Which part.
    pub part: String,
    /// What the host CPU has.
    pub expected: String,
    /// What the engine under test has.
    pub actual: String,
}

/// Where `actual` differs from `expected`, but for what the architecture leaves open.
pub fn compare(case: &Case, expected: &Outcome, actual: &Outcome) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut differ = |part: String, expected: &dyn fmt::Display, actual: &dyn fmt::Display| {
        found.push(Difference { part, expected: expected.to_string(), actual: actual.to_string() });
    };
    let seen = |o: &Outcome| match o.exception {
        None => "none".to_owned(),
        Some(e) => {
            let hidden = if e.address >= USER_END { PF_PRESENT } else { 0 };
            let code = e.error_code & !hidden;
            format!("vector {} error code {code:#x} address {:#x}", e.vector, e.address)
        }
    };
    if seen(expected) != seen(actual) {
        differ("exception".to_owned(), &seen(expected), &seen(actual));
    }
    let completed = expected.exception.is_none();
    let undefined = if completed { Undefined::of(case) } else { Undefined::default() };
    let open = |part: usize| {
        let i = &case.instruction;
        undefined.destination
            && i.op0_kind() == OpKind::Register
            && generate::general(i.op0_register()) == Some(part)
    };
    let (e, a) = (&expected.registers, &actual.registers);
    for (n, name) in NAMES.iter().enumerate() {
        if e.gpr[n] != a.gpr[n] && !open(n) {
            differ((*name).to_owned(), &hex(e.gpr[n]), &hex(a.gpr[n]));
        }
    }
    if e.rip != a.rip {
        differ("RIP".to_owned(), &hex(e.rip), &hex(a.rip));
    }
    let mask = undefined.compared();
    if (e.rflags ^ a.rflags) & mask != 0 {
        differ("RFLAGS".to_owned(), &flags(e.rflags & mask), &flags(a.rflags & mask));
    }
    vectors(e, a, &mut differ);
    let memory_open = undefined.destination && case.instruction.op0_kind() == OpKind::Memory;
    if expected.memory != actual.memory && !memory_open {
        let pairs = || expected.memory.iter().zip(actual.memory.iter());
        let first = pairs().position(|(e, a)| e != a).unwrap_or(0);
        let last = first + 1 + pairs().skip(first).take(64).rposition(|(e, a)| e != a).unwrap_or(0);
        let at = DATA + first as u64;
        let last = last.min(expected.memory.len());
        differ(
            format!("memory at {at:#x}"),
            &bytes(&expected.memory[first..last]),
            &bytes(&actual.memory[first..last]),
        );
    }
    found
}

fn vectors(
    e: &Registers,
    a: &Registers,
    differ: &mut impl FnMut(String, &dyn fmt::Display, &dyn fmt::Display),
) {
    let (e, a) = (&e.vector, &a.vector);
    let words = [
        ("FCW", u32::from(e.fcw), u32::from(a.fcw)),
        ("FSW", u32::from(e.fsw), u32::from(a.fsw)),
        ("x87 tags", u32::from(e.tags), u32::from(a.tags)),
        ("MXCSR", e.mxcsr, a.mxcsr),
    ];
    for (name, e, a) in words {
        if e != a {
            differ(name.to_owned(), &hex(e.into()), &hex(a.into()));
        }
    }
    for (n, (e, a)) in e.st.iter().zip(&a.st).enumerate() {
        if e != a {
            differ(format!("ST{n}"), &bytes(e), &bytes(a));
        }
    }
    for (n, (e, a)) in e.ymm.iter().zip(&a.ymm).enumerate() {
        if e != a {
            differ(format!("YMM{n}"), &bytes(e), &bytes(a));
        }
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// Bytes as a number, the most significant first.
fn bytes(bytes: &[u8]) -> String {
    bytes.iter().rev().fold("0x".to_owned(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn flags(rflags: u64) -> String {
    const FLAGS: [(u64, &str); 11] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (18, "AC"),
        (21, "ID"),
    ];
    let set: Vec<&str> = FLAGS.iter().filter(|(bit, _)| rflags >> bit & 1 != 0).map(|(_, n)| *n).collect();
    if set.is_empty() { "none".to_owned() } else { set.join(" ") }
}

/// The case as a reader wants to see it, with what differs.
pub fn report(case: &Case, differences: &[Difference]) -> String {
    let mut text = String::new();
    describe(case, &mut text);
    for d in differences {
        let _ = writeln!(text, "  {}: the host CPU has {}, the engine {}", d.part, d.expected, d.actual);
    }
    text
}

/// The instruction in Intel syntax.
pub fn disassembly(case: &Case) -> String {
    let mut text = String::new();
    if case.instruction.is_invalid() {
        "(invalid)".clone_into(&mut text);
    } else {
        IntelFormatter::new().format(&case.instruction, &mut text);
    }
    text
}

fn describe(case: &Case, text: &mut String) {
    let r = &case.registers;
    let code: Vec<String> = case.bytes.iter().map(|b| format!("{b:02x}")).collect();
    let _ = writeln!(text, "case {} of seed {}: {}", case.number, case.seed, disassembly(case));
    let _ = writeln!(text, "  {:?}, {:?}, at {:#x}: {}", case.mode, case.family, r.rip, code.join(" "));
    for (names, values) in NAMES.chunks(4).zip(r.gpr.chunks(4)) {
        let line: Vec<String> = names.iter().zip(values).map(|(n, v)| format!("{n:>3} {v:016x}")).collect();
        let _ = writeln!(text, "  {}", line.join("  "));
    }
    let v = &r.vector;
    let _ = writeln!(
        text,
        "  RFLAGS {}  FCW {:#x} FSW {:#x} tags {:#x} MXCSR {:#x}",
        flags(r.rflags),
        v.fcw,
        v.fsw,
        v.tags,
        v.mxcsr
    );
    let i = &case.instruction;
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            let register = i.op_register(n);
            if register.is_xmm() || register.is_ymm() {
                let _ = writeln!(text, "  {register:?} {}", bytes(&v.ymm[register.number() & 15]));
            }
        }
        if let Some(address) = generate::linear_address(case, n).filter(|_| i.op_kind(n) != OpKind::Register)
        {
            let start = address.wrapping_sub(DATA) as usize;
            let there = case.memory.get(start..).map_or("-".to_owned(), |m| bytes(&m[..m.len().min(16)]));
            let _ = writeln!(text, "  operand {n} at {address:#x}: {there}");
        }
    }
    if case.family == generate::Family::X87 {
        for n in [0, 1] {
            let _ = writeln!(text, "  ST{n} {}", bytes(&v.st[n]));
        }
    }
}
