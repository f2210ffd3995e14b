//! The lines that host and guest exchange on the control port.
//!
//! Each message is one line of UTF-8. The guest reports stages, then exactly one [`FromGuest`] that ends the
//! run; the host sends [`ToGuest`] at any time. Lines that are not understood are ignored by the guest and are
//! an error for the host, which trusts nothing that the guest says.

use std::fmt;

/// The longest line that either side reads, in bytes.
pub const MAX_LINE: usize = 4096;

/// A message from the guest's first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromGuest {
    /// What the guest does now, for people.
    Stage(String),
    /// The command is about to run: from here on, the streams are its own.
    Ready,
    /// The command ended with this status.
    Exit(u8),
    /// The command was ended by this signal.
    Signal(u8),
    /// The command could not be started: 126 (not executable) or 127 (not found), and why.
    NotRun(u8, String),
    /// The guest could not be set up; the command was not started.
    Failed(String),
}

/// A message from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToGuest {
    /// Send this signal to the command's process group.
    Signal(u8),
    /// The terminal now has this many rows and columns.
    Winsize(u16, u16),
    /// Nobody reads this stream (1 or 2) any more: further writes to it are to fail.
    Hangup(u8),
}

impl fmt::Display for FromGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clean = |text: &str| text.replace('\n', " ");
        match self {
            Self::Stage(name) => write!(f, "stage {}", clean(name)),
            Self::Ready => write!(f, "ready"),
            Self::Exit(status) => write!(f, "exit {status}"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::NotRun(status, why) => write!(f, "error {status} {}", clean(why)),
            Self::Failed(why) => write!(f, "fail {}", clean(why)),
        }
    }
}

impl FromGuest {
    /// Reads one line, given without its end of line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Some(match word {
            "stage" => Self::Stage(rest.to_owned()),
            "ready" => Self::Ready,
            "exit" => Self::Exit(rest.parse().ok()?),
            "signal" => Self::Signal(rest.parse().ok().filter(|n| (1..128).contains(n))?),
            "error" => {
                let (status, why) = rest.split_once(' ')?;
                Self::NotRun(status.parse().ok().filter(|s| (126..=127).contains(s))?, why.to_owned())
            }
            "fail" => Self::Failed(rest.to_owned()),
            _ => return None,
        })
    }
}

impl fmt::Display for ToGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Winsize(rows, columns) => write!(f, "winsize {rows} {columns}"),
            Self::Hangup(stream) => write!(f, "hangup {stream}"),
        }
    }
}

impl ToGuest {
    /// Reads one line, given without its end of line.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let message = match (words.next()?, words.next()?, words.next()) {
            ("signal", number, None) => Self::Signal(number.parse().ok()?),
            ("winsize", rows, Some(columns)) => Self::Winsize(rows.parse().ok()?, columns.parse().ok()?),
            ("hangup", stream, None) => Self::Hangup(stream.parse().ok()?),
            _ => return None,
        };
        words.next().is_none().then_some(message)
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

/// The peer sent a line longer than [`MAX_LINE`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a control line is longer than {MAX_LINE} bytes")]
pub struct LineTooLong;

impl Lines {
    /// Takes the next bytes and returns the lines that they complete, without their ends. Bytes that are not
    /// UTF-8 come back as U+FFFD.
    ///
    /// # Errors
    /// [`LineTooLong`], after which the stream is of no more use.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, LineTooLong> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            self.partial.extend_from_slice(piece);
            if self.partial.len() > MAX_LINE {
                return Err(LineTooLong);
            }
            if self.partial.pop_if(|&mut b| b == b'\n').is_some() {
                lines.push(String::from_utf8_lossy(&self.partial).into_owned());
                self.partial.clear();
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_line() {
        for message in [
            FromGuest::Stage("mounting root".into()),
            FromGuest::Ready,
            FromGuest::Exit(7),
            FromGuest::Signal(9),
            FromGuest::NotRun(127, "nosuch: not found".into()),
            FromGuest::Failed("no root".into()),
        ] {
            assert_eq!(FromGuest::parse(&message.to_string()), Some(message));
        }
        for message in [ToGuest::Signal(15), ToGuest::Winsize(24, 80), ToGuest::Hangup(1)] {
            assert_eq!(ToGuest::parse(&message.to_string()), Some(message));
        }
    }

    #[test]
    fn a_newline_cannot_forge_a_message() {
        let line = FromGuest::Failed("x\nexit 0".into()).to_string();
        assert_eq!(FromGuest::parse(&line), Some(FromGuest::Failed("x exit 0".into())));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in
            ["", "exit", "exit 256", "exit -1", "signal 0", "signal 200", "error 1 x", "hello", "error 126"]
        {
            assert_eq!(FromGuest::parse(line), None, "{line:?}");
        }
        for line in ["", "signal", "signal x", "winsize 1", "winsize 1 2 3", "signal 1 2"] {
            assert_eq!(ToGuest::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn lines_are_cut_wherever_the_bytes_break() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"exi"), Ok(vec![]));
        assert_eq!(lines.push(b"t 0\nsta"), Ok(vec!["exit 0".to_owned()]));
        assert_eq!(lines.push(b"ge a\n\n"), Ok(vec!["stage a".to_owned(), String::new()]));
        assert_eq!(lines.push(&[b'x'; MAX_LINE + 1]), Err(LineTooLong));
    }
}
