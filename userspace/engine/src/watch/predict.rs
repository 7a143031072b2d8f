//! How long a dump would take: amounts times measured costs, corrected by what earlier dumps took. Pure.

use super::sample::{Part, Prediction};
use crate::dump::history::{Amounts, Observed};

/// Makes a structure of numbers of which each can be the middle one of several.
macro_rules! costs {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one of each costs, in nanoseconds, as measured on this machine and this tree.
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub(super) struct Costs {
            $($(#[$doc])* pub $name: f64,)*
        }

        impl Costs {
            /// The middle one of each.
            pub(super) fn median<'a>(all: impl Iterator<Item = &'a Self> + Clone) -> Self {
                Self { $($name: middle(all.clone().map(|c| c.$name).collect()),)* }
            }
        }
    };
}

costs! {
    /// Listing a process's threads and children, as often as a freeze does.
    list_process,
    /// Seizing, interrupting and waiting for a thread, and what a process takes besides.
    seize_thread,
    seize_process,
    /// The reader's passes.
    read_process,
    read_descriptor,
    read_mapping,
    /// Records of open files: those that the reader knows all of, and those that are asked one by one.
    plain_file,
    asked_file,
    /// Records of processes, threads and mappings.
    process,
    thread,
    mapping,
    /// Looking which pages hold something: for a mapping, and for a page.
    scan_mapping,
    scan_page,
    /// Looking which pages have changed since they were copied, instead.
    track_mapping,
    track_page,
    /// Copying: opening a process's memory, a range of pages, a page of it, and comparing a page with the parent's.
    copy_process,
    copy_range,
    copy_page,
    compare_page,
    /// Detaching a thread.
    thaw_thread,
    /// Bytes in the image for a thread.
    thread_bytes,
}

/// The middle one; of no values, zero.
pub(super) fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

impl Amounts {
    /// How much of each there is, for what is tracked and for what is not.
    fn apart(&self, n: u64) -> (f64, f64) {
        if self.tracked { (count(n), 0.0) } else { (0.0, count(n)) }
    }
}

/// The phases of the freeze under the names that the dump gives them, and the terms of each.
const PHASES: [(&str, Terms); 7] = [
    ("freezing", |n, c| {
        [
            count(n.counts.processes) * c.list_process,
            count(n.counts.threads) * c.seize_thread,
            count(n.counts.processes) * c.seize_process,
            0.0,
        ]
    }),
    ("descriptors", |n, c| {
        [
            count(n.counts.processes) * c.read_process,
            count(n.counts.descriptors) * c.read_descriptor,
            count(n.counts.mappings) * c.read_mapping,
            0.0,
        ]
    }),
    ("files", |n, c| {
        [
            count(n.counts.files.saturating_sub(n.counts.asked)) * c.plain_file,
            count(n.counts.asked) * c.asked_file,
            0.0,
            0.0,
        ]
    }),
    ("tasks", |n, c| {
        [
            count(n.counts.processes) * c.process,
            count(n.counts.threads) * c.thread,
            count(n.counts.mappings) * c.mapping,
            0.0,
        ]
    }),
    ("scan", |n, c| {
        let (mappings, pages) = (n.apart(n.counts.mappings), n.apart(n.scanned));
        [mappings.1 * c.scan_mapping, pages.1 * c.scan_page, mappings.0 * c.track_mapping, pages.0 * c.track_page]
    }),
    ("pages", |n, c| {
        [
            count(n.counts.ranges) * c.copy_range,
            count(n.copied) * c.copy_page,
            count(n.counts.compared) * c.compare_page,
            // Those of which nothing is copied are not opened.
            count(n.counts.processes.min(n.counts.ranges)) * c.copy_process,
        ]
    }),
    ("thaw", |n, c| [count(n.counts.threads) * c.thaw_thread, 0.0, 0.0, 0.0]),
];

/// Nanoseconds of the parts of a phase.
type Terms = fn(&Amounts, &Costs) -> [f64; 4];

fn count(n: u64) -> f64 {
    n as f64
}

/// Without a dump of a similar tree, the measured costs count like so many of one.
const PRIOR: f64 = 0.3;
/// The same tree says more than another one.
const SAME_TREE: f64 = 4.0;
/// Each dump says so much more than the one before.
const AGING: f64 = 0.9;
/// Ratios that are this many times larger or smaller than the middle one count as if they were not.
const SPREAD: f64 = 1.3;
/// Corrections beyond are taken for accidents: a machine that slept, a disk that was full.
const LARGEST: f64 = 5.0;
/// A phase shorter than this varies too much to be compared.
const NOISE_NS: f64 = 20_000.0;

/// Predicts a dump by `reader` that stores so many pages.
pub(super) fn predict(
    root: i32,
    reader: &str,
    amounts: &Amounts,
    stored: u64,
    costs: &Costs,
    history: &[Observed],
) -> Prediction {
    let likes: Vec<&Observed> = history.iter().filter(|o| o.reader == reader).collect();
    let part = |(phase, terms): (&str, Terms)| {
        let ns = terms(amounts, costs);
        let correction = correction(root, phase, terms, &ns, costs, &likes);
        Part { phase: phase.into(), us: (ns.iter().sum::<f64>() * correction / 1e3).round() as u64, correction }
    };
    let parts: Vec<Part> = PHASES.into_iter().map(part).collect();
    Prediction {
        freeze_us: parts.iter().map(|p| p.us).sum(),
        image_bytes: image_bytes(amounts, stored, costs),
        precopied: amounts.tracked,
        parts,
        dumps: likes.len(),
        age: 0.0,
    }
}

/// Pages that earlier dumps of the same tree had left for the freeze after a pre-copy: the middle one of the last three.
pub(super) fn left_before(root: i32, history: &[Observed]) -> u64 {
    let same = history.iter().rev().filter(|o| o.root == root && o.amounts.tracked);
    middle(same.take(3).map(|o| count(o.amounts.counts.pages)).collect()) as u64
}

/// By how much dumps of similar trees took longer than the costs said: a mean of the ratios, weighted by likeness and
/// age. A single dump that was disturbed must not count for much, so those far from the middle are drawn nearer to it.
fn correction(root: i32, phase: &str, terms: Terms, ns: &[f64; 4], costs: &Costs, history: &[&Observed]) -> f64 {
    let mut ratios = vec![(0.0, PRIOR)];
    for (age, observed) in history.iter().rev().enumerate() {
        let Some((_, us)) = observed.phases.iter().find(|(name, _)| name == phase) else { continue };
        let expected = terms(&observed.amounts, costs);
        let ratio = ((*us * 1000) as f64 + NOISE_NS) / (expected.iter().sum::<f64>() + NOISE_NS);
        let mut weight = likeness(&expected, ns).powi(2) * AGING.powi(age as i32);
        if observed.root == root {
            weight *= SAME_TREE;
        }
        ratios.push((ratio.clamp(1.0 / LARGEST, LARGEST).ln(), weight));
    }
    let middle = weighted_middle(&mut ratios);
    let near = |ln: f64| ln.clamp(middle - SPREAD.ln(), middle + SPREAD.ln());
    let total: f64 = ratios.iter().map(|(_, weight)| weight).sum();
    (ratios.iter().map(|(ln, weight)| near(*ln) * weight).sum::<f64>() / total).exp()
}

/// The value below and above which there is as much weight.
fn weighted_middle(values: &mut [(f64, f64)]) -> f64 {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let half = values.iter().map(|(_, weight)| weight).sum::<f64>() / 2.0;
    let mut below = 0.0;
    let found = values.iter().find(|(_, weight)| {
        below += weight;
        below >= half
    });
    found.map_or(0.0, |(value, _)| *value)
}

/// How much of two phases is the same, in amount and in kind: from 0 to 1.
fn likeness(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let sum = |of: fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| of(*a, *b)).sum::<f64>() + NOISE_NS;
    sum(f64::min) / sum(f64::max)
}

/// Bytes of records, roughly: postcard's numbers are as long as they must be.
fn image_bytes(amounts: &Amounts, stored: u64, costs: &Costs) -> u64 {
    let n = &amounts.counts;
    let records = 10_000 + n.processes * 1500 + n.descriptors * 6 + n.files * 90 + n.mappings * 36 + n.ranges * 12;
    stored * 4096 + records + (count(n.threads) * costs.thread_bytes) as u64
}

/// Splits measured times into what each range and each page costs. Samples are (ranges, pages, nanoseconds). The quarter
/// that took longest for what it is was interrupted by somebody else's work.
pub(super) fn fit(samples: &[(f64, f64, f64)]) -> (f64, f64) {
    let (range, page) = least_squares(samples);
    let excess = |s: &(f64, f64, f64)| s.2 / (range * s.0 + page * s.1).max(1.0);
    let mut kept = samples.to_vec();
    kept.sort_by(|a, b| excess(a).total_cmp(&excess(b)));
    kept.truncate(samples.len() - samples.len() / 4);
    least_squares(&kept)
}

/// Least squares, nothing below zero.
fn least_squares(samples: &[(f64, f64, f64)]) -> (f64, f64) {
    let sum = |f: fn(&(f64, f64, f64)) -> f64| samples.iter().map(f).sum::<f64>();
    let (rr, pp, rp) = (sum(|s| s.0 * s.0), sum(|s| s.1 * s.1), sum(|s| s.0 * s.1));
    let (rt, pt) = (sum(|s| s.0 * s.2), sum(|s| s.1 * s.2));
    let determinant = rr * pp - rp * rp;
    let only_pages = if pp > 0.0 { pt / pp } else { 0.0 };
    // All alike: nothing tells one from the other.
    if determinant <= 1e-9 * rr * pp {
        return (0.0, only_pages);
    }
    let (range, page) = ((rt * pp - pt * rp) / determinant, (pt * rr - rt * rp) / determinant);
    match (range < 0.0, page < 0.0) {
        (true, _) => (0.0, only_pages),
        (_, true) => (rt / rr, 0.0),
        _ => (range, page),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use standstill_images::types::DumpCounts;

    fn costs() -> Costs {
        Costs {
            list_process: 1e5,
            seize_thread: 1e4,
            seize_process: 1e3,
            read_process: 2e4,
            read_descriptor: 300.0,
            read_mapping: 250.0,
            plain_file: 200.0,
            asked_file: 5000.0,
            process: 1e5,
            thread: 2e4,
            mapping: 1000.0,
            scan_mapping: 200.0,
            scan_page: 5.0,
            track_mapping: 300.0,
            track_page: 1.0,
            copy_process: 2e4,
            copy_range: 1000.0,
            copy_page: 500.0,
            compare_page: 100.0,
            thaw_thread: 3000.0,
            thread_bytes: 3000.0,
        }
    }

    fn amounts() -> impl Strategy<Value = Amounts> {
        (1u64..500, 1u64..2000, 0u64..30_000, 1u64..40_000, 0u64..1 << 20, 0u64..5000).prop_map(
            |(processes, threads, descriptors, mappings, pages, ranges)| Amounts {
                counts: DumpCounts {
                    processes,
                    threads: processes + threads,
                    descriptors,
                    files: descriptors / 2,
                    asked: descriptors / 4,
                    mappings,
                    ranges,
                    pages,
                    compared: pages / 3,
                },
                scanned: pages,
                tracked: pages % 2 == 0,
                copied: pages,
                shared: 0,
            },
        )
    }

    /// A dump that took `factor` times what the costs say.
    fn dump(root: i32, amounts: &Amounts, factor: f64) -> Observed {
        let us = |terms: Terms| (terms(amounts, &costs()).iter().sum::<f64>() * factor / 1e3) as u64;
        let took = |(name, terms): (&str, Terms)| (name.to_owned(), us(terms));
        Observed { root, reader: "ebpf".into(), amounts: *amounts, phases: PHASES.into_iter().map(took).collect() }
    }

    #[test]
    fn the_phases_add_up() {
        let counts = DumpCounts { processes: 2, threads: 3, ranges: 1, ..Default::default() };
        let amounts = Amounts { counts, scanned: 1000, copied: 1000, ..Default::default() };
        let p = predict(1, "ebpf", &amounts, 900, &costs(), &[]);
        let us = |phase: &str| p.parts.iter().find(|part| part.phase == phase).unwrap().us;
        assert_eq!(us("freezing"), 232);
        // One of the processes has nothing to copy.
        assert_eq!(us("pages"), 521);
        assert_eq!(us("thaw"), 9);
        assert_eq!(p.freeze_us, p.parts.iter().map(|part| part.us).sum::<u64>());
        assert!(p.image_bytes > 900 * 4096 && p.image_bytes < 950 * 4096, "{}", p.image_bytes);
    }

    #[test]
    fn one_slow_measurement_does_not_count() {
        let slow = Costs { thread: 1e9, ..costs() };
        assert_eq!(Costs::median([costs(), slow, costs()].iter()), costs());
        assert_eq!(Costs::median([].iter()), Costs::default());
    }

    #[test]
    fn a_dump_of_another_size_or_reader_changes_little() {
        let small = Amounts { copied: 100, ..Default::default() };
        let large = Amounts { copied: 300_000, ..Default::default() };
        let plain = predict(1, "ebpf", &large, 7, &costs(), &[]).freeze_us as f64;
        let other_size = predict(1, "ebpf", &large, 7, &costs(), &[dump(1, &small, 4.0)]).freeze_us as f64;
        assert!((other_size / plain - 1.0).abs() < 0.05, "{plain} {other_size}");
        let mut procfs = dump(1, &large, 4.0);
        procfs.reader = "procfs".into();
        let other_reader = predict(1, "ebpf", &large, 7, &costs(), &[procfs]).freeze_us as f64;
        assert_eq!(other_reader, plain);
    }

    #[test]
    fn what_was_left_the_last_times() {
        let dump = |root, tracked, pages| Observed {
            root,
            amounts: Amounts { tracked, counts: DumpCounts { pages, ..Default::default() }, ..Default::default() },
            ..Default::default()
        };
        assert_eq!(left_before(7, &[dump(7, false, 9), dump(8, true, 9)]), 0);
        let history = [dump(7, true, 900), dump(7, true, 30), dump(7, true, 10), dump(8, true, 1), dump(7, true, 20)];
        assert_eq!(left_before(7, &history), 20);
    }

    #[test]
    fn one_dump_that_was_disturbed_counts_little() {
        let n = Amounts { copied: 100_000, ..Default::default() };
        let plain = predict(7, "ebpf", &n, 7, &costs(), &[]).freeze_us as f64;
        let history = [dump(7, &n, 1.0), dump(7, &n, 1.1), dump(7, &n, 4.0)];
        let corrected = predict(7, "ebpf", &n, 7, &costs(), &history).freeze_us as f64;
        assert!((1.0..1.25).contains(&(corrected / plain)), "{plain} {corrected}");
        assert_eq!(weighted_middle(&mut []), 0.0);
    }

    #[test]
    fn the_same_time_for_something_else_is_not_alike() {
        assert_eq!(likeness(&[1e9, 0.0, 0.0, 0.0], &[1e9, 0.0, 0.0, 0.0]), 1.0);
        assert!(likeness(&[1e9, 0.0, 0.0, 0.0], &[0.0, 1e9, 0.0, 0.0]) < 1e-3);
        assert!((likeness(&[2e9, 0.0, 0.0, 0.0], &[1e9, 0.0, 0.0, 0.0]) - 0.5).abs() < 1e-3);
    }

    #[test]
    fn ranges_and_pages_are_told_apart() {
        let sample = |r: f64, p: f64| (r, p, 1000.0 * r + 500.0 * p);
        let (range, page) = fit(&[sample(10.0, 10.0), sample(1.0, 256.0), sample(4.0, 100.0)]);
        assert!((range - 1000.0).abs() < 1e-3 && (page - 500.0).abs() < 1e-3);
        assert_eq!(fit(&[sample(1.0, 4.0), sample(1.0, 4.0)]), (0.0, 750.0));
        assert_eq!(fit(&[]), (0.0, 0.0));
        let mut disturbed = vec![sample(1.0, 64.0); 15];
        disturbed.push((1.0, 64.0, 4e6));
        let (range, page) = fit(&disturbed);
        assert!((range + 64.0 * page - 33_000.0).abs() < 1.0, "{range} {page}");
    }

    proptest! {
        #[test]
        fn more_of_anything_never_takes_less(a in amounts(), b in amounts()) {
            let b = Amounts { tracked: a.tracked, ..b };
            let sum = Amounts {
                counts: DumpCounts {
                    processes: a.counts.processes + b.counts.processes,
                    threads: a.counts.threads + b.counts.threads,
                    descriptors: a.counts.descriptors + b.counts.descriptors,
                    files: a.counts.files + b.counts.files,
                    asked: a.counts.asked + b.counts.asked,
                    mappings: a.counts.mappings + b.counts.mappings,
                    ranges: a.counts.ranges + b.counts.ranges,
                    pages: a.counts.pages + b.counts.pages,
                    compared: a.counts.compared + b.counts.compared,
                },
                scanned: a.scanned + b.scanned,
                tracked: a.tracked,
                copied: a.copied + b.copied,
                shared: 0,
            };
            let of = |n: &Amounts| predict(1, "ebpf", n, n.copied / 2, &costs(), &[]);
            prop_assert!(of(&sum).freeze_us >= of(&a).freeze_us);
            prop_assert!(of(&sum).image_bytes >= of(&a).image_bytes);
        }

        #[test]
        fn dumps_of_the_same_tree_correct_within_a_tenth(n in amounts(), factor in 0.3f64..3.5) {
            let history: Vec<_> = (0..4).map(|_| dump(7, &n, factor)).collect();
            let plain = predict(7, "ebpf", &n, 7, &costs(), &[]).freeze_us as f64;
            let corrected = predict(7, "ebpf", &n, 7, &costs(), &history).freeze_us as f64;
            prop_assert!((corrected / (plain * factor) - 1.0).abs() < 0.1, "{plain} {corrected} {factor}");
        }

        #[test]
        fn nothing_makes_it_absurd(n in amounts(), us in any::<u32>(), zero in any::<bool>()) {
            let mut odd = dump(7, &n, 1.0);
            odd.phases.iter_mut().for_each(|(_, took)| *took = if zero { 0 } else { us.into() });
            let plain = predict(7, "ebpf", &n, 7, &costs(), &[]).freeze_us;
            let corrected = predict(7, "ebpf", &n, 7, &costs(), &[odd]).freeze_us;
            prop_assert!(corrected <= plain * 5 + 10 && corrected * 6 + 10 >= plain, "{plain} {corrected}");
        }
    }
}
