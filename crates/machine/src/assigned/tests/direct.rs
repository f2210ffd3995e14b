//! A device that writes to memory by itself, where a vCPU has decoded code.

use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::*;
use crate::loader::testing::{Part, elf};
use crate::loader::{BootProtocol, KernelImage};
use crate::power::PowerEvent;
use crate::{Ended, GuestAbi, Machine, MachineConfig};

/// Where the guest begins, and where the function is that it calls.
const KERNEL: u64 = 0x20_0000;
const FUNCTION: u64 = 0x40_0000;
/// Where the guest puts BAR 0: in the lower window, which its first page tables have.
const BAR0: u32 = 0xd000_0000;

/// `mov al, n; ret`.
fn function(n: u8) -> Vec<u8> {
    vec![0xb0, n, 0xc3]
}

/// `mov edx, port`.
fn port(port: u32) -> Vec<u8> {
    [&[0xba][..], &port.to_le_bytes()].concat()
}

/// A write of a configuration register in slot 1: `out` to 0xcf8 and to 0xcfc, from eax.
fn configure(register: u32, value: u32) -> Vec<u8> {
    let load = |value: u32| [&[0xb8][..], &value.to_le_bytes()].concat();
    let out = [0xef];
    [&port(0xcf8)[..], &load(1 << 31 | 1 << 11 | register), &out, &port(0xcfc), &load(value), &out].concat()
}

/// Calls the function and tells the device what it returned, reads a register of the device, and does it again.
fn guest() -> Vec<u8> {
    let mut code = [configure(0x10, BAR0), configure(0x14, 0), configure(0x04, 6)].concat();
    // mov ebx, BAR0; mov esi, FUNCTION
    code.push(0xbb);
    code.extend(BAR0.to_le_bytes());
    code.push(0xbe);
    code.extend((FUNCTION as u32).to_le_bytes());
    // call rsi; mov [rbx + 0x10], al
    let call = [0xff, 0xd6, 0x88, 0x43, 0x10];
    code.extend(call);
    // mov eax, [rbx + 0x20]
    code.extend([0x8b, 0x43, 0x20]);
    code.extend(call);
    // Sleep state S5: mov al, 5 << 2 | 1 << 5; out dx, al; hlt.
    code.extend(port(u32::from(crate::layout::SLEEP_CONTROL_PORT)));
    code.extend([0xb0, 0x34, 0xee, 0xf4]);
    code
}

#[test]
fn code_that_a_device_writes_by_itself_is_what_the_guest_executes() {
    let mut machine = Machine::new(MachineConfig {
        memory: 16 << 20,
        cpus: 1,
        serial: Box::new(io::sink()),
        guest_abi: GuestAbi::default(),
        iommu: None,
    })
    .unwrap();
    let model = Model::new();
    // By the file behind guest memory, past everything that notes writes.
    let ram = machine.memory().find_region(GuestAddress(FUNCTION)).unwrap();
    let offset = ram.file_offset().unwrap();
    let (file, at) = (Arc::clone(offset.arc()), offset.start() + FUNCTION - ram.start_addr().0);
    model.with(|s| {
        s.on_register = Some(Box::new(move || file.write_all_at(&function(2), at).unwrap()));
    });
    machine.add_device(Arc::clone(&model) as Arc<dyn Device>, Reach::Direct).unwrap();
    let part =
        |address, content: Vec<u8>| Part { kind: 1, address, memory_size: content.len() as u64, content };
    let image = elf(KERNEL, &[part(KERNEL, guest()), part(FUNCTION, function(1))]);
    let image = KernelImage::from_bytes(image).unwrap();
    machine.load(&image, BootProtocol::Linux64, None, "").unwrap();
    let (ended, stats) = machine.run().unwrap();
    assert_eq!(ended, Ended::Guest(PowerEvent::PowerOff), "{stats:?}");
    assert_eq!(model.with(|s| s.registers.clone()), [(0x10, vec![1]), (0x10, vec![2])]);
    assert!(model.with(|s| s.closed));
}
