//! How far a command has come: a bar on standard error, if that is a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{self, IsTerminal, Write, stderr},
    sync::{
        Mutex, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

/// Time between two looks. What takes less has no bar.
const INTERVAL: Duration = Duration::from_millis(200);

/// The bar on the screen.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A bar for so many bytes. It is drawn on standard error, and only if that is a terminal; `silent`: not even there.
pub(crate) fn bar(bytes: u64, silent: bool) -> ProgressBar {
    let target = if silent { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left");
    ProgressBar::with_draw_target(Some(bytes), target)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows a bar while `work` is done. `look` tells how many bytes are done and how many there are; `None`: nothing is
/// drawn now.
pub(crate) fn during<T>(silent: bool, look: impl Fn() -> Option<(u64, u64)> + Sync, work: impl FnOnce() -> T) -> T {
    if silent || !stderr().is_terminal() {
        return work();
    }
    let bar = bar(0, false);
    thread::scope(|scope| {
        let (done, ended) = channel::<()>();
        let (bar, look) = (&bar, &look);
        let draw = move || {
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let Some((position, length)) = look().filter(|(_, length)| *length > 0) else { continue };
                bar.set_length(length);
                bar.set_position(position);
                shown().get_or_insert_with(|| bar.clone());
            }
            *shown() = None;
            bar.finish_and_clear();
        };
        scope.spawn(draw);
        let result = work();
        drop(done);
        result
    })
}

fn shown() -> std::sync::MutexGuard<'static, Option<ProgressBar>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Standard error for messages while a bar may be shown: they come above it.
pub(crate) struct Above;

impl Write for Above {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let bar = shown().clone();
        bar.map_or_else(|| stderr().write(text), |bar| bar.suspend(|| stderr().write(text)))
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}
