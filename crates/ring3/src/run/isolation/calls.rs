//! The system calls that are left once the guest runs.
//!
//! # Theory of operation
//! Two filters, on all threads. The first ends the process at a call that only somebody else's code can want in
//! it ([`FATAL`]): starting a program, a look into another process, a mount, and where the guest has no network of
//! the kind `user`, a socket. The second lets through what
//! [`allowed`] lists, where it matters by its arguments too, and answers every other call with ENOSYS: the
//! libraries below us take that as an older kernel's answer and do without, so that a new version of one of them
//! does not end the run.
//!
//! Nothing here says *which* descriptor may be used: that is decided by what is open.
//!
//! A call that is missing shows in `strace -f ring3 run ...` as an ENOSYS that goes away with `--isolation off`.

use std::collections::{BTreeMap, BTreeSet};

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use uapi::iommufd::{
    IOMMU_DESTROY, IOMMU_HWPT_ALLOC, IOMMU_IOAS_ALLOC, IOMMU_IOAS_IOVA_RANGES, IOMMU_IOAS_MAP,
    IOMMU_IOAS_UNMAP,
};
use uapi::vfio::{
    VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_DETACH_IOMMUFD_PT, VFIO_DEVICE_RESET, VFIO_DEVICE_SET_IRQS,
    VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_UNMAP_DMA,
};

use super::{HostDevices, Use, Uses};

/// A condition on one argument: its bits under `mask` are `value`.
pub(crate) struct Arg {
    /// Its number, from 0.
    pub(crate) index: u8,
    pub(crate) mask: u64,
    pub(crate) value: u64,
}

/// An argument of type `int`, whose upper half the kernel ignores.
pub(crate) const INT: u64 = 0xffff_ffff;
/// A pointer or a `long`.
const LONG: u64 = u64::MAX;

const fn arg(index: u8, mask: u64, value: u64) -> Arg {
    Arg { index, mask, value }
}

/// A call that is allowed whenever all conditions hold. Several entries for one call are alternatives.
struct Call {
    number: c_long,
    when: Vec<Arg>,
}

fn all(numbers: &[c_long]) -> Vec<Call> {
    numbers.iter().map(|&number| Call { number, when: Vec::new() }).collect()
}

fn when<const N: usize>(number: c_long, when: [Arg; N]) -> Vec<Call> {
    vec![Call { number, when: when.into() }]
}

/// `number` with argument `index`, an `int`, being one of `values`.
fn one_of(number: c_long, index: u8, values: &[u64]) -> Vec<Call> {
    values.iter().flat_map(|&value| when(number, [arg(index, INT, value)])).collect()
}

/// What the guest's network calls: `usernet`'s engine, on its own thread.
fn network() -> Vec<Call> {
    const STREAM: u64 = libc::SOCK_STREAM as u64;
    const DATAGRAM: u64 = libc::SOCK_DGRAM as u64;
    /// The kind of a socket, without its flags.
    const KIND: u64 = 0xf;
    let socket = |family: libc::c_int, kind: u64| {
        when(libc::SYS_socket, [arg(0, INT, family as u64), arg(1, KIND, kind)])
    };
    [
        // TCP, UDP and ping sockets; no raw ones, no packet, netlink or local sockets, no others.
        socket(libc::AF_INET, STREAM),
        socket(libc::AF_INET, DATAGRAM),
        socket(libc::AF_INET6, STREAM),
        socket(libc::AF_INET6, DATAGRAM),
        all(&[libc::SYS_connect, libc::SYS_bind, libc::SYS_accept4]),
        all(&[libc::SYS_getsockname, libc::SYS_getpeername, libc::SYS_getsockopt]),
        // Options of sockets, IP, TCP and UDP.
        one_of(
            libc::SYS_setsockopt,
            1,
            &[
                libc::SOL_SOCKET as u64,
                libc::IPPROTO_IP as u64,
                libc::IPPROTO_IPV6 as u64,
                libc::IPPROTO_TCP as u64,
                libc::IPPROTO_UDP as u64,
            ],
        ),
        // From sockets that are not connected, and what is said about them; several datagrams at once.
        messages(),
        all(&[libc::SYS_recvmmsg]),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What serving a device to clients calls: crate `vfio`, on all of its threads.
fn clients() -> Vec<Call> {
    const SOCKET: u64 = libc::SOL_SOCKET as u64;
    const RECEIVE_TIMEOUT: u64 = libc::SO_RCVTIMEO as u64;
    /// The same with a time of 64 bits, which is tried first (linux/socket.h; not in libc on all targets).
    const RECEIVE_TIMEOUT_NEW: u64 = 66;
    let timeout = |option| when(libc::SYS_setsockopt, [arg(1, INT, SOCKET), arg(2, INT, option)]);
    [
        messages(),
        // How long a read of a client waits.
        timeout(RECEIVE_TIMEOUT),
        timeout(RECEIVE_TIMEOUT_NEW),
        // The next client, and the second socket of one.
        all(&[libc::SYS_accept4, libc::SYS_socketpair]),
        // What kind of descriptor it was given.
        all(&[libc::SYS_readlink]),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Messages that carry more than bytes, by sockets that are open: a device's calls (`vfio::user`) too.
fn messages() -> Vec<Call> {
    all(&[libc::SYS_sendmsg, libc::SYS_recvmsg])
}

/// What the host's devices need while the guest runs, and when they are given back: crate `vfio`, on the threads of vCPUs
/// and devices.
fn host_devices(devices: HostDevices) -> Vec<Call> {
    const DRIVING: [u32; 5] =
        [VFIO_DEVICE_SET_IRQS, VFIO_DEVICE_RESET, VFIO_IOMMU_UNMAP_DMA, IOMMU_IOAS_UNMAP, IOMMU_DESTROY];
    const MAPPING: [u32; 7] = [
        VFIO_IOMMU_MAP_DMA,
        IOMMU_IOAS_MAP,
        // A page table for each address space of the guest's.
        IOMMU_IOAS_ALLOC,
        IOMMU_IOAS_IOVA_RANGES,
        IOMMU_HWPT_ALLOC,
        VFIO_DEVICE_ATTACH_IOMMUFD_PT,
        VFIO_DEVICE_DETACH_IOMMUFD_PT,
    ];
    let calls: &[&[u32]] = match devices {
        HostDevices::None => &[],
        HostDevices::Mapped => &[&DRIVING],
        HostDevices::Mapping => &[&DRIVING, &MAPPING],
    };
    let calls: Vec<u64> = calls.iter().copied().flatten().map(|call| u64::from(*call)).collect();
    one_of(libc::SYS_ioctl, 1, &calls)
}

/// What the process `pid` may call, and why.
fn allowed(pid: u32, uses: Uses) -> Vec<Call> {
    const EXEC: u64 = libc::PROT_EXEC as u64;
    const WRITE: u64 = libc::PROT_WRITE as u64;
    const THREAD: u64 = libc::CLONE_THREAD as u64;
    const KEEP_SIZE: u64 = libc::FALLOC_FL_KEEP_SIZE as u64;
    /// Bits of open flags that write, or make a file.
    const CHANGING: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    [
        // The allocator, threads' stacks, and the interpreter's arena for native instructions, which is a memfd
        // mapped twice: no mapping is writable and executable, none becomes executable.
        all(&[libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise]),
        when(libc::SYS_mmap, [arg(2, EXEC, 0)]),
        when(libc::SYS_mmap, [arg(2, EXEC | WRITE, EXEC)]),
        when(libc::SYS_mprotect, [arg(2, EXEC, 0)]),
        all(&[libc::SYS_memfd_create, libc::SYS_ftruncate]),
        // Threads: vCPUs, timers, and a device's when its driver starts it. Not processes. (The C library asks
        // for clone3 first, whose flags a filter cannot see, and takes ENOSYS for an answer.)
        when(libc::SYS_clone, [arg(0, THREAD, THREAD)]),
        all(&[libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_gettid, libc::SYS_exit]),
        all(&[libc::SYS_sched_yield, libc::SYS_sched_getaffinity]),
        one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME as u64]),
        // Waiting.
        all(&[libc::SYS_futex, libc::SYS_poll, libc::SYS_ppoll, libc::SYS_restart_syscall]),
        all(&[libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_wait, libc::SYS_epoll_pwait]),
        all(&[libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_nanosleep, libc::SYS_clock_nanosleep]),
        // Time, where the vDSO does not answer.
        all(&[libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_gettimeofday]),
        // Descriptors that are open: streams, disks, files below the root, events.
        all(&[libc::SYS_read, libc::SYS_readv, libc::SYS_pread64, libc::SYS_preadv, libc::SYS_close]),
        all(&[libc::SYS_write, libc::SYS_writev, libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_lseek]),
        one_of(
            libc::SYS_fcntl,
            1,
            &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFD as u64, libc::F_GETFL as u64],
        ),
        // A disk's flush and discard; the size stays.
        all(&[libc::SYS_fsync, libc::SYS_fdatasync]),
        when(libc::SYS_fallocate, [arg(1, KEEP_SIZE, KEEP_SIZE)]),
        // Files below the root, for reading.
        when(libc::SYS_openat, [arg(2, CHANGING, libc::O_RDONLY as u64)]),
        all(&[libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fstatfs]),
        all(&[libc::SYS_readlinkat, libc::SYS_getdents64]),
        // Asking how many descriptors may be open, not setting it.
        when(libc::SYS_prlimit64, [arg(2, LONG, 0)]),
        // The sockets between our own threads: no address of another.
        when(libc::SYS_sendto, [arg(4, LONG, 0)]),
        all(&[libc::SYS_recvfrom, libc::SYS_shutdown]),
        // The terminal's mode and size. Above all not TIOCSTI, which types on the user's behalf.
        one_of(
            libc::SYS_ioctl,
            1,
            &[
                libc::TCGETS,
                libc::TCSETS,
                libc::TCSETSW,
                libc::TCSETSF,
                libc::TCGETS2,
                libc::TCSETS2,
                libc::TCSETSW2,
                libc::TCSETSF2,
                libc::TIOCGWINSZ,
            ],
        ),
        // Signals to this process, and its own end, abort included.
        all(&[libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn]),
        all(&[libc::SYS_sigaltstack, libc::SYS_getpid, libc::SYS_exit_group]),
        when(libc::SYS_tgkill, [arg(0, INT, u64::from(pid))]),
        // The entropy device, and hash tables.
        all(&[libc::SYS_getrandom]),
        match uses.network {
            Use::Nothing if uses.messages => messages(),
            Use::Nothing => Vec::new(),
            Use::Clients => clients(),
            Use::Sockets => network(),
            Use::Ports => network().into_iter().chain(all(&[libc::SYS_listen])).collect(),
        },
        host_devices(uses.host_devices),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// No part of ring3 that still runs, and no library below it, makes these calls.
pub(crate) const FATAL: [c_long; 63] = [
    // Other programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    // Network, and local sockets.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    // Files around their path, and the names of files.
    libc::SYS_open_by_handle_at,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    // Other users.
    libc::SYS_setuid,
    libc::SYS_setresuid,
    libc::SYS_setgid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // Parts of the kernel with a history.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
];

/// The calls that end the process: those that this run makes all the same are none of them.
fn fatal(uses: Uses) -> Vec<c_long> {
    let allowed: BTreeSet<c_long> = allowed(0, uses).iter().map(|call| call.number).collect();
    FATAL.iter().copied().filter(|number| !allowed.contains(number)).collect()
}

/// Puts the filters on all threads of the process.
pub(super) fn filter(uses: Uses) -> Result<(), seccompiler::Error> {
    let fatal = fatal_program(uses)?;
    let allowed = allowed_program(std::process::id(), uses)?;
    // Later filters add to earlier ones; this one lets the next be added.
    apply_filter_all_threads(&fatal)?;
    apply_filter_all_threads(&allowed)
}

fn fatal_program(uses: Uses) -> Result<BpfProgram, BackendError> {
    let rules = fatal(uses).into_iter().map(|number| (number, Vec::new())).collect();
    program(rules, SeccompAction::Allow, SeccompAction::KillProcess)
}

fn allowed_program(pid: u32, uses: Uses) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in allowed(pid, uses) {
        // No rule at all means always.
        let alternatives = rules.entry(call.number).or_default();
        if !call.when.is_empty() {
            alternatives.push(SeccompRule::new(conditions(&call.when)?)?);
        }
    }
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    program(rules, unknown, SeccompAction::Allow)
}

/// The conditions for a rule.
pub(crate) fn conditions(args: &[Arg]) -> Result<Vec<SeccompCondition>, BackendError> {
    let condition = |arg: &Arg| {
        let len = if arg.mask > INT { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
        SeccompCondition::new(arg.index, len, SeccompCmpOp::MaskedEq(arg.mask), arg.value)
    };
    args.iter().map(condition).collect()
}

/// A filter that does `listed` at the calls that `rules` has, and `otherwise` at others.
pub(crate) fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn plain(network: Use) -> Uses {
        Uses { network, messages: false, host_devices: HostDevices::None }
    }

    const USES: [Uses; 7] = [
        plain(Use::Nothing),
        plain(Use::Clients),
        plain(Use::Sockets),
        plain(Use::Ports),
        Uses { network: Use::Nothing, messages: true, host_devices: HostDevices::None },
        Uses { network: Use::Sockets, messages: false, host_devices: HostDevices::Mapped },
        Uses { network: Use::Nothing, messages: false, host_devices: HostDevices::Mapping },
    ];

    #[test]
    fn the_tables_do_not_contradict_themselves() {
        for uses in USES {
            let calls = allowed(1, uses);
            let (always, limited): (Vec<_>, Vec<_>) = calls.iter().partition(|call| call.when.is_empty());
            let unique: BTreeSet<c_long> = always.iter().map(|call| call.number).collect();
            assert_eq!(unique.len(), always.len(), "listed twice");
            assert!(limited.iter().all(|call| !unique.contains(&call.number)), "limited, and not limited");
            let fatal = fatal(uses);
            assert!(calls.iter().all(|call| !fatal.contains(&call.number)), "allowed, and fatal");
            assert_eq!(fatal.iter().collect::<BTreeSet<_>>().len(), fatal.len(), "fatal twice");
            let not_fatal = match uses.network {
                Use::Nothing => 0,
                Use::Clients => 1,
                Use::Sockets => 4,
                Use::Ports => 5,
            };
            assert_eq!(FATAL.len() - fatal.len(), not_fatal);
        }
    }

    /// What the engine calls is tagged beside the calls.
    #[test]
    fn the_network_can_do_what_its_tags_say() {
        // While it is made, and not once the guest runs.
        let before = [libc::SYS_inotify_init1, libc::SYS_inotify_add_watch];
        // What the other front ends do with their standard streams.
        let others = [libc::SYS_dup2, libc::SYS_dup3];
        let numbers = |uses| allowed(1, uses).iter().map(|call| call.number).collect::<BTreeSet<c_long>>();
        let (sockets, ports) = (numbers(plain(Use::Sockets)), numbers(plain(Use::Ports)));
        for (name, number) in crate::net::isolation::for_all_modes() {
            let elsewhere = before.contains(&number) || others.contains(&number);
            assert!(ports.contains(&number) || elsewhere, "{name}");
        }
        assert!(ports.difference(&sockets).eq(&[libc::SYS_listen]), "what control at run time takes");
    }

    #[test]
    fn the_document_has_the_numbers() {
        let text = include_str!("../../../../../docs/isolation.md");
        let count = |numbers: Vec<c_long>| numbers.into_iter().collect::<BTreeSet<_>>().len();
        for (uses, network) in USES.into_iter().zip([
            "without a network",
            "serving a device",
            "with a network",
            "with --net-control",
            "with --device alone",
        ]) {
            let calls = allowed(1, uses);
            let total = count(calls.iter().map(|call| call.number).collect());
            let limited = count(calls.iter().filter(|c| !c.when.is_empty()).map(|c| c.number).collect());
            let allowed =
                format!("{network} {total} system calls, {limited} of them only with certain arguments");
            let fatal = format!("{network} {} system calls that nobody", fatal(uses).len());
            for words in [allowed, fatal] {
                assert!(text.contains(&words), "docs/isolation.md does not say: {words}");
            }
        }
    }

    #[test]
    fn the_programs_are_within_the_kernels_limit() {
        // BPF_MAXINSNS, and the sum that every system call pays for at worst.
        for uses in USES {
            for program in [fatal_program(uses).unwrap(), allowed_program(1, uses).unwrap()] {
                assert!((10..4096).contains(&program.len()), "{}", program.len());
            }
        }
    }
}
