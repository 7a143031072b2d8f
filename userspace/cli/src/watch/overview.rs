//! The first pane: what a dump would cost, and the tree in figures.

use super::{metrics::rate_names, output::plain};
use indicatif::HumanBytes;
use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Style, Stylize},
    text::{Line, Span},
    widgets::{Paragraph, Widget},
};
use standstill_engine::{
    observe::Scope,
    watch::{Prediction, Sample},
};

/// Width of the longest bar.
const BAR: usize = 34;

pub(super) fn render(sample: &Sample, area: Rect, buffer: &mut Buffer) {
    let mut lines = Vec::new();
    match (&sample.prediction, &sample.prediction_note) {
        (Some(p), _) => prediction(p, sample.prediction_without_precopy.as_ref(), &mut lines),
        (None, Some(note)) => lines.push(Line::from(vec!["If frozen now: ".bold(), plain(note).into()])),
        (None, None) => lines.push(Line::from("If frozen now: not known yet")),
    }
    lines.push(Line::default());
    tree(sample, &mut lines);
    lines.push(Line::default());
    changes(sample, &mut lines);
    lines.push(Line::default());
    lines.push(reader(sample));
    if let Some(note) = &sample.dirty_note {
        lines.push(Line::from(vec!["No rates of writes: ".yellow(), plain(note).into()]));
    }
    Paragraph::new(lines).render(area, buffer);
}

pub(super) fn milliseconds(us: u64) -> String {
    match us {
        0..10_000 => format!("{:.2} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

fn prediction(p: &Prediction, plain_dump: Option<&Prediction>, lines: &mut Vec<Line<'_>>) {
    lines.push(Line::from(vec![
        "If frozen now: ".bold(),
        "freeze of ".into(),
        milliseconds(p.freeze_us).bold(),
        " and image of ".into(),
        HumanBytes(p.image_bytes).to_string().bold(),
    ]));
    let longest = p.parts.iter().map(|part| part.us).max().unwrap_or(0).max(1);
    for part in &p.parts {
        let bar = "▇".repeat((part.us as usize * BAR).div_ceil(longest as usize));
        let corrected = match (part.correction * 100.0).round() as i64 - 100 {
            0 => String::new(),
            percent => format!("{percent:+} %"),
        };
        lines.push(Line::from(vec![
            Span::raw(format!("  {:<12} {:>9} ", plain(&part.phase), milliseconds(part.us))),
            Span::styled(format!("{bar:<BAR$}"), Style::new().cyan()),
            Span::raw(format!(" {corrected:>7}")).dim(),
        ]));
    }
    let from = match p.dumps {
        0 => "not corrected: no dump has been made yet".to_owned(),
        1 => "corrected by 1 earlier dump".to_owned(),
        n => format!("corrected by {n} earlier dumps"),
    };
    lines.push(Line::from(format!("  measured {:.1} s ago, {from}", p.age)).dim());
    if let Some(plain) = plain_dump.filter(|_| p.precopied) {
        let without = milliseconds(plain.freeze_us);
        lines.push(Line::from(format!("  memory is copied before; with --precopy=0 a freeze of {without}")).dim());
    }
}

fn tree(sample: &Sample, lines: &mut Vec<Line<'_>>) {
    let t = &sample.totals;
    lines.push(Line::from("The tree".bold()));
    lines.push(Line::from(format!(
        "  {:<10} {:>10}   {:<11} {:>10}   {:<9} {:>12}",
        "processes",
        t.processes,
        "descriptors",
        t.descriptors,
        "resident",
        HumanBytes(t.resident).to_string()
    )));
    lines.push(Line::from(format!(
        "  {:<10} {:>10}   {:<11} {:>10}   {:<9} {:>12}",
        "threads",
        t.threads,
        "mappings",
        t.mappings,
        "anonymous",
        HumanBytes(t.anonymous).to_string()
    )));
}

fn changes(sample: &Sample, lines: &mut Vec<Line<'_>>) {
    let how = match sample.rates.counted {
        Some(Scope::Syscalls) => "counted in the kernel",
        Some(Scope::Memory) => "counted in the kernel; descriptors: differences between samples",
        None => "differences between samples",
    };
    lines.push(Line::from(vec!["Changes a second".bold(), format!(" ({how})").dim()]));
    let cells: Vec<String> = rate_names(sample).map(|(name, rate)| format!("{name:<11} {:>5}", short(rate))).collect();
    for row in cells.chunks(4) {
        lines.push(Line::from(format!("  {}", row.join("  "))));
    }
}

/// A rate in at most five characters.
fn short(rate: f64) -> String {
    match rate {
        0.0 => "0".into(),
        r if r < 9.95 => format!("{r:.1}"),
        r if r < 99_999.5 => format!("{r:.0}"),
        r => format!("{:.0}k", (r / 1e3).min(9999.0)),
    }
}

fn reader(sample: &Sample) -> Line<'_> {
    match &sample.reader_note {
        Some(note) => Line::from(vec!["Read from procfs, without eBPF: ".yellow(), plain(note).into()]),
        None if sample.reader == "ebpf" => Line::from("Read by eBPF iterators").dim(),
        None => Line::from("Read from procfs").dim(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!(milliseconds(1234), "1.23 ms");
        assert_eq!(milliseconds(123_456), "123.5 ms");
        assert_eq!(milliseconds(2_500_000), "2.50 s");
        for (rate, want) in [(0.0, "0"), (0.25, "0.2"), (12.3, "12"), (123_456.0, "123k"), (1e12, "9999k")] {
            assert_eq!(short(rate), want);
        }
    }
}
