//! `bench-net`: runs user-mode network back ends in alternation, each between the same two network namespaces, and
//! prints the table. See `benches/net-peers.sh`, which builds and fetches what it needs and starts it in namespaces
//! where it is root, and `docs/benchmarks.md`.
//!
//! The same program is the load: `bench-net serve`, `ping`, `connect` and `hold` run in one namespace each.

mod iperf;
mod load;
mod measure;
mod process;
mod subject;
mod table;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use measure::Group;
use subject::Subject;
use world::World;

const USAGE: &str = "bench-net run --ring3 FILE --newest DIR --stable DIR [--runs N] [--seconds S] [--cc NAME] \
                     [--only NAME,...] [--rows GROUP,...]";

pub(crate) type Failure = Box<dyn std::error::Error>;

/// What the command line says.
pub(crate) struct Options {
    /// The ring3 to measure, unless it is left out.
    ring3: Option<PathBuf>,
    /// Root file systems with the peers' programs (`benches/peers/fetch.sh`).
    newest: PathBuf,
    stable: PathBuf,
    runs: usize,
    /// How long one load lasts.
    seconds: u32,
    /// The congestion control of every namespace.
    congestion: String,
    subjects: Vec<Subject>,
    groups: Vec<Group>,
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options, Failure> {
    let mut options = Options {
        ring3: None,
        newest: PathBuf::new(),
        stable: PathBuf::new(),
        runs: 3,
        seconds: 2,
        congestion: "reno".into(),
        subjects: Subject::ALL.to_vec(),
        groups: Group::ALL.to_vec(),
    };
    while let Some(name) = args.next() {
        let value = args.next().ok_or(USAGE)?;
        match name.as_str() {
            "--ring3" => options.ring3 = Some(value.into()),
            "--newest" => options.newest = value.into(),
            "--stable" => options.stable = value.into(),
            "--runs" => options.runs = number(&value, 1000)?,
            "--seconds" => options.seconds = number(&value, 60)?,
            "--cc" => options.congestion = value,
            "--only" => options.subjects = listed(&value, &Subject::ALL, Subject::name)?,
            "--rows" => options.groups = listed(&value, &Group::ALL, Group::name)?,
            _ => return Err(USAGE.into()),
        }
    }
    if options.ring3.is_none() {
        options.subjects.retain(|subject| *subject != Subject::Ring3);
    }
    Ok(options)
}

/// A number from one to `most`.
fn number<N: TryFrom<u32>>(text: &str, most: u32) -> Result<N, Failure> {
    let number = text.parse().ok().filter(|n| (1..=most).contains(n));
    number
        .and_then(|n| N::try_from(n).ok())
        .ok_or_else(|| format!("'{text}' is not a number from 1 to {most}").into())
}

/// The members of `all` whose names are in a list separated by commas, in the order of `all`.
fn listed<T: Copy>(list: &str, all: &[T], name: fn(T) -> &'static str) -> Result<Vec<T>, Failure> {
    let names: Vec<&str> = list.split(',').collect();
    if let Some(unknown) = names.iter().find(|wanted| all.iter().all(|one| name(*one) != **wanted)) {
        let known: Vec<&str> = all.iter().map(|one| name(*one)).collect();
        return Err(format!("there is no '{unknown}', but: {}", known.join(", ")).into());
    }
    Ok(all.iter().copied().filter(|one| names.contains(&name(*one))).collect())
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let done = match args.next().as_deref() {
        Some("run") => options(args).and_then(|options| compare(&options)),
        Some(kind) => load::main(kind, args),
        None => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-net: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> Result<(), Failure> {
    let world = World::new(&options.congestion)?;
    println!("congestion control of the host's namespace: {}", world.host.congestion()?);
    let mut samples = table::Samples::new(&options.subjects);
    for run in 1..=options.runs {
        for &subject in &options.subjects {
            // A back end that fails leaves gaps in its column, and the others are still measured.
            if let Err(error) = measure::all(options, &world, subject, |row, value| {
                println!("run {run}, {:<12} {:<44} {value:.3}", subject.name(), row.to_string());
                samples.add(subject, row, value);
            }) {
                eprintln!("bench-net: run {run}, {}: {error}", subject.name());
            }
        }
    }
    println!("\n{}", samples.render(options.runs));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_the_order_of_the_table_and_name_what_is_unknown() {
        let subjects = listed("veth,ring3", &Subject::ALL, Subject::name).unwrap();
        assert_eq!(subjects, [Subject::Ring3, Subject::Veth]);
        let error = listed("veth,vde", &Subject::ALL, Subject::name).unwrap_err().to_string();
        assert!(error.contains("'vde'") && error.contains("slirp4netns"), "{error}");
    }

    #[test]
    fn numbers_have_bounds() {
        assert_eq!(number::<usize>("3", 5).unwrap(), 3);
        assert!(
            number::<u32>("0", 5).is_err()
                && number::<u32>("6", 5).is_err()
                && number::<u32>("x", 5).is_err()
        );
    }
}
