//! The terminal: drawing, keys, and giving it back as it was.

use super::{
    TICK,
    app::{App, Pane, Wish},
    output, overview,
    sampler::{Sampler, Told},
    stop, tables,
};
use crate::Failure;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyEventKind},
    layout::{Constraint, Layout},
    style::{Style, Stylize},
    text::Line,
    widgets::Tabs,
};
use std::{os::fd::AsFd, time::Duration};

const HELP: &str = " q quit   Tab 1-5 pane   s sort   ↑ ↓ PgUp PgDn scroll";

/// Gives the terminal back on every way out. Panics do so before they print: see [`ratatui::try_init`].
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows the tree until a key or a signal ends it; whether the tree has ended.
pub(super) fn run(sampler: &Sampler, app: App) -> Result<bool, Failure> {
    // Before the terminal is changed: it may be half done when it fails.
    let _restore = Restore;
    let terminal = ratatui::try_init().map_err(|e| Failure::io("set up the terminal", &e))?;
    watch(terminal, sampler, app)
}

fn watch(mut terminal: DefaultTerminal, sampler: &Sampler, mut app: App) -> Result<bool, Failure> {
    let failed = |e| Failure::io("the terminal", &e);
    let mut changed = true;
    loop {
        if stop::asked() {
            return Ok(false);
        }
        match sampler.next(Duration::ZERO) {
            Some(Told::Sample(sample)) => {
                app.take(*sample);
                changed = true;
            }
            Some(Told::Ended) => return Ok(true),
            Some(Told::Failed(e)) => return Err(e.into()),
            None => {}
        }
        if changed {
            terminal.draw(|frame| draw(frame, &mut app)).map_err(failed)?;
            changed = false;
        }
        // A signal interrupts this as a key does.
        if hung_up_within(TICK).map_err(failed)? {
            return Ok(false);
        }
        while event::poll(Duration::ZERO).or_else(interrupted).map_err(failed)? {
            match event::read().map_err(failed)? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    if app.key(key) == Wish::Quit {
                        return Ok(false);
                    }
                    changed = true;
                }
                Event::Resize(..) => changed = true,
                _ => {}
            }
        }
    }
}

/// Waits for a key; whether the terminal is gone meanwhile. crossterm, waiting itself, would read the end of its input for
/// ever.
fn hung_up_within(time: Duration) -> std::io::Result<bool> {
    let (input, output) = (std::io::stdin(), std::io::stdout());
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN), PollFd::new(output.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO)) {
        Err(nix::errno::Errno::EINTR) => return Ok(false),
        other => other?,
    };
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    Ok(fds.iter().any(|fd| fd.revents().is_some_and(|r| r.intersects(gone))))
}

fn interrupted(e: std::io::Error) -> std::io::Result<bool> {
    if e.kind() == std::io::ErrorKind::Interrupted { Ok(false) } else { Err(e) }
}

fn draw(frame: &mut Frame<'_>, app: &mut App) {
    let [title, tabs, pane, help] =
        Layout::vertical([Constraint::Length(1), Constraint::Length(2), Constraint::Fill(1), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(heading(app, title.width.into()), title);
    let names = Pane::ALL.map(|(_, name)| name);
    frame.render_widget(Tabs::new(names).select(app.pane.number()).highlight_style(Style::new().reversed()), tabs);
    match (&app.sample, app.pane) {
        (None, _) => frame.render_widget(Line::from("reading the tree …"), pane),
        (Some(sample), Pane::Overview) => overview::render(sample, pane, frame.buffer_mut()),
        _ => tables::render(app, pane, frame.buffer_mut()),
    }
    frame.render_widget(Line::from(HELP).dim(), help);
}

fn heading(app: &App, width: usize) -> Line<'static> {
    let root = app.sample.as_ref().and_then(|s| s.processes.iter().find(|p| p.pid == app.root));
    let name = root.map(|p| output::plain(&p.comm)).unwrap_or_default();
    let left = format!(" standstill watch: {} {name}", app.root);
    let right = app.sample.as_ref().map_or(String::new(), |s| output::date(s.time as u64) + " ");
    let gap = width.saturating_sub(left.chars().count() + right.chars().count());
    Line::from(format!("{left}{}{right}", " ".repeat(gap))).reversed()
}

#[cfg(test)]
mod tests {
    use super::{super::app::samples, *};
    use ratatui::{
        Terminal,
        backend::TestBackend,
        crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    };
    use standstill_engine::watch::Sample;

    fn shown(app: &mut App, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, app)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(width.into()).map(|cells| cells.iter().map(|c| c.symbol()).collect());
        lines.collect::<Vec<String>>().join("\n")
    }

    fn busy(pane: char) -> App {
        let mut app = App::new(4711);
        app.take(samples::busy());
        app.key(KeyEvent::new(KeyCode::Char(pane), KeyModifiers::NONE));
        app
    }

    #[track_caller]
    fn expect(screen: &str, words: &[&str]) {
        for word in words {
            assert!(screen.contains(word), "{word:?} is not on the screen:\n{screen}");
        }
    }

    #[test]
    fn overview_with_the_prediction() {
        let screen = shown(&mut busy('1'), 80, 24);
        expect(&screen, &["standstill watch: 4711 server", "1 Overview", "2 Processes", "q quit"]);
        expect(&screen, &["If frozen now: freeze of 12.3 ms and image of 68.00 MiB"]);
        expect(&screen, &["freezing", "2.35 ms", "pages", "10.0 ms", "+25 %", "corrected by 3 earlier dumps"]);
        expect(&screen, &["processes", "threads", "72.00 MiB", "forks", "1.5", "descriptors", "250", "eBPF iterators"]);
        assert!(!screen.contains("signals"), "nobody can tell:\n{screen}");
    }

    #[test]
    fn without_ebpf_it_says_so() {
        let mut app = App::new(4711);
        let note = Some("CAP_BPF is missing".to_owned());
        app.take(Sample { reader: "procfs".into(), reader_note: note, ..samples::busy() });
        expect(&shown(&mut app, 80, 24), &["Read from procfs, without eBPF: CAP_BPF is missing"]);
    }

    #[test]
    fn what_cannot_be_dumped_is_named() {
        let mut app = App::new(4711);
        let note = Some("process 7: the mapping x cannot be dumped".to_owned());
        app.take(Sample { prediction: None, prediction_note: note, ..samples::busy() });
        expect(&shown(&mut app, 80, 24), &["If frozen now: process 7: the mapping x cannot be dumped"]);
    }

    #[test]
    fn tables() {
        expect(&shown(&mut busy('2'), 80, 24), &["PID▾", "RESIDENT", "4712", "worker", "64.00 MiB"]);
        expect(&shown(&mut busy('3'), 80, 24), &["RESIDENT▾", "anonymous", "/usr/lib/libc.so.6", "128.00 MiB"]);
        expect(&shown(&mut busy('4'), 80, 24), &["COUNT▾", "tcp", "established", "40", "regular"]);
        expect(
            &shown(&mut busy('5'), 80, 24),
            &["RECV▾", "tcp", "established", "1200", "127.0.0.1:80", "…7.0.0.1:40404"],
        );
        let mut app = busy('3');
        let written = |sample: &mut Sample| sample.memory[0].written_per_second = Some(5_242_880.0);
        written(app.sample.as_mut().unwrap());
        expect(&shown(&mut app, 80, 24), &["WRITTEN/S", "5.00 MiB", "libc.so.6"]);
    }

    #[test]
    fn sorting() {
        let mut app = busy('2');
        let first = |app: &mut App| {
            let screen = shown(app, 80, 24);
            let (server, worker) = (screen.rfind("server"), screen.find("worker"));
            if server < worker { "server" } else { "worker" }
        };
        if let Some(sample) = &mut app.sample {
            sample.processes[1].resident = 1 << 30;
        }
        assert_eq!(first(&mut app), "server");
        app.key(KeyEvent::new(KeyCode::Char('s'), KeyModifiers::NONE));
        assert_eq!(first(&mut app), "worker");
    }

    #[test]
    fn any_size_and_any_name() {
        let mut app = busy('1');
        if let Some(sample) = &mut app.sample {
            sample.processes[0].comm = "\x1b[31mred\n".into();
        }
        for pane in ['1', '2', '3', '4', '5'] {
            app.key(KeyEvent::new(KeyCode::Char(pane), KeyModifiers::NONE));
            for (width, height) in [(1, 1), (20, 5), (80, 24), (200, 60)] {
                let screen = shown(&mut app, width, height);
                assert!(!screen.contains('\x1b'), "{screen:?}");
            }
        }
        assert!(shown(&mut App::new(1), 80, 24).contains("reading the tree"));
    }
}
