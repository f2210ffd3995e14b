//! The first process in a ring3 guest.
//!
//! The kernel starts it from the initramfs that the host built. In order, it
//!
//! 1. mounts the kernel's file systems and reads the [`guest_init::spec`],
//! 2. loads the kernel modules that the spec lists,
//! 3. finds its virtio console ports by name and opens them,
//! 4. gives the network card its addresses and routes ([`network`]),
//! 5. mounts the host's directory read-only under a tmpfs overlay and makes that `/`,
//! 6. starts the command and relays its streams ([`relay`]) until it ends,
//! 7. reports the status on the control port and powers the machine off.
//!
//! As PID 1 it must not return or panic before step 7 (the kernel panics when it ends), so every error ends
//! in a `fail` message and a power-off.

mod command;
mod error;
mod mounts;
mod netlink;
mod network;
mod ports;
mod relay;
#[expect(unsafe_code, reason = "child set-up between fork and exec")]
mod sys;

use std::fs;

use error::{Error, Result};
use guest_init::control::FromGuest;
use guest_init::spec::{MODULE_DIR, Root, SPEC_PATH, Spec};
use ports::{Control, Ports};

fn main() {
    if rustix::process::getpid() != rustix::process::Pid::INIT {
        eprintln!("guest-init: this is the first process of a ring3 guest; it does nothing elsewhere");
        std::process::exit(125);
    }
    let mut control = None;
    if let Err(error) = run(&mut control) {
        let text = error.chain();
        eprintln!("guest-init: {text}");
        if let Some(control) = &control {
            // Nothing is left to do when even this fails: the power-off tells the host enough.
            let _ = control.send(&FromGuest::Failed(text));
        }
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}

fn run(control_slot: &mut Option<Control>) -> Result<()> {
    mounts::kernel_file_systems()?;
    let bytes = fs::read(SPEC_PATH).map_err(Error::io("cannot read", SPEC_PATH))?;
    let spec = Spec::from_bytes(&bytes).map_err(Error::Spec)?;
    load_modules(&spec)?;
    let Ports { control, streams } = Ports::open(&spec)?;
    let control = control_slot.insert(control);
    control.send(&FromGuest::Stage("mounting the root".into()))?;
    let _ = fs::remove_file(SPEC_PATH);
    let _ = fs::remove_dir_all(MODULE_DIR);
    if !spec.hostname.is_empty() {
        let name = std::os::unix::ffi::OsStrExt::as_bytes(spec.hostname.as_os_str());
        rustix::system::sethostname(name).map_err(Error::errno("cannot set the host name", "ring3"))?;
    }
    network::set_up(spec.network.as_ref());
    match spec.root {
        Root::Virtiofs => mounts::host_root(&spec)?,
        Root::Initramfs => {}
    }
    mounts::user_file_systems(&spec)?;
    if let Some(network) = &spec.network {
        network::name_resolvers(network);
    }
    if let Some(tree) = &spec.module_tree {
        mounts::link_module_tree(tree);
    }
    control.send(&FromGuest::Stage("starting the command".into()))?;
    let end = match command::start(&spec, control) {
        Ok(started) => relay::run(started, streams, control)?,
        Err(command::StartError::NotRun(status, why)) => FromGuest::NotRun(status, why),
        Err(command::StartError::Other(error)) => return Err(error),
    };
    // Before the status: the host may stop the machine as soon as it has it.
    rustix::fs::sync();
    control.send(&end)
}

/// Loads the listed modules. One that is loaded already, or whose device is missing, is no error; what matters
/// is found missing later, with a better message.
fn load_modules(spec: &Spec) -> Result<()> {
    for name in &spec.modules {
        let path = format!("{MODULE_DIR}/{name}");
        let file = fs::File::open(&path).map_err(Error::io("cannot open module", &path))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => eprintln!("guest-init: cannot load module {name}: {errno}"),
        }
    }
    Ok(())
}
