//! Random instructions and the host CPU's answer to them.
