//! Order of kernel releases: Debian's version order (Policy Manual, 5.6.12), which puts `6.12.9` after
//! `6.1.120`, `6.1.0-9` before `6.1.0-10`, and `6.12~rc1` before `6.12`.

use std::cmp::Ordering;

/// Compares two releases.
#[must_use]
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        let text_a = take(&mut a, |byte| !byte.is_ascii_digit());
        let text_b = take(&mut b, |byte| !byte.is_ascii_digit());
        let longest = text_a.len().max(text_b.len());
        for i in 0..longest {
            match weight(text_a.get(i)).cmp(&weight(text_b.get(i))) {
                Ordering::Equal => {}
                other => return other,
            }
        }
        let number_a = trim_zeros(take(&mut a, u8::is_ascii_digit));
        let number_b = trim_zeros(take(&mut b, u8::is_ascii_digit));
        match number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b)) {
            Ordering::Equal => {}
            other => return other,
        }
    }
    Ordering::Equal
}

/// Whether `release` is `wanted` or a more exact form of it: `6.12` selects `6.12.117+deb12-cloud-amd64`, not
/// `6.120`.
#[must_use]
pub fn selects(wanted: &str, release: &str) -> bool {
    release.strip_prefix(wanted).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn take<'a>(bytes: &mut &'a [u8], belongs: impl Fn(&u8) -> bool) -> &'a [u8] {
    let end = bytes.iter().position(|byte| !belongs(byte)).unwrap_or(bytes.len());
    let (head, tail) = bytes.split_at_checked(end).unwrap_or((bytes, &[]));
    *bytes = tail;
    head
}

fn trim_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|&d| d != b'0').unwrap_or(digits.len());
    digits.get(start..).unwrap_or_default()
}

/// Tilde before the end, the end before letters, letters before everything else.
fn weight(byte: Option<&u8>) -> u16 {
    match byte {
        Some(b'~') => 0,
        None => 1,
        Some(letter) if letter.is_ascii_alphabetic() => u16::from(*letter) + 1,
        Some(&other) => u16::from(other) + 0x200,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_in_order() {
        let ordered = [
            "",
            "5.10.0-30-cloud-amd64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-10-cloud-amd64",
            "6.1.0-56-cloud-amd64",
            "6.1.120",
            "6.12~rc1",
            "6.12",
            "6.12.9+deb12-cloud-amd64",
            "6.12.117+deb12-cloud-amd64",
        ];
        for (i, a) in ordered.iter().enumerate() {
            for (j, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
        assert_eq!(compare("1.01", "1.1"), Ordering::Equal);
    }

    #[test]
    fn a_short_version_selects_whole_numbers() {
        assert!(selects("6.12", "6.12.117+deb12-cloud-amd64"));
        assert!(selects("6.1.0-56-cloud-amd64", "6.1.0-56-cloud-amd64"));
        assert!(!selects("6.1", "6.12.117+deb12-cloud-amd64"));
        assert!(!selects("6.12", "6.120.1"));
    }
}
