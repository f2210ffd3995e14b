//! What the process that runs a guest may still do: the least that lets the run go on.
//!
//! # Theory of operation
//! A guest that breaks out of the processor or a device is code in this process, in any of its threads. So what
//! the process can do is cut down in two steps, before the guest's first instruction.
//!
//! 1. [`confine`], while there is one thread, since these hold for the calling thread and those it starts later:
//!    descriptors that the parent left open are closed; no program that is started gains rights
//!    (`no_new_privs`); of root's capabilities only the one to read files stays; Landlock (`files`) leaves
//!    reading below the shared root; the process's memory is not for debuggers and core dumps.
//! 2. [`Confined::seal`], on the machine's thread when everything is open: a system call filter on all threads
//!    at once (`calls`).
//!
//! What the guest may use is open by then: disks, streams, its root, the ports that lead into it. Its own connections
//! are not: where it has a network of the kind `user`, sockets of the internet can still be opened ([`Use`]). Between the steps ring3 runs its own code
//! only and has not looked at the guest's words, apart from loading the kernel that the user chose.
//!
//! **Failures.** A kernel or a container may refuse any of this. Each measure stands alone: what is refused is
//! reported (`-v`, `--stats`), and the run goes on with the others. The filter is put on all threads or on none.
//!
//! `docs/isolation.md` has the threat model.

pub(crate) mod calls;
mod descriptors;
mod files;

use std::fmt;
use std::path::Path;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

pub use descriptors::Inherited;

/// What of the host's network a run uses once it is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// None of it.
    Nothing,
    /// None of it, but clients of a UNIX socket that it listens on already.
    Clients,
    /// Sockets of IPv4 and IPv6 that it opens for the guest; it listens to no more ports than it does already.
    Sockets,
    /// Such sockets, and ports that it begins to listen to when the user asks for them.
    Ports,
}

/// What a run uses once it is confined, besides what every run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uses {
    /// Of the host's network.
    pub network: Use,
    /// Messages with whoever has the guest's devices, over sockets that are open.
    pub messages: bool,
    /// Devices of the host, which are open.
    pub host_devices: HostDevices,
}

/// What is done with the host's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostDevices {
    /// There are none.
    None,
    /// They are driven; what they reach has been mapped.
    Mapped,
    /// What they reach changes, as the guest says to its IOMMU.
    Mapping,
}

impl From<Use> for Uses {
    fn from(network: Use) -> Self {
        Self { network, messages: false, host_devices: HostDevices::None }
    }
}

/// What became of each measure, as words for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measures(Vec<String>);

impl Measures {
    /// None, because the user said so.
    #[must_use]
    pub fn off() -> Self {
        Self(vec!["off".into()])
    }

    fn add(&mut self, name: &str, result: Result<(), impl fmt::Display>) {
        self.0.push(match result {
            Ok(()) => name.to_owned(),
            Err(error) => format!("no {name} ({error})"),
        });
    }
}

impl fmt::Display for Measures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// A process after the first step. The second is due when everything is open.
#[derive(Debug)]
#[must_use = "without its second step the process is only half confined"]
pub struct Confined(Measures, Uses);

/// The first step, for a process whose only thread is the caller. Below `root` files can be read from now on; none
/// can be written that is not open yet, apart from what the standard streams are.
pub fn confine(inherited: Inherited, root: Option<&Path>, uses: impl Into<Uses>) -> Confined {
    let uses = uses.into();
    let mut measures = Measures(Vec::new());
    inherited.close();
    // Before Landlock and the filter, for which the kernel demands it.
    measures.add("no_new_privs", set_no_new_privs(true));
    measures.0.push(match files::restrict(root, uses.network) {
        Ok(measure) => measure,
        Err(error) => format!("no Landlock ({error})"),
    });
    measures.0.push(match drop_capabilities(root.is_some()) {
        Ok(measure) => measure,
        Err(error) => format!("all capabilities kept ({error})"),
    });
    measures.add("not dumpable", set_dumpable_behavior(DumpableBehavior::NotDumpable));
    Confined(measures, uses)
}

impl Confined {
    /// The second step, for all threads. Returns what was done in both.
    #[must_use]
    pub fn seal(self) -> Measures {
        let Self(mut measures, uses) = self;
        measures.add("seccomp", calls::filter(uses));
        measures
    }
}

/// Gives up root's powers but that to read the files of all users, which the shared root may need.
fn drop_capabilities(keep_reading: bool) -> rustix::io::Result<String> {
    let has = capabilities(None)?;
    let reading = if keep_reading { CapabilitySet::DAC_READ_SEARCH } else { CapabilitySet::empty() };
    let keep = CapabilitySets {
        effective: has.effective & reading,
        permitted: has.permitted & reading,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, keep)?;
    Ok(if keep.permitted.is_empty() { "no capabilities" } else { "CAP_DAC_READ_SEARCH alone" }.into())
}
