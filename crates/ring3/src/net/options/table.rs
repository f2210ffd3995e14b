//! The table of options in the documentation, made from the parser's own.

use clap::{Arg, Command};

use crate::net::command::FrontEnd;

const TITLE: &str = "\
# Options of `ring3 pasta` and `ring3 passt`

This page is made from the tables that the parser uses, and a test compares them: after a change,
`RING3_REGENERATE=1 cargo test -p ring3 --lib net::options::table` writes it anew. The grammar of ports is in `ring3 pasta
--help`.
";

/// The page.
#[must_use]
pub fn page() -> String {
    let [pasta, passt] = [FrontEnd::Pasta, FrontEnd::Passt].map(FrontEnd::command);
    let has =
        |command: &Command, arg: &Arg| command.get_arguments().any(|other| other.get_id() == arg.get_id());
    let mut text = TITLE.to_owned();
    for (title, command, other, wanted) in [
        ("Both", &pasta, &passt, true),
        ("pasta alone", &pasta, &passt, false),
        ("passt alone", &passt, &pasta, false),
    ] {
        text += &format!("\n## {title}\n\n| option | argument | default | effect |\n|---|---|---|---|\n");
        for arg in command.get_arguments().filter(|arg| has(other, arg) == wanted) {
            text += &row(arg);
        }
    }
    text
}

fn row(arg: &Arg) -> String {
    let code = |word: String| format!("`{word}`");
    let short = arg.get_short().map(|short| code(format!("-{short}")));
    let long = arg.get_long_and_visible_aliases().unwrap_or_default();
    let mut names: Vec<String> =
        short.into_iter().chain(long.into_iter().map(|long| code(format!("--{long}")))).collect();
    let takes_value = arg.get_action().takes_values();
    let values = arg.get_value_names().unwrap_or_default();
    let argument = values.iter().map(|name| code(name.to_string())).collect::<Vec<_>>().join(" ");
    if arg.is_positional() {
        names.push("(last)".to_owned());
    }
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    // A default that is found out is in the description; see `args`.
    let (effect, described) = match help.split_once(" [default: ") {
        Some((effect, default)) => (effect.to_owned(), Some(default.trim_end_matches(']').to_owned())),
        None => (help, None),
    };
    let value = arg.get_default_values().first().map(|value| code(value.to_string_lossy().into_owned()));
    let default = value.filter(|_| takes_value).or(described).unwrap_or_else(|| "-".to_owned());
    let cells = [names.join(" "), if takes_value { argument } else { String::new() }, default, effect];
    format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_documentation_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/network-options.md");
        if std::env::var_os("RING3_REGENERATE").is_some() {
            std::fs::write(&path, page()).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == page(), "docs/network-options.md is not what the options are now: see its top");
    }

    #[test]
    fn every_option_says_what_it_does() {
        for front_end in [FrontEnd::Pasta, FrontEnd::Passt] {
            for arg in front_end.command().get_arguments() {
                let row = row(arg);
                assert!(!row.contains("|  |\n") && row.starts_with("| `-") || arg.is_positional(), "{row}");
            }
        }
    }
}
