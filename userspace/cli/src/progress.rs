//! How far a command has come.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for so many bytes. It is drawn on standard error, and only if that is a terminal.
pub(crate) fn bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
