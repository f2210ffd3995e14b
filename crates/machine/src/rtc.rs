//! The clock of the PC: an MC146818 that can only be read.
//!
//! The ACPI tables say that there is none (FADT, "CMOS RTC not present"), and a kernel with a
//! paravirtual clock has no use for one. But kernels also look without asking, some wait for its
//! update flag to clear for as long as a second, and what reads as all ones never clears it. So there is a
//! clock: the host's time in UTC, no alarm, no interrupt, no memory. Writes are ignored.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::PortDevice;

/// Ports of the clock: index and data.
pub const PORTS: u16 = 2;

/// Register A: time base 32768 Hz, no periodic interrupt; update-in-progress (bit 7) never set.
const STATUS_A: u8 = 0x26;
/// Register B: 24-hour mode, values in BCD, no interrupt.
const STATUS_B: u8 = 0x02;
/// Register D: the time is valid.
const STATUS_D: u8 = 0x80;

/// The clock as a port device of [`PORTS`] ports.
#[derive(Debug)]
pub struct Rtc {
    index: AtomicU8,
    now: fn() -> u64,
}

impl Rtc {
    /// A clock with the host's time.
    pub fn new() -> Self {
        Self::with_time(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    /// A clock whose time, in seconds since 1970, comes from `now`.
    pub fn with_time(now: fn() -> u64) -> Self {
        Self { index: AtomicU8::new(0), now }
    }

    fn register(&self, index: u8) -> u8 {
        let date = Date::from_unix((self.now)());
        match index {
            0x00 => bcd(date.second),
            0x02 => bcd(date.minute),
            0x04 => bcd(date.hour),
            0x06 => bcd(date.weekday),
            0x07 => bcd(date.day),
            0x08 => bcd(date.month),
            0x09 => bcd((date.year % 100) as u8),
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0d => STATUS_D,
            // The century's usual place; the FADT names none.
            0x32 => bcd((date.year / 100 % 100) as u8),
            _ => 0,
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl PortDevice for Rtc {
    fn read(&self, offset: u16, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            // The index port cannot be read.
            *byte = if port == 1 { self.register(self.index.load(Ordering::Relaxed)) } else { 0xff };
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let (0, Some(value)) = (offset, data.first()) {
            // Bit 7 masks non-maskable interrupts on a PC.
            self.index.store(value & 0x7f, Ordering::Relaxed);
        }
    }
}

/// Two decimal digits, one in each half.
fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// A time in UTC as the clock's registers have it.
#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Date {
    /// The date of a Unix time, by the proleptic Gregorian calendar. Counts in 400-year cycles of years
    /// that start in March, so that the leap day is a year's last.
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86400, seconds % 86400);
        let since_march_0 = days + 719_468;
        let (cycle, day_of_cycle) = (since_march_0 / 146_097, since_march_0 % 146_097);
        let year_of_cycle =
            (day_of_cycle - day_of_cycle / 1460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
        let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: cycle * 400 + year_of_cycle + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index | 0x80]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn tells_the_time() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let rtc = Rtc::with_time(|| 1_709_251_198);
        let time: Vec<u8> = [0, 2, 4, 6, 7, 8, 9, 0x32].map(|i| read(&rtc, i)).to_vec();
        assert_eq!(time, [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        assert_eq!(read(&rtc, 0x0a) & 0x80, 0, "never updating");
        assert_eq!(read(&rtc, 0x0d), 0x80, "valid");
        rtc.write(0, &[0x0f]);
        rtc.write(1, &[0x0a]);
        assert_eq!(read(&rtc, 0x0f), 0, "no memory");
    }

    fn is_leap(year: u64) -> bool {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    }

    #[test]
    fn dates_follow_each_other() {
        let mut previous = Date::from_unix(0);
        assert_eq!((previous.year, previous.month, previous.day, previous.weekday), (1970, 1, 1, 5));
        for day in 1..=200 * 366 {
            let date = Date::from_unix(day * 86400);
            let leap = is_leap(previous.year);
            let last = match previous.month {
                2 => 28 + u8::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            let expected = match (previous.month, previous.day) {
                (12, 31) => (previous.year + 1, 1, 1),
                (m, d) if d == last => (previous.year, m + 1, 1),
                (m, d) => (previous.year, m, d + 1),
            };
            assert_eq!((date.year, date.month, date.day), expected);
            assert_eq!(date.weekday, previous.weekday % 7 + 1);
            previous = date;
        }
    }
}
