//! The host's network as it is, for a front end to take after, and as it will be, for its engine to follow.

use usernet::follow::{Follower, Following};
use usernet::{Config, Handle, HostNetwork};

use super::options::network::Network;
use super::{Because, NetError};

/// The host's network, opened while the process sees it.
pub(super) struct Changes {
    follower: Follower,
    options: Network,
    host: HostNetwork,
    template: Config,
}

impl Changes {
    /// Reads the part of the host's network that the options choose, and notices changes from now on.
    ///
    /// # Errors
    /// The host does not tell, or has nothing that the options ask for.
    pub(super) fn open(options: &Network) -> Result<Self, NetError> {
        let mut follower =
            Follower::open(options.template()).because(|| "cannot follow the host's network".into())?;
        let (host, template) = follower.config().because(|| "cannot take after the host's network".into())?;
        Ok(Self { follower, options: options.clone(), host, template })
    }

    /// What the host has.
    pub(super) fn host(&self) -> &HostNetwork {
        &self.host
    }

    /// What the guest has: the host's, changed by the options, without forwards.
    ///
    /// # Errors
    /// The options do not go with what the host has.
    pub(super) fn config(&self) -> Result<Config, NetError> {
        self.options.apply(self.template.clone()).because(|| "cannot make the guest's network".into())
    }

    /// Has `engine` follow the host's network until what is returned is dropped. What was configured in a namespace
    /// (`--config-net`) stays as it is.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn follow(self, engine: Handle) -> Result<Following, NetError> {
        let Self { follower, options, host, template } = self;
        let changed = move |_: &HostNetwork, template: Config| {
            let told = options.apply(template).and_then(|config| engine.reconfigure(config));
            if let Err(error) = told {
                tracing::warn!("the guest's network does not follow the host's: {error}");
            }
        };
        follower.start((host, template), changed).because(|| "cannot start a thread".into())
    }
}
