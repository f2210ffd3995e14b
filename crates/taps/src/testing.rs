//! Bodies of fuzz targets.

pub use crate::vhost_net::any_completions;
