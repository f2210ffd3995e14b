//! Protection keys: what they forbid, what PKRU and IA32_PKRS change in pages at hand, and PKRU as XSAVE state.

use cpu::fpu::component;
use cpu::state::{cr0, cr4, reg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::harness::*;

const PF: u8 = 14;
const KEY: u32 = 5;
/// A page with the key `KEY`.
const KEYED: u64 = DATA;
/// A page with key 0.
const OTHER: u64 = DATA + 0x1000;
/// Memory for XSAVE, with key 0.
const AREA: u64 = DATA + 0x2000;
/// IA32_PKRS.
const PKRS: u32 = 0x6e1;

/// Error code bits of a page fault.
mod error {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITE: u64 = 2;
    pub(super) const USER: u64 = 4;
    pub(super) const KEY: u64 = 0x20;
}

/// The bits of `KEY` in PKRU and IA32_PKRS.
const fn rights(access_disable: bool, write_disable: bool) -> u32 {
    (access_disable as u32 | (write_disable as u32) << 1) << (2 * KEY)
}

const OPEN: u32 = 0;
const NO_WRITE: u32 = rights(false, true);
const NO_ACCESS: u32 = rights(true, false);

/// The page table entry of `address`.
fn entry(address: u64) -> u64 {
    PT + (address >> 12) * 8
}

fn set_key(g: &Guest, address: u64, key: u32, bits: u64) {
    g.poke::<u64>(entry(address), address | bits | u64::from(key) << 59);
}

/// 64-bit mode with CR4.PKE, and `KEY` on the user-mode page `KEYED`.
fn keyed() -> Guest {
    let mut g = Guest::long();
    g.vcpu.state.cr4 |= cr4::PKE;
    g.vcpu.refresh();
    set_key(&g, KEYED, KEY, 7);
    g
}

/// The same with CR4.PKS, and the page a supervisor-mode page.
fn supervisor_keyed() -> Guest {
    let mut g = keyed();
    g.vcpu.state.cr4 |= cr4::PKS;
    g.vcpu.refresh();
    set_key(&g, KEYED, KEY, 3);
    g
}

fn wrpkru(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.wrpkru()
}

fn write_pkrs(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.mov(ecx, PKRS)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Sets XCR0 to x87, SSE and PKRU, and the requested-feature bitmap to the last.
fn pkru_is_saved(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, cr4)?;
    a.or(eax, cr4::OSXSAVE as i32)?;
    a.mov(cr4, rax)?;
    a.mov(eax, 0x203)?;
    a.xor(edx, edx)?;
    a.xor(ecx, ecx)?;
    a.xsetbv()
}

/// Runs `program`, which must end in a page fault at `address`; returns the error code.
#[track_caller]
fn page_fault(
    g: &mut Guest,
    address: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> u64 {
    g.code(program);
    let trap = g.fault(PF);
    assert_eq!(g.vcpu.state.cr2, address);
    trap.error_code.unwrap_or_default()
}

/// Whether an access was made or what the error code of the page fault was.
fn access(g: &mut Guest, address: u64, write: bool) -> Result<(), u64> {
    g.code(|a| if write { a.mov(dword_ptr(address), ebx) } else { a.mov(ebx, dword_ptr(address)) });
    assert_eq!(g.run(), cpu::Outcome::Halted);
    match g.trap() {
        None => Ok(()),
        // HLT at CPL 3.
        Some(t) if t.vector == 13 && t.cs & 3 == 3 => Ok(()),
        Some(t) => {
            assert_eq!((t.vector, g.vcpu.state.cr2), (PF, address));
            Err(t.error_code.unwrap_or_default())
        }
    }
}

#[test]
fn pkru_judges_every_data_access_to_user_pages() {
    for user in [false, true] {
        for write_protect in [false, true] {
            for (access_disable, write_disable) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                for write in [false, true] {
                    let mut g = keyed();
                    if !write_protect {
                        g.vcpu.state.cr0 &= !cr0::WP;
                    }
                    g.vcpu.state.pkru = rights(access_disable, write_disable);
                    g.vcpu.refresh();
                    if user {
                        g.user(sel::USER_CODE64);
                    }
                    let forbidden = access_disable || write && write_disable && (user || write_protect);
                    let code = error::PRESENT
                        | error::KEY
                        | if write { error::WRITE } else { 0 }
                        | if user { error::USER } else { 0 };
                    let expected = if forbidden { Err(code) } else { Ok(()) };
                    let what = (user, write_protect, access_disable, write_disable, write);
                    assert_eq!(access(&mut g, KEYED, write), expected, "{what:?}");
                }
            }
        }
    }
}

#[test]
fn pkrs_judges_every_data_access_to_supervisor_pages() {
    for write_protect in [false, true] {
        for (access_disable, write_disable) in [(false, false), (false, true), (true, false), (true, true)] {
            for write in [false, true] {
                let mut g = supervisor_keyed();
                if !write_protect {
                    g.vcpu.state.cr0 &= !cr0::WP;
                }
                // PKRU forbids what it can: it is not asked about this page.
                g.vcpu.state.pkru = NO_ACCESS;
                g.vcpu.refresh();
                g.vcpu.write_msr(PKRS, rights(access_disable, write_disable).into()).unwrap();
                let forbidden = access_disable || write && write_disable && write_protect;
                let code = error::PRESENT | error::KEY | if write { error::WRITE } else { 0 };
                let expected = if forbidden { Err(code) } else { Ok(()) };
                let what = (write_protect, access_disable, write_disable, write);
                assert_eq!(access(&mut g, KEYED, write), expected, "{what:?}");
            }
        }
    }
}

#[test]
fn keys_do_not_judge_without_their_cr4_bit() {
    let mut g = keyed();
    g.vcpu.state.cr4 &= !cr4::PKE;
    g.vcpu.state.pkru = NO_ACCESS;
    g.vcpu.refresh();
    assert_eq!(access(&mut g, KEYED, true), Ok(()));
    let mut g = supervisor_keyed();
    g.vcpu.state.cr4 &= !cr4::PKS;
    g.vcpu.refresh();
    g.vcpu.write_msr(PKRS, NO_ACCESS.into()).unwrap();
    assert_eq!(access(&mut g, KEYED, true), Ok(()));
}

#[test]
fn keys_do_not_judge_fetches() {
    let mut g = keyed();
    g.code_at(KEYED, 64, |a| a.mov(ebx, 7));
    g.code(|a| {
        wrpkru(a, NO_ACCESS)?;
        a.mov(eax, KEYED as u32)?;
        a.jmp(rax)
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX), 7);
}

#[test]
fn wrpkru_takes_rights_from_pages_at_hand() {
    let mut g = keyed();
    let code = page_fault(&mut g, KEYED, |a| {
        a.mov(dword_ptr(KEYED), ebx)?;
        wrpkru(a, NO_WRITE)?;
        a.mov(ebx, dword_ptr(KEYED))?;
        a.mov(dword_ptr(OTHER), ebx)?;
        a.mov(dword_ptr(KEYED), ebx)
    });
    assert_eq!(code, error::PRESENT | error::KEY | error::WRITE);
    let mut g = keyed();
    let code = page_fault(&mut g, KEYED, |a| {
        a.mov(ebx, dword_ptr(KEYED))?;
        wrpkru(a, NO_ACCESS)?;
        a.mov(ebx, dword_ptr(KEYED))
    });
    assert_eq!(code, error::PRESENT | error::KEY);
}

#[test]
fn wrpkru_gives_rights_to_pages_at_hand() {
    let mut g = keyed();
    g.poke::<u32>(KEYED, 1);
    g.code(|a| {
        for _ in 0..3 {
            wrpkru(a, NO_WRITE)?;
            a.add(ebx, dword_ptr(KEYED))?;
            wrpkru(a, OPEN)?;
            a.inc(dword_ptr(KEYED))?;
            wrpkru(a, NO_ACCESS)?;
        }
        Ok(())
    });
    g.finish();
    assert_eq!((g.reg(reg::RBX), g.peek::<u32>(KEYED)), (1 + 2 + 3, 4));
}

#[test]
fn wrpkru_leaves_pages_of_other_keys_at_hand() {
    let mut g = keyed();
    set_key(&g, OTHER, KEY + 1, 7);
    g.code(|a| {
        a.mov(ebx, dword_ptr(KEYED))?;
        a.mov(ebx, dword_ptr(OTHER))?;
        // What the TLB holds does not see the entry's change until it is dropped.
        a.mov(dword_ptr(entry(OTHER)), ebx)?;
        a.mov(dword_ptr(entry(KEYED)), ebx)?;
        wrpkru(a, NO_ACCESS)?;
        wrpkru(a, OPEN)?;
        a.mov(ebx, dword_ptr(OTHER))?;
        a.mov(ebx, dword_ptr(KEYED))
    });
    assert_eq!(g.fault(PF).error_code, Some(0));
    assert_eq!(g.vcpu.state.cr2, KEYED);
}

#[test]
fn wrpkru_reaches_pages_of_other_pcids() {
    const NO_FLUSH: u64 = 1 << 63;
    let mut g = keyed();
    let code = page_fault(&mut g, KEYED, |a| {
        a.mov(rax, cr4)?;
        a.or(eax, cr4::PCIDE as i32)?;
        a.mov(cr4, rax)?;
        for pcid in [1, 2, 1] {
            if pcid == 1 {
                wrpkru(a, OPEN)?;
            }
            a.mov(rax, TABLES | pcid | NO_FLUSH)?;
            a.mov(cr3, rax)?;
            if pcid == 1 {
                a.mov(dword_ptr(KEYED), ebx)?;
            }
            wrpkru(a, NO_WRITE)?;
        }
        a.mov(rax, TABLES | 1 | NO_FLUSH)?;
        a.mov(cr3, rax)?;
        a.mov(dword_ptr(KEYED), ebx)
    });
    assert_eq!(code, error::PRESENT | error::KEY | error::WRITE);
}

#[test]
fn key_zero_is_a_key_too() {
    let mut g = keyed();
    // All but `OTHER` become supervisor pages, so that the fault can be delivered.
    for page in 0..512 {
        g.poke::<u64>(PT + page * 8, page << 12 | 3);
    }
    g.poke::<u64>(entry(OTHER), OTHER | 7);
    let code = page_fault(&mut g, OTHER, |a| {
        a.mov(dword_ptr(OTHER), ebx)?;
        wrpkru(a, 0b10)?;
        a.mov(ebx, dword_ptr(OTHER))?;
        a.mov(dword_ptr(OTHER), ebx)
    });
    assert_eq!(code, error::PRESENT | error::KEY | error::WRITE);
}

#[test]
fn pkrs_takes_rights_from_pages_at_hand() {
    let mut g = supervisor_keyed();
    // A user-mode page with the same key is not its business.
    set_key(&g, OTHER, KEY, 7);
    let code = page_fault(&mut g, KEYED, |a| {
        a.mov(dword_ptr(OTHER), ebx)?;
        a.mov(dword_ptr(KEYED), ebx)?;
        write_pkrs(a, NO_WRITE)?;
        a.mov(dword_ptr(OTHER), ebx)?;
        a.mov(ebx, dword_ptr(KEYED))?;
        a.mov(dword_ptr(KEYED), ebx)
    });
    assert_eq!(code, error::PRESENT | error::KEY | error::WRITE);
}

#[test]
fn pkrs_is_a_register_of_32_bits() {
    let mut g = supervisor_keyed();
    g.code(|a| {
        write_pkrs(a, 0xfedc_ba98)?;
        a.xor(eax, eax)?;
        a.rdmsr()
    });
    g.finish();
    assert_eq!((g.reg(reg::RAX), g.reg(reg::RDX)), (0xfedc_ba98, 0));
    g.code(|a| {
        a.mov(edx, 1)?;
        a.mov(ecx, PKRS)?;
        a.wrmsr()
    });
    g.resume_at(CODE);
    assert_eq!(g.fault(13).error_code, Some(0));
    assert_eq!(g.vcpu.read_msr(PKRS).unwrap(), 0xfedc_ba98);
}

#[test]
fn cpuid_offers_both_and_follows_cr4() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, 7)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(esi, ecx)?;
        a.mov(rax, cr4)?;
        a.or(eax, (cr4::PKE | cr4::PKS) as i32)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 7)?;
        a.xor(ecx, ecx)?;
        a.cpuid()
    });
    g.finish();
    let keys = |value: u64| (value >> 3 & 1, value >> 4 & 1, value >> 31 & 1);
    assert_eq!(keys(g.reg(reg::RSI)), (1, 0, 1));
    assert_eq!(keys(g.reg(reg::RCX)), (1, 1, 1));
}

#[test]
fn rdpkru_and_wrpkru_need_pke_and_zeros() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let programs: [(Program, &[_]); 2] =
        [(CodeAssembler::rdpkru, &[ecx]), (CodeAssembler::wrpkru, &[ecx, edx])];
    for (program, zeros) in programs {
        let mut g = Guest::long();
        g.code(program);
        g.fault(6);
        for register in [ecx, edx] {
            let mut g = keyed();
            g.code(|a| {
                a.xor(ecx, ecx)?;
                a.xor(edx, edx)?;
                a.inc(register)?;
                program(a)
            });
            if zeros.contains(&register) {
                assert_eq!(g.fault(13).error_code, Some(0));
            } else {
                g.finish();
                assert_eq!(g.reg(reg::RDX), 0);
            }
        }
    }
}

#[test]
fn xsave_and_xrstor_carry_pkru() {
    for compact in [false, true] {
        let mut g = keyed();
        g.poke::<u32>(AREA + 836, 0x7777);
        g.code(|a| {
            pkru_is_saved(a)?;
            wrpkru(a, NO_WRITE)?;
            a.mov(eax, component::PKRU as u32)?;
            if compact { a.xsavec64(ptr(AREA)) } else { a.xsave64(ptr(AREA)) }?;
            wrpkru(a, OPEN)?;
            a.mov(eax, component::PKRU as u32)?;
            a.xrstor64(ptr(AREA))?;
            a.rdpkru()?;
            a.mov(ebx, eax)?;
            // An area that does not have it sets it to its initial state.
            a.mov(dword_ptr(AREA + 512), 0)?;
            a.mov(eax, component::PKRU as u32)?;
            a.xrstor64(ptr(AREA))?;
            a.rdpkru()
        });
        g.finish();
        assert_eq!((g.reg(reg::RBX), g.reg(reg::RAX)), (u64::from(NO_WRITE), 0), "compact: {compact}");
        // 8 bytes, at the place that CPUID tells or right behind the header.
        let at = if compact { 576 } else { 832 };
        assert_eq!(g.peek::<u64>(AREA + at), u64::from(NO_WRITE));
        let format = if compact { 1 << 63 | component::PKRU } else { 0 };
        assert_eq!(g.peek::<u64>(AREA + 520), format);
    }
}

#[test]
fn pkru_is_in_use_when_it_is_not_zero() {
    let mut g = keyed();
    g.code(|a| {
        pkru_is_saved(a)?;
        for (value, result) in [(0, ebx), (NO_WRITE, esi)] {
            wrpkru(a, value)?;
            // XSAVEOPT leaves it out while it is zero, and says so.
            a.mov(eax, component::PKRU as u32)?;
            a.xsaveopt64(ptr(AREA + u64::from(value != 0) * 0x400))?;
            a.mov(ecx, 1)?;
            a.xgetbv()?;
            a.mov(result, eax)?;
        }
        Ok(())
    });
    g.poke::<u32>(AREA + 832, 0x1234);
    g.finish();
    assert_eq!((g.reg(reg::RBX) >> 9 & 1, g.reg(reg::RSI) >> 9 & 1), (0, 1));
    assert_eq!((g.peek::<u64>(AREA + 512), g.peek::<u32>(AREA + 832)), (0, 0x1234));
    assert_eq!((g.peek::<u64>(AREA + 0x600), g.peek::<u32>(AREA + 0x740)), (component::PKRU, NO_WRITE));
}

#[test]
fn xrstor_takes_rights_from_pages_at_hand() {
    let mut g = keyed();
    g.poke::<u64>(AREA + 512, component::PKRU);
    g.poke::<u32>(AREA + 832, NO_ACCESS);
    let code = page_fault(&mut g, KEYED, |a| {
        pkru_is_saved(a)?;
        a.mov(ebx, dword_ptr(KEYED))?;
        a.mov(eax, component::PKRU as u32)?;
        a.xrstor64(ptr(AREA))?;
        a.mov(ebx, dword_ptr(KEYED))
    });
    assert_eq!(code, error::PRESENT | error::KEY);
    assert_eq!(g.vcpu.state.pkru, NO_ACCESS);
}
