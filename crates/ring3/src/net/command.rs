//! `pasta` and `passt` as commands: from the words of the command line to an exit status.
//!
//! They are asked for by `ring3 pasta` and `ring3 passt`, or by the name that ring3 was called by: a link named `pasta` or
//! `passt`, also with something behind a dot, as upstream's `passt.avx2`.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, FromArgMatches};

use super::options::{BadOptions, PasstArgs, PasstSettings, PastaArgs, PastaSettings};
use super::{NetError, log, passt, pasta};

/// What a vhost-user back end of QEMU's tells of itself (docs/interop/vhost-user.json): libvirt asks before it starts one.
const CAPABILITIES: &str = "{\n  \"type\": \"net\"\n}\n";

/// One of the two front ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontEnd {
    /// For network namespaces.
    Pasta,
    /// For virtual machines.
    Passt,
}

/// A front end's command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invocation {
    /// Which one is asked for.
    pub front_end: FrontEnd,
    /// What it is called in messages: as the user did.
    name: String,
    /// What follows the name.
    words: Vec<OsString>,
}

/// Why a front end ended without having served.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Help or version, which is no mistake, or options that are none.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// Options that do not fit together.
    #[error(transparent)]
    Options(#[from] BadOptions),
    /// What could not be done.
    #[error(transparent)]
    Failed(#[from] NetError),
}

impl FrontEnd {
    /// The one of this name.
    fn named(name: &OsStr) -> Option<Self> {
        match name.to_str()? {
            "pasta" => Some(Self::Pasta),
            "passt" => Some(Self::Passt),
            _ => None,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Passt => "passt",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Pasta => Self::Passt,
            Self::Passt => Self::Pasta,
        }
    }

    /// Its options.
    #[must_use]
    pub fn command(self) -> Command {
        match self {
            Self::Pasta => PastaArgs::command(),
            Self::Passt => PasstArgs::command(),
        }
    }
}

impl Invocation {
    /// The front end that `words`, the command line, ask for, if they do.
    #[must_use]
    pub fn of(words: &[OsString]) -> Option<Self> {
        let (program, rest) = words.split_first()?;
        // `passt.avx2` and the like.
        let by_link = Path::new(program).file_stem().and_then(FrontEnd::named);
        if let Some(front_end) = by_link {
            return Some(Self { front_end, name: front_end.name().into(), words: rest.to_vec() });
        }
        let (task, rest) = rest.split_first()?;
        let front_end = FrontEnd::named(task)?;
        let name = format!("ring3 {}", front_end.name());
        Some(Self { front_end, name, words: rest.to_vec() })
    }

    /// Serves; returns the exit status.
    ///
    /// # Errors
    /// The options are none, or do not fit together, or what they ask for could not be done.
    pub fn run(self) -> Result<u8, CommandError> {
        match self.front_end {
            FrontEnd::Pasta => serve_pasta(self.parse()?),
            FrontEnd::Passt => serve_passt(self.parse()?),
        }
    }

    fn parse<T: FromArgMatches>(self) -> Result<T, clap::Error> {
        let command = self.front_end.command().bin_name(self.name).no_binary_name(true);
        let matches = command.try_get_matches_from(self.words);
        matches.and_then(|matches| T::from_arg_matches(&matches)).map_err(|e| of_the_other(self.front_end, e))
    }
}

/// Serves as pasta does.
///
/// # Errors
/// As [`Invocation::run`].
pub fn serve_pasta(args: PastaArgs) -> Result<u8, CommandError> {
    let settings = PastaSettings::try_from(args)?;
    log::start(&settings.common.log, settings.common.foreground, FrontEnd::Pasta.name())?;
    Ok(pasta::run(&settings)?)
}

/// Serves as passt does.
///
/// # Errors
/// As [`Invocation::run`].
pub fn serve_passt(args: PasstArgs) -> Result<u8, CommandError> {
    if args.own.print_capabilities {
        // Nobody may be reading.
        let _ = io::stdout().write_all(CAPABILITIES.as_bytes());
        return Ok(0);
    }
    let settings = PasstSettings::try_from(args)?;
    log::start(&settings.common.log, settings.common.foreground, FrontEnd::Passt.name())?;
    Ok(passt::run(&settings)?)
}

/// Says so if what is unknown to this front end is known to the other.
fn of_the_other(front_end: FrontEnd, error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return error };
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let (this, other) = (front_end.name(), front_end.other());
    let known = other.command().get_arguments().any(|known| {
        let long = known.get_long_and_visible_aliases().unwrap_or_default();
        let short = known.get_short().map(|short| format!("-{short}"));
        argument.strip_prefix("--").is_some_and(|name| long.contains(&name))
            || short.as_ref() == Some(argument)
    });
    if !known {
        return error;
    }
    let other = other.name();
    let text = format!("{argument} is an option of {other}, and means nothing to {this}\n");
    front_end.command().error(ErrorKind::UnknownArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invocation(words: &[&str]) -> Option<Invocation> {
        Invocation::of(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    fn failure(words: &[&str]) -> String {
        invocation(words).unwrap().run().unwrap_err().to_string()
    }

    #[test]
    fn a_front_end_is_asked_for_by_name_or_by_link() {
        for (words, front_end, rest) in [
            (&["ring3", "pasta", "-f", "ls", "-l"][..], FrontEnd::Pasta, 3),
            (&["/usr/bin/ring3", "passt"], FrontEnd::Passt, 0),
            (&["/usr/bin/pasta", "passt"], FrontEnd::Pasta, 1),
            (&["passt.avx2", "-f"], FrontEnd::Passt, 1),
        ] {
            let found = invocation(words).unwrap();
            assert_eq!((found.front_end, found.words.len()), (front_end, rest), "{words:?}");
        }
        for words in [&["ring3"][..], &["ring3", "run", "pasta"], &["ring3-pasta"], &[]] {
            assert_eq!(invocation(words), None, "{words:?}");
        }
    }

    #[test]
    fn what_the_other_one_knows_is_said_to_be_the_others() {
        assert!(failure(&["passt", "--config-net"]).contains("--config-net is an option of pasta"));
        assert!(failure(&["passt", "-T", "22"]).contains("-T is an option of pasta"));
        assert!(failure(&["pasta", "--vhost-user"]).contains("--vhost-user is an option of passt"));
        assert!(failure(&["ring3", "pasta", "--socket-path", "x"]).contains("an option of passt"));
        assert!(failure(&["passt", "--nonsense"]).contains("unexpected argument '--nonsense'"));
    }

    #[test]
    fn capabilities_come_before_everything_else() {
        assert_eq!(invocation(&["passt", "--print-capabilities"]).unwrap().run().unwrap(), 0);
        assert!(CAPABILITIES.contains("\"type\": \"net\""));
    }

    #[test]
    fn help_and_version_are_no_mistakes() {
        for word in ["-h", "--help", "--version"] {
            for name in ["pasta", "passt"] {
                match invocation(&[name, word]).unwrap().run() {
                    Err(CommandError::Usage(error)) => assert!(!error.use_stderr(), "{name} {word}"),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
