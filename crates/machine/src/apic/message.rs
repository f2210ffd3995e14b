//! Interrupt messages: what travels between devices, I/O APIC and local APICs.

/// How a receiver treats a message (SDM vol. 3, 12.6.1; encodings are bits 10:8 of ICR, MSI data, RTE).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryMode {
    /// To every named APIC (000).
    Fixed,
    /// To one of the named APICs (001).
    LowestPriority,
    /// System management interrupt (010). ring3 has no SMM.
    Smi,
    /// Non-maskable interrupt (100).
    Nmi,
    /// Initialize the processor (101).
    Init,
    /// Start-up IPI (110); only from the ICR.
    StartUp,
    /// External interrupt, vector from an 8259 (111); not from the ICR. ring3 has no 8259.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes bits 2:0 of `bits`; `None` for the reserved encoding 011.
    pub(crate) fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }

    /// Whether the message carries a vector for the IRR.
    pub(crate) fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// Edge or level (SDM vol. 3, 12.8.4: the TMR bit).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TriggerMode {
    /// Sent once; EOI stays in the local APIC.
    Edge,
    /// EOI is broadcast to the I/O APIC.
    Level,
}

/// Which local APICs a message is for (SDM vol. 3, 12.6.2).
///
/// The variant says how wide the sender's destination field is, because the broadcast value and the
/// logical format depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// Physical, from an 8-bit field (xAPIC ICR, MSI, RTE); 15 bits with extended destination ids.
    /// 0xff is broadcast.
    Physical(u16),
    /// Logical, from an 8-bit field; 0xff is broadcast.
    Logical(u16),
    /// Physical, from an x2APIC ICR; 0xffff_ffff is broadcast.
    Physical32(u32),
    /// Logical, from an x2APIC ICR: cluster in bits 31:16, members in bits 15:0; 0xffff_ffff is broadcast.
    Logical32(u32),
    /// One vCPU by index (shorthand "self", hypercalls).
    Vcpu(usize),
    /// Every vCPU (shorthand "all including self").
    All,
    /// Every vCPU but this index (shorthand "all excluding self").
    AllBut(usize),
}

/// One interrupt message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does there.
    pub mode: DeliveryMode,
    /// The vector, for modes that have one.
    pub vector: u8,
    /// Edge or level.
    pub trigger: TriggerMode,
}
