//! The first exchange: versions and capabilities.
//!
//! A client proposes; the server answers with what both can do. Capabilities are a JSON object; what is unknown in it is
//! passed over, what has a wrong type or an impossible value ends the connection. Every limit is capped at what is bounded
//! memory here, whatever the peer says.

use serde_json::{Map, Value, json};
use zerocopy::IntoBytes;

use super::wire::{self, Header};
use super::{Errno, Result};

/// The protocol's version here. Version 0.1 is all that there is; the specification has no other yet.
pub const MAJOR: u16 = 0;
/// See [`MAJOR`].
pub const MINOR: u16 = 1;

/// Most descriptors that one message may carry here. QEMU refuses servers that offer to take more.
pub const MAX_FDS: usize = 16;
/// Most bytes that one transfer may have here, and the specification's default.
pub const MAX_TRANSFER: usize = 1 << 20;
/// The least that a peer may ask transfers to be limited to: what the structures need that come with a transfer.
const MIN_TRANSFER: u64 = 64;
/// Most DMA windows at a time, and the specification's default.
pub const MAX_DMA_MAPS: usize = 65_535;
/// Bytes of JSON that are looked at.
const MAX_JSON: usize = 16 << 10;

/// Bytes that a message may have: a transfer, and the structures before it.
pub const MAX_MESSAGE: usize = Header::SIZE + MAX_TRANSFER + 4096;

/// What one side can do, or both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// Descriptors that the sender takes in one message.
    pub max_fds: usize,
    /// Bytes of one transfer.
    pub max_transfer: usize,
    /// DMA windows at a time.
    pub max_dma_maps: usize,
    /// The sizes of page that DMA windows may be made of, one bit each.
    pub page_sizes: u64,
    /// REGION_WRITE_MULTI is known.
    pub write_multiple: bool,
    /// Commands of the server go over a socket of their own.
    pub twin_socket: bool,
    /// Where that socket is among the descriptors of the reply.
    pub twin_fd: Option<usize>,
}

impl Capabilities {
    /// What this implementation can do.
    pub const OURS: Self = Self {
        max_fds: MAX_FDS,
        max_transfer: MAX_TRANSFER,
        max_dma_maps: MAX_DMA_MAPS,
        page_sizes: 4096,
        write_multiple: true,
        twin_socket: true,
        twin_fd: None,
    };

    /// What a sender can do that says nothing.
    pub const DEFAULT: Self = Self {
        max_fds: 1,
        max_transfer: 1 << 20,
        max_dma_maps: 65_535,
        page_sizes: 4096,
        write_multiple: false,
        twin_socket: false,
        twin_fd: None,
    };

    /// What both can do.
    #[must_use]
    pub fn common(self, other: Self) -> Self {
        Self {
            max_fds: self.max_fds.min(other.max_fds),
            max_transfer: self.max_transfer.min(other.max_transfer),
            max_dma_maps: self.max_dma_maps.min(other.max_dma_maps),
            page_sizes: self.page_sizes & other.page_sizes,
            write_multiple: self.write_multiple && other.write_multiple,
            twin_socket: self.twin_socket && other.twin_socket,
            twin_fd: None,
        }
    }

    fn json(self) -> Value {
        let mut capabilities = json!({
            "max_msg_fds": self.max_fds,
            "max_data_xfer_size": self.max_transfer,
            "max_dma_maps": self.max_dma_maps,
            "pgsizes": self.page_sizes,
        });
        // A server names nothing that the client has not proposed.
        if self.write_multiple {
            capabilities["write_multiple"] = true.into();
        }
        if self.twin_socket {
            let mut twin = json!({ "supported": true });
            if let Some(index) = self.twin_fd {
                twin["fd_index"] = index.into();
            }
            capabilities["twin_socket"] = twin;
        }
        json!({ "capabilities": capabilities })
    }

    /// Reads them from JSON. EINVAL when it is none, or a value is of the wrong type or impossible.
    fn from_json(text: &[u8]) -> Result<Self> {
        if text.len() > MAX_JSON {
            return Err(Errno::INVAL);
        }
        let value: Value = serde_json::from_slice(text).map_err(|_| Errno::INVAL)?;
        let object = value.as_object().ok_or(Errno::INVAL)?;
        let none = Map::new();
        let capabilities = match object.get("capabilities") {
            Some(value) => value.as_object().ok_or(Errno::INVAL)?,
            None => &none,
        };
        let number = |name: &str, default: u64| match capabilities.get(name) {
            Some(value) => value.as_u64().ok_or(Errno::INVAL),
            None => Ok(default),
        };
        let boolean = |from: &Map<String, Value>, name: &str| match from.get(name) {
            Some(value) => value.as_bool().ok_or(Errno::INVAL),
            None => Ok(false),
        };
        let capped = |number: u64, cap: usize| usize::try_from(number).unwrap_or(cap).min(cap);
        let twin = match capabilities.get("twin_socket") {
            Some(value) => value.as_object().ok_or(Errno::INVAL)?,
            None => &none,
        };
        let transfer = number("max_data_xfer_size", 1 << 20)?;
        if transfer < MIN_TRANSFER {
            return Err(Errno::INVAL);
        }
        let twin_fd = match twin.get("fd_index") {
            Some(value) => {
                let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
                Some(index.ok_or(Errno::INVAL)?)
            }
            None => None,
        };
        Ok(Self {
            max_fds: capped(number("max_msg_fds", 1)?, MAX_FDS),
            max_transfer: capped(transfer, MAX_TRANSFER),
            max_dma_maps: capped(number("max_dma_maps", 65_535)?, MAX_DMA_MAPS),
            page_sizes: number("pgsizes", 4096)?,
            write_multiple: boolean(capabilities, "write_multiple")?,
            twin_socket: boolean(twin, "supported")?,
            twin_fd,
        })
    }
}

/// The payload of a VERSION message or its reply.
pub fn encode(version: wire::Version, capabilities: Capabilities) -> Vec<u8> {
    let mut payload = version.as_bytes().to_vec();
    payload.extend_from_slice(capabilities.json().to_string().as_bytes());
    payload.push(0);
    payload
}

/// What such a payload says. EINVAL when it is too short, its text does not end with a NUL, or is not what it should be.
pub fn decode(payload: &[u8]) -> Result<(wire::Version, Capabilities)> {
    let (version, text) = wire::split::<wire::Version>(payload)?;
    let capabilities = match text.split_last() {
        None => Capabilities::DEFAULT,
        Some((0, [])) => Capabilities::DEFAULT,
        Some((0, text)) => Capabilities::from_json(text)?,
        Some(_) => return Err(Errno::INVAL),
    };
    Ok((version, capabilities))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_json(text: &str) -> Result<Capabilities> {
        let payload = [&[0, 0, 1, 0], text.as_bytes(), &[0]].concat();
        decode(&payload).map(|(_, capabilities)| capabilities)
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let version = wire::Version { major: 0, minor: 1 };
        for capabilities in [
            Capabilities::OURS,
            Capabilities::DEFAULT,
            Capabilities { twin_fd: Some(3), max_transfer: 4096, ..Capabilities::OURS },
        ] {
            assert_eq!(decode(&encode(version, capabilities)), Ok((version, capabilities)));
        }
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        assert_eq!(decode(&[0, 0, 1, 0]).unwrap().1, Capabilities::DEFAULT);
        assert_eq!(with_json(""), Ok(Capabilities::DEFAULT));
        assert_eq!(with_json("{}"), Ok(Capabilities::DEFAULT));
        assert_eq!(with_json(r#"{"capabilities":{"new":[1]}, "more":2}"#), Ok(Capabilities::DEFAULT));
    }

    #[test]
    fn limits_are_capped() {
        let huge = with_json(
            r#"{"capabilities":{"max_msg_fds":1000000,"max_data_xfer_size":18446744073709551615,"max_dma_maps":4294967296}}"#,
        )
        .unwrap();
        assert_eq!(
            (huge.max_fds, huge.max_transfer, huge.max_dma_maps),
            (MAX_FDS, MAX_TRANSFER, MAX_DMA_MAPS)
        );
    }

    #[test]
    fn nonsense_is_refused() {
        let deep = format!("{{\"capabilities\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        let long = format!("{{\"x\":\"{}\"}}", "x".repeat(MAX_JSON));
        for text in [
            "[]",
            "{",
            "null",
            r#"{"capabilities":3}"#,
            r#"{"capabilities":{"max_msg_fds":-1}}"#,
            r#"{"capabilities":{"max_data_xfer_size":1.5}}"#,
            r#"{"capabilities":{"max_data_xfer_size":0}}"#,
            r#"{"capabilities":{"write_multiple":1}}"#,
            r#"{"capabilities":{"twin_socket":true}}"#,
            r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":-1}}}"#,
            "\u{0}",
            &deep,
            &long,
        ] {
            assert_eq!(with_json(text), Err(Errno::INVAL), "{text:.80}");
        }
        assert_eq!(decode(&[0, 0, 1]), Err(Errno::INVAL));
        assert_eq!(decode(b"\0\0\x01\0{}"), Err(Errno::INVAL), "no NUL");
    }
}
