//! Which kernel a run boots, and where its modules are.

pub mod image;
