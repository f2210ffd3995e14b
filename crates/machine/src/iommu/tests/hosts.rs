//! Endpoints whose translations are not ring3's: what the guest maps is carried over.

use super::*;
use crate::iommu::fake::{BOTH, Fake};
use crate::vcpu::lock;

const HOSTS: u32 = 24;

struct WithHost {
    it: Setup,
    fake: Arc<Fake>,
    exposed: Arc<Exposed>,
}

fn with_host() -> WithHost {
    let mut it = setup();
    it.iommu.set_bypass(true);
    let fake = Arc::new(Fake::default());
    let exposed = it.iommu.add_host_endpoint(HOSTS, HostEndpoint::of(Arc::clone(&fake) as _)).unwrap();
    WithHost { it, fake, exposed }
}

fn run(physical: u64, length: u64) -> Run {
    Run { physical, length }
}

#[test]
fn a_hosts_device_reaches_what_its_domain_maps() {
    let WithHost { it, fake, exposed } = with_host();
    let Setup { ram: _ram, mut iommu, memory, .. } = it;
    assert_eq!(fake.reaches().unwrap(), [(0, MIB, BOTH), (HIGH, MIB, BOTH)]);
    assert_eq!(exposed.runs(), None);
    iommu.attach(3, HOSTS, false).unwrap();
    assert_eq!((fake.reaches().unwrap(), exposed.runs().unwrap()), (vec![], vec![]));
    // One in software is in the domain, too.
    iommu.attach(3, 8, false).unwrap();
    let at = 0x7_0000_0000;
    iommu.map(3, at, at + 2 * PAGE - 1, HIGH, RW).unwrap();
    iommu.map(3, 0, PAGE - 1, PAGE, MapFlags { read: true, write: false }).unwrap();
    assert_eq!(fake.reaches().unwrap(), [(0, PAGE, Prot::READ), (at, 2 * PAGE, BOTH)]);
    assert_eq!(exposed.runs().unwrap(), [(at, run(HIGH, 2 * PAGE))]);
    assert!(read(&memory[0], at).is_some());
    iommu.unmap(3, at, at + 2 * PAGE - 1).unwrap();
    assert_eq!(fake.reaches().unwrap(), [(0, PAGE, Prot::READ)]);
    assert_eq!(exposed.runs().unwrap(), []);
    assert!(read(&memory[0], at).is_none());
}

#[test]
fn a_hosts_device_goes_from_domain_to_domain() {
    let WithHost { it, fake, exposed } = with_host();
    let Setup { ram: _ram, mut iommu, .. } = it;
    iommu.attach(1, 8, false).unwrap();
    iommu.map(1, PAGE, 3 * PAGE - 1, 0, RW).unwrap();
    // It joins a domain that has something.
    iommu.attach(1, HOSTS, false).unwrap();
    assert_eq!(fake.reaches().unwrap(), [(PAGE, 2 * PAGE, BOTH)]);
    assert_eq!(exposed.runs().unwrap(), [(PAGE, run(0, 2 * PAGE))]);
    iommu.attach(2, HOSTS, false).unwrap();
    assert_eq!((fake.reaches().unwrap(), exposed.runs().unwrap()), (vec![], vec![]));
    // One that does not translate, none while that is allowed, none.
    iommu.attach(4, HOSTS, true).unwrap();
    assert_eq!((fake.reaches().unwrap().len(), exposed.runs()), (2, None));
    iommu.detach(4, HOSTS).unwrap();
    assert_eq!((fake.reaches().unwrap().len(), exposed.runs()), (2, None));
    iommu.set_bypass(false);
    assert_eq!((fake.reaches(), exposed.runs().unwrap()), (None, vec![]));
    iommu.reset();
    iommu.set_bypass(true);
    assert_eq!(fake.reaches().unwrap().len(), 2);
}

#[test]
fn what_the_host_refuses_is_refused_and_nothing_else_is_affected() {
    let WithHost { it, fake, exposed } = with_host();
    let Setup { ram: _ram, mut iommu, memory, .. } = it;
    iommu.attach(1, 8, false).unwrap();
    iommu.attach(1, HOSTS, false).unwrap();
    iommu.attach(2, 16, false).unwrap();
    *lock(&fake.limit) = Some(1);
    iommu.map(1, 0, PAGE - 1, 0, RW).unwrap();
    assert_eq!(iommu.map(1, PAGE, 2 * PAGE - 1, PAGE, RW), Err(Refusal::NoMemory));
    assert!(read(&memory[0], PAGE).is_none(), "nor has the device in software got it");
    assert_eq!((fake.reaches().unwrap().len(), exposed.runs().unwrap().len()), (1, 1));
    // Another domain is not the host's.
    iommu.map(2, PAGE, 2 * PAGE - 1, PAGE, RW).unwrap();
    iommu.map(2, 2 * PAGE, 3 * PAGE - 1, PAGE, RW).unwrap();
    assert!(read(&memory[1], PAGE).is_some());
    // A domain with too much: the device stays where it is.
    assert_eq!(iommu.attach(2, HOSTS, false), Err(Refusal::NoMemory));
    assert_eq!(exposed.runs().unwrap(), [(0, run(0, PAGE))]);
    iommu.unmap(1, 0, PAGE - 1).unwrap();
    assert_eq!(iommu.map(1, PAGE, 2 * PAGE - 1, PAGE, RW), Ok(()));
    assert_eq!(fake.reaches().unwrap(), [(PAGE, PAGE, BOTH)]);
}

#[test]
fn a_host_that_cannot_map_guest_memory_is_an_error() {
    let mut it = setup();
    it.iommu.set_bypass(true);
    let fake = Arc::new(Fake::default());
    *lock(&fake.limit) = Some(1);
    let refused = it.iommu.add_host_endpoint(HOSTS, HostEndpoint::of(fake as _)).map(drop);
    assert_eq!(refused, Err(Errno::NOSPC));
}

#[test]
fn the_guest_is_told_what_the_host_cannot_translate() {
    let WithHost { it, .. } = with_host();
    let Setup { ram: _ram, mut iommu, .. } = it;
    assert_eq!(iommu.input_range(), (0, (1 << 39) - 1));
    let region = |start, last, msi| Reserved { start, last, msi };
    let messages = region(0xfee0_0000, 0xfee0_0000 + (layout::LOCAL_APIC_SIZE - 1), true);
    assert_eq!(iommu.reserved(8), Ok(vec![messages]));
    let mut expected = vec![messages];
    if messages.last < 0xfeef_ffff {
        expected.push(region(messages.last + 1, 0xfeef_ffff, false));
    }
    expected.push(region(0x20_0000_0000, 0x20_0000_ffff, false));
    assert_eq!(iommu.reserved(HOSTS), Ok(expected));
    iommu.attach(1, HOSTS, false).unwrap();
    let map = |iommu: &mut GuestIommu, at| iommu.map(1, at, at + (PAGE - 1), 0, RW);
    assert_eq!(map(&mut iommu, 0x20_0000_0000), Err(Refusal::Range));
    assert_eq!(map(&mut iommu, 1 << 39), Err(Refusal::Range));
    assert_eq!(map(&mut iommu, 0x20_0001_0000), Ok(()));
    // What has been mapped where the device cannot reach it keeps it out.
    iommu.attach(2, 8, false).unwrap();
    iommu.map(2, 1 << 40, (1 << 40) + (PAGE - 1), 0, RW).unwrap();
    assert_eq!(iommu.attach(2, HOSTS, false), Err(Refusal::Invalid));
    assert_eq!(map(&mut iommu, 0x20_0002_0000), Ok(()));
}
