//! `bench-run`: runs ring3 and QEMU in alternation on the same kernel and initramfs, and prints the table. See
//! `benches/peers.sh`, which builds what it needs, and `docs/benchmarks.md`.

mod initramfs;
mod machine;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use machine::{Machine, Sample};

const USAGE: &str = "bench-run --ring3 FILE --init FILE --kernel FILE --work DIR [--runs N]";
/// Memory of the guests, MiB.
const MEMORY: u32 = 512;

type Failure = Box<dyn std::error::Error>;

struct Options {
    ring3: PathBuf,
    init: PathBuf,
    kernel: PathBuf,
    work: PathBuf,
    runs: usize,
}

fn options() -> Result<Options, Failure> {
    let (mut ring3, mut init, mut kernel, mut work, mut runs) = (None, None, None, None, 5);
    let mut args = std::env::args_os().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or(USAGE)?;
        match name.to_str() {
            Some("--ring3") => ring3 = Some(value.into()),
            Some("--init") => init = Some(value.into()),
            Some("--kernel") => kernel = Some(value.into()),
            Some("--work") => work = Some(value.into()),
            Some("--runs") => {
                let number = value.to_str().and_then(|text| text.parse().ok());
                runs = number.filter(|n| (1..=1000).contains(n)).ok_or("the number of runs is 1 to 1000")?;
            }
            _ => return Err(USAGE.into()),
        }
    }
    Ok(Options {
        ring3: ring3.ok_or(USAGE)?,
        init: init.ok_or(USAGE)?,
        kernel: kernel.ok_or(USAGE)?,
        work: work.ok_or(USAGE)?,
        runs,
    })
}

fn main() -> ExitCode {
    match options().and_then(|options| compare(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), Failure> {
    let read = |path: &Path| std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()));
    let initramfs = options.work.join("initramfs");
    std::fs::write(&initramfs, initramfs::with_init(&read(&options.init)?)?)?;
    drop(read(&options.kernel)?);
    println!("kernel: {}", options.kernel.display());

    // ring3 adds to the command line what suits its machine: the others are to have the very same.
    let asking = machine::ring3(options, &initramfs, Some("bench=cmdline"), "ring3");
    let text = machine::run(&asking)?.command_line.ok_or("ring3's guest did not tell its command line")?;
    let words: Vec<_> = text.split_whitespace().filter(|word| *word != "bench=cmdline").collect();
    let command_line = words.join(" ");
    println!("command line: {command_line}");

    let mut machines = vec![machine::ring3(options, &initramfs, None, "ring3")];
    for (kind, name) in [("q35", "TCG q35"), ("microvm", "TCG microvm")] {
        let qemu = machine::qemu(options, &initramfs, &command_line, kind, name);
        match machine::run(&qemu) {
            Ok(_) => machines.push(qemu),
            Err(error) => eprintln!("bench-run: left out: {error}"),
        }
    }

    let mut columns: Vec<(Machine, Vec<Sample>)> = machines.into_iter().map(|m| (m, Vec::new())).collect();
    for run in 1..=options.runs {
        let mut failed = Vec::new();
        for (column, (machine, samples)) in columns.iter_mut().enumerate() {
            match machine::run(machine) {
                Ok(sample) => {
                    println!("run {run}, {:<12} {}", machine.name, table::one_line(&sample));
                    samples.push(sample);
                }
                Err(error) if column == 0 => return Err(error),
                // A peer that does not always boot has no median.
                Err(error) => {
                    eprintln!("bench-run: left out from now on: {error}");
                    failed.push(column);
                }
            }
        }
        for column in failed.into_iter().rev() {
            columns.remove(column);
        }
    }
    println!("\n{}", table::render(&columns));
    Ok(())
}
