//! The `ring3` program: reads the command line and turns every outcome into an exit status.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use ring3::cli::{Cli, KernelTask, PvmTask, Task};
use ring3::{kernel, net, pvm_guest, run};

/// ring3's own failures; the numbers of a run are in `ring3 run --help`.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return answer_or_complain(&error),
    };
    let result = match cli.command {
        Task::Run(args) => {
            start_log();
            run::run(&args, run::vm::launch).map_err(Into::into)
        }
        Task::Pasta(args) => {
            start_log();
            return front_end(net::PastaSettings::try_from(*args).map_err(Into::into), |settings| {
                net::pasta::run(&settings)
            });
        }
        Task::Kernel { task } => kernels(task).map(|()| 0),
        Task::Pvm { task: PvmTask::Selftest(args) } => {
            start_log();
            pvm_guest::selftest::run(&args, pvm_guest::PVM_GUEST, &mut io::stdout()).map_err(Into::into)
        }
        Task::Pvm { task: PvmTask::Guest { output } } => {
            pvm_guest::write(&output).map(|()| 0).map_err(Into::into)
        }
        Task::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ring3", &mut io::stdout());
            Ok(0)
        }
        Task::Man { subcommand } => manual(&subcommand).map(|()| 0),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&*error);
            ExitCode::from(FAILED)
        }
    }
}

/// Runs a network front end, whose own failures have the status that upstream gives them.
fn front_end<S>(settings: Result<S, Failure>, run: impl FnOnce(S) -> Result<u8, net::NetError>) -> ExitCode {
    match settings.and_then(|settings| run(settings).map_err(Into::into)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&*error);
            ExitCode::FAILURE
        }
    }
}

/// The machine's own log, for those who work on it: `RING3_LOG` is a level (error, warn, info, debug, trace).
fn start_log() {
    let level = std::env::var("RING3_LOG").ok().and_then(|level| level.parse().ok());
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(level.unwrap_or(tracing::Level::WARN))
        .without_time()
        .init();
}

type Failure = Box<dyn std::error::Error>;

/// One line for what went wrong, then one for each cause.
fn complain(error: &dyn std::error::Error) {
    eprintln!("ring3: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
}

/// Help and version are answers, with status 0; the rest are mistakes.
fn answer_or_complain(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Nobody may be reading.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprint!("{text}");
        return ExitCode::from(FAILED);
    }
    eprint!("ring3: {}", text.strip_prefix("error: ").unwrap_or(&text));
    if let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
        && error.kind() == ErrorKind::UnknownArgument
        && !argument.starts_with('-')
        && std::env::args_os().nth(1).is_some_and(|task| task == "run")
    {
        eprintln!("To run it as a command, put -- before it: ring3 run -- {argument}");
    }
    ExitCode::from(FAILED)
}

fn kernels(task: KernelTask) -> Result<(), Failure> {
    match task {
        KernelTask::List => {
            let store = kernel::store::Store::of_user()?;
            let chosen = kernel::installed()?;
            let cached = store.list()?;
            let boot = kernel::in_boot();
            let mut out = io::stdout().lock();
            if cached.is_empty() && boot.is_empty() {
                eprintln!(
                    "ring3: no kernels in {} or /boot; `ring3 kernel fetch` gets one",
                    store.dir().display()
                );
            }
            for kernel in cached.iter().chain(&boot).rev() {
                let mark = if chosen.as_ref() == Some(kernel) { '*' } else { ' ' };
                writeln!(out, "{mark} {:<40} {}", kernel.release, kernel.image.display())?;
            }
            Ok(())
        }
        KernelTask::Fetch { version } => {
            Ok(writeln!(io::stdout(), "{}", kernel::fetch(version.as_deref())?.release)?)
        }
        KernelTask::Add { file, modules } => {
            Ok(writeln!(io::stdout(), "{}", kernel::add(&file, modules.as_deref())?.release)?)
        }
        KernelTask::Remove { versions } => {
            let store = kernel::store::Store::of_user()?;
            let writer = store.lock()?;
            for version in versions {
                writer.remove(&version)?;
            }
            Ok(())
        }
    }
}

/// Prints the page of the program, or of the subcommand that `names` lead to.
fn manual(names: &[String]) -> Result<(), Failure> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut title = "ring3".to_owned();
    for name in names {
        title = format!("{title}-{name}");
        let found = command.find_subcommand(name).cloned();
        command = found.ok_or_else(|| format!("no subcommand {}", names.join(" ")))?.display_name(&title);
    }
    clap_mangen::Man::new(command).render(&mut io::stdout())?;
    Ok(())
}
