//! What the environment asks for.
//!
//! `RING3_SHIM` has one item a line: `mock-iommu` for the IOMMU of the kernel's own tests with their failure injection, `device=SPEC`
//! for a VFIO device, `tree=PID DIRECTORY` for where files of sysfs are, and the process that removes them. Without the variable there is a `/dev/iommu` and nothing else.

use std::sync::Arc;

use iommufd::Context;

use crate::{
    listing,
    nodes::{faults, iommu::IommuNode, vfio},
    served::{self, Served},
    tree::{self, Place, Plan},
};

/// The variable that `ring3 shim` sets.
const VARIABLE: &str = "RING3_SHIM";

/// What is asked for.
#[derive(Default, Debug, PartialEq, Eq)]
struct Configuration {
    mock_iommu: bool,
    devices: Vec<String>,
    place: Option<Place>,
}

impl Configuration {
    /// Reads the variable's text; the lines that mean nothing beside.
    fn parse(text: &str) -> (Self, Vec<&str>) {
        let mut this = Self::default();
        let mut unknown = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            match line.split_once('=') {
                None if line == "mock-iommu" => this.mock_iommu = true,
                Some(("tree", place)) => {
                    match place.split_once(' ').map(|(owner, root)| (owner.parse(), root)) {
                        Some((Ok(owner), root)) => this.place = Some(Place { root: root.into(), owner }),
                        _ => unknown.push(line),
                    }
                }
                Some(("device", specification)) => this.devices.push(specification.to_owned()),
                _ => unknown.push(line),
            }
        }
        (this, unknown)
    }
}

/// Makes what the environment asks for.
pub(crate) fn apply() {
    let text = std::env::var(VARIABLE).unwrap_or_default();
    let (configuration, unknown) = Configuration::parse(&text);
    for line in unknown {
        crate::complain(&format!("{VARIABLE} has a line that means nothing: {line:?}"));
    }
    let context: fn() -> Arc<Context> =
        if configuration.mock_iommu { iommufd::mock::open } else { Context::new };
    let mut plan = Plan { place: configuration.place, ..Plan::default() };
    if configuration.mock_iommu {
        faults::plan(&mut plan);
    }
    vfio::set(configuration.devices, &mut plan);
    let iommu = "/dev/iommu";
    listing::set([iommu].into_iter(), &plan.tops);
    tree::set(plan);
    served::set(Served {
        nodes: vec![(iommu.to_owned(), Arc::new(IommuNode { context }))],
        fail_nth: configuration.mock_iommu,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_items() {
        let (configuration, unknown) =
            Configuration::parse("mock-iommu\n\ndevice=test,addr=1\nwhat\ntree=/a\ntree=7 /a b\n");
        assert_eq!(
            configuration,
            Configuration {
                mock_iommu: true,
                devices: vec!["test,addr=1".to_owned()],
                place: Some(Place { root: "/a b".into(), owner: 7 }),
            }
        );
        assert_eq!(unknown, ["what", "tree=/a"]);
    }
}
