//! The memory that holds native code, and the calls into it.
//!
//! # Theory of operation
//! A memory file is mapped twice: once to write code into, once to execute it. No page is ever both
//! writable and executable at one address, and no protection changes at run time. Code is appended; when
//! the arena is nearly full, all of it is given up at once.
//!
//! This file holds all `unsafe` of native execution. What makes it sound is [`super::verify`]: only code
//! that has passed it enters the arena, and such code touches nothing but the `CpuState` that it is called
//! with, clobbers what a C function may, and returns. Calls name code by a checked index, so that any
//! [`crate::insn::Insn`], however made, at worst computes the wrong thing.

use std::arch::asm;
use std::io;

use super::verify::Verified;
use crate::state::CpuState;

/// What the code of one block may take at most: 48 instructions of some 300 bytes.
const MARGIN: usize = 64 << 10;
/// Stubs start at multiples of this.
const ALIGN: usize = 16;

/// Names a stub in the arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StubId(pub(crate) u32);

/// Executable memory with the stubs in it.
#[derive(Debug)]
pub(crate) struct Arena {
    /// Address of the writable view.
    write: usize,
    /// Address of the executable view.
    execute: usize,
    /// Size of each view in bytes.
    size: usize,
    used: usize,
    /// Addresses of the stubs in the executable view.
    stubs: Vec<usize>,
}

impl Arena {
    /// An empty arena of `size` bytes, a multiple of the page size. Pages are taken from the host as they are
    /// written.
    ///
    /// # Errors
    /// When the host refuses the memory, or to map it executable.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        // SAFETY: needed because memory files and mappings exist only as system calls; the name is a C
        // string, all lengths agree, and the mappings are new ones at addresses the kernel chooses.
        unsafe {
            let fd = libc::memfd_create(c"ring3-native".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let map = |protection| {
                let address = libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, fd, 0);
                if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
            };
            let views = if libc::ftruncate(fd, size as libc::off_t) != 0 {
                Err(io::Error::last_os_error())
            } else {
                map(libc::PROT_READ | libc::PROT_WRITE).and_then(|write| {
                    map(libc::PROT_READ | libc::PROT_EXEC).map(|execute| (write, execute)).inspect_err(|_| {
                        libc::munmap(write, size);
                    })
                })
            };
            libc::close(fd);
            let (write, execute) = views?;
            Ok(Self { write: write as usize, execute: execute as usize, size, used: 0, stubs: Vec::new() })
        }
    }

    /// Adds a stub; `None` if there is no room.
    pub(crate) fn add(&mut self, code: &Verified) -> Option<StubId> {
        let code = code.bytes();
        let end = self.used.checked_add(code.len())?;
        if end > self.size {
            return None;
        }
        let id = u32::try_from(self.stubs.len()).ok()?;
        // SAFETY: needed to fill the mapping; `used .. end` was just checked to lie inside it, and no
        // reference to it exists.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), (self.write + self.used) as *mut u8, code.len());
        }
        self.stubs.push(self.execute + self.used);
        self.used = end.next_multiple_of(ALIGN);
        Some(StubId(id))
    }

    /// Whether the next block's code may not fit.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.used > self.size.saturating_sub(MARGIN)
    }

    /// Gives up all stubs.
    pub(crate) fn reset(&mut self) {
        self.used = 0;
        self.stubs.clear();
    }

    /// Runs a stub on `state` with the host's MXCSR as it is. `false` if there is no such stub.
    #[inline(always)]
    pub(crate) fn call(&self, id: StubId, state: &mut CpuState) -> bool {
        let Some(&address) = self.stubs.get(id.0 as usize) else { return false };
        // SAFETY: needed to run generated code; `address` is the start of a stub that passed
        // `verify`: it is a function of this type that touches `state` only, and stays mapped and unchanged
        // as long as it is in `stubs`.
        unsafe {
            let stub: unsafe extern "sysv64" fn(*mut CpuState) = std::mem::transmute(address);
            stub(state);
        }
        true
    }

    /// Runs a stub on `state` with `mxcsr`, which must mask all exceptions, and returns MXCSR as the stub
    /// left it; `None` if there is no such stub.
    pub(crate) fn call_with_mxcsr(&self, id: StubId, state: &mut CpuState, mxcsr: u32) -> Option<u32> {
        let &address = self.stubs.get(id.0 as usize)?;
        // Masked and without reserved bits, whatever the caller said: neither LDMXCSR nor the stub traps.
        let mut words = [mxcsr & crate::fpu::MXCSR_MASK | 0x1f80, 0, 0];
        // SAFETY: needed to run generated code with another rounding mode, which Rust code must not see:
        // hence the switch to it, the call and the switch back are one block. The stub is as in `call`;
        // `words` is this frame's; R12 to R14 survive the call.
        unsafe {
            asm!(
                "stmxcsr dword ptr [r13 + 8]",
                "ldmxcsr dword ptr [r13]",
                "call r12",
                "stmxcsr dword ptr [r13 + 4]",
                "ldmxcsr dword ptr [r13 + 8]",
                in("r12") address,
                in("r13") words.as_mut_ptr(),
                inlateout("rdi") std::ptr::from_mut(state) => _,
                clobber_abi("sysv64"),
            );
        }
        Some(words[1])
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: needed to give the mappings back; both are ours, of this size, and nobody can call into
        // them without the arena.
        unsafe {
            libc::munmap(self.write as *mut libc::c_void, self.size);
            libc::munmap(self.execute as *mut libc::c_void, self.size);
        }
    }
}

/// Loads the host's MXCSR with default control bits and the exception flags of `mxcsr`.
pub(crate) fn load_host_flags(mxcsr: u32) {
    let word = crate::fpu::MXCSR_DEFAULT | mxcsr & crate::fpu::MXCSR_FLAGS;
    // SAFETY: needed to reach the register; the control bits are those that Rust code expects, and the
    // exception flags may be anything.
    unsafe { asm!("ldmxcsr dword ptr [{}]", in(reg) &raw const word, options(nostack, readonly)) }
}

/// The exception flags in the host's MXCSR.
pub(crate) fn host_flags() -> u32 {
    let mut word = 0u32;
    // SAFETY: needed to reach the register; stores four bytes into `word`.
    unsafe { asm!("stmxcsr dword ptr [{}]", in(reg) &raw mut word, options(nostack)) }
    word & crate::fpu::MXCSR_FLAGS
}
