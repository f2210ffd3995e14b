//! The shared structure: each field by its bytes.

use pvm::abi::GENERATION_1;
use pvm::{Event, Next};

use crate::rig::*;

/// Delivers `event` to a user whose registers are all `1 << n` and the like, and returns the structure.
fn saved(event: Event) -> [u8; 128] {
    let mut v = Vcpu::user();
    v.cpu.poke(PVCS, &[0; 4096]);
    v.cpu.registers.cr2 = 0x1817_1615_1413_1211;
    v.cpu.registers.gs_base = 0x5756_5554_5352_5150;
    v.cpu.registers.rflags = 0xa00;
    v.cpu.registers.pkru = 0x5f5e_5d5c;
    v.cpu.registers.rip = 0x6766_6564_6362_6160;
    v.cpu.registers.rsp = 0x6f6e_6d6c_6b6a_6968;
    v.cpu.registers.rcx = 0x7776_7574_7372_7170;
    v.cpu.registers.r11 = 0x7f7e_7d7c_7b7a_7978;
    assert_eq!(v.deliver(event), Ok(()));
    // Behind its 128 bytes the page is the guest's.
    assert_eq!(v.cpu.bytes::<{ 4096 - 128 }>(PVCS + 128), [0; 4096 - 128]);
    v.cpu.bytes(PVCS)
}

#[test]
fn every_field_is_where_the_table_has_it() {
    let bytes = saved(Event::with_code(14, 0x0b0a_0908));
    let mut expected = [0; 128];
    // event_flags: 0 to 7, unchanged. event_errcode, event_vector, cr2:
    expected[8..12].copy_from_slice(&[0x08, 0x09, 0x0a, 0x0b]);
    expected[12..16].copy_from_slice(&[14, 0, 0, 0]);
    expected[16..24].copy_from_slice(&[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
    // Five reserved words: 24 to 63. user_cs, user_ss:
    expected[64..68].copy_from_slice(&[0x33, 0, 0x2b, 0]);
    // Reserved: 68 to 79. user_gsbase, eflags, pkru, rip, rsp, rcx, r11:
    expected[80..88].copy_from_slice(&[0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57]);
    expected[88..92].copy_from_slice(&[0x00, 0x0a, 0, 0]);
    expected[92..96].copy_from_slice(&[0x5c, 0x5d, 0x5e, 0x5f]);
    expected[96..104].copy_from_slice(&[0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67]);
    expected[104..112].copy_from_slice(&[0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f]);
    expected[112..120].copy_from_slice(&[0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77]);
    expected[120..128].copy_from_slice(&[0x78, 0x79, 0x7a, 0x7b, 0x7c, 0x7d, 0x7e, 0x7f]);
    assert_eq!(bytes, expected);
}

#[test]
fn the_map_has_the_same_offsets() {
    let p = &GENERATION_1.pvcs;
    let fields = [
        (p.event_flags, 0, 8),
        (p.event_errcode, 8, 4),
        (p.event_vector, 12, 4),
        (p.cr2, 16, 8),
        (p.user_cs, 64, 2),
        (p.user_ss, 66, 2),
        (p.user_gsbase, 80, 8),
        (p.eflags, 88, 4),
        (p.pkru, 92, 4),
        (p.rip, 96, 8),
        (p.rsp, 104, 8),
        (p.rcx, 112, 8),
        (p.r11, 120, 8),
    ];
    for (field, offset, size) in fields {
        assert_eq!((field.offset, field.size), (offset, size));
    }
    assert_eq!(p.size, 128);
}

#[test]
fn the_vector_is_written_for_user_events_and_interrupts_alone() {
    const OLD: [u8; 4] = [0x8c, 0x8d, 0x8e, 0x8f];
    for (mut v, vector, written) in [
        (Vcpu::user(), 6, true),
        (Vcpu::user(), 0xfe, true),
        (Vcpu::supervisor(), 6, false),
        (Vcpu::supervisor(), 14, false),
        (Vcpu::supervisor(), 32, true),
    ] {
        assert_eq!(v.deliver(Event::new(vector)), Ok(()));
        let expected = if written { [vector, 0, 0, 0] } else { OLD };
        assert_eq!(v.cpu.bytes(PVCS + 12), expected, "{vector}");
    }
}

#[test]
fn the_error_code_is_written_only_if_there_is_one() {
    const OLD: [u8; 4] = [0x88, 0x89, 0x8a, 0x8b];
    for (mut v, event, expected) in [
        (Vcpu::user(), Event::new(6), OLD),
        (Vcpu::user(), Event::new(33), OLD),
        (Vcpu::user(), Event::with_code(13, 0), [0; 4]),
        (Vcpu::supervisor(), Event::with_code(13, 7), OLD),
        (Vcpu::supervisor(), Event::new(33), OLD),
    ] {
        assert_eq!(v.deliver(event), Ok(()));
        assert_eq!(v.cpu.bytes(PVCS + 8), expected, "{event:?}");
    }
}

#[test]
fn cr2_is_written_by_every_page_fault_and_no_other_event() {
    const OLD: [u8; 8] = [0x90, 0x91, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97];
    for mut v in [Vcpu::user(), Vcpu::supervisor()] {
        for vector in [0, 13, 15, 32, 255] {
            let mut v = v.clone();
            v.cpu.registers.cr2 = 0x1234;
            assert_eq!(v.deliver(Event::new(vector)), Ok(()));
            assert_eq!(v.cpu.bytes(PVCS + 16), OLD, "{vector}");
        }
        v.cpu.registers.cr2 = 0x1234;
        assert_eq!(v.deliver(Event::with_code(14, 0)), Ok(()));
        assert_eq!(v.cpu.bytes(PVCS + 16), 0x1234u64.to_le_bytes());
    }
}

#[test]
fn reserved_words_and_bits_are_left_alone() {
    let mut v = Vcpu::user();
    v.cpu.poke(PVCS, &[0xff; 4096]);
    let untouched = |v: &Vcpu| {
        assert_eq!(v.cpu.bytes::<40>(PVCS + 24), [0xff; 40]);
        assert_eq!(v.cpu.bytes::<12>(PVCS + 68), [0xff; 12]);
        assert_eq!(v.cpu.bytes::<{ 4096 - 128 }>(PVCS + 128), [0xff; 4096 - 128]);
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS) | IF | IP, u64::MAX);
    };
    assert_eq!(v.deliver(Event::with_code(14, 1)), Ok(()));
    untouched(&v);
    assert_eq!(v.deliver(Event::with_code(14, 1)), Ok(()));
    assert_eq!(v.deliver(Event::new(32)), Ok(()));
    untouched(&v);
    for number in 0x1708_8200..=0x1708_8209 {
        v.cpu.registers.rax = number;
        v.cpu.registers.rbx = 0;
        let _ = v.syscall_at(0x1000);
        untouched(&v);
    }
    v.cpu.registers.rsp = STACK;
    assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    untouched(&v);
}

#[test]
fn narrow_fields_have_no_room_for_more() {
    // Registers wider than their fields do not spill into the next one.
    let mut v = Vcpu::user();
    v.cpu.registers.rflags = 0xffff_ffff_0000_0202;
    v.cpu.registers.pkru = 0xffff_ffff_1234_5678;
    assert_eq!(v.deliver(Event::new(3)), Ok(()));
    assert_eq!(v.cpu.bytes(PVCS + 88), [0x02, 0x02, 0, 0, 0x78, 0x56, 0x34, 0x12]);
    assert_eq!(v.cpu.bytes(PVCS + 96), 0x40_1000u64.to_le_bytes());
}

#[test]
fn the_pending_flag_is_cleared_by_four_things() {
    let pending = || {
        let mut v = Vcpu::supervisor();
        v.pvm.interrupt_waits(&mut v.cpu);
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), IP);
        v.put_u16(at::USER_CS, 0x33);
        v.put_u16(at::USER_SS, 0x2b);
        v.cpu.registers.rsp = STACK;
        v
    };
    // IRQ_WIN, IRQ_HALT, ERETU, ERETS.
    for (number, address) in [(0x1708_8201, 0), (0x1708_8202, 0), (0, RETU_RIP), (0, RETS_RIP)] {
        let mut v = pending();
        v.cpu.registers.rax = number;
        assert!(v.syscall_at(address).is_ok());
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS) & IP, 0, "{number:#x} {address:#x}");
    }
    // Not by another hypercall, nor by an event.
    let mut v = pending();
    assert_eq!(v.hypercall(0x1708_8203, [0; 3]), 0);
    v.cpu.registers.rsp = STACK + 0x800;
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.deliver(Event::new(32)), Ok(()));
    assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), IP);
}
