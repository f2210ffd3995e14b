//! The answers are those of the kernel's vfio-pci, to the same calls.

use std::os::fd::OwnedFd;

use super::*;
use crate::eventfd::tests::{count, pair};

const INTX: u32 = VFIO_PCI_INTX_IRQ_INDEX;
const MSI: u32 = VFIO_PCI_MSI_IRQ_INDEX;
const MSIX: u32 = VFIO_PCI_MSIX_IRQ_INDEX;
const ERR: u32 = VFIO_PCI_ERR_IRQ_INDEX;
const REQ: u32 = VFIO_PCI_REQ_IRQ_INDEX;

use IrqAction::{Mask, Trigger, Unmask};

fn all() -> Arc<Interrupts> {
    Interrupts::new(Kinds { intx: true, msi: 4, msix: 5 })
}

fn set(
    irqs: &Interrupts,
    action: IrqAction,
    index: u32,
    start: u32,
    count: u32,
    data: IrqData,
) -> Result<()> {
    irqs.set(IrqSet { index, start, count, action, data })
}

fn none(irqs: &Interrupts, action: IrqAction, index: u32, start: u32, count: u32) -> Result<()> {
    set(irqs, action, index, start, count, IrqData::None)
}

fn flags(irqs: &Interrupts, action: IrqAction, index: u32, start: u32, flags: &[bool]) -> Result<()> {
    set(irqs, action, index, start, flags.len() as u32, IrqData::Bool(flags.to_vec()))
}

fn fds(
    irqs: &Interrupts,
    action: IrqAction,
    index: u32,
    start: u32,
    fds: Vec<Option<OwnedFd>>,
) -> Result<()> {
    set(irqs, action, index, start, fds.len() as u32, IrqData::EventFd(fds))
}

/// Gives vector `start` a new eventfd.
fn enable(irqs: &Interrupts, index: u32, start: u32) -> OwnedFd {
    let (ours, theirs) = pair();
    fds(irqs, Trigger, index, start, vec![Some(theirs)]).unwrap();
    ours
}

fn not_an_eventfd() -> Option<OwnedFd> {
    Some(rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

#[test]
fn kinds_are_told() {
    let irqs = all();
    let of = |index| irqs.info(index).map(|info| (info.flags.bits(), info.count));
    assert_eq!(of(INTX), Ok((7, 1)));
    assert_eq!(of(MSI), Ok((9, 4)));
    assert_eq!(of(MSIX), Ok((1, 5)));
    assert_eq!(of(ERR), Ok((9, 1)));
    assert_eq!(of(REQ), Ok((9, 1)));
    assert_eq!(of(5), Err(Errno::INVAL));
    assert_eq!(of(u32::MAX), Err(Errno::INVAL));
}

#[test]
fn nothing_works_before_it_is_enabled() {
    let irqs = all();
    for index in [INTX, MSI, MSIX] {
        assert_eq!(none(&irqs, Trigger, index, 0, 1), Err(Errno::INVAL));
        assert_eq!(none(&irqs, Trigger, index, 0, 0), Err(Errno::INVAL));
        assert_eq!(flags(&irqs, Trigger, index, 0, &[true]), Err(Errno::INVAL));
        let answer = if index == INTX { Errno::INVAL } else { Errno::NOTTY };
        assert_eq!(none(&irqs, Mask, index, 0, 1), Err(answer));
        assert_eq!(none(&irqs, Unmask, index, 0, 1), Err(answer));
        assert_eq!(fds(&irqs, Trigger, index, 0, vec![not_an_eventfd()]), Err(Errno::INVAL));
    }
    for index in [ERR, REQ] {
        assert_eq!(none(&irqs, Trigger, index, 0, 1), Err(Errno::INVAL));
        assert_eq!(none(&irqs, Trigger, index, 0, 0), Err(Errno::INVAL));
        assert_eq!(flags(&irqs, Trigger, index, 0, &[true]), Ok(()));
        assert_eq!(none(&irqs, Mask, index, 0, 1), Err(Errno::NOTTY));
    }
    assert_eq!(fds(&irqs, Trigger, INTX, 0, vec![]), Err(Errno::INVAL));
    assert_eq!(fds(&irqs, Trigger, MSI, 0, vec![]), Err(Errno::RANGE));
    assert_eq!(fds(&irqs, Trigger, ERR, 0, vec![]), Err(Errno::INVAL));
    assert_eq!(irqs.enabled(), Enabled::None);
}

#[test]
fn vectors_that_do_not_exist() {
    let irqs = all();
    for (start, count) in [(5, 0), (5, 1), (0, 6), (1, u32::MAX), (u32::MAX, u32::MAX)] {
        assert_eq!(none(&irqs, Trigger, MSIX, start, count), Err(Errno::INVAL), "{start} {count}");
    }
    assert_eq!(none(&Interrupts::new(Kinds::default()), Trigger, MSIX, 0, 0), Err(Errno::INVAL));
}

#[test]
fn messages() {
    for index in [MSI, MSIX] {
        let irqs = all();
        assert!(!irqs.message(0));
        let first = enable(&irqs, index, 0);
        let second = enable(&irqs, index, 0);
        assert_eq!(none(&irqs, Trigger, index, 0, 1), Ok(()));
        assert!(irqs.message(0));
        assert_eq!((count(&first), count(&second)), (0, 2));
        assert_eq!(flags(&irqs, Trigger, index, 0, &[false]), Ok(()));
        assert_eq!(count(&second), 0);
        assert_eq!(flags(&irqs, Trigger, index, 0, &[true]), Ok(()));
        assert_eq!(count(&second), 1);
        // One kind at a time.
        for other in [INTX, MSI + MSIX - index] {
            let (_ours, theirs) = pair();
            assert_eq!(fds(&irqs, Trigger, other, 0, vec![Some(theirs)]), Err(Errno::INVAL));
            assert_eq!(none(&irqs, Trigger, other, 0, 1), Err(Errno::INVAL));
            assert_eq!(none(&irqs, Trigger, other, 0, 0), Err(Errno::INVAL));
        }
        assert_eq!(fds(&irqs, Trigger, index, 0, vec![None]), Ok(()));
        assert_eq!(none(&irqs, Trigger, index, 0, 1), Ok(()));
        assert_eq!(count(&second), 0);
        assert_eq!(none(&irqs, Trigger, index, 0, 0), Ok(()));
        assert_eq!(none(&irqs, Trigger, index, 0, 0), Err(Errno::INVAL));
        assert!(!irqs.message(0));
    }
}

#[test]
fn only_msix_grows() {
    let irqs = all();
    let (first, theirs) = pair();
    let (second, others) = pair();
    fds(&irqs, Trigger, MSI, 0, vec![Some(theirs), Some(others)]).unwrap();
    assert_eq!(irqs.enabled(), Enabled::Msi(2));
    assert_eq!(fds(&irqs, Trigger, MSI, 2, vec![None]), Err(Errno::INVAL));
    assert_eq!(none(&irqs, Trigger, MSI, 0, 3), Err(Errno::INVAL));
    // A device that was given two messages sends its others as the last.
    assert!(irqs.message(0) && irqs.message(1) && irqs.message(3));
    assert_eq!((count(&first), count(&second)), (1, 2));
    none(&irqs, Trigger, MSI, 0, 0).unwrap();

    let second = enable(&irqs, MSIX, 1);
    let last = enable(&irqs, MSIX, 4);
    assert_eq!(none(&irqs, Trigger, MSIX, 0, 5), Ok(()));
    assert!(irqs.message(4) && irqs.message(0));
    assert_eq!((count(&second), count(&last)), (1, 2));
}

#[test]
fn intx_masks_itself_and_comes_back() {
    let irqs = all();
    irqs.set_intx(true);
    let ours = enable(&irqs, INTX, 0);
    assert_eq!(count(&ours), 1, "the level was high already");
    irqs.set_intx(false);
    irqs.set_intx(true);
    assert_eq!(count(&ours), 0, "masked");
    assert_eq!(none(&irqs, Unmask, INTX, 0, 1), Ok(()));
    assert_eq!(count(&ours), 1, "still high");
    irqs.set_intx(false);
    assert_eq!(flags(&irqs, Unmask, INTX, 0, &[true]), Ok(()));
    assert_eq!(count(&ours), 0);
    assert_eq!(none(&irqs, Mask, INTX, 0, 1), Ok(()));
    irqs.set_intx(true);
    assert_eq!(none(&irqs, Trigger, INTX, 0, 1), Ok(()));
    assert_eq!(count(&ours), 1, "the user's own trigger knows no mask");
    assert_eq!(flags(&irqs, Unmask, INTX, 0, &[false]), Ok(()));
    assert_eq!(count(&ours), 0);
    irqs.set_intx_disabled(true);
    assert_eq!(none(&irqs, Unmask, INTX, 0, 1), Ok(()));
    assert_eq!(count(&ours), 0);
    irqs.set_intx_disabled(false);
    assert_eq!(count(&ours), 1);
    assert!(!irqs.message(0), "messages are not enabled");
}

#[test]
fn intx_is_unmasked_by_an_eventfd() {
    let irqs = all();
    let ours = enable(&irqs, INTX, 0);
    let (unmask, theirs) = pair();
    assert_eq!(fds(&irqs, Mask, INTX, 0, vec![not_an_eventfd()]), Err(Errno::NOTTY));
    assert_eq!(fds(&irqs, Unmask, INTX, 0, vec![not_an_eventfd()]), Err(Errno::INVAL));
    assert_eq!(fds(&irqs, Unmask, INTX, 0, vec![Some(theirs)]), Ok(()));
    let (_other, theirs) = pair();
    assert_eq!(fds(&irqs, Unmask, INTX, 0, vec![Some(theirs)]), Err(Errno::BUSY));
    irqs.set_intx(true);
    assert_eq!(count(&ours), 1);
    rustix::io::write(&unmask, &1u64.to_ne_bytes()).unwrap();
    let mut readable = [rustix::event::PollFd::new(&ours, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut readable, None).unwrap();
    assert_eq!(count(&ours), 1);
    assert_eq!(fds(&irqs, Unmask, INTX, 0, vec![None]), Ok(()));
    assert_eq!(fds(&irqs, Unmask, INTX, 0, vec![None]), Ok(()));
    rustix::io::write(&unmask, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(none(&irqs, Trigger, INTX, 0, 0), Ok(()));
    assert_eq!(count(&unmask), 1, "nobody reads it");
}

#[test]
fn error_and_request_are_apart_from_the_rest() {
    let irqs = all();
    let message = enable(&irqs, MSIX, 0);
    let error = enable(&irqs, ERR, 0);
    let request = enable(&irqs, REQ, 0);
    irqs.error();
    irqs.request();
    irqs.request();
    assert_eq!((count(&error), count(&request), count(&message)), (1, 2, 0));
    assert_eq!(none(&irqs, Trigger, ERR, 0, 1), Ok(()));
    assert_eq!(flags(&irqs, Trigger, ERR, 0, &[false]), Ok(()));
    assert_eq!(flags(&irqs, Trigger, ERR, 0, &[true]), Ok(()));
    assert_eq!(count(&error), 2);
    assert_eq!(fds(&irqs, Trigger, ERR, 0, vec![None]), Ok(()));
    assert_eq!(none(&irqs, Trigger, ERR, 0, 1), Err(Errno::INVAL));
    assert_eq!(none(&irqs, Trigger, REQ, 0, 0), Ok(()));
    assert_eq!(none(&irqs, Trigger, REQ, 0, 0), Err(Errno::INVAL));
}

#[test]
fn clearing_takes_all_back() {
    let irqs = all();
    let ours = enable(&irqs, INTX, 0);
    let error = enable(&irqs, ERR, 0);
    let (_unmask, theirs) = pair();
    fds(&irqs, Unmask, INTX, 0, vec![Some(theirs)]).unwrap();
    irqs.clear();
    irqs.set_intx(true);
    irqs.error();
    assert_eq!((count(&ours), count(&error)), (0, 0));
    assert_eq!(irqs.enabled(), Enabled::None);
}
