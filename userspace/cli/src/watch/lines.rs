//! Without a view: JSON by the line, one look, or nothing but metrics.

use super::{
    app::{App, Pane},
    output, overview,
    sampler::{Sampler, Told},
    tables, wait,
};
use crate::Failure;
use ratatui::{buffer::Buffer, layout::Rect};
use standstill_engine::watch::Sample;
use std::io::{self, ErrorKind, Write};

/// An object a line; whether the tree has ended.
pub(super) fn json(sampler: &Sampler, once: bool) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    if once {
        return match second(sampler)? {
            Some(sample) => write(&mut out, &sample).map(|_| false),
            None => Ok(true),
        };
    }
    loop {
        match wait(sampler) {
            Some(Told::Sample(sample)) => {
                if !write(&mut out, &sample)? {
                    return Ok(false);
                }
            }
            Some(Told::Ended) => return Ok(true),
            Some(Told::Failed(e)) => return Err(e.into()),
            None => return Ok(false),
        }
    }
}

/// Writes a sample; false if nobody reads any more.
fn write(out: &mut impl Write, sample: &Sample) -> Result<bool, Failure> {
    let text = serde_json::to_string(sample).map_err(|e| Failure { status: 1, text: format!("write JSON: {e}") })?;
    match out.write_all((text + "\n").as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::io("write to standard output", &e)),
    }
}

/// The second sample, the first that can tell what changes; `None` if the tree has ended.
fn second(sampler: &Sampler) -> Result<Option<Box<Sample>>, Failure> {
    let mut samples = 0;
    loop {
        match wait(sampler) {
            Some(Told::Sample(sample)) => {
                samples += 1;
                if samples == 2 {
                    return Ok(Some(sample));
                }
            }
            Some(Told::Ended) | None => return Ok(None),
            Some(Told::Failed(e)) => return Err(e.into()),
        }
    }
}

/// All panes below each other; whether the tree has ended.
pub(super) fn once(sampler: &Sampler) -> Result<bool, Failure> {
    let Some(sample) = second(sampler)? else { return Ok(true) };
    output::print(&text(*sample)).map(|()| false)
}

fn text(sample: Sample) -> String {
    let mut app = App::new(sample.root);
    let rows = |n: usize| u16::try_from(n + 1).unwrap_or(u16::MAX / 100).min(400);
    let heights = [
        (Pane::Overview, 20),
        (Pane::Processes, rows(sample.processes.len())),
        (Pane::Memory, rows(sample.memory.len())),
        (Pane::Descriptors, rows(sample.descriptors.len())),
        (Pane::Sockets, rows(sample.sockets.len())),
    ];
    app.take(sample);
    let mut text = String::new();
    for (pane, height) in heights {
        let area = Rect::new(0, 0, 100, height);
        let mut buffer = Buffer::empty(area);
        app.pane = pane;
        match (pane, &app.sample) {
            (Pane::Overview, Some(sample)) => overview::render(sample, area, &mut buffer),
            _ => tables::render(&mut app, area, &mut buffer),
        }
        let lines = buffer.content().chunks(area.width.into());
        let lines = lines.map(|cells| cells.iter().map(|c| c.symbol()).collect::<String>().trim_end().to_owned());
        let block = lines.collect::<Vec<_>>().join("\n");
        text.push_str(block.trim_end());
        text.push_str("\n\n");
    }
    text.trim_end().to_owned() + "\n"
}

/// Waits for the end; whether it was the tree's.
pub(super) fn nothing(sampler: &Sampler) -> Result<bool, Failure> {
    loop {
        match wait(sampler) {
            Some(Told::Sample(_)) => {}
            Some(Told::Ended) => return Ok(true),
            Some(Told::Failed(e)) => return Err(e.into()),
            None => return Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::app::samples, *};
    use serde_json::Value;

    #[test]
    fn a_line_of_json_has_every_figure() {
        let mut out = Vec::new();
        assert!(write(&mut out, &samples::busy()).unwrap());
        let text = String::from_utf8(out).unwrap();
        assert!(text.ends_with("}\n") && text.lines().count() == 1);
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["root"], 4711);
        assert_eq!(json["processes"][1]["comm"], "worker");
        assert_eq!(json["totals"]["threads"], 9);
        assert_eq!(json["memory"][0]["kind"], "anonymous");
        assert_eq!(json["descriptors"][0]["kind"], "tcp");
        assert_eq!(json["sockets"][0]["send"], 1200);
        assert_eq!(json["rates"]["forks"], 1.5);
        assert_eq!(json["prediction"]["freeze_us"], 12_345);
        assert_eq!(json["prediction"]["parts"][0]["phase"], "freezing");
        assert_eq!(serde_json::from_value::<Sample>(json).unwrap(), samples::busy());
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(!write(&mut Gone, &samples::busy()).unwrap());
    }

    #[test]
    fn once_shows_all_panes() {
        let text = text(samples::busy());
        for word in ["12.3 ms", "worker", "/usr/lib/libc.so.6", "established", "freezing", "127.0.0.1:40404"] {
            assert!(text.contains(word), "{word}:\n{text}");
        }
    }
}
