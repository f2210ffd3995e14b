//! Telling from a kernel image whether it is a PVM guest.

use memchr::memmem;

use crate::abi::cpuid;

/// Whether `image`, the bytes of a kernel as it is loaded (not compressed), contains the synthetic CPUID
/// instruction: no other code has a reason to.
pub fn is_guest(image: &[u8]) -> bool {
    memmem::find(image, &cpuid::SYNTHETIC).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_instruction_anywhere() {
        let mut image = vec![0x0f; 5000];
        assert!(!is_guest(&image));
        image.splice(4990.., cpuid::SYNTHETIC);
        assert!(is_guest(&image));
        assert!(!is_guest(&image[..4999]));
    }
}
