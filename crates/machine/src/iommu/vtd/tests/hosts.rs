//! Devices of a host: the guest's page tables are carried over.

use iommufd::domain::Prot;

use super::*;
use crate::iommu::fake::{BOTH, Fake};
use crate::writes::Run;

const HOSTS: u16 = 0x18;
/// Its domain.
const DOMAIN: u64 = 7;

struct WithHost {
    it: Setup,
    fake: Arc<Fake>,
    exposed: Arc<Exposed>,
}

fn with_host() -> WithHost {
    let it = setup();
    let fake = Arc::new(Fake::default());
    let exposed = it.unit.add_host_endpoint(HOSTS, HostEndpoint::of(Arc::clone(&fake) as _)).unwrap();
    WithHost { it, fake, exposed }
}

impl WithHost {
    /// A context entry with a table of three levels, or none.
    fn context(&self, entry: Option<u64>) {
        let at = CONTEXTS + u64::from(HOSTS) * 16;
        self.it.put(at + 8, DOMAIN << 8 | 1);
        self.it.put(at, entry.unwrap_or(0));
    }

    /// The entry for the page of `iova`, below 1 GiB, in tables of three levels.
    fn map(&self, iova: u64, entry: u64) {
        for (level, shift) in [(0, 30), (1, 21)] {
            self.it.put(TABLES + level * PAGE + (iova >> shift & 511) * 8, (TABLES + (level + 1) * PAGE) | 3);
        }
        self.it.put(TABLES + 2 * PAGE + (iova >> 12 & 511) * 8, entry);
    }

    fn reaches(&self) -> Vec<(u64, u64, Prot)> {
        self.fake.reaches().unwrap()
    }
}

/// What Linux sends in caching mode: a context entry that was not present belongs to domain 0.
fn device_again(domain: u64) -> (u64, u64) {
    (1 | 3 << 4 | domain << 16 | u64::from(HOSTS) << 32, 0)
}

fn pages_again(iova: u64, mask: u64) -> (u64, u64) {
    (2 | 3 << 4 | DOMAIN << 16, iova | mask)
}

#[test]
fn the_unit_says_that_it_caches_what_is_not_present() {
    let it = setup();
    let low = it.read(at::CAPABILITY);
    assert_eq!((low >> 7 & 1, low >> 8 & 31, low >> 16 & 63), (0, 0b0110, 47));
    // The host has 39 bits.
    let WithHost { it, .. } = with_host();
    let low = it.read(at::CAPABILITY);
    assert_eq!((low >> 7 & 1, low >> 8 & 31, low >> 16 & 63), (1, 0b0010, 38));
}

#[test]
fn a_hosts_device_reaches_what_its_table_has() {
    let mut host = with_host();
    assert_eq!(host.reaches(), [(0, 4 * MIB, BOTH), (HIGH, MIB, BOTH)]);
    assert_eq!(host.exposed.runs(), None);
    host.it.enable();
    assert_eq!((host.fake.reaches(), host.exposed.runs()), (None, Some(vec![])));
    host.map(0x5000, HIGH | 3);
    host.map(0x6000, 0x8000 | 1);
    // No memory; where messages go.
    host.map(0x7000, (5 * MIB) | 3);
    host.context(Some(TABLES | 1));
    assert!(host.it.submit(&[device_again(0)]));
    assert_eq!(host.reaches(), [(0x5000, PAGE, BOTH), (0x6000, PAGE, Prot::READ)]);
    assert_eq!(host.exposed.runs().unwrap(), [(0x5000, Run { physical: HIGH, length: PAGE })]);
    // What becomes present, what changes, what goes.
    host.map(0x9000, 0x9000 | 2);
    host.map(0x5000, 0xa000 | 3);
    host.map(0x6000, 0);
    assert!(host.it.submit(&[pages_again(0x8000, 2)]));
    let before = [(0x5000, PAGE, BOTH), (0x6000, PAGE, Prot::READ), (0x9000, PAGE, Prot::WRITE)];
    assert_eq!(host.reaches(), before);
    // Another domain's.
    assert!(host.it.submit(&[(2 | 2 << 4 | (DOMAIN + 1) << 16, 0)]));
    assert_eq!(host.reaches(), before);
    assert!(host.it.submit(&[pages_again(0x4000, 2)]));
    assert_eq!(host.reaches(), [(0x5000, PAGE, BOTH), (0x9000, PAGE, Prot::WRITE)]);
    let run = |physical| Run { physical, length: PAGE };
    assert_eq!(host.exposed.runs().unwrap(), [(0x5000, run(0xa000)), (0x9000, run(0x9000))]);
    // By register, all.
    host.map(0x9000, 0);
    host.it.write64(at::IOTLB, 1 << 63 | 1 << 60);
    assert_eq!(host.reaches(), [(0x5000, PAGE, BOTH)]);
    // The entry goes, and translation.
    host.context(None);
    assert!(host.it.submit(&[device_again(DOMAIN)]));
    assert_eq!((host.fake.reaches(), host.exposed.runs()), (None, Some(vec![])));
    host.it.write(at::COMMAND, 1 << 26);
    assert_eq!((host.reaches().len(), host.exposed.runs()), (2, None));
    assert_eq!(host.it.unit.unit.engine.shadows().count(), 0);
}

#[test]
fn large_pages_and_small_ones_take_each_others_place() {
    let mut host = with_host();
    host.it.enable();
    host.map(0x1000, 0x1000 | 3);
    host.map(0x2000, 0x2000 | 3);
    host.context(Some(TABLES | 1));
    assert!(host.it.submit(&[device_again(0)]));
    assert_eq!(host.reaches().len(), 2);
    // One of the two is invalidated, and all change.
    host.it.put(TABLES + PAGE, 0x20_0083);
    assert!(host.it.submit(&[pages_again(0x1000, 0)]));
    assert_eq!(host.reaches(), [(0, 2 * MIB, BOTH)]);
    host.it.put(TABLES + PAGE, (TABLES + 2 * PAGE) | 3);
    assert!(host.it.submit(&[pages_again(0x3000, 0)]));
    assert_eq!(host.reaches(), [(0x1000, PAGE, BOTH), (0x2000, PAGE, BOTH)]);
    // Of a page of 1 GiB what is memory.
    host.it.put(TABLES, 0x83);
    assert!(host.it.submit(&[FORGET_ALL]));
    assert_eq!(host.reaches(), [(0, 4 * MIB, BOTH)]);
    assert_eq!(host.exposed.runs().unwrap(), [(0, Run { physical: 0, length: 4 * MIB })]);
}

#[test]
fn what_the_host_does_not_map_is_left_out() {
    let mut host = with_host();
    host.it.enable();
    *lock(&host.fake.limit) = Some(2);
    host.context(Some(TABLES | 1));
    host.map(0x1000, 0x1000 | 3);
    assert!(host.it.submit(&[device_again(0)]));
    for page in 2..5 {
        host.map(page * PAGE, (page * PAGE) | 3);
    }
    assert!(host.it.submit(&[FORGET_ALL]));
    assert_eq!(host.reaches(), [(0x1000, PAGE, BOTH), (0x2000, PAGE, BOTH)]);
    host.map(0x1000, 0);
    assert!(host.it.submit(&[FORGET_ALL]));
    assert_eq!(host.reaches(), [(0x2000, PAGE, BOTH), (0x3000, PAGE, BOTH)]);
    // The devices in software are not concerned.
    host.it.context(0, TABLES + 0x8000);
    host.it.map(TABLES + 0x8000, 0x5000, HIGH | 1);
    host.it.put(HIGH + 8, 7);
    assert_eq!(host.it.dma(0, 0x5008), Some(7));
}

#[test]
fn a_table_that_is_its_own_comes_to_an_end() {
    let mut host = with_host();
    host.it.enable();
    for index in 0..512 {
        host.it.put(TABLES + index * 8, TABLES | 3);
    }
    *lock(&host.fake.limit) = Some(600);
    host.context(Some(TABLES | 1));
    // The host's page table cannot be filled, so the device is attached to nothing.
    assert!(host.it.submit(&[device_again(0)]));
    assert_eq!(host.fake.reaches(), None);
    host.it.put(TABLES, 0);
    *lock(&host.fake.limit) = None;
    assert!(host.it.submit(&[device_again(0)]));
    assert!((1..=4096).contains(&host.reaches().len()));
}
