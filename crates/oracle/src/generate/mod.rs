//! Cases, made from a seed.
//!
//! # Theory of operation
//! An instruction form (`iced_x86::Code`) is drawn from the catalog, its operands from the form's operand
//! kinds, and it is encoded; now and then a superfluous prefix is put in front. What counts from there on is
//! what the decoder makes of the bytes: it must again be a form of the catalog. Registers and memory are
//! random, with values that matter to the instruction more often than chance would have it: a memory operand's
//! registers are chosen so that the address comes out in the data window, at its borders, or where it must
//! fault.
//!
//! Each case has a generator of its own, derived from seed and number, so that case K of seed S is the same
//! whichever cases ran before it.

mod catalog;
mod operand;
mod values;

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpKind, Register};

use crate::case::{CODE, CODE_SIZE, Case, DATA, DATA_SIZE, GS_BASE, Memory, Mode, Registers};
use crate::random::Random;
use catalog::Catalog;
pub use catalog::{EXCLUDED, EXCLUDED_FORMS, Family, lacking};
use operand::Plan;

/// The longest instruction in bytes.
const LONGEST: usize = 15;

/// Makes cases.
pub struct Generator {
    seed: u64,
    mode: Mode,
    catalog: Catalog,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("seed", &self.seed)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl Generator {
    /// A generator of cases for all instructions that the host has.
    pub fn new(seed: u64, mode: Mode) -> Self {
        Self { seed, mode, catalog: Catalog::new(mode, |_| true) }
    }

    /// A generator for those of them that `wanted` names. `None` if there are none.
    pub fn only(seed: u64, mode: Mode, wanted: impl Fn(Code) -> bool) -> Option<Self> {
        let catalog = Catalog::new(mode, wanted);
        (!catalog.families().is_empty()).then_some(Self { seed, mode, catalog })
    }

    /// The instruction forms that are tested, by family.
    pub fn codes(&self) -> impl Iterator<Item = (Family, &[Code])> {
        self.catalog.families().iter().map(|(f, codes)| (*f, &codes[..]))
    }

    /// Case `number`.
    pub fn case(&self, number: u64) -> Case {
        let mut random = Random::for_case(self.seed, number);
        loop {
            if let Some(case) = self.attempt(number, &mut random) {
                return case;
            }
        }
    }

    /// Case `number` if the first attempt makes one, which [`Self::case`] repeats until it does.
    pub fn try_case(&self, number: u64) -> Option<Case> {
        self.attempt(number, &mut Random::for_case(self.seed, number))
    }

    fn draw(&self, random: &mut Random) -> Code {
        let families = self.catalog.families();
        let mut n = random.below(families.iter().map(|(f, _)| f.weight()).sum());
        for (family, codes) in families {
            if n < family.weight() {
                return random.pick(codes);
            }
            n -= family.weight();
        }
        Code::Nopd
    }

    fn attempt(&self, number: u64, random: &mut Random) -> Option<Case> {
        let code = self.draw(random);
        // In the page's middle; across the border of the two pages; or up against what is not mapped.
        let rip = match random.below(40) {
            0 => CODE + 0x1000 - random.below(LONGEST as u64),
            1 => CODE + CODE_SIZE - 1 - random.below(LONGEST as u64),
            _ => CODE + 0x800 + random.below(0x40),
        };
        let mut i = Instruction::default();
        i.set_code(code);
        let mut plan = None;
        for (n, &kind) in code.op_code().op_kinds().iter().enumerate() {
            let planned = operand::fill(&mut i, n as u32, kind, self.mode, rip, random)?;
            plan = plan.or(planned);
        }
        self.prefixes(&mut i, random);
        let mut encoder = Encoder::try_new(self.mode.bitness()).ok()?;
        encoder.encode(&i, rip).ok()?;
        let bytes = decorate(encoder.take_buffer(), random);
        let (i, bytes, family) = self.admit(&bytes, rip)?;

        let mut registers = Registers { rip, rflags: values::rflags(random), ..Registers::default() };
        for gpr in &mut registers.gpr {
            *gpr = values::integer(random);
        }
        registers.vector = values::vector(random);
        let mut memory: Box<Memory> = Box::new([0; DATA_SIZE as usize]);
        random.fill(&mut memory[..]);
        let mut case = Case {
            seed: self.seed,
            number,
            family,
            mode: self.mode,
            instruction: i,
            bytes,
            registers,
            memory,
        };
        steer(&mut case, plan, random);
        if self.mode == Mode::Bits32 {
            case.registers.gpr.iter_mut().for_each(|r| *r &= 0xffff_ffff);
            case.registers.gpr[8..].fill(0);
            case.registers.vector.ymm[8..].fill([0; 32]);
        }
        (!splits_line(&case)).then_some(case)
    }

    /// REP prefixes of string instructions.
    fn prefixes(&self, i: &mut Instruction, random: &mut Random) {
        if i.is_string_instruction() {
            match random.below(5) {
                0 | 1 => i.set_has_repe_prefix(true),
                2 => i.set_has_repne_prefix(true),
                _ => {}
            }
            if random.chance(1, 16) {
                i.set_segment_prefix(Register::GS);
            }
        }
    }

    /// What the bytes at `rip` really are, if that may be executed.
    fn admit(&self, bytes: &[u8], rip: u64) -> Option<(Instruction, Vec<u8>, Family)> {
        let mut decoder = Decoder::with_ip(self.mode.bitness(), bytes, rip, DecoderOptions::NONE);
        let i = decoder.decode();
        let (i, family) = if i.is_invalid() {
            // Too long an instruction, or a LOCK prefix where it must not be faults on every processor; other invalid encodings may
            // be instructions that the decoder does not know.
            let mut rest = bytes.strip_prefix(&[0xf0]).unwrap_or(bytes);
            if bytes.len() > LONGEST {
                // #GP.
                let overrides = bytes.iter().take_while(|&&b| b == 0x2e).count();
                rest = &bytes[overrides..];
            } else if rest.len() == bytes.len() {
                return None;
            }
            let plain = Decoder::with_ip(self.mode.bitness(), rest, rip, DecoderOptions::NONE).decode();
            let family = self.catalog.family(plain.code())?;
            (i, family)
        } else {
            if i.len() != bytes.len() {
                return None;
            }
            (i, self.catalog.family(i.code())?)
        };
        let legacy: Vec<u8> = bytes
            .iter()
            .copied()
            .take_while(|b| {
                let rex = self.mode == Mode::Bits64 && matches!(b, 0x40..=0x4f);
                rex || matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            })
            .collect();
        let has = |prefix: &u8| legacy.contains(prefix);
        // FS is the host thread's. Near branches with an operand size prefix depend on the vendor, and so does
        // LOOPcc with a REP prefix, which AMD processors go by.
        let repeats = has(&0xf2) || has(&0xf3);
        let conditional_loop = matches!(i.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne);
        if has(&0x64) || family == Family::Branch && has(&0x66) || conditional_loop && repeats {
            return None;
        }
        // A prefix may have moved the target of a short branch onto the instruction itself, for ever.
        let own = i.ip()..i.next_ip();
        if i.near_branch_target() != 0 && own.contains(&i.near_branch_target()) {
            return None;
        }
        // PAUSE with REX.B is XCHG with R8 on some processors.
        if i.code() == Code::Pause && bytes.iter().any(|b| matches!(b, 0x40..=0x4f)) {
            return None;
        }
        Some((i, bytes.to_vec(), family))
    }
}

/// Puts prefixes that mean nothing, or something else, in front of some instructions.
fn decorate(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    if !random.chance(1, 8) {
        return bytes;
    }
    if random.chance(1, 6) && !bytes.starts_with(&[0xf0]) {
        bytes.insert(0, 0xf0);
        return bytes;
    }
    if random.chance(1, 12) {
        // To the longest length, or beyond it.
        while bytes.len() < LONGEST + random.below(2) as usize {
            bytes.insert(0, 0x2e);
        }
        return bytes;
    }
    for _ in 0..=random.below(3) {
        let prefix = random.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x40, 0x48, 0x4f, 0x45]);
        bytes.insert(0, prefix);
    }
    bytes
}

/// Gives the registers that matter to the instruction values that matter.
fn steer(case: &mut Case, plan: Option<Plan>, random: &mut Random) {
    use Mnemonic as M;
    let gpr = &mut case.registers.gpr;
    let i = &case.instruction;
    let window = |random: &mut Random, size| operand::linear(random, size, false);
    if random.chance(15, 16) {
        gpr[4] = DATA + 0x200 + (random.below(0x1c00) & !7);
        if random.chance(1, 12) {
            gpr[4] = window(random, 8);
        }
    }
    if i.is_string_instruction() || matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu) {
        let gs = if i.segment_prefix() == Register::GS { GS_BASE } else { 0 };
        gpr[6] = window(random, 16).wrapping_sub(gs);
        gpr[7] = window(random, 16);
        if !i.is_string_instruction() {
            gpr[7] = gpr[7].wrapping_sub(gs);
        }
        if random.chance(7, 8) {
            gpr[1] = random.below(20);
        }
        if matches!(i.mnemonic(), M::Scasb | M::Scasw | M::Scasd | M::Scasq) && random.chance(1, 2) {
            // A run that ends somewhere.
            let n = gpr[7].wrapping_sub(DATA) as usize;
            let value = gpr[0].to_le_bytes();
            if let Some(run) = case.memory.get_mut(n..n.saturating_add(64)) {
                run.iter_mut().enumerate().for_each(|(k, b)| *b = value[k & 7]);
            }
        }
        if matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq) && random.chance(1, 2) {
            let (a, b) = (gpr[6].wrapping_sub(DATA), gpr[7].wrapping_sub(DATA));
            if a < DATA_SIZE - 64 && b < DATA_SIZE - 64 {
                case.memory.copy_within(a as usize..a as usize + 40, b as usize);
            }
        }
    }
    match i.mnemonic() {
        M::Xlatb => gpr[3] = window(random, 1),
        M::Leave | M::Enter if random.chance(7, 8) => gpr[5] = window(random, 8),
        M::Div | M::Idiv if random.chance(2, 3) => {
            gpr[2] = random.pick(&[0, 0, 1, u64::MAX, gpr[0] >> 63]);
            if random.chance(1, 2) {
                gpr[0] &= 0x7fff;
            }
        }
        M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz | M::Jcxz if random.chance(1, 2) => {
            gpr[1] = random.below(3) | random.pick(&[0, 1 << 32, 1 << 16]);
        }
        _ => {}
    }
    if let Some(plan) = plan {
        plan.solve(gpr, random);
        steer_memory(case, &plan, random);
    }
    let i = &case.instruction;
    if i.mnemonic() == M::Ret || i.is_call_near_indirect() || i.is_jmp_near_indirect() {
        let target = operand::branch_target(random, case.registers.rip);
        if i.op0_kind() == OpKind::Register {
            if let Some(r) = general(i.op0_register()) {
                case.registers.gpr[r] = target;
            }
        } else {
            let at =
                if i.mnemonic() == M::Ret { Some(case.registers.gpr[4]) } else { plan.map(|p| p.target) };
            poke(case, at, &target.to_le_bytes());
        }
    }
}

/// Makes what lies at a memory operand meet the instruction half-way.
fn steer_memory(case: &mut Case, plan: &Plan, random: &mut Random) {
    use Mnemonic as M;
    let i = &case.instruction;
    let gathers = i.is_vsib();
    match i.mnemonic() {
        M::Bt | M::Bts | M::Btr | M::Btc if i.op1_kind() == OpKind::Register && random.chance(3, 4) => {
            let base = i.memory_base().full_register();
            let index = i.memory_index().full_register();
            let offset = i.op1_register();
            if offset.full_register() != base
                && offset.full_register() != index
                && let Some(r) = general(offset)
            {
                case.registers.gpr[r] = random.below(4096).wrapping_sub(2048);
            }
        }
        M::Cmpxchg if random.chance(1, 2) => {
            let value = case.registers.gpr[0];
            poke(case, Some(plan.target), &value.to_le_bytes()[..plan.size.min(8) as usize]);
        }
        M::Cmpxchg8b | M::Cmpxchg16b if random.chance(1, 2) => {
            let half = plan.size as usize / 2;
            let (low, high) = (case.registers.gpr[0], case.registers.gpr[2]);
            poke(case, Some(plan.target), &low.to_le_bytes()[..half.min(8)]);
            poke(case, Some(plan.target + half as u64), &high.to_le_bytes()[..half.min(8)]);
        }
        _ => {
            // Numbers rather than noise for floating-point instructions.
            if matches!(case.family, Family::X87 | Family::Sse | Family::Avx) && random.chance(2, 3) {
                for n in 0..4 {
                    let lane = values::lane(random);
                    poke(case, Some(plan.target.wrapping_add(n * 8)), &lane.to_le_bytes());
                }
            }
            if gathers {
                steer_gather(case, random);
            }
        }
    }
}

/// Small indexes for a gather, and a mask with some bits.
fn steer_gather(case: &mut Case, random: &mut Random) {
    let i = &case.instruction;
    let index = i.memory_index();
    let wide = format!("{:?}", i.code()).to_lowercase().contains("vm64");
    let n = index.number();
    if let Some(ymm) = case.registers.vector.ymm.get_mut(n) {
        for chunk in ymm.chunks_exact_mut(if wide { 8 } else { 4 }) {
            if random.chance(15, 16) {
                let small = (random.next() as i8) as i64;
                let len = chunk.len();
                chunk.copy_from_slice(&small.to_le_bytes()[..len]);
            }
        }
    }
}

/// Writes into the case's memory, as far as the bytes lie in it.
fn poke(case: &mut Case, at: Option<u64>, bytes: &[u8]) {
    let Some(at) = at else { return };
    let start = at.wrapping_sub(DATA) as usize;
    if let Some(end) = start.checked_add(bytes.len())
        && let Some(place) = case.memory.get_mut(start..end)
    {
        place.copy_from_slice(bytes);
    }
}

/// The number of the general register that holds `r`.
pub(crate) fn general(r: Register) -> Option<usize> {
    r.is_gpr().then(|| r.full_register() as usize - Register::RAX as usize)
}

/// The linear address of the instruction's memory operand `n`, for the registers before it.
pub fn linear_address(case: &Case, n: u32) -> Option<u64> {
    case.instruction.virtual_address(n, 0, |r, _, _| {
        if r.is_gpr() {
            let value = case.registers.gpr[general(r)?];
            return Some(match r.size() {
                1 => value & 0xff,
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            });
        }
        match r {
            Register::GS => Some(GS_BASE),
            r if r.is_segment_register() => Some(0),
            _ => None,
        }
    })
}

/// Whether the instruction locks memory in two cache lines, which hosts may trap or throttle.
fn splits_line(case: &Case) -> bool {
    let i = &case.instruction;
    if !i.has_lock_prefix() && i.mnemonic() != Mnemonic::Xchg {
        return false;
    }
    (0..i.op_count())
        .filter(|&n| i.op_kind(n) == OpKind::Memory)
        .any(|n| linear_address(case, n).is_none_or(|a| a % 64 + i.memory_size().size() as u64 > 64))
}
