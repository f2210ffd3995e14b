//! Two vCPUs on one RAM.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use cpu::state::reg;
use cpu::{Answer, Exit, Outcome, Platform, attention};
use iced_x86::code_asm::*;
use vm_memory::{Bytes as _, GuestAddress};

use crate::harness::*;

const ROUNDS: u32 = 20_000;

#[test]
fn locked_instructions_of_two_vcpus_lose_nothing() {
    let mut first = Guest::long();
    let mut second = Guest::long_on(Arc::clone(&first.ram));
    // Each its own code page; one counter across a cache line, one exchanged by compare and swap.
    let program = |a: &mut CodeAssembler| {
        a.mov(ecx, ROUNDS)?;
        let mut top = a.create_label();
        let mut retry = a.create_label();
        a.set_label(&mut top)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.mov(ebx, 1)?;
        a.lock().xadd(dword_ptr(DATA + 62), ebx)?;
        a.mov(eax, dword_ptr(DATA + 128))?;
        a.set_label(&mut retry)?;
        a.lea(edx, ptr(rax + 3))?;
        a.lock().cmpxchg(dword_ptr(DATA + 128), edx)?;
        a.jne(retry)?;
        a.dec(ecx)?;
        a.jne(top)
    };
    first.code_at(CODE, 64, program);
    second.code_at(0x9000, 64, program);
    second.vcpu.state.set_rip(0x9000);
    second.vcpu.set_reg(reg::RSP, STACK - 0x4000);
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(first.run(), Outcome::Halted));
        assert_eq!(second.run(), Outcome::Halted);
    });
    assert_eq!(second.peek::<u64>(DATA), 2 * u64::from(ROUNDS));
    assert_eq!(second.peek::<u32>(DATA + 62), 2 * ROUNDS);
    assert_eq!(second.peek::<u32>(DATA + 128), 6 * ROUNDS);
}

#[test]
fn a_vcpu_sees_code_that_another_rewrites() {
    let mut runner = Guest::long();
    let mut writer = Guest::long_on(Arc::clone(&runner.ram));
    // The runner calls a function until it returns 7; the writer first makes its TLB entry for the page writable,
    // then waits until the runner has run the code, then rewrites it.
    runner.code_at(0x9000, 64, |a| {
        a.mov(eax, 1)?;
        a.ret()
    });
    runner.code(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.call(0x9000)?;
        a.lock().inc(dword_ptr(DATA))?;
        a.cmp(eax, 7)?;
        a.jne(top)
    });
    writer.code_at(0xa000, 64, |a| {
        a.mov(byte_ptr(0x9100), 1)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA), 100)?;
        a.jb(wait)?;
        a.mov(dword_ptr(0x9001), 7)
    });
    writer.vcpu.state.set_rip(0xa000);
    writer.vcpu.set_reg(reg::RSP, STACK - 0x4000);
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(runner.run(), Outcome::Halted));
        assert_eq!(writer.run(), Outcome::Halted);
    });
    assert_eq!(runner.reg(reg::RAX), 7);
}

#[test]
fn code_that_is_rewritten_all_the_time_is_never_stale() {
    const LAST: u32 = 400;
    // A function returns a number, which the writer counts up in place, and announces after each time. Two
    // runners call it: it must never return less than what was announced before the call.
    let mut writer = Guest::long();
    let mut runners = [0xa000, 0xb000].map(|code| {
        let mut runner = Guest::long_on(Arc::clone(&writer.ram));
        runner.code_at(code, 64, |a| {
            let mut top = a.create_label();
            let mut stale = a.create_label();
            a.set_label(&mut top)?;
            a.mov(ebx, dword_ptr(DATA))?;
            a.call(0x9000)?;
            a.lock().inc(qword_ptr(DATA + 64))?;
            a.cmp(eax, ebx)?;
            a.jb(stale)?;
            a.inc(rsi)?;
            a.cmp(ebx, LAST)?;
            a.jb(top)?;
            a.hlt()?;
            a.set_label(&mut stale)?;
            a.mov(dword_ptr(DATA + 128), 1)
        });
        runner.vcpu.state.set_rip(code);
        runner.vcpu.set_reg(reg::RSP, STACK - 0x1000 * (code >> 12));
        runner
    });
    writer.code_at(0x9000, 64, |a| {
        a.mov(eax, 0)?;
        a.ret()
    });
    writer.code(|a| {
        let mut top = a.create_label();
        let mut wait = a.create_label();
        let mut end = a.create_label();
        a.xor(eax, eax)?;
        a.set_label(&mut top)?;
        a.inc(eax)?;
        a.mov(dword_ptr(0x9001), eax)?;
        a.mov(dword_ptr(DATA), eax)?;
        // After some of the changes it waits for a call, so that the runners keep up.
        a.test(eax, 3)?;
        a.jne(top)?;
        a.cmp(eax, LAST)?;
        a.jae(end)?;
        a.mov(edx, dword_ptr(DATA + 64))?;
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA + 128), 0)?;
        a.jne(end)?;
        a.cmp(dword_ptr(DATA + 64), edx)?;
        a.je(wait)?;
        a.jmp(top)?;
        a.set_label(&mut end)?;
        a.mov(dword_ptr(DATA), LAST)
    });
    thread::scope(|scope| {
        for runner in &mut runners {
            scope.spawn(|| assert_eq!(runner.run(), Outcome::Halted));
        }
        assert_eq!(writer.run(), Outcome::Halted);
    });
    let calls: u64 = runners.iter().map(|r| r.reg(reg::RSI)).sum();
    for runner in &runners {
        let (got, announced) = (runner.reg(reg::RAX), runner.reg(reg::RBX));
        assert_eq!((got, announced), (LAST.into(), LAST.into()), "returned, announced before");
    }
    assert_eq!(writer.peek::<u64>(DATA + 64), calls);
}

#[test]
fn a_requested_flush_makes_changed_page_tables_count() {
    // The runner calls a function and reads a number, both through page table entries that change under
    // it, with no interrupt: the flush is requested by attention.
    const FUNCTION: u64 = 0x5_0000;
    const NUMBER: u64 = 0x5_1000;
    let mut runner = Guest::long();
    for which in [1u32, 2] {
        let at = 0x6_0000 + u64::from(which) * 0x1_0000;
        runner.code_at(at, 64, |a| {
            a.mov(eax, which)?;
            a.ret()
        });
        runner.poke(at + 0x1000, which);
    }
    runner.code(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.call(FUNCTION)?;
        a.mov(ebx, dword_ptr(NUMBER))?;
        a.mov(dword_ptr(DATA + 8), eax)?;
        a.mov(dword_ptr(DATA + 12), ebx)?;
        a.inc(qword_ptr(DATA))?;
        a.cmp(dword_ptr(DATA + 64), 0)?;
        a.je(top)
    });
    let (ram, attention) = (Arc::clone(&runner.ram), Arc::clone(&runner.attention));
    let memory = ram.memory();
    let map = |which: u64| {
        for (page, offset) in [(FUNCTION, 0), (NUMBER, 0x1000)] {
            let entry = (0x6_0000 + which * 0x1_0000 + offset) | 7;
            memory.write_obj(entry, GuestAddress(PT + (page >> 12) * 8)).unwrap();
        }
    };
    let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    map(1);
    let wrong = thread::scope(|scope| {
        let running = scope.spawn(|| runner.run());
        let wrong = (0..1000u64).find_map(|round| {
            let which = round % 2 + 1;
            map(which);
            attention.raise(attention::FLUSH_TLB);
            while attention.peek() & attention::FLUSH_TLB != 0 && !running.is_finished() {
                thread::yield_now();
            }
            // The pass under way may be half old; the one after it must not.
            let passes = read(DATA);
            while read(DATA) < passes + 2 && !running.is_finished() {
                thread::yield_now();
            }
            let seen = read(DATA + 8);
            (seen != which << 32 | which).then_some((round, seen))
        });
        memory.write_obj(1u32, GuestAddress(DATA + 64)).unwrap();
        assert_eq!(running.join().unwrap(), Outcome::Halted);
        wrong
    });
    assert_eq!(wrong, None, "round, what was seen");
}

#[test]
fn a_start_up_ipi_starts_a_waiting_vcpu() {
    let mut g = Guest::long();
    g.vcpu.wait_for_sipi();
    assert_eq!(g.run(), Outcome::Halted);
    g.code_at(0x5000, 16, |a| a.mov(ax, cs));
    g.attention.raise_sipi(5);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!((g.reg(reg::RAX), g.vcpu.state.rip()), (0x500, 3));
}

#[test]
fn a_kick_ends_the_run_of_a_guest_that_spins() {
    let mut g = Guest::long();
    g.bytes(&[0xeb, 0xfe]);
    let attention = Arc::clone(&g.attention);
    thread::scope(|scope| {
        scope.spawn(|| attention.raise(attention::KICK));
        assert_eq!(g.run(), Outcome::Kicked);
    });
}

/// A platform that, at each port write of its vCPU, hands over to another thread and waits for it: an exit that
/// takes as long as that thread likes.
struct Handover {
    go: mpsc::SyncSender<()>,
    back: mpsc::Receiver<()>,
}

impl Platform for Handover {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        if let Exit::PortOut { .. } | Exit::MmioWrite { .. } = exit {
            self.go.send(()).unwrap();
            self.back.recv_timeout(HANG).expect("the other vCPU waits for this exit");
        }
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn tsc(&self) -> u64 {
        0
    }
}

/// Nothing takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

/// Runs a vCPU that was set up by `prepare` from 0xa000, and `meanwhile` on another thread each time that it is in
/// an exit.
fn during_exits(ram: &Arc<cpu::Ram>, prepare: impl FnOnce(&mut Guest), mut meanwhile: impl FnMut() + Send) {
    let ((go, gone), (came, back)) = (mpsc::sync_channel(0), mpsc::sync_channel(1));
    let mut guest = Guest::long_with(Arc::clone(ram), |_, _| Box::new(Handover { go, back }));
    guest.vcpu.state.set_rip(0xa000);
    guest.vcpu.set_reg(reg::RSP, STACK - 0x4000);
    prepare(&mut guest);
    thread::scope(|scope| {
        scope.spawn(move || {
            while gone.recv().is_ok() {
                meanwhile();
                came.send(()).unwrap();
            }
        });
        assert_eq!(guest.run(), Outcome::Halted);
        drop(guest);
    });
}

#[test]
fn an_exit_that_blocks_holds_up_no_other_vcpu() {
    // The writer makes its TLB entry for the page writable. While it is in an exit, the runner decodes the page,
    // which takes a hand-shake. Afterwards the writer must not write through its old entry.
    let mut runner = Guest::long();
    let function = |a: &mut CodeAssembler| a.mov(eax, 1);
    runner.code_at(0x9000, 64, function);
    let ram = Arc::clone(&runner.ram);
    let mut seen = Vec::new();
    during_exits(
        &ram,
        |writer| {
            writer.code_at(0xa000, 64, |a| {
                a.mov(byte_ptr(0x9100), 1)?;
                a.out(0x80, al)?;
                a.mov(dword_ptr(0x9001), 7)?;
                a.out(0x80, al)
            });
        },
        || {
            runner.resume_at(0x9000);
            assert_eq!(runner.run(), Outcome::Halted);
            seen.push(runner.reg(reg::RAX));
        },
    );
    assert_eq!(seen, [1, 7]);
}

#[test]
fn a_store_to_a_device_and_code_does_not_miss_that_it_is_code() {
    // One store whose first half goes to a device and whose second to a page that becomes code during the exit.
    let mut runner = Guest::long();
    runner.code_at(0x9000, 64, |a| a.mov(eax, 0x0101_0101));
    let ram = Arc::clone(&runner.ram);
    let mut seen = Vec::new();
    during_exits(
        &ram,
        |writer| {
            // The page before is a device's.
            writer.poke(PT + 8 * 8, MMIO | 7);
            writer.code_at(0xa000, 64, |a| {
                a.mov(byte_ptr(0x9100), 1)?;
                a.mov(rax, 0x0202_02b8_0000_0000u64)?;
                a.mov(qword_ptr(0x8ffc), rax)?;
                a.out(0x80, al)
            });
        },
        || {
            runner.resume_at(0x9000);
            assert_eq!(runner.run(), Outcome::Halted);
            seen.push(runner.reg(reg::RAX));
        },
    );
    assert_eq!(seen.last(), Some(&0x0102_0202), "{seen:x?}");
}

/// A platform that calls a function at the first MMIO read.
struct AtRead<F>(Option<F>);

impl<F: FnOnce() + Send> Platform for AtRead<F> {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        if let (Exit::MmioRead { .. }, Some(f)) = (exit, self.0.take()) {
            f();
        }
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn tsc(&self) -> u64 {
        0
    }
}

#[test]
fn a_locked_instruction_across_pages_excludes_plain_stores() {
    // The first half of the operand is RAM, the second a device's. When the device is read, RAM has been; a store
    // that another vCPU makes now, without LOCK, must not be lost.
    const OPERAND: u64 = DATA + 0xffc;
    let mut second = Guest::long();
    let ram = Arc::clone(&second.ram);
    second.code_at(0x9000, 64, |a| a.mov(dword_ptr(OPERAND), 7));
    second.vcpu.state.set_rip(0x9000);
    let stopped = Arc::clone(&second.attention);
    let (started, running) = mpsc::channel();
    let at_read = move || {
        let second = thread::spawn(move || assert_eq!(second.run(), Outcome::Halted));
        while !second.is_finished() && stopped.peek() & attention::STOP == 0 {
            thread::yield_now();
        }
        started.send(second).unwrap();
    };
    let mut first = Guest::long_with(ram, |_, _| Box::new(AtRead(Some(at_read))));
    first.poke(PT + ((OPERAND >> 12) + 1) * 8, MMIO | 7);
    first.code(|a| a.lock().add(qword_ptr(OPERAND), 1));
    first.finish();
    running.recv().unwrap().join().unwrap();
    assert_eq!(first.peek::<u32>(OPERAND), 7);
}

#[test]
fn locked_instructions_stop_the_other_vcpus_only_across_cache_lines() {
    let mut g = Guest::long();
    g.code(|a| {
        for address in [DATA, DATA + 3, DATA + 56, DATA + 60] {
            a.lock().add(dword_ptr(address), 1)?;
            a.xchg(dword_ptr(address), eax)?;
        }
        // Not locked.
        a.add(qword_ptr(DATA + 60), 1)
    });
    g.finish();
    assert_eq!(g.vcpu.stats.split_locks, 0);
    g.resume_at(CODE);
    g.poke::<u64>(DATA + 0x7d, 0x0102_0304_0506_0708);
    g.code(|a| {
        a.lock().add(word_ptr(DATA + 63), 1)?;
        a.lock().xadd(dword_ptr(DATA + 61), eax)?;
        a.mov(rax, 9u64)?;
        a.xchg(qword_ptr(DATA + 0x7d), rax)?;
        a.lock().cmpxchg8b(qword_ptr(DATA + 57))
    });
    g.finish();
    assert_eq!((g.vcpu.stats.split_locks, g.peek::<u64>(DATA + 0x7d)), (4, 9));
}
