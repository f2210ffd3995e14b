//! The `ring3` program: reads the command line and turns every outcome into an exit status.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use ring3::cli::{Cli, KernelTask, NetPortsArgs, NetTask, NetworkArgs, PvmTask, Task};
use ring3::net::command::{self, CommandError, Invocation};
use ring3::net::control::{Request, client};
use ring3::net::options::ports::PortSpec;
use ring3::{kernel, pvm_guest, run, shim, vfio};
use usernet::config::Transport;

/// ring3's own failures; the numbers of a run are in `ring3 run --help`.
const FAILED: u8 = 125;

/// Those of `pasta` and `passt`, which upstream's callers know.
const NET_FAILED: u8 = 1;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    if let Some(invocation) = Invocation::of(&words) {
        let name = invocation.front_end.name();
        return finish_net(name, invocation.run());
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return answer_or_complain(&error),
    };
    let result = match cli.command {
        Task::Run(args) => {
            start_log();
            run::run(&args, run::vm::launch).map_err(Into::into)
        }
        Task::Kernel { task } => kernels(task).map(|()| 0),
        Task::Pvm { task: PvmTask::Selftest(args) } => {
            start_log();
            pvm_guest::selftest::run(&args, pvm_guest::PVM_GUEST, &mut io::stdout()).map_err(Into::into)
        }
        Task::Pvm { task: PvmTask::Guest { output } } => {
            pvm_guest::write(&output).map(|()| 0).map_err(Into::into)
        }
        // `Invocation::of` finds them first; they are in `Cli` for its help, man pages and completions.
        Task::Pasta(args) => return finish_net("pasta", command::serve_pasta(*args)),
        Task::Passt(args) => return finish_net("passt", command::serve_passt(*args)),
        Task::Net { task } => control_net(task).map(|()| 0),
        Task::Vfio { task } => {
            start_log();
            vfio::run(task).map(|()| 0).map_err(Into::into)
        }
        Task::Shim(args) => {
            let Err(error) = shim::exec(&args);
            complain("ring3", &error);
            return ExitCode::from(error.status());
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
            complain("ring3", &*error);
            ExitCode::from(FAILED)
        }
    }
}

/// The exit status of `pasta` or `passt`.
fn finish_net(name: &str, result: Result<u8, CommandError>) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(CommandError::Usage(error)) if !error.use_stderr() => {
            // Nobody may be reading.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        Err(CommandError::Usage(error)) => {
            let text = error.render().to_string();
            eprint!("{name}: {}", text.strip_prefix("error: ").unwrap_or(&text));
            ExitCode::from(NET_FAILED)
        }
        Err(error) => {
            complain(name, &error);
            ExitCode::from(NET_FAILED)
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
fn complain(name: &str, error: &dyn std::error::Error) {
    eprintln!("{name}: {error}");
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

/// Asks a running network for something, and prints what it says.
fn control_net(task: NetTask) -> Result<(), Failure> {
    let (network, requests) = match task {
        NetTask::List { network } => (network, vec![Request::List]),
        NetTask::Add { ports } => net_requests(ports, Request::Add),
        NetTask::Remove { ports } => net_requests(ports, Request::Remove),
    };
    let lines = client::ask(&client::socket(network.socket)?, &requests)?;
    let mut out = io::stdout().lock();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn net_requests(
    ports: NetPortsArgs,
    request: impl Fn(Transport, PortSpec) -> Request,
) -> (NetworkArgs, Vec<Request>) {
    let transport = if ports.udp { Transport::Udp } else { Transport::Tcp };
    (ports.network, ports.specs.into_iter().map(|spec| request(transport, spec)).collect())
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
