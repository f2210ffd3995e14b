//! The system calls that are left once the guest is served.
//!
//! # Theory of operation
//! **The list is not here.** Beside each use of a call in crates `usernet` and `taps` and in [`crate::net`] stands a comment
//! with its name, for all modes or for some:
//!
//! ```text
//! // syscalls: recvfrom sendto
//! // syscalls(pasta): splice
//! ```
//!
//! The build script collects them ([`TAGS`]). So a call that is no longer used is no longer allowed, and one that is new is seen
//! in the change that brings it. What the standard library and the C library call for themselves is tagged below.
//!
//! What is here are conditions on arguments ([`conditions`]), for calls that can do more than what they are used for.
//!
//! Two filters, on all threads. The first ends the process at a call that only somebody else's code can want: starting a
//! program, changing namespaces, a look into another process ([`FATAL`]). The second answers
//! what is not tagged with ENOSYS: the libraries below us take that as an older kernel's answer and do without.
//!
//! A tag that is missing shows in `strace -f` as an ENOSYS.

use std::collections::{BTreeMap, BTreeSet};

use libc::c_long;
use rustix::process::Pid;
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompRule, apply_filter_all_threads};

use crate::run::isolation::calls::{self, Arg, FATAL, INT};

// (mode or "" for all, name, number), made by the build script.
include!(concat!(env!("OUT_DIR"), "/syscall_tags.rs"));

/// What serves the guest: each has a list of its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// A tap device in a namespace.
    Pasta,
    /// A stream socket.
    Passt,
    /// A vhost-user socket.
    VhostUser,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pasta, Self::Passt, Self::VhostUser];

    /// As tags name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Passt => "passt",
            Self::VhostUser => "vhost-user",
        }
    }

    /// The calls that are allowed, under conditions or without.
    fn calls(self) -> BTreeSet<(&'static str, c_long)> {
        let ours = |mode: &str| mode.is_empty() || mode == self.name();
        TAGS.iter().filter(|(mode, ..)| ours(mode)).map(|&(_, name, number)| (name, number)).collect()
    }
}

/// What is called in every mode, and so by `ring3 run` too.
#[cfg(test)]
pub(crate) fn for_all_modes() -> impl Iterator<Item = (&'static str, c_long)> {
    TAGS.iter().filter(|(mode, ..)| mode.is_empty()).map(|&(_, name, number)| (name, number))
}

// What the standard library and the C library call by themselves.
//
// The allocator and threads' stacks:
// syscalls: brk mmap munmap mremap madvise mprotect
// Threads, which the engine starts for further queues. The C library asks for clone3 first, whose flags a filter cannot see,
// and takes ENOSYS for an answer:
// syscalls: clone set_robust_list rseq gettid exit sched_yield sched_getaffinity prctl sigaltstack
// Locks, channels, waiting:
// syscalls: futex nanosleep clock_nanosleep restart_syscall
// Time, where the vDSO does not answer:
// syscalls: clock_gettime gettimeofday
// Hash tables:
// syscalls: getrandom
// The log, eventfds, pipes, signals that arrived, and the end of a descriptor:
// syscalls: read write close poll ppoll fcntl
// Handling signals, and the end of the process, abort included:
// syscalls: rt_sigaction rt_sigprocmask rt_sigreturn exit_group getpid tgkill

/// When a call is allowed: when all conditions of one of these hold. `None` is always.
fn conditions(name: &str, command: Option<Pid>) -> Option<Vec<Vec<Arg>>> {
    const EXEC: u64 = libc::PROT_EXEC as u64;
    const THREAD: u64 = libc::CLONE_THREAD as u64;
    /// Bits of open flags that write, or make a file.
    const CHANGING: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    /// What socket(2) takes besides the kind of socket.
    const KIND: u64 = INT & !((libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as u64);
    let is = |index, mask, value| Arg { index, mask, value };
    let one_of = |index, values: &[u64]| values.iter().map(|&value| vec![is(index, INT, value)]).collect();
    Some(match name {
        "mmap" | "mprotect" => vec![vec![is(2, EXEC, 0)]],
        "clone" => vec![vec![is(0, THREAD, THREAD)]],
        "prctl" => one_of(0, &[libc::PR_SET_NAME as u64]),
        "fcntl" => one_of(
            1,
            &[
                libc::F_DUPFD_CLOEXEC as u64,
                libc::F_GETFD as u64,
                libc::F_GETFL as u64,
                libc::F_SETPIPE_SZ as u64,
                libc::F_GETPIPE_SZ as u64,
            ],
        ),
        "openat" => vec![vec![is(2, CHANGING, 0)]],
        // No local sockets, and no raw ones.
        "socket" => [libc::AF_INET, libc::AF_INET6]
            .into_iter()
            .flat_map(|family| {
                [libc::SOCK_STREAM, libc::SOCK_DGRAM]
                    .map(|kind| vec![is(0, INT, family as u64), is(1, KIND, kind as u64)])
            })
            .collect(),
        "tgkill" => one_of(0, &[u64::from(std::process::id())]),
        "kill" => {
            one_of(0, &command.map(|pid| pid.as_raw_nonzero().get() as u64).into_iter().collect::<Vec<_>>())
        }
        _ => return None,
    })
}

/// Puts the filters on all threads of the process.
pub(super) fn filter(mode: Mode, command: Option<Pid>) -> Result<(), seccompiler::Error> {
    let fatal = fatal_program(mode)?;
    let allowed = allowed_program(mode, command)?;
    // Later filters add to earlier ones; this one lets the next be added.
    apply_filter_all_threads(&fatal)?;
    apply_filter_all_threads(&allowed)
}

/// The calls that end the process.
fn fatal(mode: Mode) -> Vec<c_long> {
    let allowed: BTreeSet<c_long> = mode.calls().into_iter().map(|(_, number)| number).collect();
    FATAL.iter().copied().filter(|number| !allowed.contains(number)).collect()
}

fn fatal_program(mode: Mode) -> Result<BpfProgram, BackendError> {
    let rules = fatal(mode).into_iter().map(|number| (number, Vec::new())).collect();
    calls::program(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

fn allowed_program(mode: Mode, command: Option<Pid>) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (name, number) in mode.calls() {
        let Some(alternatives) = conditions(name, command) else {
            // No rule at all means always.
            rules.insert(number, Vec::new());
            continue;
        };
        let alternatives: Result<Vec<_>, _> = alternatives.iter().map(|args| rule(args)).collect();
        let alternatives = alternatives?;
        if !alternatives.is_empty() {
            rules.insert(number, alternatives);
        }
    }
    calls::program(rules, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()), SeccompAction::Allow)
}

fn rule(args: &[Arg]) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(calls::conditions(args)?)
}
