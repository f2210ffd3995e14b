//! tmp
use oracle::*;
use std::collections::BTreeMap;
fn main() {
    let n: u64 = std::env::args().nth(1).unwrap().parse().unwrap();
    let show: u64 = std::env::args().nth(2).map_or(0, |s| s.parse().unwrap());
    let g = Generator::new(1, case::Mode::Bits64);
    for (f, c) in g.codes() {
        println!("{f:?} {}", c.len());
    }
    let t = std::time::Instant::now();
    let cases = 20000.min(n);
    for k in 0..cases {
        std::hint::black_box(g.case(k));
    }
    println!("generate: {:?} each", t.elapsed() / cases as u32);
    let mut cpu = HostCpu::new().unwrap();
    let mut counts: BTreeMap<(Family, Option<u8>), u64> = BTreeMap::new();
    let mut time = std::time::Duration::ZERO;
    for k in 0..n {
        let c = g.case(k);
        if k < show {
            println!("{k} {} {:x?}", c.instruction, c.bytes);
        }
        let t = std::time::Instant::now();
        let o = cpu.run(&c).unwrap();
        time += t.elapsed();
        if o.exception.is_some_and(|e| e.vector == 13) && std::env::var("S").is_ok() {
            println!(
                "{k} {} {:x?} {:x} rip {:x} {:x?}",
                c.instruction, c.bytes, c.registers.rflags, o.registers.rip, o.exception
            );
        }
        if std::env::var("D").is_ok() {
            for _ in 0..3 {
                let p = cpu.run(&c).unwrap();
                if p != o {
                    println!(
                        "DIFF {k} {} {:x?} {:x} vs {:x?} {:x}",
                        c.instruction, o.exception, o.registers.rip, p.exception, p.registers.rip
                    );
                }
            }
        }
        if k < show {
            println!("   {:x?} rip {:x}", o.exception, o.registers.rip);
        }
        *counts.entry((c.family, o.exception.map(|e| e.vector))).or_default() += 1;
    }
    println!("native: {:?} each", time / n as u32);
    println!("{counts:?}");
}
