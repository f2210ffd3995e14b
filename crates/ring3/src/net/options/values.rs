//! The arguments of options, as types.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::time::Duration;

use usernet::config::MacAddress;

/// Longest name of a host in DNS (RFC 1035, 2.3.4).
const LONGEST_NAME: usize = 253;

/// `none`, or something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoneOr<T> {
    /// The word.
    None,
    /// Anything else.
    Some(T),
}

impl<T> NoneOr<T> {
    fn parse<E>(text: &str, parse: impl FnOnce(&str) -> Result<T, E>) -> Result<Self, E> {
        if text == "none" { Ok(Self::None) } else { parse(text).map(Self::Some) }
    }
}

/// Reads an address, whatever it means.
fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse()
        .map_err(|_| "not an address: give one of IPv4 as in 192.0.2.1, or of IPv6 as in 2001:db8::1".into())
}

/// Reads the address of somebody: not nobody's, nor a group's.
///
/// # Errors
/// It is none, or one of those.
pub fn parse_host(text: &str) -> Result<IpAddr, String> {
    let address = parse_address(text)?;
    let everybody = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || everybody {
        return Err("no host has this address: it means nobody, a group, or everybody".into());
    }
    Ok(address)
}

/// Reads an address that can be reached over a link: somebody's, and not a loopback's.
///
/// # Errors
/// It is none of those.
pub fn parse_on_link(text: &str) -> Result<IpAddr, String> {
    let address = parse_host(text)?;
    if address.to_canonical().is_loopback() {
        return Err("a guest cannot reach anybody by this address: it is that of its own loopback".into());
    }
    Ok(address)
}

/// Reads `none`, or an address as [`parse_on_link`] does.
///
/// # Errors
/// It is neither.
pub fn parse_on_link_or_none(text: &str) -> Result<NoneOr<IpAddr>, String> {
    NoneOr::parse(text, parse_on_link)
}

/// Reads `none`, or an address of any meaning.
///
/// # Errors
/// It is neither.
pub fn parse_address_or_none(text: &str) -> Result<NoneOr<IpAddr>, String> {
    NoneOr::parse(text, parse_address).map_err(|error| format!("{error}; none for no address"))
}

/// Words of one argument; `none` has none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed(pub Vec<String>);

/// Reads search domains, separated by white space.
///
/// # Errors
/// One of them cannot be a domain.
pub fn parse_domains(text: &str) -> Result<Listed, String> {
    if text == "none" {
        return Ok(Listed(Vec::new()));
    }
    match text.split_whitespace().map(parse_name).collect::<Result<Vec<_>, _>>()? {
        domains if domains.is_empty() => Err("no domain: give some, with blanks between, or none".into()),
        domains => Ok(Listed(domains)),
    }
}

/// Reads a name of the DNS.
///
/// # Errors
/// It cannot be one: too long, an empty or long label, or characters that no client takes.
pub fn parse_name(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    if name.len() <= LONGEST_NAME && name.split('.').all(label) {
        Ok(name.to_owned())
    } else {
        Err("not a name: labels of 1 to 63 letters, digits, - and _, with dots between".into())
    }
}

/// An address, and perhaps its prefix's length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressPrefix {
    /// The address.
    pub address: IpAddr,
    /// The length of its prefix in bits, if given.
    pub prefix: Option<u8>,
}

impl FromStr for AddressPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr =
            address.parse().map_err(|_| "not an address: give ADDR or ADDR/LEN, as in 192.0.2.1/24")?;
        let everybody = matches!(address, IpAddr::V4(address) if address.is_broadcast());
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() || everybody {
            return Err("a guest cannot have this address: it means nobody, a group, or a loopback".into());
        }
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = length
            .map(|length| match length.parse() {
                Ok(bits) if bits <= longest => Ok(bits),
                _ => Err(format!("'{length}' is not a prefix's length: that is 0 to {longest}")),
            })
            .transpose()?;
        Ok(Self { address, prefix })
    }
}

/// The length of an IPv4 network's prefix in bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Netmask(pub u8);

impl FromStr for Netmask {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits = match text.parse::<Ipv4Addr>() {
            Ok(mask) => {
                let mask = u32::from(mask);
                (mask.leading_ones() + mask.trailing_zeros() >= 32).then(|| mask.leading_ones() as u8)
            }
            Err(_) => text.parse().ok().filter(|bits| *bits <= 32),
        };
        bits.map(Self).ok_or_else(|| "not a netmask: give 0 to 32 bits, or as in 255.255.255.0".into())
    }
}

/// A number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = match text.char_indices().next_back() {
            Some((at, unit)) if unit.is_ascii_alphabetic() => (text.get(..at).unwrap_or_default(), unit),
            _ => (text, 'B'),
        };
        let unit: u64 = match unit.to_ascii_uppercase() {
            'B' => 1,
            'K' => 1 << 10,
            'M' => 1 << 20,
            'G' => 1 << 30,
            _ => 0,
        };
        match number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)) {
            Some(bytes) if bytes > 0 => Ok(Self(bytes)),
            _ => Err("not a size: give bytes, or a number with K, M or G".into()),
        }
    }
}

/// A user, and perhaps a group, each by number or name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserGroup {
    /// The user.
    pub user: Id,
    /// The group; the user's own if `None`.
    pub group: Option<Id>,
}

/// A user or a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Id {
    /// By number.
    Number(u32),
    /// By name.
    Name(String),
}

impl FromStr for UserGroup {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = |word: &str| match word.parse() {
            _ if word.is_empty() => Err("a name is missing: give UID, UID:GID, LOGIN or LOGIN:GROUP"),
            // The value that means "leave it" to setresuid(2).
            Ok(u32::MAX) => Err("4294967295 is nobody's id"),
            Ok(number) => Ok(Id::Number(number)),
            Err(_) => Ok(Id::Name(word.to_owned())),
        };
        Ok(match text.split_once(':') {
            Some((user, group)) => Self { user: id(user)?, group: Some(id(group)?) },
            None => Self { user: id(text)?, group: None },
        })
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Reads a number of seconds.
///
/// # Errors
/// It is none, or 0.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u32>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds.into())),
        _ => Err("not a delay: give whole seconds, 1 or more".into()),
    }
}

/// Reads the address of one Ethernet interface.
///
/// # Errors
/// It is not six bytes, or means several interfaces, or none.
pub fn parse_mac(text: &str) -> Result<MacAddress, String> {
    let bad = || "not an Ethernet address: give six bytes, as in 9a:55:9a:55:9a:55".to_owned();
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or_else(bad)?;
        if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        return Err(bad());
    }
    if mac[0] & 1 == 1 || mac == [0; 6] {
        return Err("an interface cannot have this address: it is a group's, or zero".into());
    }
    Ok(mac)
}

/// The longest packet in a frame of 65535 bytes, which is as much as a tap device takes.
const LARGEST_MTU: u16 = 65521;

/// Reads an MTU: 0, or what IPv4 needs at least (RFC 791) to what a frame can have at most.
///
/// # Errors
/// It is neither.
pub fn parse_mtu(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(mtu) if mtu == 0 || (68..=LARGEST_MTU).contains(&mtu) => Ok(mtu),
        _ => Err(format!("not an MTU: give 68 to {LARGEST_MTU}, or 0 to tell none")),
    }
}
