//! Client against server, and peers that break the protocol.
