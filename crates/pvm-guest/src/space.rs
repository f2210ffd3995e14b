//! The address space of the checks: the kernel's root, the user's root, and the pages of user space.

use crate::abi::{PvmMsr, hypercall, msr};
use crate::cpu::{Cpu, user_space};
use crate::insn;
use crate::memory::{self, PAGE, PageFrame, Physical, place};
use crate::paging::{Tree, rights, user_programs};

/// Both roots, and the pages that are mapped in user space.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// The kernel and user space.
    pub kernel: Tree,
    /// User space only.
    pub user: Tree,
    /// The pages at [`user_space::DATA`].
    pub data: [PageFrame; user_space::DATA_PAGES as usize],
}

impl Space {
    /// Makes user space, and puts it under the kernel's root too.
    pub fn new(kernel: Tree) -> Self {
        let user = Tree::new();
        let programs = user_programs();
        for (n, page) in (0..).zip(programs.clone().step_by(PAGE as usize)) {
            user.map(user_space::CODE + n * PAGE, Physical(page), rights::USER_CODE);
        }
        let data = core::array::from_fn(|_| PageFrame::new());
        for (n, frame) in (0..).zip(data) {
            user.map(user_space::DATA + n * PAGE, frame.address(), rights::USER_DATA);
        }
        kernel.share_slot(user, user_space::CODE);
        Self { kernel, user, data }
    }

    /// Where supervisor-only test pages go.
    pub fn test(&self) -> u64 {
        memory::base() + place::TEST
    }

    /// Maps a user page, in both roots as they share it, and drops what the TLB may have.
    pub fn map_user(&self, address: u64, frame: PageFrame, rights: u64) {
        self.user.map(address, frame.address(), rights);
        flush();
    }

    /// Maps a page of the kernel's.
    pub fn map_kernel(&self, address: u64, frame: PageFrame, rights: u64) {
        self.kernel.map(address, frame.address(), rights);
        flush();
    }

    /// What every check may rely on afterwards: roots, red zone, closed interrupts. A check that failed may have left
    /// them otherwise.
    pub fn settle(&self, cpu: &Cpu) {
        crate::lapic::timer_off();
        cpu.set_interrupt_flag(false);
        insn::hypercall(
            hypercall::LOAD_PGTBL,
            [hypercall::LOAD_PGTBL_FLUSH, self.kernel.root(), self.user.root(), 0],
        );
        wrmsr(msr(PvmMsr::SupervisorRedzone), crate::cpu::REDZONE);
        cpu.clear_events();
    }
}

/// WRMSR by hypercall.
pub fn wrmsr(index: u32, value: u64) -> u64 {
    insn::hypercall(hypercall::WRMSR, [index.into(), value, 0, 0])
}

/// RDMSR by hypercall.
pub fn rdmsr(index: u32) -> u64 {
    insn::hypercall(hypercall::RDMSR, [index.into(), 0, 0, 0])
}

/// Drops all translations.
pub fn flush() {
    insn::hypercall(hypercall::TLB_FLUSH, [0; 4]);
}
