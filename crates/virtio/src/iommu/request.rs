//! The bytes of requests, answers and faults (virtio 1.3, section 5.13.6). All numbers are little-endian.

use super::{FaultRecord, Reserved};

/// Bytes of the longest request's part for the device, a PROBE's.
pub(super) const MAX_SIZE: usize = 72;
/// Bytes of `struct virtio_iommu_req_tail`, the end of the part for the driver.
pub(super) const TAIL_SIZE: usize = 4;
/// Bytes of `struct virtio_iommu_fault`.
pub(super) const FAULT_SIZE: usize = 24;

/// `type` of `struct virtio_iommu_req_head`.
mod kind {
    pub(super) const ATTACH: u8 = 1;
    pub(super) const DETACH: u8 = 2;
    pub(super) const MAP: u8 = 3;
    pub(super) const UNMAP: u8 = 4;
    pub(super) const PROBE: u8 = 5;
}

/// A flag of ATTACH: the domain does not translate.
const ATTACH_BYPASS: u32 = 1;

/// What a mapping allows (`VIRTIO_IOMMU_MAP_F_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFlags {
    /// The endpoint may read.
    pub read: bool,
    /// It may write.
    pub write: bool,
}

/// Why a request was not done (`VIRTIO_IOMMU_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request or a part of it is not supported.
    Unsupported,
    /// The IOMMU failed.
    Device,
    /// A parameter is invalid.
    Invalid,
    /// A range is invalid.
    Range,
    /// There is no such endpoint or domain.
    NoEntry,
    /// There is no memory left.
    NoMemory,
}

impl Refusal {
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Unsupported => 2,
            Self::Device => 3,
            Self::Invalid => 4,
            Self::Range => 5,
            Self::NoEntry => 6,
            Self::NoMemory => 8,
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Attach { domain: u32, endpoint: u32, bypass: bool },
    Detach { domain: u32, endpoint: u32 },
    Map { domain: u32, start: u64, last: u64, to: u64, flags: MapFlags },
    Unmap { domain: u32, start: u64, last: u64 },
    Probe { endpoint: u32 },
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Refusal> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(Refusal::Invalid)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    take(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    take(bytes, at).map(u64::from_le_bytes)
}

/// A range that is not empty.
fn range_at(bytes: &[u8], at: usize) -> Result<(u64, u64), Refusal> {
    let (start, last) = (u64_at(bytes, at)?, u64_at(bytes, at + 8)?);
    if start <= last { Ok((start, last)) } else { Err(Refusal::Range) }
}

impl Request {
    /// Reads the part for the device. Reserved bytes are ignored where the specification does not say otherwise; what
    /// follows the request is ignored.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let [kind] = take(bytes, 0)?;
        match kind {
            kind::ATTACH => {
                let (domain, endpoint, flags) = (u32_at(bytes, 4)?, u32_at(bytes, 8)?, u32_at(bytes, 12)?);
                // "A device MUST NOT [...] if [...] reserved is not zero" (5.13.6.3.2).
                if flags & !ATTACH_BYPASS != 0 || take(bytes, 16)? != [0; 4] {
                    return Err(Refusal::Invalid);
                }
                Ok(Self::Attach { domain, endpoint, bypass: flags & ATTACH_BYPASS != 0 })
            }
            kind::DETACH => {
                take::<8>(bytes, 12)?;
                Ok(Self::Detach { domain: u32_at(bytes, 4)?, endpoint: u32_at(bytes, 8)? })
            }
            kind::MAP => {
                const READ: u32 = 1;
                const WRITE: u32 = 2;
                let (start, last) = range_at(bytes, 8)?;
                let (to, flags) = (u64_at(bytes, 24)?, u32_at(bytes, 32)?);
                // VIRTIO_IOMMU_MAP_F_MMIO among them, which is not offered.
                if flags & !(READ | WRITE) != 0 {
                    return Err(Refusal::Invalid);
                }
                let flags = MapFlags { read: flags & READ != 0, write: flags & WRITE != 0 };
                Ok(Self::Map { domain: u32_at(bytes, 4)?, start, last, to, flags })
            }
            kind::UNMAP => {
                let (start, last) = range_at(bytes, 8)?;
                take::<4>(bytes, 24)?;
                Ok(Self::Unmap { domain: u32_at(bytes, 4)?, start, last })
            }
            kind::PROBE => {
                take::<64>(bytes, 8)?;
                Ok(Self::Probe { endpoint: u32_at(bytes, 4)? })
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

/// `struct virtio_iommu_probe_resv_mem` for each region.
pub(super) fn properties(regions: &[Reserved]) -> Vec<u8> {
    const RESV_MEM: u16 = 1;
    /// Bytes behind type and length.
    const LENGTH: u16 = 20;
    let mut bytes = Vec::new();
    for region in regions {
        bytes.extend(RESV_MEM.to_le_bytes());
        bytes.extend(LENGTH.to_le_bytes());
        bytes.extend([region.msi.into(), 0, 0, 0]);
        bytes.extend(region.start.to_le_bytes());
        bytes.extend(region.last.to_le_bytes());
    }
    bytes
}

/// `struct virtio_iommu_fault`.
pub(super) fn fault(fault: FaultRecord) -> [u8; FAULT_SIZE] {
    const REASON_DOMAIN: u8 = 1;
    const REASON_MAPPING: u8 = 2;
    const READ: u32 = 1;
    const WRITE: u32 = 2;
    /// The address is valid.
    const ADDRESS: u32 = 1 << 8;
    let mut bytes = [0; FAULT_SIZE];
    let reason = if fault.mapped_domain { REASON_MAPPING } else { REASON_DOMAIN };
    let flags = ADDRESS | if fault.write { WRITE } else { READ };
    bytes[0] = reason;
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..12].copy_from_slice(&fault.endpoint.to_le_bytes());
    bytes[16..].copy_from_slice(&fault.address.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of 32-bit words.
    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn requests_are_read() {
        assert_eq!(
            Request::parse(&words(&[1, 7, 8, 1, 0])),
            Ok(Request::Attach { domain: 7, endpoint: 8, bypass: true })
        );
        assert_eq!(Request::parse(&words(&[1, 7, 8, 2, 0])), Err(Refusal::Invalid));
        assert_eq!(Request::parse(&words(&[1, 7, 8, 0, 5])), Err(Refusal::Invalid));
        assert_eq!(Request::parse(&words(&[2, 7, 8, 0, 0])), Ok(Request::Detach { domain: 7, endpoint: 8 }));
        let map = words(&[3, 7, 0x1000, 1, 0x1fff, 1, 0x5000, 2, 3]);
        let flags = MapFlags { read: true, write: true };
        let (start, last, to) = (0x1_0000_1000, 0x1_0000_1fff, 0x2_0000_5000);
        assert_eq!(Request::parse(&map), Ok(Request::Map { domain: 7, start, last, to, flags }));
        assert_eq!(Request::parse(&words(&[3, 7, 0, 0, 1, 0, 0, 0, 4])), Err(Refusal::Invalid));
        let unmap = words(&[4, 7, 0x1000, 1, 0x1fff, 1, 0]);
        assert_eq!(Request::parse(&unmap), Ok(Request::Unmap { domain: 7, start, last }));
        assert_eq!(Request::parse(&words(&[4, 7, 1, 0, 0, 0, 0])), Err(Refusal::Range));
        let mut probe = words(&[5, 8]);
        probe.resize(72, 0xff);
        assert_eq!(Request::parse(&probe), Ok(Request::Probe { endpoint: 8 }));
        for request in [&map, &unmap, &probe] {
            for cut in 0..request.len() {
                assert_eq!(Request::parse(&request[..cut]), Err(Refusal::Invalid));
            }
        }
        for kind in [0, 6, 255] {
            assert_eq!(Request::parse(&[kind; 72]), Err(Refusal::Unsupported));
        }
    }

    #[test]
    fn answers_are_written() {
        let msi = Reserved { start: 0xfee0_0000, last: 0xfeef_ffff, msi: true };
        let expected = words(&[20 << 16 | 1, 1, 0xfee0_0000, 0, 0xfeef_ffff, 0]);
        assert_eq!(properties(&[msi]), expected);
        let record = FaultRecord { endpoint: 9, address: 0x1_0000_0002, write: true, mapped_domain: false };
        assert_eq!(fault(record).to_vec(), words(&[1, 0x102, 9, 0, 2, 1]));
    }
}
