//! Random instructions and the host CPU's answer to them.
//!
//! A [`Generator`] makes a [`Case`]: an instruction with everything that it can read. An [`Engine`] makes an
//! [`Outcome`] of it: everything that it can have written, and the exception if there was one. [`HostCpu`] is
//! the engine that is right; [`compare`] says where another differs from it, but for what the architecture
//! leaves open.

pub mod case;
pub mod generate;
mod native;
mod random;

pub use case::{Case, Engine, EngineError, Outcome};
pub use generate::{Family, Generator};
pub use native::HostCpu;
