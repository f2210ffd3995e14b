//! How long to wait for an acknowledgement (RFC 6298).

use std::time::Duration;

/// The retransmission timer's length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rto {
    /// Smoothed round-trip time in microseconds, scaled by 8; zero before the first sample.
    smoothed: u32,
    /// Its variation in microseconds, scaled by 4.
    variation: u32,
    /// How often the timer has run out since something was acknowledged.
    pub(super) backoff: u8,
}

impl Rto {
    const INITIAL: Duration = Duration::from_secs(1);
    /// Less than the RFC's second, as every system's is: the link is inside one machine.
    const SHORTEST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(60);
    /// A sample above this says nothing more.
    const LONGEST_SAMPLE: Duration = Duration::from_secs(60);

    pub(super) fn new() -> Self {
        Self { smoothed: 0, variation: 0, backoff: 0 }
    }

    /// Something sent once was acknowledged after `round_trip`.
    pub(super) fn sample(&mut self, round_trip: Duration) {
        let sample =
            u32::try_from(round_trip.min(Self::LONGEST_SAMPLE).as_micros()).unwrap_or(u32::MAX).max(1);
        if self.smoothed == 0 {
            (self.smoothed, self.variation) = (sample * 8, sample * 2);
            return;
        }
        let error = (self.smoothed / 8).abs_diff(sample);
        self.variation = self.variation - self.variation / 4 + error;
        self.smoothed = (self.smoothed - self.smoothed / 8 + sample).max(1);
    }

    /// How long to wait now.
    pub(super) fn timeout(&self) -> Duration {
        let base = match self.smoothed {
            0 => Self::INITIAL,
            _ => Duration::from_micros(u64::from(self.smoothed / 8) + u64::from(self.variation))
                .max(Self::SHORTEST),
        };
        base.saturating_mul(1 << self.backoff.min(10)).min(Self::LONGEST)
    }

    /// The timer ran out.
    pub(super) fn back_off(&mut self) {
        self.backoff = self.backoff.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_samples_give_the_shortest_time() {
        let mut rto = Rto::new();
        assert_eq!(rto.timeout(), Duration::from_secs(1));
        for _ in 0..50 {
            rto.sample(Duration::from_millis(1));
        }
        assert_eq!(rto.timeout(), Rto::SHORTEST);
    }

    #[test]
    fn first_sample_counts_thrice() {
        let mut rto = Rto::new();
        rto.sample(Duration::from_millis(300));
        assert_eq!(rto.timeout(), Duration::from_millis(900));
    }

    #[test]
    fn backs_off_to_a_minute() {
        let mut rto = Rto::new();
        let mut last = Duration::ZERO;
        for _ in 0..300 {
            assert!(rto.timeout() >= last);
            last = rto.timeout();
            rto.back_off();
        }
        assert_eq!(last, Rto::LONGEST);
        // Hours between frames overflow nothing.
        rto.sample(Duration::from_secs(1 << 40));
        rto.sample(Duration::from_secs(1 << 40));
        assert_eq!(rto.timeout(), Rto::LONGEST);
    }
}
