//! Whether options fit together: from [`super::args`] to [`super::settings`].

/// Options that do not fit together, or that the host has nothing for.
#[derive(Debug, thiserror::Error)]
pub enum BadOptions {
    /// Two that exclude each other.
    #[error("{one} cannot be used with {other}: {why}")]
    Excludes {
        /// The one.
        one: &'static str,
        /// The other.
        other: &'static str,
        /// Why not.
        why: &'static str,
    },
}
