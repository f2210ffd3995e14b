//! Ports that are forwarded while somebody listens behind them: rules with `auto`.
//!
//! Every second it is looked which ports are bound on either side ([`Bound`]), and forwards are added and removed
//! accordingly: those into the namespace at the engine, those out of it at the splicer. Ports that are bound by our own
//! forwards do not count, or each side would follow the other for ever.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use usernet::config::{Forward, Transport};
use usernet::splice::{self, Side};

use super::bound::Bound;
use crate::net::descriptors::forward_what_can_be_had;
use crate::net::options::ports::Rule;
use crate::net::options::settings::Ports;

/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(1);

/// The loopback interface's name.
const LOOPBACK: &str = "lo";

/// Who makes forwards of some kind.
pub(super) trait Forwarder {
    /// A forward.
    type Forward: Clone + Eq + Hash;

    /// The forward that a rule means by one of its ports.
    fn forward(&self, rule: &Rule, transport: Transport, port: u16) -> Self::Forward;
    /// Adds one.
    fn add(&self, forward: Self::Forward) -> io::Result<()>;
    /// Removes one.
    fn remove(&self, forward: Self::Forward) -> io::Result<()>;
    /// The ports that this forwarder listens to.
    fn listens(&self, transport: Transport) -> io::Result<BTreeSet<u16>>;
}

/// By frames, or by the bypass.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum AnyForward {
    /// The engine's.
    Framed(Forward),
    /// The splicer's.
    Spliced(splice::Forward),
}

/// Engine or splicer.
#[derive(Debug)]
pub(super) enum AnyForwarder {
    /// Forwards from the host, by frames.
    Engine { engine: usernet::Handle, v6: bool },
    /// Forwards from the loopback of one side to that of the other.
    Splicer { splicer: splice::Handle, from: Side, v6: bool },
}

impl Forwarder for AnyForwarder {
    type Forward = AnyForward;

    fn forward(&self, rule: &Rule, transport: Transport, port: u16) -> AnyForward {
        match self {
            Self::Engine { v6, .. } => AnyForward::Framed(rule.forward(transport, port, *v6)),
            Self::Splicer { from, v6, .. } => AnyForward::Spliced(spliced(*from, rule, transport, port, *v6)),
        }
    }

    fn add(&self, forward: AnyForward) -> io::Result<()> {
        match (self, forward) {
            (Self::Engine { engine, .. }, AnyForward::Framed(forward)) => {
                engine.add_forward(forward).map(drop)
            }
            (Self::Splicer { splicer, .. }, AnyForward::Spliced(forward)) => {
                splicer.add_forward(forward).map(drop)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn remove(&self, forward: AnyForward) -> io::Result<()> {
        match (self, forward) {
            (Self::Engine { engine, .. }, AnyForward::Framed(forward)) => {
                engine.remove_forward(forward).map(drop)
            }
            (Self::Splicer { splicer, .. }, AnyForward::Spliced(forward)) => {
                splicer.remove_forward(forward).map(drop)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn listens(&self, transport: Transport) -> io::Result<BTreeSet<u16>> {
        Ok(match self {
            Self::Engine { engine, .. } => {
                let forwards = engine.forwards()?.into_iter();
                forwards.filter(|f| f.transport == transport).map(|f| f.listen.port()).collect()
            }
            Self::Splicer { splicer, from, .. } => {
                let forwards = splicer.forwards()?.into_iter();
                let ours = |f: &splice::Forward| f.transport == transport && f.from == *from;
                forwards.filter(ours).map(|f| f.listen.port()).collect()
            }
        })
    }
}

/// The forward by the bypass that a rule means by one of its ports. Without an address or interface it is reached by the
/// interface `lo` alone.
fn spliced(from: Side, rule: &Rule, transport: Transport, port: u16, v6: bool) -> splice::Forward {
    let v6 = v6 && !rule.mapping.to_address.is_some_and(|address| address.is_ipv4());
    let any: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let listen = SocketAddr::new(rule.listen.address.unwrap_or(any), port);
    let lo = rule.listen.address.is_none().then(|| LOOPBACK.to_owned());
    splice::Forward {
        interface: rule.listen.interface.clone().or(lo),
        target_address: rule.mapping.to_address,
        ..splice::Forward::new(from, transport, listen, rule.leads_to(port))
    }
}

/// One direction's ports: the rules, and what was made of them.
pub(super) struct Direction<F: Forwarder> {
    pub(super) forwarder: F,
    /// TCP's and UDP's rules.
    ports: [(Transport, Ports); 2],
    made: HashSet<F::Forward>,
    /// Those that could not be made when last tried, so that it is said once.
    refused: HashMap<F::Forward, io::ErrorKind>,
}

impl<F: Forwarder> Direction<F> {
    /// With TCP's and UDP's rules.
    pub(super) fn new(forwarder: F, tcp: Ports, udp: Ports) -> Self {
        let ports = [(Transport::Tcp, tcp), (Transport::Udp, udp)];
        Self { forwarder, ports, made: HashSet::new(), refused: HashMap::new() }
    }

    /// Makes the forwards of the rules without `auto`.
    ///
    /// # Errors
    /// One that must be there cannot be had, or not one of those that need not.
    pub(super) fn make_fixed(&self) -> io::Result<()> {
        for (transport, ports) in &self.ports {
            let fixed = |best_effort| {
                let rules =
                    ports.rules.iter().filter(move |rule| !rule.auto && rule.best_effort == best_effort);
                rules.flat_map(|rule| {
                    rule.mapping.ports.ports().map(|port| self.forwarder.forward(rule, *transport, port))
                })
            };
            fixed(false).try_for_each(|forward| self.forwarder.add(forward))?;
            let add = |forward| self.forwarder.add(forward);
            // It can fail only if who forwards has ended.
            let remove = |forward| drop(self.forwarder.remove(forward));
            forward_what_can_be_had(fixed(true), add, remove).map_err(|error| {
                io::Error::new(error.kind(), format!("not a single {transport} port can be had: {error}"))
            })?;
        }
        Ok(())
    }

    /// Whether there is anything to follow.
    fn follows(&self) -> bool {
        self.ports.iter().any(|(_, ports)| ports.rules.iter().any(|rule| rule.auto))
    }

    /// Makes the forwards be those that go with what is bound, on the side that they lead to.
    fn follow(&mut self, bound: [&BTreeSet<u16>; 2]) {
        let wanted = self.wanted(bound);
        let gone: Vec<_> = self.made.iter().filter(|forward| !wanted.contains(*forward)).cloned().collect();
        for forward in gone {
            self.made.remove(&forward);
            // It may have been removed by hand.
            let _ = self.forwarder.remove(forward);
        }
        self.refused.retain(|forward, _| wanted.contains(forward));
        for forward in wanted {
            if self.made.contains(&forward) {
                continue;
            }
            match self.forwarder.add(forward.clone()) {
                Ok(()) => {
                    self.refused.remove(&forward);
                    self.made.insert(forward);
                }
                Err(error) => {
                    if self.refused.insert(forward, error.kind()) != Some(error.kind()) {
                        tracing::debug!("a port that is bound on the other side is not forwarded: {error}");
                    }
                }
            }
        }
    }

    fn wanted(&self, [tcp, udp]: [&BTreeSet<u16>; 2]) -> HashSet<F::Forward> {
        let mut wanted = HashSet::new();
        for (transport, ports) in &self.ports {
            let mut bound = match transport {
                Transport::Tcp => tcp.clone(),
                Transport::Udp => udp.clone(),
            };
            if ports.follow_tcp {
                bound.extend(tcp);
            }
            for rule in ports.rules.iter().filter(|rule| rule.auto) {
                let led = bound.iter().filter_map(|&target| rule.leading_to(target));
                wanted.extend(led.map(|port| self.forwarder.forward(rule, *transport, port)));
            }
        }
        wanted
    }
}

/// Both directions, and what is bound on both sides.
pub(super) struct Auto {
    pub(super) host: Bound,
    pub(super) guest: Bound,
    pub(super) inwards: Option<Direction<AnyForwarder>>,
    pub(super) outwards: Option<Direction<AnyForwarder>>,
}

impl Auto {
    /// Whether there is anything to follow.
    pub(super) fn follows(&self) -> bool {
        self.inwards.as_ref().is_some_and(Direction::follows)
            || self.outwards.as_ref().is_some_and(Direction::follows)
    }

    /// Looks once.
    ///
    /// # Errors
    /// The tables cannot be read, or engine or splicer have ended.
    pub(super) fn look(&mut self) -> io::Result<()> {
        if let Some(inwards) = &mut self.inwards {
            let own = |transport| own(self.outwards.as_ref(), transport);
            let [tcp, udp] = others(&self.guest, own)?;
            inwards.follow([&tcp, &udp]);
        }
        if let Some(outwards) = &mut self.outwards {
            let own = |transport| own(self.inwards.as_ref(), transport);
            let [tcp, udp] = others(&self.host, own)?;
            outwards.follow([&tcp, &udp]);
        }
        Ok(())
    }

    /// Looks again and again, until `end` is dropped.
    pub(super) fn run(mut self, end: &Receiver<()>) {
        while let Err(RecvTimeoutError::Timeout) = end.recv_timeout(INTERVAL) {
            if let Err(error) = self.look() {
                tracing::debug!("bound ports are no longer followed: {error}");
                return;
            }
        }
    }
}

/// What a direction's forwards listen to.
fn own<F: Forwarder>(direction: Option<&Direction<F>>, transport: Transport) -> io::Result<BTreeSet<u16>> {
    direction.map_or_else(|| Ok(BTreeSet::new()), |direction| direction.forwarder.listens(transport))
}

/// What others have bound: TCP's ports, and UDP's.
fn others(
    bound: &Bound,
    own: impl Fn(Transport) -> io::Result<BTreeSet<u16>>,
) -> io::Result<[BTreeSet<u16>; 2]> {
    let of = |transport| -> io::Result<BTreeSet<u16>> { Ok(&bound.ports(transport)? - &own(transport)?) };
    Ok([of(Transport::Tcp)?, of(Transport::Udp)?])
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::net::options::ports::{Listen, Mapping, PortRange};

    /// Notes what it is asked.
    #[derive(Default)]
    struct Notes {
        said: RefCell<Vec<String>>,
        refuses: Option<u16>,
    }

    impl Forwarder for Notes {
        type Forward = (Transport, u16);

        fn forward(&self, _: &Rule, transport: Transport, port: u16) -> (Transport, u16) {
            (transport, port)
        }

        fn add(&self, forward: (Transport, u16)) -> io::Result<()> {
            if self.refuses == Some(forward.1) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            self.said.borrow_mut().push(format!("+{:?} {}", forward.0, forward.1));
            Ok(())
        }

        fn remove(&self, forward: (Transport, u16)) -> io::Result<()> {
            self.said.borrow_mut().push(format!("-{:?} {}", forward.0, forward.1));
            Ok(())
        }

        fn listens(&self, _: Transport) -> io::Result<BTreeSet<u16>> {
            Ok(BTreeSet::new())
        }
    }

    fn rule(first: u16, last: u16, to: u16) -> Rule {
        let mapping = Mapping { ports: PortRange { first, last }, to, to_address: None };
        Rule { listen: Listen::default(), mapping, auto: true, best_effort: true }
    }

    fn sorted(notes: &Notes) -> Vec<String> {
        let mut said = std::mem::take(&mut *notes.said.borrow_mut());
        said.sort();
        said
    }

    #[test]
    fn forwards_come_and_go_with_what_is_bound() {
        let tcp = Ports { rules: vec![rule(1000, 1999, 2000)], follow_tcp: false };
        let udp = Ports { rules: vec![rule(1000, 4000, 1000)], follow_tcp: true };
        let notes = Notes { refuses: Some(1009), ..Notes::default() };
        let mut direction = Direction::new(notes, tcp, udp);
        let none = BTreeSet::new();
        direction.follow([&BTreeSet::from([2001, 999, 2009]), &BTreeSet::from([3000])]);
        assert_eq!(sorted(&direction.forwarder), ["+Tcp 1001", "+Udp 2001", "+Udp 2009", "+Udp 3000"]);
        direction.follow([&BTreeSet::from([2001, 2009]), &none]);
        assert_eq!(sorted(&direction.forwarder), ["-Udp 3000"]);
        direction.forwarder.refuses = None;
        direction.follow([&BTreeSet::from([2009]), &none]);
        assert_eq!(sorted(&direction.forwarder), ["+Tcp 1009", "-Tcp 1001", "-Udp 2001"]);
    }

    #[test]
    fn a_rule_without_auto_is_not_followed() {
        let fixed = Ports { rules: vec![Rule { auto: false, ..rule(1, 65535, 1) }], follow_tcp: false };
        let mut direction = Direction::new(Notes::default(), fixed, Ports::default());
        direction.follow([&BTreeSet::from([80]), &BTreeSet::new()]);
        assert!(!direction.follows());
        assert!(sorted(&direction.forwarder).is_empty());
    }
}
