//! The host CPU as an engine.
//!
//! # Theory of operation
//! The data and the code window are mapped at the addresses that cases name, each a second time elsewhere
//! for writing. [`enter`] loads every register of a case and ends in IRETQ, which sets RIP, RSP and RFLAGS
//! in one step, may switch to 32-bit code, and is serializing, so that the bytes just written are what
//! executes. The instruction, or the INT3 after it, ends in an exception; the kernel turns that into a
//! signal, whose frame holds all registers, the vector and the error code. The handler copies them, puts
//! the host's own values into the frame and returns from the signal to [`enter`]'s second half, which
//! returns to the caller.
//!
//! # Safety
//! All `unsafe` of this crate is in this module. An instruction under test runs with the process's rights:
//! the generator must not make system calls, branches to mapped memory other than the windows, or accesses
//! through the FS segment, which is the thread's own data. Wild pointers are possible and meant to fault:
//! with position-independent host code nothing else lies below 4 GiB, and of the 64-bit values that cases
//! use none points to where the host maps anything, short of one chance in 2^30.
//!
//! One [`HostCpu`] exists at a time: it owns the fixed addresses and the process's signal handlers.

mod enter;
mod signal;
mod window;

use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, DATA_WRITABLE, Engine, EngineError, Exception, FILLER, GS_BASE,
    Memory, Mode, Outcome, Registers, USER_CS, USER_CS32, USER_SS, VectorState,
};
use enter::{Context, XSAVE_AVX, XSAVE_HEADER, enter};
use signal::Signals;
use window::Window;

/// Held by the one [`HostCpu`].
static ONLY: Mutex<()> = Mutex::new(());

/// The host CPU.
pub struct HostCpu {
    context: Box<Context>,
    data: Window,
    code: Window,
    /// What lies in the code window: where, and how many bytes.
    placed: (usize, usize),
    /// After the windows, which it outlives in no way that matters.
    _signals: Signals,
    _only: MutexGuard<'static, ()>,
    /// Signal stack and mask belong to the thread.
    _thread: PhantomData<*const ()>,
}

impl std::fmt::Debug for HostCpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostCpu")
    }
}

impl HostCpu {
    /// Prepares this thread and process; waits while another [`HostCpu`] exists.
    ///
    /// # Errors
    /// When the host refuses the mappings, or has no AVX.
    pub fn new() -> Result<Self, EngineError> {
        if !std::is_x86_feature_detected!("avx") || !std::is_x86_feature_detected!("xsave") {
            return Err(EngineError::Lacks("AVX"));
        }
        let only = ONLY.lock().unwrap_or_else(PoisonError::into_inner);
        let host = |what| move |source| EngineError::Host { what, source };
        let data = Window::new(DATA, DATA_SIZE, libc::PROT_READ | libc::PROT_WRITE)
            .map_err(host("mapping the data window"))?;
        data.protect(DATA_WRITABLE, DATA_SIZE - DATA_WRITABLE, libc::PROT_READ)
            .map_err(host("protecting the data window"))?;
        let mut code = Window::new(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC)
            .map_err(host("mapping the code window"))?;
        code.bytes().fill(FILLER);
        let signals = Signals::install().map_err(host("installing signal handlers"))?;
        enter::set_gs_base(GS_BASE).map_err(host("setting the GS base"))?;
        Ok(Self {
            context: Box::default(),
            data,
            code,
            placed: (0, 0),
            _signals: signals,
            _only: only,
            _thread: PhantomData,
        })
    }

    fn place(&mut self, case: &Case) {
        let code = self.code.bytes();
        let (start, len) = self.placed;
        if let Some(old) = code.get_mut(start..start + len) {
            old.fill(FILLER);
        }
        let start = case.registers.rip.wrapping_sub(CODE) as usize;
        self.placed = (0, 0);
        if let Some(room) = code.get_mut(start..) {
            let len = room.len().min(case.bytes.len());
            room[..len].copy_from_slice(&case.bytes[..len]);
            self.placed = (start, len);
        }
    }
}

impl Engine for HostCpu {
    fn run(&mut self, case: &Case) -> Result<Outcome, EngineError> {
        self.place(case);
        self.data.bytes().copy_from_slice(&case.memory[..]);
        let context = &mut *self.context;
        context.gpr = case.registers.gpr;
        context.rip = case.registers.rip;
        context.rflags = case.registers.rflags;
        context.cs = u64::from(if case.mode == Mode::Bits64 { USER_CS } else { USER_CS32 });
        context.ss = u64::from(USER_SS);
        store_vector(&case.registers.vector, &mut context.xsave);
        signal::expect(context);
        // SAFETY: needed to execute the instruction; the signal handlers are installed and know the context,
        // the windows are mapped, and the case obeys the rules of the module's documentation.
        unsafe { enter(context) };
        signal::expect_none();

        let mut memory: Box<Memory> = Box::new([0; DATA_SIZE as usize]);
        memory.copy_from_slice(self.data.bytes());
        let registers = Registers {
            gpr: context.gpr,
            rip: context.rip,
            rflags: context.rflags,
            vector: load_vector(&context.xsave),
        };
        let exception = Exception {
            vector: context.trap_number as u8,
            error_code: context.error_code as u32,
            address: context.address,
        };
        Ok(Outcome::from_exception(case, exception, registers, memory))
    }
}

/// Writes an XSAVE image in standard form (Intel SDM vol. 1, 13.4).
fn store_vector(v: &VectorState, image: &mut [u8]) {
    image[0..2].copy_from_slice(&v.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&v.fsw.to_le_bytes());
    image[4] = v.tags;
    image[5..24].fill(0);
    image[24..28].copy_from_slice(&v.mxcsr.to_le_bytes());
    for (n, st) in v.st.iter().enumerate() {
        image[32 + n * 16..42 + n * 16].copy_from_slice(st);
    }
    image[XSAVE_HEADER..XSAVE_HEADER + 64].fill(0);
    image[XSAVE_HEADER] = 7;
    for (n, ymm) in v.ymm.iter().enumerate() {
        image[160 + n * 16..176 + n * 16].copy_from_slice(&ymm[..16]);
        image[XSAVE_AVX + n * 16..XSAVE_AVX + 16 + n * 16].copy_from_slice(&ymm[16..]);
    }
}

/// Reads an XSAVE image in standard form; components marked as initial hold nothing of value.
fn load_vector(image: &[u8]) -> VectorState {
    let mut v = VectorState::default();
    let present = image[XSAVE_HEADER];
    let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    v.mxcsr = u32::from(u16_at(24)) | u32::from(u16_at(26)) << 16;
    if present & 1 != 0 {
        (v.fcw, v.fsw, v.tags) = (u16_at(0), u16_at(2), image[4]);
        for (n, st) in v.st.iter_mut().enumerate() {
            st.copy_from_slice(&image[32 + n * 16..42 + n * 16]);
        }
    }
    for (n, ymm) in v.ymm.iter_mut().enumerate() {
        if present & 2 != 0 {
            ymm[..16].copy_from_slice(&image[160 + n * 16..176 + n * 16]);
        }
        if present & 4 != 0 {
            ymm[16..].copy_from_slice(&image[XSAVE_AVX + n * 16..XSAVE_AVX + 16 + n * 16]);
        }
    }
    v
}
