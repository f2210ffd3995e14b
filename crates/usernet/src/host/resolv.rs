//! The host's resolvers, from resolv.conf(5).

use std::net::IpAddr;

/// The contents of resolv.conf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Resolvers {
    pub(super) servers: Vec<IpAddr>,
    pub(super) search: Vec<String>,
}

impl Resolvers {
    /// Reads resolv.conf(5). Lines that make no sense are passed over, as the C library does.
    pub(super) fn parse(text: &str) -> Self {
        let mut resolvers = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // An address with an interface is link-local: out of the guest's reach.
                    let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
                    let local = |a: &IpAddr| matches!(a, IpAddr::V6(a) if a.is_unicast_link_local());
                    resolvers.servers.extend(address.filter(|a| !local(a)));
                }
                // The last of them counts.
                Some("search" | "domain") => resolvers.search = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        resolvers.search.retain(|domain| domain != ".");
        resolvers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_as_the_c_library_does() {
        let text = "# comment\n; another\n\nnameserver\nnameserver nonsense\nnameserver fe80::1%eth0\n\
                    nameserver fe80::1\n\tnameserver 192.0.2.1 trailing\noptions ndots:5\ndomain one.example\n\
                    search two.example  three.example .\n";
        let read = Resolvers::parse(text);
        assert_eq!(read.servers, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(read.search, ["two.example", "three.example"]);
    }
}
