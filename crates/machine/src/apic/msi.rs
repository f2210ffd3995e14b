//! MSI: a memory write that is an interrupt message (SDM vol. 3, 12.11).

use super::message::{DeliveryMode, Destination, Message, TriggerMode};

/// The 1 MiB of physical addresses at which a write is an MSI.
const MSI_WINDOW: u64 = 0xfee0_0000;
const MSI_WINDOW_MASK: u64 = 0xffff_ffff_fff0_0000;

/// Decodes an MSI.
///
/// `extended_ids`: bits 11:5 of the address are bits 14:8 of the destination (KVM_FEATURE_MSI_EXT_DEST_ID).
/// Returns `None` for what no local APIC understands: an address outside the window, a reserved
/// delivery mode, a level de-assert.
pub(crate) fn decode(address: u64, data: u32, extended_ids: bool) -> Option<Message> {
    if address & MSI_WINDOW_MASK != MSI_WINDOW {
        return None;
    }
    let mode = DeliveryMode::from_bits(data >> 8)?;
    if mode == DeliveryMode::StartUp {
        return None;
    }
    let level = data & (1 << 15) != 0;
    if level && data & (1 << 14) == 0 {
        return None;
    }
    let mut id = (address >> 12 & 0xff) as u16;
    if extended_ids {
        id |= ((address >> 5 & 0x7f) as u16) << 8;
    }
    let logical = address & (1 << 2) != 0;
    Some(Message {
        destination: if logical { Destination::Logical(id) } else { Destination::Physical(id) },
        // The redirection hint matters only to chipsets: with it, a logical fixed message goes to one.
        mode: match mode {
            DeliveryMode::Fixed if logical && address & (1 << 3) != 0 => DeliveryMode::LowestPriority,
            other => other,
        },
        vector: data as u8,
        trigger: if level { TriggerMode::Level } else { TriggerMode::Edge },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use DeliveryMode::*;
    use Destination::*;
    use TriggerMode::*;

    #[test]
    fn decoding_table() {
        let m = |destination, mode, vector, trigger| Some(Message { destination, mode, vector, trigger });
        let table = [
            (0xfee0_0000, 0x0041, m(Physical(0), Fixed, 0x41, Edge)),
            (0xfee0_1000, 0x0041, m(Physical(1), Fixed, 0x41, Edge)),
            (0xfeef_f000, 0x0041, m(Physical(0xff), Fixed, 0x41, Edge)),
            (0xfee0_3004, 0x0141, m(Logical(3), LowestPriority, 0x41, Edge)),
            (0xfee0_300c, 0x0041, m(Logical(3), LowestPriority, 0x41, Edge)),
            (0xfee0_3008, 0x0041, m(Physical(3), Fixed, 0x41, Edge)),
            (0xfee0_0000, 0xc041, m(Physical(0), Fixed, 0x41, Level)),
            (0xfee0_0000, 0x8041, None),
            (0xfee0_0000, 0x4041, m(Physical(0), Fixed, 0x41, Edge)),
            (0xfee0_0000, 0x0200, m(Physical(0), Smi, 0, Edge)),
            (0xfee0_0000, 0x0300, None),
            (0xfee0_0000, 0x0400, m(Physical(0), Nmi, 0, Edge)),
            (0xfee0_0000, 0x0500, m(Physical(0), Init, 0, Edge)),
            (0xfee0_0000, 0x0600, None),
            (0xfee0_0000, 0x0700, m(Physical(0), ExtInt, 0, Edge)),
            (0xfed0_0000, 0x0041, None),
            (0xfef0_0000, 0x0041, None),
            (0x1_fee0_0000, 0x0041, None),
            (0, 0, None),
            (u64::MAX, u32::MAX, None),
        ];
        for (address, data, want) in table {
            assert_eq!(decode(address, data, false), want, "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn extended_destination_ids_are_bits_11_to_5_when_offered() {
        let destination = |ext| decode(0xfee1_2000 | 0x7f << 5, 0x41, ext).map(|m| m.destination);
        assert_eq!(destination(false), Some(Physical(0x12)));
        assert_eq!(destination(true), Some(Physical(0x7f12)));
    }
}
