//! What cannot be delivered or returned from is a triple fault, never a double fault, and changes nothing.

use pvm::testing::Use;
use pvm::{Event, TripleFault};

use crate::rig::*;

/// Ways for the shared structure to be of no use.
const SPOILED: [fn(&mut Vcpu); 4] = [
    |v| v.set(msr::VCPU_STRUCT, 0),
    |v| {
        v.cpu.pages.remove(&PVCS);
    },
    |v| v.cpu.map(PVCS, Use::ReadOnly),
    |v| v.cpu.map(PVCS, Use::Mmio),
];

/// `event` shuts `v` down and leaves everything else as it is.
#[track_caller]
fn shuts_down(mut v: Vcpu, event: Event) {
    let mut expected = v.clone();
    assert_eq!(v.deliver(event), Err(TripleFault));
    v.assert_is(&mut expected);
}

#[test]
fn an_event_from_user_mode_needs_the_structure() {
    for spoil in SPOILED {
        let mut v = Vcpu::user();
        spoil(&mut v);
        for event in [Event::new(0), Event::nmi(), Event::with_code(14, 4), Event::new(255)] {
            shuts_down(v.clone(), event);
        }
    }
}

#[test]
fn a_system_call_needs_the_structure() {
    for spoil in SPOILED {
        let mut v = Vcpu::user();
        spoil(&mut v);
        let pages = v.cpu.pages.clone();
        assert_eq!(v.syscall_at(0x40_0000), Err(TripleFault));
        assert_eq!(v.cpu.pages, pages);
        assert_eq!(v.pvm.mode(), pvm::Mode::User);
    }
}

#[test]
fn an_interrupt_in_supervisor_mode_needs_the_structure() {
    for spoil in SPOILED {
        let mut v = Vcpu::supervisor();
        spoil(&mut v);
        shuts_down(v.clone(), Event::new(32));
        shuts_down(v, Event::new(255));
    }
}

#[test]
fn a_page_fault_in_supervisor_mode_needs_the_structure() {
    for spoil in SPOILED {
        let mut v = Vcpu::supervisor();
        spoil(&mut v);
        let before = v.cpu.registers;
        assert_eq!(v.deliver(Event::with_code(14, 0)), Err(TripleFault));
        // The frame has been written by then; the registers have not.
        assert_eq!(v.cpu.registers, before);
    }
}

#[test]
fn an_exception_in_supervisor_mode_needs_a_stack() {
    let at = |rsp: u64, redzone: u64| {
        let mut v = Vcpu::supervisor();
        v.set(msr::SUPERVISOR_REDZONE, redzone);
        v.cpu.registers.rsp = rsp;
        v
    };
    // Not there; crossing into what is not there, on either side of the page.
    shuts_down(at(STACK - 0x1000, 0), Event::new(6));
    shuts_down(at(STACK - 0x1000, 0), Event::nmi());
    shuts_down(at(STACK, 0), Event::new(6));
    shuts_down(at(STACK + 0x30, 0), Event::new(6));
    shuts_down(at(STACK + 0x1010, 0), Event::new(6));
    // Ended by the red zone.
    shuts_down(at(STACK + 0x800, 0x7d0), Event::new(6));
    // Read-only, and a device.
    for usable in [Use::ReadOnly, Use::Mmio] {
        let mut v = at(STACK + 0x800, 0);
        v.cpu.map(STACK, usable);
        shuts_down(v, Event::new(6));
    }
    // From here on the page at the address would be there.
    for page in [0, 0xffff_ffff_ffff_f000, 0x0000_8000_0000_0000, 0x8000_0000_0000_0000] {
        let mut v = at(0, 0);
        v.cpu.map(page, Use::Ram);
        let (low, high) = (page.wrapping_add(0x800), page.wrapping_add(0xff0));
        match page {
            // Below zero is the top of the address space, which is not there.
            0 => {
                for (rsp, redzone) in [(0, 0), (0x30, 0), (0x100, 0x100), (0x800, 0x1000)] {
                    let mut v = v.clone();
                    v.cpu.registers.rsp = rsp;
                    v.set(msr::SUPERVISOR_REDZONE, redzone);
                    shuts_down(v, Event::new(6));
                }
            }
            // Above the top is zero, which is not there.
            0xffff_ffff_ffff_f000 => {
                v.cpu.registers.rsp = 0x20;
                shuts_down(v, Event::new(6));
            }
            // Not canonical.
            _ => {
                for rsp in [low, high] {
                    v.cpu.registers.rsp = rsp;
                    shuts_down(v.clone(), Event::new(6));
                }
            }
        }
    }
}

#[test]
fn a_stack_can_wrap_if_both_ends_are_there() {
    let mut v = Vcpu::supervisor();
    v.cpu.map(0, Use::Ram);
    v.cpu.map(0xffff_ffff_ffff_f000, Use::Ram);
    v.set(msr::SUPERVISOR_REDZONE, 0x10);
    v.cpu.registers.rsp = 0x30;
    assert_eq!(v.deliver(Event::with_code(13, 0x77)), Ok(()));
    assert_eq!(v.cpu.registers.rsp, 0xffff_ffff_ffff_ffe0);
    assert_eq!(v.cpu.bytes(0xffff_ffff_ffff_ffe0), [0x77, 0, 0, 0, 13, 0, 0, 0]);
    assert_eq!(v.cpu.bytes(0), 0x30u64.to_le_bytes(), "RSP");
    assert_eq!(v.cpu.bytes(8), SUPERVISOR_SS.to_le_bytes());
}

#[test]
fn a_return_to_user_mode_needs_the_structure() {
    for spoil in SPOILED {
        let mut v = Vcpu::supervisor();
        spoil(&mut v);
        let mut expected = v.clone();
        expected.cpu.registers.rip = RETU_RIP + 2;
        assert_eq!(v.syscall_at(RETU_RIP), Err(TripleFault));
        v.assert_is(&mut expected);
    }
}

#[test]
fn a_return_to_supervisor_mode_needs_the_stack() {
    for rsp in [0, STACK - 64, STACK - 8, STACK + 0xfc8, STACK + 0x1000, 0x0000_8000_0000_0000, u64::MAX] {
        let mut v = Vcpu::supervisor();
        v.cpu.registers.rsp = rsp;
        let before = v.clone();
        assert_eq!(v.syscall_at(RETS_RIP), Err(TripleFault));
        assert_eq!(v.cpu.pages, before.cpu.pages);
        assert_eq!(v.cpu.registers.rsp, rsp);
    }
    let mut v = Vcpu::supervisor();
    v.cpu.map(STACK, Use::Mmio);
    assert_eq!(v.syscall_at(RETS_RIP), Err(TripleFault));
}

#[test]
fn a_page_that_comes_back_is_used_again() {
    let mut v = Vcpu::user();
    let page = v.cpu.pages.remove(&PVCS).unwrap();
    assert_eq!(v.clone().deliver(Event::new(32)), Err(TripleFault));
    v.cpu.pages.insert(PVCS, page);
    assert_eq!(v.deliver(Event::new(32)), Ok(()));
    assert_eq!(v.cpu.bytes(PVCS + 12), 32u32.to_le_bytes());
}
