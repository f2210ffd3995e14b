//! Random instructions and the host CPU's answer to them.
//!
//! A [`Generator`] makes a [`Case`]: an instruction with everything that it can read. An [`Engine`] makes an
//! [`Outcome`] of it: everything that it can have written, and the exception if there was one. [`HostCpu`] is
//! the engine that is right; [`compare()`] says where another differs from it, but for what the architecture
//! leaves open.

pub mod case;
pub mod compare;
pub mod generate;
pub mod guest;
mod interpret;
pub mod known;
mod native;
mod random;
pub mod undefined;

pub use case::{Case, Engine, EngineError, Mode, Outcome};
pub use compare::{Difference, compare, report};
pub use generate::{Family, Generator};
pub use interpret::Interpret;
pub use native::HostCpu;
