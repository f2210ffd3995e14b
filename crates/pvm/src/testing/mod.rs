//! What tests of the ABI need: a processor without a processor, and steps from a fuzzer's bytes. Behind the
//! feature `testing`.

mod any;
mod plain;

pub use any::deliver_anything;
pub use plain::{Call, PAGE_SIZE, Page, Plain, Registers, Shared, Use};
