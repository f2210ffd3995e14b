//! The way into a case and out of it.

use std::arch::naked_asm;
use std::io;
use std::mem::offset_of;

/// Where the header of an XSAVE image is.
pub(super) const XSAVE_HEADER: usize = 512;
/// Where the upper halves of the YMM registers are in an XSAVE image in standard form. CPUID leaf 0DH tells
/// it; that it is 576 is fixed by the images that every processor with AVX writes.
pub(super) const XSAVE_AVX: usize = 576;

/// The registers of a case: before [`enter`] its input, after it what the signal handler found.
#[repr(C, align(64))]
pub(super) struct Context {
    /// x87, SSE and AVX state as an XSAVE image in standard form.
    pub(super) xsave: [u8; 832],
    /// General registers by encoding.
    pub(super) gpr: [u64; 16],
    /// RIP.
    pub(super) rip: u64,
    /// RFLAGS.
    pub(super) rflags: u64,
    /// The code segment's selector.
    pub(super) cs: u64,
    /// The stack segment's selector.
    pub(super) ss: u64,
    /// RSP of the host while the case runs.
    pub(super) host_rsp: u64,
    /// The exception's vector.
    pub(super) trap_number: u64,
    /// Its error code.
    pub(super) error_code: u64,
    /// CR2.
    pub(super) address: u64,
}

impl Default for Context {
    fn default() -> Self {
        Self {
            xsave: [0; 832],
            gpr: [0; 16],
            rip: 0,
            rflags: 0,
            cs: 0,
            ss: 0,
            host_rsp: 0,
            trap_number: 0,
            error_code: 0,
            address: 0,
        }
    }
}

/// Loads the registers of `context` and goes to its RIP; returns by way of the signal handler.
///
/// # Safety
/// The handler must know `context`, and the code at its RIP must end in an exception without having
/// changed what it must not.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn enter(context: *mut Context) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + {host_rsp}], rsp",
        // A case may have set NT, which the return from the signal leaves set and IRETQ does not want.
        "push 2",
        "popfq",
        // For 32-bit code, which uses them; 64-bit code can only see the selectors.
        "mov eax, dword ptr [rdi + {ss}]",
        "mov ds, eax",
        "mov es, eax",
        "mov eax, 7",
        "xor edx, edx",
        "xrstor64 [rdi + {xsave}]",
        "push qword ptr [rdi + {ss}]",
        "push qword ptr [rdi + {gpr} + 4 * 8]",
        "push qword ptr [rdi + {rflags}]",
        "push qword ptr [rdi + {cs}]",
        "push qword ptr [rdi + {rip}]",
        "mov rax, [rdi + {gpr} + 0 * 8]",
        "mov rcx, [rdi + {gpr} + 1 * 8]",
        "mov rdx, [rdi + {gpr} + 2 * 8]",
        "mov rbx, [rdi + {gpr} + 3 * 8]",
        "mov rbp, [rdi + {gpr} + 5 * 8]",
        "mov rsi, [rdi + {gpr} + 6 * 8]",
        "mov r8,  [rdi + {gpr} + 8 * 8]",
        "mov r9,  [rdi + {gpr} + 9 * 8]",
        "mov r10, [rdi + {gpr} + 10 * 8]",
        "mov r11, [rdi + {gpr} + 11 * 8]",
        "mov r12, [rdi + {gpr} + 12 * 8]",
        "mov r13, [rdi + {gpr} + 13 * 8]",
        "mov r14, [rdi + {gpr} + 14 * 8]",
        "mov r15, [rdi + {gpr} + 15 * 8]",
        "mov rdi, [rdi + {gpr} + 7 * 8]",
        "iretq",
        host_rsp = const offset_of!(Context, host_rsp),
        xsave = const offset_of!(Context, xsave),
        gpr = const offset_of!(Context, gpr),
        rip = const offset_of!(Context, rip),
        rflags = const offset_of!(Context, rflags),
        cs = const offset_of!(Context, cs),
        ss = const offset_of!(Context, ss),
    )
}

/// The second half of [`enter`]: where the signal handler goes on, with RSP as it was before the case.
///
/// # Safety
/// Not to be called.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn leave() {
    naked_asm!("vzeroupper", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",)
}

/// Sets this thread's GS base, which Linux programs in 64-bit mode leave alone.
pub(super) fn set_gs_base(base: u64) -> io::Result<()> {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: needed for the system call that libc does not wrap; nothing in the process uses GS.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
