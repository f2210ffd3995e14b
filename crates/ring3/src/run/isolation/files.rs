//! Landlock: which files can still be opened, and what of the network.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, RestrictionStatus,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

use super::Use;

/// The newest rights that the rules below were written and tested for; an older kernel enforces those it knows.
const NEWEST: ABI = ABI::V6;

/// What the machine reads about the host when it starts: the trust in the TSC and its frequency.
const ABOUT_THE_HOST: [&str; 2] = ["/sys/devices/system/clocksource", "/sys/devices/system/cpu"];

/// Leaves the calling thread, and those it starts, only reading below `root` and what the standard streams need,
/// and connecting if the guest has sockets. Returns what is enforced.
pub(super) fn restrict(root: Option<&Path>, network: Use) -> Result<String, RulesetError> {
    let forbidden = match network {
        Use::Nothing | Use::Clients => AccessNet::from_all(NEWEST),
        // The ports that lead into the guest are bound already.
        Use::Sockets => AccessNet::BindTcp.into(),
        Use::Ports => BitFlags::empty(),
    };
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?;
    if !forbidden.is_empty() {
        rules = rules.handle_access(forbidden)?;
    }
    let mut rules = rules.scope(Scope::from_all(NEWEST))?.create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    for path in root.into_iter().chain(ABOUT_THE_HOST.map(Path::new)) {
        // A path that is not there needs no rule.
        if let Ok(dir) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(dir, read))?;
        }
    }
    rules = allow_reopening(rules, io::stdin())?;
    rules = allow_reopening(rules, io::stdout())?;
    rules = allow_reopening(rules, io::stderr())?;
    let status = rules.restrict_self()?;
    Ok(describe(&status))
}

/// A terminal or named pipe is opened again by the console device, to have a mode of its own.
fn allow_reopening(rules: RulesetCreated, stream: impl AsFd) -> Result<RulesetCreated, RulesetError> {
    let Some(access) = access_of(&stream) else { return Ok(rules) };
    rules.add_rule(PathBeneath::new(stream, access))
}

/// What the descriptor's owner can do with it, if it is of a kind that is opened again and has a place in a file
/// system. (A pipe without a name has none: Landlock does not restrict it.)
fn access_of(stream: &impl AsFd) -> Option<BitFlags<AccessFs>> {
    let kind = FileType::from_raw_mode(fstat(stream).ok()?.st_mode);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&stream.as_fd()));
    let named = std::fs::read_link(path).is_ok_and(|target| target.is_absolute());
    if !named || !matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
        return None;
    }
    Some(match fcntl_getfl(stream).ok()? & OFlags::ACCMODE {
        OFlags::RDONLY => AccessFs::ReadFile.into(),
        OFlags::WRONLY => AccessFs::WriteFile.into(),
        _ => AccessFs::ReadFile | AccessFs::WriteFile,
    })
}

fn describe(status: &RestrictionStatus) -> String {
    match (status.landlock, &status.ruleset) {
        (LandlockStatus::Available { effective_abi, kernel_abi }, RulesetStatus::FullyEnforced)
        | (LandlockStatus::Available { effective_abi, kernel_abi }, RulesetStatus::PartiallyEnforced) => {
            format!("Landlock ABI {}", kernel_abi.unwrap_or(effective_abi as i32))
        }
        (LandlockStatus::NotEnabled, _) => "no Landlock (disabled in the kernel)".into(),
        _ => "no Landlock (the kernel lacks it)".into(),
    }
}
