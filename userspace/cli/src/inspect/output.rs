//! Standard output, whose reader may go away at any time.

use crate::Failure;
use serde::Serialize;
use std::io::{self, ErrorKind, Write};

/// Writes text. A reader that has gone is no error: it has seen enough.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::io("write to standard output", &e)),
        _ => Ok(()),
    }
}

/// Writes a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(value).map_err(|e| Failure { status: 1, text: format!("write JSON: {e}") })?;
    print(&(text + "\n"))
}

/// Bytes as text: what is not UTF-8 is written as `\xNN`.
pub(crate) fn text(bytes: &[u8]) -> String {
    bytes
        .utf8_chunks()
        .fold(String::new(), |text, chunk| text + chunk.valid() + &chunk.invalid().escape_ascii().to_string())
}

/// Text for a terminal: names that a program chose must not be able to steer it.
pub(crate) fn plain(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// Seconds since the epoch as a date in UTC.
pub(crate) fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Years that begin in March have their leap day at the end: see Hinnant, chrono-compatible date algorithms.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(1_785_283_199), "2026-07-28 23:59:59 UTC");
        assert_eq!(date(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }

    #[test]
    fn names_keep_their_bytes_and_lose_their_power() {
        assert_eq!(text(b"a\xff\xc3\xa4"), "a\\xffä");
        assert_eq!(plain("a\x1b[31m\nb ä"), "a\\u{1b}[31m\\nb ä");
    }
}
