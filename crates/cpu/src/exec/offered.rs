//! What CPUID does not offer is not executed.
//!
//! This is decided when an instruction is decoded, once for as long as it stays in the cache. Extensions that a bit of
//! CR4 switches on (XSAVE, FSGSBASE, protection keys and others) need nothing here: the bits of those that are not
//! offered cannot be set.

use iced_x86::{Code, CpuidFeature, Instruction};

use crate::cpuid::Cpuid;

/// `i` as a processor with the features of `cpuid` decodes it; `None` if it does not know it.
pub(super) fn decoded(cpuid: &Cpuid, i: &Instruction) -> Option<Instruction> {
    let known = i.cpuid_features().iter().all(|&f| feature(f).is_none_or(|name| cpuid.has(name)));
    if known {
        return Some(*i);
    }
    let mut older = *i;
    older.set_code(without_prefix(i.code())?);
    Some(older)
}

/// LZCNT and TZCNT are BSR and BSF with a prefix that means nothing to processors without them.
fn without_prefix(code: Code) -> Option<Code> {
    Some(match code {
        Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
        Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
        _ => return None,
    })
}

/// The name in [`crate::cpuid::FEATURES`] of what `feature` depends on; `None` for what every processor here has, and
/// what CR4 or its own handler decides.
fn feature(feature: CpuidFeature) -> Option<&'static str> {
    use CpuidFeature as F;
    Some(match feature {
        F::SSE3 => "SSE3",
        F::SSSE3 => "SSSE3",
        F::SSE4_1 => "SSE4.1",
        F::SSE4_2 => "SSE4.2",
        F::AES => "AES",
        F::PCLMULQDQ => "PCLMULQDQ",
        F::SHA => "SHA",
        F::GFNI => "GFNI",
        F::AVX => "AVX",
        F::AVX2 => "AVX2",
        F::AVX_VNNI => "AVX-VNNI",
        F::FMA => "FMA",
        F::F16C => "F16C",
        F::VAES => "VAES",
        F::VPCLMULQDQ => "VPCLMULQDQ",
        F::POPCNT => "POPCNT",
        F::LZCNT => "LZCNT",
        F::BMI1 => "BMI1",
        F::BMI2 => "BMI2",
        F::ADX => "ADX",
        F::MOVBE => "MOVBE",
        F::MOVDIRI => "MOVDIRI",
        F::CMPXCHG16B => "CMPXCHG16B",
        F::RDRAND => "RDRAND",
        F::RDSEED => "RDSEED",
        F::RDPID => "RDPID",
        F::RDTSCP => "RDTSCP",
        F::CLFLUSHOPT => "CLFLUSHOPT",
        F::CLWB => "CLWB",
        F::SERIALIZE => "SERIALIZE",
        F::WBNOINVD => "WBNOINVD",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    fn mnemonic(cpuid: &Cpuid, bytes: &[u8]) -> Option<Mnemonic> {
        let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(!i.is_invalid(), "{bytes:x?}");
        decoded(cpuid, &i).map(|i| i.mnemonic())
    }

    #[test]
    fn an_instruction_needs_its_feature() {
        use Mnemonic as M;
        let cases: [(&str, &[u8], Mnemonic); 21] = [
            ("SSSE3", &[0x66, 0x0f, 0x38, 0x00, 0xc1], M::Pshufb),
            ("SSE4.1", &[0x66, 0x0f, 0x38, 0x17, 0xc1], M::Ptest),
            ("SSE4.2", &[0xf2, 0x0f, 0x38, 0xf1, 0xc1], M::Crc32),
            ("AES", &[0x66, 0x0f, 0x38, 0xdc, 0xc1], M::Aesenc),
            ("AVX", &[0xc5, 0xf8, 0x57, 0xc1], M::Vxorps),
            ("AVX2", &[0xc5, 0xf5, 0xef, 0xc1], M::Vpxor),
            ("FMA", &[0xc4, 0xe2, 0xf1, 0x98, 0xc1], M::Vfmadd132pd),
            ("POPCNT", &[0xf3, 0x0f, 0xb8, 0xc1], M::Popcnt),
            ("BMI1", &[0xc4, 0xe2, 0x78, 0xf2, 0xc1], M::Andn),
            ("BMI2", &[0xc4, 0xe3, 0x7b, 0xf0, 0xc1, 0x01], M::Rorx),
            ("ADX", &[0x66, 0x0f, 0x38, 0xf6, 0xc1], M::Adcx),
            ("MOVBE", &[0x0f, 0x38, 0xf0, 0x01], M::Movbe),
            ("MOVDIRI", &[0x0f, 0x38, 0xf9, 0x01], M::Movdiri),
            ("CMPXCHG16B", &[0x48, 0x0f, 0xc7, 0x09], M::Cmpxchg16b),
            ("RDRAND", &[0x0f, 0xc7, 0xf0], M::Rdrand),
            ("RDSEED", &[0x0f, 0xc7, 0xf8], M::Rdseed),
            ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8], M::Rdpid),
            ("RDTSCP", &[0x0f, 0x01, 0xf9], M::Rdtscp),
            ("CLFLUSHOPT", &[0x66, 0x0f, 0xae, 0x39], M::Clflushopt),
            ("CLWB", &[0x66, 0x0f, 0xae, 0x31], M::Clwb),
            ("SERIALIZE", &[0x0f, 0x01, 0xe8], M::Serialize),
        ];
        for (name, bytes, expected) in cases {
            let mut cpuid = Cpuid::default();
            // What the host executes may be missing from the start.
            assert_eq!(mnemonic(&cpuid, bytes).is_some(), cpuid.has(name), "{name}");
            assert!(mnemonic(&cpuid, bytes).is_none_or(|m| m == expected), "{name}");
            assert!(cpuid.disable(name), "{name}");
            assert_eq!(mnemonic(&cpuid, bytes), None, "{name}");
        }
    }

    #[test]
    fn lzcnt_and_tzcnt_fall_back_to_the_scans() {
        for (name, opcode, new, old) in
            [("LZCNT", 0xbd, Mnemonic::Lzcnt, Mnemonic::Bsr), ("BMI1", 0xbc, Mnemonic::Tzcnt, Mnemonic::Bsf)]
        {
            let forms: [&[u8]; 3] = [
                &[0xf3, 0x0f, opcode, 0xc1],
                &[0x66, 0xf3, 0x0f, opcode, 0xc1],
                &[0xf3, 0x48, 0x0f, opcode, 0xc1],
            ];
            for bytes in forms {
                let mut cpuid = Cpuid::default();
                assert_eq!(mnemonic(&cpuid, bytes), Some(new));
                cpuid.disable(name);
                assert_eq!(mnemonic(&cpuid, bytes), Some(old));
            }
        }
    }

    #[test]
    fn every_name_is_one_of_cpuid() {
        for f in CpuidFeature::values() {
            assert!(
                feature(f).is_none_or(|name| crate::cpuid::FEATURES.iter().any(|g| g.name == name)),
                "{f:?}"
            );
        }
    }
}
