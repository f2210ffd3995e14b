//! Runs random instructions on the host CPU and in the interpreter, and reports where they differ.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use oracle::{Engine as _, Family, Generator, HostCpu, Interpret, Mode, compare, known, report};

/// Runs random instructions on the host CPU and in the interpreter, and reports where they differ.
#[derive(Parser, Debug)]
#[command(version)]
struct Options {
    /// How many cases to run
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
    /// What the cases are derived from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The number of the first case
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this case (of --seed, --filter, --exact and --bits)
    #[arg(long)]
    case: Option<u64>,
    /// Only instruction forms whose name contains this; several are separated by commas
    #[arg(long)]
    filter: Option<String>,
    /// Only forms whose mnemonic is exactly what --filter says
    #[arg(long)]
    exact: bool,
    /// 64-bit mode or compatibility mode
    #[arg(long, default_value_t = 64, value_parser = parse_bits)]
    bits: u32,
    /// How many cases to print in full for each instruction form that differs
    #[arg(long, default_value_t = 1)]
    show: u64,
}

fn parse_bits(text: &str) -> Result<u32, String> {
    match text {
        "64" => Ok(64),
        "32" => Ok(32),
        _ => Err("64 or 32".to_owned()),
    }
}

#[derive(Default)]
struct Count {
    cases: u64,
    faults: u64,
    differ: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("oracle: {e}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool, Box<dyn std::error::Error>> {
    let mode = if options.bits == 64 { Mode::Bits64 } else { Mode::Bits32 };
    let filter: Vec<String> =
        options.filter.iter().flat_map(|f| f.split(',')).map(str::to_lowercase).collect();
    let generator = Generator::only(options.seed, mode, |code| {
        let name = format!("{code:?}").to_lowercase();
        let mnemonic = format!("{:?}", code.mnemonic()).to_lowercase();
        filter.is_empty()
            || filter.iter().any(|f| if options.exact { mnemonic == *f } else { name.contains(f) })
    })
    .ok_or("no instruction form has such a name")?;
    for feature in oracle::generate::lacking() {
        println!("the host CPU has no {feature:?}: not tested");
    }
    let mut host = HostCpu::new()?;
    let mut interpret = Interpret::new()?;
    let (first, cases) = options.case.map_or((options.first, options.cases), |k| (k, 1));
    let bar = ProgressBar::new(cases)
        .with_style(ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} {per_sec} {eta}")?);
    let mut counts: BTreeMap<Family, Count> = BTreeMap::new();
    let mut forms: BTreeMap<String, u64> = BTreeMap::new();
    let mut explained: BTreeMap<&str, u64> = BTreeMap::new();
    for number in first..first.saturating_add(cases) {
        if number % 4096 == 0 {
            bar.set_position(number - first);
        }
        let case = generator.case(number);
        let count = counts.entry(case.family).or_default();
        count.cases += 1;
        if options.case.is_some() {
            print!("{}", report(&case, &[]));
        }
        let expected = host.run(&case)?;
        count.faults += u64::from(expected.exception.is_some());
        let text = match interpret.run(&case) {
            Ok(actual) => {
                let differences = compare(&case, &expected, &actual);
                if options.case.is_some() {
                    println!("  the host CPU: {:x?}, RIP {:#x}", expected.exception, expected.registers.rip);
                }
                if differences.is_empty() {
                    continue;
                }
                if let Some(known) = known::explain(&case, &expected, &actual, &differences) {
                    *explained.entry(known.name).or_default() += 1;
                    if options.case.is_none() {
                        continue;
                    }
                    println!("known: {}: {}", known.name, known.reason);
                }
                report(&case, &differences)
            }
            Err(e) => {
                let text = format!("{}  {e}\n", report(&case, &[]));
                interpret = Interpret::new()?;
                text
            }
        };
        count.differ += 1;
        let form = forms.entry(format!("{:?}", case.instruction.code())).or_default();
        *form += 1;
        if *form <= options.show {
            bar.suspend(|| print!("{text}"));
        }
    }
    bar.finish_and_clear();
    println!("{:<10} {:>10} {:>10} {:>10}", "family", "cases", "faults", "differ");
    for (family, count) in &counts {
        println!(
            "{:<10} {:>10} {:>10} {:>10}",
            format!("{family:?}"),
            count.cases,
            count.faults,
            count.differ
        );
    }
    for (name, n) in &explained {
        println!("known: {name} {n}");
    }
    for (form, n) in &forms {
        println!("differs: {form} {n}");
    }
    for (name, n) in interpret.unimplemented() {
        println!("raised #UD as not implemented: {name} {n}");
    }
    Ok(forms.is_empty())
}
