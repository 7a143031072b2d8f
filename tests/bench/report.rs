//! Figures as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::measure::Figures;
use crate::options::Options;

/// All runs of one case with one tool.
#[derive(Default, Serialize)]
struct Series {
    case: &'static str,
    tool: String,
    idle_us: Vec<u64>,
    freeze_us: Vec<u64>,
    told_us: Vec<u64>,
    dump_us: Vec<u64>,
    durable_us: Vec<u64>,
    restore_cold_us: Vec<u64>,
    restore_warm_us: Vec<u64>,
    image_bytes: Vec<u64>,
    failures: Vec<String>,
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    kernel: String,
    cpus: usize,
    runs: usize,
    series: Vec<Series>,
}

/// Takes one kind of figure out of a series.
type Figure = fn(&Series) -> &[u64];

/// The figures that are compared.
const COLUMNS: [(&str, Figure); 7] = [
    ("idle ms", |series| &series.idle_us),
    ("freeze ms", |series| &series.freeze_us),
    ("told ms", |series| &series.told_us),
    ("dump ms", |series| &series.dump_us),
    ("durable ms", |series| &series.durable_us),
    ("restore cold ms", |series| &series.restore_cold_us),
    ("restore warm ms", |series| &series.restore_warm_us),
];

impl Report {
    pub(crate) fn new(runs: usize) -> Self {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        Self { kernel: release.trim().to_owned(), cpus, runs, series: Vec::new() }
    }

    pub(crate) fn add(&mut self, case: &'static str, tool: &str, result: Result<Figures, String>) {
        let known = self.series.iter().position(|series| series.case == case && series.tool == tool);
        let at = known.unwrap_or_else(|| {
            self.series.push(Series { case, tool: tool.to_owned(), ..Series::default() });
            self.series.len() - 1
        });
        let series = &mut self.series[at];
        match result {
            Ok(figures) => {
                series.idle_us.push(figures.idle_us);
                series.freeze_us.push(figures.freeze_us);
                series.told_us.extend(figures.told_us);
                series.dump_us.push(figures.dump_us);
                series.durable_us.push(figures.durable_us);
                series.restore_cold_us.push(figures.restore_cold_us);
                series.restore_warm_us.push(figures.restore_warm_us);
                series.image_bytes.push(figures.image_bytes);
            }
            Err(error) => {
                eprintln!("{case} with {tool} failed: {error}");
                series.failures.push(error);
            }
        }
    }

    pub(crate) fn has_failures(&self) -> bool {
        self.series.iter().any(|series| !series.failures.is_empty())
    }

    pub(crate) fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Median (least to most) of each figure, and how many times longer CRIU takes.
    pub(crate) fn table(&self) -> String {
        let mut text =
            format!("Linux {}, {} cpus, {} runs; median (least to most)\n", self.kernel, self.cpus, self.runs);
        _ = write!(text, "{:<14} {:<11}", "case", "tool");
        for (name, _) in COLUMNS {
            _ = write!(text, " {name:>22}");
        }
        _ = writeln!(text, " {:>10}", "image MiB");
        let mut by_case: BTreeMap<usize, Vec<&Series>> = BTreeMap::new();
        for series in &self.series {
            let order = self.series.iter().position(|other| other.case == series.case).unwrap_or(0);
            by_case.entry(order).or_default().push(series);
        }
        for mut group in by_case.into_values() {
            group.sort_by_key(|series| series.tool == "criu");
            for series in &group {
                series.write_row(&mut text);
            }
            if let Some((theirs, ours)) = group.split_last()
                && theirs.tool == "criu"
            {
                ours.iter().for_each(|ours| write_ratios(&mut text, ours, theirs));
            }
        }
        text
    }
}

impl Series {
    fn write_row(&self, text: &mut String) {
        _ = write!(text, "{:<14} {:<11}", self.case, self.tool);
        for (_, values) in COLUMNS {
            _ = write!(text, " {:>22}", spread(values(self)));
        }
        let mib =
            median(&self.image_bytes).map_or("-".to_owned(), |bytes| format!("{:.1}", bytes / f64::from(1 << 20)));
        _ = write!(text, " {mib:>10}");
        if !self.failures.is_empty() {
            _ = write!(text, "  {} of the runs failed", self.failures.len());
        }
        text.push('\n');
    }
}

fn write_ratios(text: &mut String, ours: &Series, theirs: &Series) {
    _ = write!(text, "{:<14} {:<11}", "", format!("criu/{:.6}", ours.tool));
    for (_, values) in COLUMNS {
        _ = write!(text, " {:>22}", ratio(values(ours), values(theirs)));
    }
    let size = ratio(&ours.image_bytes, &theirs.image_bytes);
    _ = writeln!(text, " {size:>10}");
}

fn ratio(ours: &[u64], theirs: &[u64]) -> String {
    match (median(ours), median(theirs)) {
        (Some(ours), Some(theirs)) if ours > 0.0 => format!("{:.2}x", theirs / ours),
        _ => "-".to_owned(),
    }
}

fn spread(values: &[u64]) -> String {
    let ms = |us: f64| us / 1000.0;
    match (median(values), values.iter().min(), values.iter().max()) {
        (Some(median), Some(least), Some(most)) => {
            format!("{:.1} ({:.1}-{:.1})", ms(median), ms(*least as f64), ms(*most as f64))
        }
        _ => "-".to_owned(),
    }
}

fn median(values: &[u64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => None,
        (length, half) if length % 2 == 1 => Some(sorted[half] as f64),
        (_, half) => Some((sorted[half - 1] + sorted[half]) as f64 / 2.0),
    }
}

/// The middle one of some figures, or the upper of two.
pub(crate) fn high_median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Writes figures to the file that was asked for.
pub(crate) fn write_json(options: &Options, value: &serde_json::Value) -> Result<(), String> {
    let Some(path) = &options.json else { return Ok(()) };
    let text = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
