//! How often each duration occurred.

/// Bits of a duration that are kept: each bucket is at most 1/64 of its durations wide.
const BITS: u32 = 6;
const SUB: usize = 1 << BITS;
/// Buckets for all durations of 64 bits.
const BUCKETS: usize = (64 - BITS as usize + 1) * SUB;

/// Durations in nanoseconds by log-linear buckets.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    most: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, most: 0 }
    }
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.total += 1;
        self.most = self.most.max(ns);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.total, self.most) = (0, 0);
    }

    /// Adds what another one counted.
    pub fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
        self.total += other.total;
        self.most = self.most.max(other.most);
    }

    /// How many durations were counted.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// The longest duration.
    pub const fn most(&self) -> u64 {
        self.most
    }

    /// The duration that this share of all does not exceed, at most by the width of a bucket.
    pub fn quantile(&self, share: f64) -> u64 {
        let wanted = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper(bucket).min(self.most);
            }
        }
        self.most
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let shift = ns.ilog2() - BITS;
    (shift as usize + 1) * SUB + (ns >> shift) as usize - SUB
}

/// Longest duration of a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = (bucket / SUB - 1) as u32;
    let lower = ((bucket % SUB + SUB) as u64) << shift;
    lower + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_narrow_and_in_order() {
        for ns in (0..200_000).chain([1 << 30, u64::MAX - 1, u64::MAX]) {
            let upper = upper(bucket(ns));
            assert!(upper >= ns && upper - ns <= ns / SUB as u64, "{ns} {upper}");
            assert!(bucket(ns) < BUCKETS && (ns == 0 || bucket(ns - 1) <= bucket(ns)));
        }
    }

    #[test]
    fn quantiles_are_those_of_the_durations() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|ns| histogram.record(ns));
        let mut both = histogram.clone();
        both.add(&histogram);
        for (share, want) in [(0.5, 5000.0), (0.99, 9900.0), (0.999, 9990.0)] {
            assert!((both.quantile(share) as f64 / want - 1.0).abs() < 0.02, "{}", both.quantile(share));
        }
        assert_eq!((both.total(), both.most(), both.quantile(1.0)), (20_000, 10_000, 10_000));
    }
}
