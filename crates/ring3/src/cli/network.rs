//! The guest's network, as the user gives it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use usernet::config::Transport;

/// What the guest's network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// There is no card.
    None,
    /// The host's sockets, through an engine in this process.
    User,
    /// A tap device of the host that exists already, by its name.
    Tap(String),
}

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The host's address; all of them if `None`.
    pub address: Option<IpAddr>,
    /// The host's port; 0: one that is free.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
    /// TCP or UDP.
    pub transport: Transport,
}

impl fmt::Display for Publish {
    /// As it is read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.host))?,
            None => write!(f, "{}", self.host)?,
        }
        write!(f, ":{}", self.guest)?;
        if self.transport == Transport::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

pub(super) fn parse_link(text: &str) -> Result<Link, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(Link::None),
        None if text == "user" => Ok(Link::User),
        // An interface's name has at most 15 bytes, and is one of a file below /sys.
        Some(("tap", name)) if (1..16).contains(&name.len()) && !name.contains('/') && name != ".." => {
            Ok(Link::Tap(name.to_owned()))
        }
        Some(("tap", name)) => Err(format!("{name:?} is no name of an interface")),
        _ => Err("give none, user, or tap=NAME".into()),
    }
}

pub(super) fn parse_publish(text: &str) -> Result<Publish, String> {
    let (ports, transport) = match text.rsplit_once('/') {
        None => (text, Transport::Tcp),
        Some((ports, "tcp")) => (ports, Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some((_, other)) => return Err(format!("{other:?} is neither tcp nor udp")),
    };
    let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port: 1 to 65535"));
    let (rest, guest) =
        ports.rsplit_once(':').ok_or("give the host's port and the guest's, as in 8080:80")?;
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => (Some(address), host),
        None => (None, rest),
    };
    let address = match address {
        None => None,
        Some(text) => {
            let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
            let address: Option<IpAddr> = bare.unwrap_or(text).parse().ok();
            // An IPv6 address has colons of its own.
            let clear = address.filter(|address| address.is_ipv6() == bare.is_some());
            Some(clear.ok_or_else(|| format!("{text:?} is no address: 127.0.0.1, or [::1] with brackets"))?)
        }
    };
    let (host, guest) = (port(host)?, port(guest)?);
    if guest == 0 {
        return Err("the guest's port cannot be 0".into());
    }
    Ok(Publish { address, host, guest, transport })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        let parse = |text: &str| parse_publish(text).unwrap();
        let plain = Publish { address: None, host: 8080, guest: 80, transport: Transport::Tcp };
        assert_eq!(parse("8080:80"), plain);
        assert_eq!(parse("8080:80/tcp"), plain);
        let udp = Publish { transport: Transport::Udp, ..plain.clone() };
        assert_eq!(parse("8080:80/udp"), udp);
        let at = |address: &str| Some(address.parse().unwrap());
        assert_eq!(parse("127.0.0.1:8080:80"), Publish { address: at("127.0.0.1"), ..plain.clone() });
        assert_eq!(parse("[::1]:8080:80/udp"), Publish { address: at("::1"), ..udp });
        assert_eq!(parse("0:80"), Publish { host: 0, ..plain });
        for text in ["8080:80", "127.0.0.1:8080:80", "[::1]:8080:80/udp", "0:1/udp"] {
            assert_eq!(parse(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_a_port_is_named() {
        for (text, words) in [
            ("80", "8080:80"),
            ("", "8080:80"),
            ("x:80", "\"x\" is no port"),
            ("80:65536", "\"65536\" is no port"),
            ("80:", "\"\" is no port"),
            ("80:0", "cannot be 0"),
            ("80:80/sctp", "\"sctp\" is neither"),
            ("host:80:80", "\"host\" is no address"),
            ("::1:80:80", "with brackets"),
            ("[127.0.0.1]:80:80", "is no address"),
        ] {
            let error = parse_publish(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn links_are_named() {
        assert_eq!(parse_link("none"), Ok(Link::None));
        assert_eq!(parse_link("user"), Ok(Link::User));
        assert_eq!(parse_link("tap=vm0"), Ok(Link::Tap("vm0".into())));
        for bad in ["", "tap", "tap=", "tap=a/b", "tap=..", "tap=a-name-that-is-too-long", "bridge"] {
            assert!(parse_link(bad).is_err(), "{bad}");
        }
    }
}
