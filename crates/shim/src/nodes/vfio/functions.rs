//! The devices that the program was given, as functions of a PCI bus: which there are, and which of them VFIO has.
//!
//! Both can change, by what is written to sysfs; the tree says what is so for all processes, and [`Functions::follow`] makes it so
//! in this one. Numbers of nodes and groups follow from what `--device` said alone, so that all processes have the same.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use iommufd::{
    iova::{Iova, IovaRange},
    soft::SoftDevice,
};
use vfio::{
    Errno, Result,
    device::Device,
    devices::{
        ioat, nvme,
        specification::{Kind, Specification},
        test,
    },
    doors::{Registration, System, Token, VirtualFunctions},
    pci::address::Address,
};

use super::sysfs;
use crate::{kept, tree::Locked};

/// The group of the first device: a number that a machine's own groups rarely have.
const FIRST_GROUP: u32 = 1000;

/// The slot of the first device that is given no address.
const FIRST_SLOT: u8 = 0x10;

/// Where interrupts are written to on x86: nothing can be mapped there.
const MSI_WINDOW: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// What a device cannot be made for, in words.
type Problem = String;

fn words(error: impl ToString) -> Problem {
    error.to_string()
}

/// What a function is registered with, but for its device.
fn registration(
    at: Address,
    number: u32,
    device: Arc<dyn Device>,
    token: Token,
) -> Result<Registration, Problem> {
    let msi = IovaRange::new(Iova(MSI_WINDOW.0), Iova(MSI_WINDOW.1)).map_err(words)?;
    Ok(Registration {
        name: at.to_string(),
        address: Some(at.parts()),
        device,
        hardware: Some(SoftDevice::new(u64::from(group(number)), vec![msi])),
        reset_set: Some(u32::from(at.bus)),
        token,
        number: Some(number),
    })
}

/// The group of the function with a number: each has its own.
pub(super) fn group(number: u32) -> u32 {
    FIRST_GROUP.saturating_add(number)
}

/// A device that `--device` named.
pub(super) struct Physical {
    pub at: Address,
    pub number: u32,
    pub device: Arc<dyn Device>,
    token: Token,
    bound: AtomicBool,
    pub functions: Option<VirtualFunctions>,
    /// The number of its first virtual function.
    first: u32,
}

/// One function.
#[derive(Clone, Copy)]
pub(super) enum Function<'a> {
    Physical(&'a Physical),
    Virtual(&'a Physical, &'a VirtualFunctions, u16),
}

impl Function<'_> {
    pub(super) fn at(self) -> Address {
        match self {
            Self::Physical(physical) => physical.at,
            Self::Virtual(_, functions, index) => functions.address(index),
        }
    }

    /// The number of its node, when VFIO has it.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Physical(physical) => physical.number,
            Self::Virtual(physical, _, index) => physical.first.saturating_add(u32::from(index)),
        }
    }

    /// Whether VFIO has it.
    pub(super) fn is_bound(self) -> bool {
        match self {
            Self::Physical(physical) => physical.bound.load(Ordering::Acquire),
            Self::Virtual(_, functions, index) => {
                functions.devices().get(usize::from(index)).is_some_and(Option::is_some)
            }
        }
    }
}

/// All of them.
pub(super) struct Functions {
    pub system: Arc<System>,
    pub physical: Vec<Physical>,
}

impl Functions {
    /// Those that `--device` named. What cannot be made is complained about, and is not there.
    pub(super) fn new(specifications: &[String]) -> Self {
        let system = System::new(true);
        let count = u32::try_from(specifications.len()).unwrap_or(u32::MAX);
        let mut this = Self { system, physical: Vec::new() };
        let mut first = count;
        for (number, text) in (0..).zip(specifications) {
            match this.add(text, number, first) {
                Ok(functions) => first = first.saturating_add(u32::from(functions)),
                Err(problem) => crate::complain(&format!("--device {text}: {problem}")),
            }
        }
        this
    }

    /// Makes one device, and gives it to VFIO: how many virtual functions it can have.
    fn add(&mut self, text: &str, number: u32, first: u32) -> Result<u16, Problem> {
        let specification: Specification = text.parse().map_err(words)?;
        let slot = u8::try_from(number).unwrap_or(u8::MAX).saturating_add(FIRST_SLOT);
        let at = specification.address.unwrap_or(Address { segment: 0, bus: 0, devfn: slot << 3 });
        let (device, token): (Arc<dyn Device>, _) = match specification.kind {
            Kind::Nvme { file, read_only } => {
                let open = File::options().read(true).write(!read_only).open(&file);
                let file = open.map_err(|error| format!("cannot open {}: {error}", file.display()))?;
                let file = File::from(kept::for_ever(file.into()));
                let disk = disk::Disk::new(file, read_only).map_err(words)?;
                (Arc::new(nvme::new(disk, &nvme::Options::default()).map_err(words)?), Token::none())
            }
            Kind::Ioat => (Arc::new(ioat::physical().map_err(words)?), Token::physical()),
            Kind::Test => (Arc::new(test::function().map_err(words)?), Token::none()),
        };
        let functions = token.is_physical().then(|| virtual_functions(&self.system, at, first, &token));
        let made = registration(at, number, Arc::clone(&device), token.clone())?;
        self.system.add(made).map_err(words)?;
        let total = functions.as_ref().map_or(0, VirtualFunctions::total);
        let bound = AtomicBool::new(true);
        self.physical.push(Physical { at, number, device, token, bound, functions, first });
        Ok(total)
    }

    /// Those that there are.
    pub(super) fn all(&self) -> impl Iterator<Item = Function<'_>> {
        self.physical.iter().flat_map(|physical| {
            let virtuals = physical.functions.iter().flat_map(move |functions| {
                (0..functions.count()).map(move |index| Function::Virtual(physical, functions, index))
            });
            core::iter::once(Function::Physical(physical)).chain(virtuals)
        })
    }

    /// The one at a PCI address, written as sysfs has it.
    pub(super) fn find(&self, name: &str) -> Option<Function<'_>> {
        self.all().find(|function| function.at().to_string() == name)
    }

    /// Gives a function to VFIO, or takes it away. With a physical function its virtual ones go.
    pub(super) fn bind(&self, function: Function<'_>, to_vfio: bool) -> Result<()> {
        match function {
            _ if function.is_bound() == to_vfio => Ok(()),
            Function::Virtual(_, functions, index) if to_vfio => functions.bind(index),
            Function::Virtual(_, functions, index) => functions.unbind(index),
            Function::Physical(physical) => {
                if to_vfio {
                    let device = Arc::clone(&physical.device);
                    registration(physical.at, physical.number, device, physical.token.clone())
                        .and_then(|made| self.system.add(made).map_err(words))
                        .map_err(|_| Errno::BUSY)?;
                } else {
                    if let Some(functions) = &physical.functions {
                        functions.set(0)?;
                    }
                    self.system.remove(physical.number);
                }
                physical.bound.store(to_vfio, Ordering::Release);
                Ok(())
            }
        }
    }

    /// Makes it so in this process as the tree has it.
    pub(super) fn follow(&self, tree: &Locked) {
        for physical in &self.physical {
            let function = Function::Physical(physical);
            // Each step is one that another process has made already.
            let _ = self.bind(function, tree.has(&sysfs::of(function, "driver")));
            let Some(functions) = &physical.functions else { continue };
            let count = tree.text(&sysfs::of(function, "sriov_numvfs"));
            let count = count.and_then(|count| count.parse().ok()).unwrap_or(0);
            if functions.count() != count {
                let _ = functions.set(0).and_then(|()| functions.set(count));
            }
            for index in 0..functions.count() {
                let function = Function::Virtual(physical, functions, index);
                let _ = self.bind(function, tree.has(&sysfs::of(function, "driver")));
            }
        }
    }
}

/// The virtual functions of a DMA engine.
fn virtual_functions(system: &Arc<System>, at: Address, first: u32, token: &Token) -> VirtualFunctions {
    let layout = (ioat::TOTAL_VFS, ioat::VF_OFFSET, ioat::VF_STRIDE);
    VirtualFunctions::new(system, at, layout, token.clone(), move |index, at| {
        let number = first.saturating_add(u32::from(index));
        registration(at, number, ioat::virtual_function().ok()?, Token::none()).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_is_told() {
        let mut functions = Functions::new(&[]);
        for (bad, words) in [("tape", "no device"), ("nvme,file=/nowhere/at/all", "cannot open")] {
            let problem = functions.add(bad, 0, 1).unwrap_err();
            assert!(problem.contains(words), "{bad}: {problem}");
        }
        assert_eq!(functions.add("ioat,addr=00:05.0", 0, 1), Ok(ioat::TOTAL_VFS));
    }

    #[test]
    fn numbers_follow_from_what_was_given() {
        let functions = Functions::new(&["ioat".to_owned(), "ioat".to_owned()]);
        for (physical, count) in functions.physical.iter().zip([2, 1]) {
            physical.functions.as_ref().unwrap().set(count).unwrap();
        }
        let all: Vec<_> = functions.all().map(|one| (one.at().to_string(), one.number())).collect();
        let named = |name: &str, number| (name.to_owned(), number);
        assert_eq!(
            all,
            [
                named("0000:00:10.0", 0),
                named("0000:01:00.0", 2),
                named("0000:01:00.2", 3),
                named("0000:00:11.0", 1),
                named("0000:01:01.0", 9),
            ]
        );
        for (name, number) in all {
            assert_eq!(functions.system.group_of(number), Some(group(number)), "{name}");
        }
    }

    #[test]
    fn without_its_physical_function_a_virtual_one_is_none() {
        let functions = Functions::new(&["ioat".to_owned()]);
        functions.physical[0].functions.as_ref().unwrap().set(1).unwrap();
        let physical = functions.find("0000:00:10.0").unwrap();
        functions.bind(physical, false).unwrap();
        assert_eq!(functions.all().count(), 1);
        assert!(!physical.is_bound() && functions.system.group_of(0).is_none());
        functions.bind(physical, true).unwrap();
        assert!(physical.is_bound() && functions.system.group_of(0).is_some());
    }
}
