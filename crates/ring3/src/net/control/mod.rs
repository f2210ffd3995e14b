//! Control of a running network: its forwarded ports, over a UNIX socket.
//!
//! # The protocol
//! Text, in lines. A client sends requests, one after the other, and reads an answer to each:
//!
//! ```text
//! list                      the ports that are forwarded
//! add TRANSPORT SPEC        forward more; all of SPEC's ports or none
//! remove TRANSPORT SPEC     end the forwarding of ports, and the flows that came by them
//! ```
//!
//! `TRANSPORT` is `tcp` or `udp`, `SPEC` as for `pasta -t` ([`super::options::ports`]). `all` takes what it can get; `auto` is not
//! for run time. To remove a port one names where it listens; it does not matter where it leads to.
//! An answer is any number of lines, which only `list` has (`TRANSPORT SPEC`), and a last one: `ok`, or `error` and why.
//!
//! # Who is at the other end
//! The socket's file is its owner's alone. Whoever opens it can have a few requests at a time in memory, of
//! [`LONGEST_REQUEST`] bytes each, and one answer, and is read from again when that was taken. Of more than [`MOST_CLIENTS`] the
//! eldest is dropped. The engine answers between two of its turns and never waits for a client.

pub mod client;
mod server;

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use usernet::Handle;
use usernet::config::{Forward, Transport};

use super::options::ports::{Listen, Mapping, PortList, PortRange, PortSpec, PortTable, Rule};

pub use server::{ControlSocket, Server};

/// Bytes of a request, with the end of its line.
pub const LONGEST_REQUEST: usize = 4096;

/// Clients that are connected at once.
pub const MOST_CLIENTS: usize = 16;

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The ports that are forwarded.
    List,
    /// More of them.
    Add(Transport, PortSpec),
    /// Fewer.
    Remove(Transport, PortSpec),
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List => f.write_str("list"),
            Self::Add(transport, spec) => write!(f, "add {} {spec}", word(*transport)),
            Self::Remove(transport, spec) => write!(f, "remove {} {spec}", word(*transport)),
        }
    }
}

impl FromStr for Request {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        let verb = words.next().unwrap_or_default();
        let request = match verb {
            "list" => Self::List,
            "add" | "remove" => {
                let transport = match words.next() {
                    Some("tcp") => Transport::Tcp,
                    Some("udp") => Transport::Udp,
                    other => return Err(format!("'{}' is neither tcp nor udp", other.unwrap_or_default())),
                };
                let spec = words.next().ok_or("the ports are missing")?;
                let spec: PortSpec = spec.parse().map_err(|error| format!("{spec}: {error}"))?;
                if verb == "add" { Self::Add(transport, spec) } else { Self::Remove(transport, spec) }
            }
            _ => return Err(format!("'{verb}' is not a request: those are list, add and remove")),
        };
        match words.next() {
            None => Ok(request),
            Some(more) => Err(format!("'{more}' is too much")),
        }
    }
}

fn word(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

/// A network that is controlled.
#[derive(Clone, Debug)]
pub struct Controlled {
    /// Its engine.
    pub handle: Handle,
    /// Whether a port without an address is listened on by IPv6, too.
    pub v6: bool,
    /// The ports that `all` leaves out.
    pub ephemeral: PortRange,
}

impl Controlled {
    /// Does what is asked for; returns the lines of the answer but for the last.
    ///
    /// # Errors
    /// Why it cannot be done. Nothing has changed then.
    pub fn serve(&self, request: Request) -> Result<Vec<String>, String> {
        match request {
            Request::List => Ok(describe(self.forwards()?)),
            Request::Add(transport, spec) => self.add(transport, spec).map(|()| Vec::new()),
            Request::Remove(transport, spec) => self.remove(transport, spec).map(|()| Vec::new()),
        }
    }

    fn forwards(&self) -> Result<Vec<Forward>, String> {
        self.handle.forwards().map_err(|error| format!("the network has ended: {error}"))
    }

    fn rules(&self, spec: PortSpec) -> Result<Vec<Rule>, String> {
        match &spec {
            PortSpec::None => return Err("'none' names no port".to_owned()),
            PortSpec::Ports(list) if list.auto => {
                return Err("'auto' is for the command line: name the ports, or say all".to_owned());
            }
            PortSpec::Ports(_) => {}
        }
        let table = PortTable::new(vec![spec]).map_err(|error| error.to_string())?;
        Ok(table.rules(self.ephemeral))
    }

    fn add(&self, transport: Transport, spec: PortSpec) -> Result<(), String> {
        let rules = self.rules(spec)?;
        let mut added: Vec<Forward> = Vec::new();
        let mut failure = None;
        for rule in &rules {
            for port in rule.mapping.ports.ports() {
                let forward = rule.forward(transport, port, self.v6);
                match self.handle.add_forward(forward) {
                    Ok(forward) => added.push(forward),
                    Err(error) => {
                        let why = error.to_string();
                        if !rule.best_effort {
                            // All or none.
                            added.into_iter().for_each(|forward| drop(self.handle.remove_forward(forward)));
                            return Err(why);
                        }
                        failure = Some(why);
                    }
                }
            }
        }
        match failure {
            Some(why) if added.is_empty() => Err(why),
            _ => Ok(()),
        }
    }

    fn remove(&self, transport: Transport, spec: PortSpec) -> Result<(), String> {
        let rules = self.rules(spec.clone())?;
        let is_meant = |forward: &Forward| {
            let at = |rule: &Rule| {
                let address = match rule.listen.address {
                    Some(address) => address == forward.listen.ip(),
                    None => forward.listen.ip().is_unspecified(),
                };
                address
                    && rule.listen.interface == forward.interface
                    && rule.mapping.ports.contains(forward.listen.port())
            };
            forward.transport == transport && rules.iter().any(at)
        };
        let meant: Vec<Forward> = self.forwards()?.into_iter().filter(is_meant).collect();
        if meant.is_empty() {
            return Err(format!("nothing is forwarded by {} {spec}", word(transport)));
        }
        for forward in meant {
            self.handle.remove_forward(forward).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Forwards as the specifications that they could have come from, ports in a row together.
fn describe(mut forwards: Vec<Forward>) -> Vec<String> {
    let place = |forward: &Forward| {
        let udp = forward.transport == Transport::Udp;
        (udp, forward.listen.ip(), forward.interface.clone(), forward.guest_address)
    };
    forwards.sort_by_key(|forward| (place(forward), forward.listen.port()));
    let mut lines = Vec::new();
    let mut row: Option<(Forward, u16)> = None;
    for forward in forwards {
        if let Some((first, length)) = &mut row
            && place(first) == place(&forward)
            && first.listen.port().checked_add(*length) == Some(forward.listen.port())
            && first.guest_port.checked_add(*length) == Some(forward.guest_port)
        {
            *length += 1;
            continue;
        }
        lines.extend(row.replace((forward, 1)).map(line));
    }
    lines.extend(row.map(line));
    lines
}

fn line((first, length): (Forward, u16)) -> String {
    let ip = first.listen.ip();
    // "Any" of IPv6 is of both families, which is what no address means.
    let address = (ip != IpAddr::V6(Ipv6Addr::UNSPECIFIED)).then_some(ip);
    let port = first.listen.port();
    let ports = PortRange { first: port, last: port.saturating_add(length - 1) };
    let spec = PortSpec::Ports(PortList {
        listen: Listen { address, interface: first.interface },
        all: None,
        named: vec![Mapping { ports, to: first.guest_port, to_address: first.guest_address }],
        exclude: Vec::new(),
        auto: false,
    });
    format!("{} {spec}", word(first.transport))
}

#[cfg(test)]
mod tests;
