use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::model::{Device, memory};
use super::*;

const SMALL: Shape = Shape { size: 8, buffer: 64 };

fn ring(shape: Shape, direction: Direction, event_index: bool) -> (Ring, Device, Arc<GuestMemoryMmap>) {
    let (memory, region) = memory(shape, 1);
    let ring = Ring::new(region, 0, shape, direction, event_index).unwrap();
    let device = Device::new(memory.clone(), shape.size, ring.addresses(), event_index);
    (ring, device, memory)
}

/// A device that writes to the used ring what it likes.
struct Liar {
    memory: Arc<GuestMemoryMmap>,
    addresses: Addresses,
    size: u16,
    index: u16,
}

impl Liar {
    fn new(ring: &Ring, memory: Arc<GuestMemoryMmap>) -> Self {
        Self { memory, addresses: ring.addresses(), size: ring.shape().size, index: 0 }
    }

    fn entry(&mut self, id: u32, length: u32) {
        let place = self.addresses.used.0 + 4 + u64::from(self.index % self.size) * 8;
        let bytes = [id.to_le_bytes(), length.to_le_bytes()].concat();
        self.memory.write_slice(&bytes, vm_memory::GuestAddress(place)).unwrap();
        self.index = self.index.wrapping_add(1);
        self.set_index(self.index);
    }

    fn set_index(&self, index: u16) {
        let place = vm_memory::GuestAddress(self.addresses.used.0 + 2);
        self.memory.write_slice(&index.to_le_bytes(), place).unwrap();
    }
}

/// A ring with three chains out, the first of two descriptors.
fn with_three_out(direction: Direction) -> (Ring, Liar) {
    let (mut ring, _, memory) = ring(SMALL, direction, true);
    for bytes in [100, 1, 1] {
        let prepared = match direction {
            Direction::ToDevice => ring.send(&[&vec![7; bytes]]),
            Direction::FromDevice => ring.offer(bytes),
        };
        assert!(prepared.unwrap());
    }
    ring.publish().unwrap();
    let liar = Liar::new(&ring, memory);
    (ring, liar)
}

#[test]
fn shapes_that_no_queue_has_are_refused() {
    for shape in [Shape { size: 0, ..SMALL }, Shape { size: 6, ..SMALL }, Shape { buffer: 0, ..SMALL }] {
        let (_, region) = memory(SMALL, 1);
        assert_eq!(
            Ring::new(region, 0, shape, Direction::ToDevice, true).unwrap_err(),
            Fault::OutsideMemory,
            "{shape:?}"
        );
    }
    let (_, region) = memory(SMALL, 1);
    let beyond = Ring::new(region, 4096, SMALL, Direction::ToDevice, true);
    assert_eq!(beyond.unwrap_err(), Fault::OutsideMemory);
}

#[test]
fn a_chain_is_as_long_as_its_bytes() {
    let (mut ring, mut device, _) = ring(SMALL, Direction::ToDevice, true);
    for (bytes, descriptors) in [(1, 1), (64, 1), (65, 2), (8 * 64, 8)] {
        let sent: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
        assert!(ring.send(&[&sent[..bytes / 3], &[], &sent[bytes / 3..]]).unwrap());
        assert_eq!(ring.free(), 8 - descriptors);
        ring.publish().unwrap();
        let chain = device.pop().unwrap();
        assert_eq!((chain.bytes, chain.room), (sent, 0));
        device.finish(chain.head, 0);
        let taken = ring.take().unwrap().unwrap();
        ring.release(taken).unwrap();
        assert_eq!(ring.free(), 8);
    }
    assert!(!ring.send(&[&[0; 8 * 64 + 1]]).unwrap());
    assert_eq!((ring.free(), ring.prepared()), (8, 0), "what does not fit leaves nothing behind");
}

#[test]
fn indices_wrap() {
    // The largest ring there can be uses every value of an index for two entries at most.
    for shape in [SMALL, Shape { size: 1, buffer: 8 }, Shape { size: 32768, buffer: 8 }] {
        for event_index in [false, true] {
            let (mut ring, mut device, _) = ring(shape, Direction::ToDevice, event_index);
            let mut number = 0u64;
            while number < 3 * 65536 {
                let batch = u64::from(shape.size).min(1 + number % 1000);
                for n in number..number + batch {
                    assert!(ring.send(&[&n.to_le_bytes()]).unwrap());
                }
                ring.publish().unwrap();
                for n in number..number + batch {
                    let chain = device.pop().unwrap();
                    assert_eq!(chain.bytes, n.to_le_bytes());
                    device.finish(chain.head, 0);
                }
                for _ in 0..batch {
                    let taken = ring.take().unwrap().unwrap();
                    ring.release(taken).unwrap();
                }
                assert_eq!(ring.take().unwrap(), None);
                number += batch;
            }
        }
    }
}

#[test]
fn an_id_beyond_the_ring_is_a_fault() {
    for id in [8, 0x1_0000, u32::MAX] {
        let (mut ring, mut liar) = with_three_out(Direction::ToDevice);
        liar.entry(id, 0);
        assert_eq!(ring.take(), Err(Fault::Id { id, size: 8 }));
    }
}

#[test]
fn an_id_that_the_device_does_not_have_is_a_fault() {
    // 0 is the head of the first chain and 1 its second descriptor; 4 is free.
    for id in [1, 4] {
        let (mut ring, mut liar) = with_three_out(Direction::ToDevice);
        liar.entry(id, 0);
        assert_eq!(ring.take(), Err(Fault::NotOutstanding { id: id as u16 }));
    }
}

#[test]
fn an_id_that_comes_twice_is_a_fault() {
    for release in [false, true] {
        let (mut ring, mut liar) = with_three_out(Direction::ToDevice);
        liar.entry(0, 0);
        let taken = ring.take().unwrap().unwrap();
        if release {
            ring.release(taken).unwrap();
        }
        liar.entry(0, 0);
        assert_eq!(ring.take(), Err(Fault::NotOutstanding { id: 0 }));
    }
}

#[test]
fn an_id_that_was_not_published_is_a_fault() {
    let (mut ring, mut liar) = with_three_out(Direction::ToDevice);
    assert!(ring.send(&[&[1]]).unwrap());
    liar.entry(4, 0);
    assert_eq!(ring.take(), Err(Fault::NotOutstanding { id: 4 }));
}

#[test]
fn a_length_beyond_the_chain_is_a_fault() {
    for (direction, id, length, room) in [
        (Direction::FromDevice, 0, 129, 128),
        (Direction::FromDevice, 2, 65, 64),
        (Direction::FromDevice, 2, u32::MAX, 64),
        (Direction::ToDevice, 0, 1, 0),
    ] {
        let (mut ring, mut liar) = with_three_out(direction);
        liar.entry(id, length);
        assert_eq!(ring.take(), Err(Fault::Length { id: id as u16, length, room }));
    }
}

#[test]
fn an_index_that_jumps_is_a_fault() {
    for to in [4, 8, 0x8000, u16::MAX] {
        let fault = Fault::Index { from: 0, to, outstanding: 3 };
        let (mut ring, liar) = with_three_out(Direction::FromDevice);
        liar.set_index(to);
        assert_eq!(ring.take(), Err(fault));
        let (mut ring, liar) = with_three_out(Direction::FromDevice);
        liar.set_index(to);
        assert_eq!(ring.ask(1), Err(fault));
    }
}

#[test]
fn an_index_that_goes_back_is_a_fault() {
    let (mut ring, mut liar) = with_three_out(Direction::FromDevice);
    liar.entry(0, 0);
    let taken = ring.take().unwrap().unwrap();
    ring.release(taken).unwrap();
    liar.set_index(0);
    assert_eq!(ring.take(), Err(Fault::Index { from: 1, to: 0, outstanding: 2 }));
}

#[test]
fn what_the_device_writes_to_the_descriptors_is_never_read() {
    let (mut ring, mut device, memory) = ring(SMALL, Direction::FromDevice, true);
    assert!(ring.offer(200).unwrap());
    ring.publish().unwrap();
    let sent: Vec<u8> = (0..200).collect();
    let (head, length) = device.fill(&sent).unwrap();
    memory.write_slice(&[0xff; 8 * 16], ring.addresses().descriptors).unwrap();
    device.finish(head, length);
    let taken = ring.take().unwrap().unwrap();
    let mut read = [0; 300];
    assert_eq!(ring.read(&taken, 0, &mut read).unwrap(), 200);
    assert_eq!(read[..200], sent);
    assert_eq!(ring.read(&taken, 150, &mut read).unwrap(), 50);
    assert_eq!(read[..50], sent[150..]);
    assert_eq!(ring.read(&taken, 200, &mut read).unwrap(), 0);
    assert_eq!(ring.read(&taken, 201, &mut read).unwrap(), 0);
    ring.release(taken).unwrap();
    assert_eq!(ring.free(), 8);
}

#[test]
fn a_device_at_work_is_not_kicked() {
    for event_index in [false, true] {
        let (mut ring, mut device, _) = ring(SMALL, Direction::ToDevice, event_index);
        assert!(!ring.publish().unwrap(), "there is nothing to see");
        assert!(ring.send(&[&[0]]).unwrap());
        assert!(ring.publish().unwrap());
        device.work();
        device.pop().unwrap();
        for _ in 0..3 {
            assert!(ring.send(&[&[0]]).unwrap());
            assert!(!ring.publish().unwrap());
        }
        assert!(device.sleep(), "it has to look again");
        while device.pop().is_some() {}
        assert!(!device.sleep());
        assert!(ring.send(&[&[0]]).unwrap());
        assert!(ring.publish().unwrap());
    }
}

#[test]
fn the_device_calls_when_it_was_asked_to() {
    let (mut ring, mut device, _) = ring(SMALL, Direction::ToDevice, true);
    let finish = |device: &mut Device| {
        let head = device.pop().unwrap().head;
        device.finish(head, 0);
        device.call_wanted()
    };
    for _ in 0..8 {
        assert!(ring.send(&[&[0]]).unwrap());
    }
    ring.publish().unwrap();
    assert!(!finish(&mut device), "nobody asked");
    let taken = ring.take().unwrap().unwrap();
    ring.release(taken).unwrap();
    assert!(!ring.ask(3).unwrap());
    assert_eq!([(); 5].map(|()| finish(&mut device)), [false, false, true, false, false]);
    assert!(ring.ask(5).unwrap(), "it has already");
    assert!(!ring.ask(6).unwrap());
    assert!(finish(&mut device));
}

#[test]
fn without_event_indices_calls_are_turned_on_and_off() {
    let (mut ring, mut device, _) = ring(SMALL, Direction::ToDevice, false);
    for _ in 0..8 {
        assert!(ring.send(&[&[0]]).unwrap());
    }
    ring.publish().unwrap();
    let finish = |device: &mut Device| {
        let head = device.pop().unwrap().head;
        device.finish(head, 0);
    };
    let flags = |memory: &GuestMemoryMmap, ring: &Ring| {
        let mut flags = [0; 2];
        memory.read_slice(&mut flags, ring.addresses().available).unwrap();
        u16::from_le_bytes(flags)
    };
    let memory = device.memory();
    assert_eq!(flags(&memory, &ring), 1);
    assert!(!ring.ask(1).unwrap());
    assert_eq!(flags(&memory, &ring), 0);
    finish(&mut device);
    assert!(ring.take().unwrap().is_some());
    assert_eq!(flags(&memory, &ring), 1, "it was answered");
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Publish,
    /// The device takes so many chains.
    Pop(usize),
    /// The device gives back the chain at this place of those that it has.
    Finish(usize),
    Take,
    Ask(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0usize..600).prop_map(Step::Send),
        2 => Just(Step::Publish),
        2 => (1usize..4).prop_map(Step::Pop),
        3 => any::<prop::sample::Index>().prop_map(|index| Step::Finish(index.index(1 << 20))),
        3 => Just(Step::Take),
        1 => (0u16..10).prop_map(Step::Ask),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(6), failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done in whatever order, every frame arrives once and whole, in order; every chain comes back;
    /// no descriptor is lost; and neither side sleeps while the other believes that it looks.
    #[test]
    fn nothing_is_lost(
        steps in prop::collection::vec(step(), 0..400),
        event_index: bool,
        size in prop::sample::select(vec![1u16, 2, 4, 8, 16]),
        seed: u8,
    ) {
        let shape = Shape { size, buffer: 64 };
        let (mut ring, mut device, _) = ring(shape, Direction::ToDevice, event_index);
        let mut sent = VecDeque::new();
        let mut has = Vec::new();
        let mut next = seed;
        // Whether the device waits for a kick; whether we wait for a call.
        let (mut asleep, mut asked) = (true, None::<u16>);
        let mut finished = 0u16;
        for step in steps {
            match step {
                Step::Send(length) => {
                    next = next.wrapping_add(1);
                    let bytes: Vec<u8> = (0..length).map(|n| next ^ n as u8).collect();
                    let fits = ring.descriptors(length) <= ring.free();
                    prop_assert_eq!(ring.send(&[&bytes]).unwrap(), fits);
                    if fits {
                        sent.push_back(bytes);
                    }
                }
                Step::Publish => {
                    let waiting = ring.prepared() > 0;
                    let kick = ring.publish().unwrap();
                    prop_assert!(kick || !waiting || !asleep, "the device sleeps on");
                    if kick {
                        asleep = false;
                        device.work();
                    }
                }
                Step::Pop(count) => {
                    for _ in 0..count {
                        let Some(chain) = device.pop() else {
                            asleep = !device.sleep();
                            break;
                        };
                        prop_assert_eq!(Some(chain.bytes), sent.pop_front());
                        has.push(chain.head);
                    }
                }
                Step::Finish(place) => {
                    if has.is_empty() {
                        continue;
                    }
                    device.finish(has.remove(place % has.len()), 0);
                    finished += 1;
                    let call = device.call_wanted();
                    if let Some(after) = asked && finished >= after {
                        prop_assert!(call || !event_index, "nobody is woken");
                        asked = None;
                    }
                }
                Step::Take => match ring.take().unwrap() {
                    Some(taken) => {
                        finished -= 1;
                        asked = None;
                        ring.release(taken).unwrap();
                    }
                    None => prop_assert_eq!(finished, 0),
                },
                Step::Ask(after) => {
                    let after = after.clamp(1, ring.outstanding().max(1));
                    let already = ring.ask(after).unwrap();
                    prop_assert_eq!(already, finished >= after);
                    asked = (!already).then_some(after);
                }
            }
        }
        // Everything ends well.
        ring.publish().unwrap();
        while let Some(chain) = device.pop() {
            prop_assert_eq!(Some(chain.bytes), sent.pop_front());
            has.push(chain.head);
        }
        has.drain(..).for_each(|head| device.finish(head, 0));
        while let Some(taken) = ring.take().unwrap() {
            ring.release(taken).unwrap();
        }
        prop_assert!(sent.is_empty());
        prop_assert_eq!((ring.free(), ring.outstanding()), (usize::from(size), 0));
    }
}
