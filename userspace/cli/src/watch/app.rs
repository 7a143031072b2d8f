//! What the view shows at the moment, and what keys do to it. Pure.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::crossterm;
use standstill_engine::watch::Sample;

/// A part of the view that fills the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pane {
    Overview,
    Processes,
    Memory,
    Descriptors,
    Sockets,
}

impl Pane {
    pub(super) const ALL: [(Self, &'static str); 5] = [
        (Self::Overview, "1 Overview"),
        (Self::Processes, "2 Processes"),
        (Self::Memory, "3 Memory"),
        (Self::Descriptors, "4 Descriptors"),
        (Self::Sockets, "5 Sockets"),
    ];

    pub(super) fn number(self) -> usize {
        Self::ALL.iter().position(|(pane, _)| *pane == self).unwrap_or(0)
    }

    fn step(self, by: usize) -> Self {
        Self::ALL[(self.number() + by) % Self::ALL.len()].0
    }

    /// Columns by which the pane can be sorted.
    pub(super) fn columns(self) -> usize {
        match self {
            Self::Overview => 1,
            Self::Processes | Self::Memory => 5,
            Self::Descriptors => 2,
            Self::Sockets => 3,
        }
    }
}

/// The state of the view.
pub(super) struct App {
    pub root: i32,
    pub pane: Pane,
    pub sample: Option<Sample>,
    /// The column that each pane is sorted by.
    pub sort: [usize; 5],
    /// The first row shown.
    pub top: usize,
    /// Rows that the screen has room for, as last drawn.
    pub page: usize,
}

/// What a key asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    GoOn,
    Quit,
}

impl App {
    pub(super) fn new(root: i32) -> Self {
        Self { root, pane: Pane::Overview, sample: None, sort: [0; 5], top: 0, page: 1 }
    }

    pub(super) fn take(&mut self, sample: Sample) {
        self.sample = Some(sample);
    }

    /// Rows of the pane.
    fn rows(&self) -> usize {
        let Some(sample) = &self.sample else { return 0 };
        match self.pane {
            Pane::Overview => 0,
            Pane::Processes => sample.processes.len(),
            Pane::Memory => sample.memory.len(),
            Pane::Descriptors => sample.descriptors.len(),
            Pane::Sockets => sample.sockets.len(),
        }
    }

    /// The first row to be shown, and how many fit: never an empty screen at the end.
    pub(super) fn window(&mut self, height: usize) -> usize {
        self.page = height.max(1);
        self.top = self.top.min(self.rows().saturating_sub(self.page));
        self.top
    }

    pub(super) fn key(&mut self, key: KeyEvent) -> Wish {
        let page = self.page;
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Wish::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return Wish::Quit,
            KeyCode::Tab | KeyCode::Right => self.show(self.pane.step(1)),
            KeyCode::BackTab | KeyCode::Left => self.show(self.pane.step(Pane::ALL.len() - 1)),
            KeyCode::Char(c @ '1'..='5') => self.show(Pane::ALL[c as usize - '1' as usize].0),
            KeyCode::Char('s') => {
                let column = &mut self.sort[self.pane.number()];
                *column = (*column + 1) % self.pane.columns();
            }
            KeyCode::Down | KeyCode::Char('j') => self.top += 1,
            KeyCode::Up | KeyCode::Char('k') => self.top = self.top.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => self.top += page,
            KeyCode::PageUp => self.top = self.top.saturating_sub(page),
            KeyCode::Home => self.top = 0,
            KeyCode::End => self.top = usize::MAX / 2,
            _ => {}
        }
        Wish::GoOn
    }

    fn show(&mut self, pane: Pane) {
        if self.pane != pane {
            (self.pane, self.top) = (pane, 0);
        }
    }
}

#[cfg(test)]
pub(super) mod samples {
    use standstill_engine::watch::{
        DescriptorRow, MappingKind, MappingRow, Part, Prediction, ProcessRow, Rates, Sample, SocketRow, Totals,
    };

    /// A tree of two processes that does something.
    pub(crate) fn busy() -> Sample {
        let process = |pid: i32, comm: &str, resident: u64| ProcessRow {
            pid,
            ppid: pid - 1,
            comm: comm.into(),
            state: 'S',
            threads: 4,
            resident,
            anonymous: resident / 2,
            descriptors: 7,
        };
        let mapping = |kind, name: &str, resident| MappingRow {
            kind,
            name: name.into(),
            count: 3,
            size: resident * 2,
            resident,
            private_dirty: resident / 4,
            written_per_second: None,
        };
        let descriptor = |kind: &str, state: Option<&str>, count| DescriptorRow {
            kind: kind.into(),
            state: state.map(Into::into),
            count,
        };
        let part = |phase: &str, us, correction| Part { phase: phase.into(), us, correction };
        Sample {
            root: 4711,
            time: 1_785_283_199.25,
            reader: "ebpf".into(),
            cost_us: 4200,
            processes: vec![process(4711, "server", 64 << 20), process(4712, "worker", 8 << 20)],
            totals: Totals {
                processes: 2,
                threads: 9,
                descriptors: 43,
                mappings: 120,
                resident: 72 << 20,
                anonymous: 36 << 20,
            },
            memory: vec![
                mapping(MappingKind::Anonymous, "anonymous", 64 << 20),
                mapping(MappingKind::File, "/usr/lib/libc.so.6", 2 << 20),
            ],
            descriptors: vec![descriptor("tcp", Some("established"), 40), descriptor("regular", None, 3)],
            sockets: vec![SocketRow {
                pid: 4711,
                fd: 9,
                kind: "tcp".into(),
                state: Some("established".into()),
                receive: Some(0),
                send: Some(1200),
                local: "127.0.0.1:80".into(),
                peer: "127.0.0.1:40404".into(),
            }],
            rates: Rates { forks: 1.5, descriptors: 250.0, mappings: Some(12.0), ..Rates::default() },
            prediction: Some(Prediction {
                freeze_us: 12_345,
                image_bytes: 68 << 20,
                precopied: true,
                parts: vec![part("freezing", 2345, 1.0), part("pages", 10_000, 1.25)],
                dumps: 3,
                age: 0.4,
            }),
            prediction_without_precopy: Some(Prediction { freeze_us: 54_321, ..Prediction::default() }),
            ..Sample::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(app: &mut App, code: KeyCode) -> Wish {
        app.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn panes_by_number_and_in_turn() {
        let mut app = App::new(1);
        for (key, want) in [
            (KeyCode::Char('3'), Pane::Memory),
            (KeyCode::Tab, Pane::Descriptors),
            (KeyCode::Tab, Pane::Sockets),
            (KeyCode::Tab, Pane::Overview),
            (KeyCode::BackTab, Pane::Sockets),
            (KeyCode::Char('9'), Pane::Sockets),
            (KeyCode::Char('1'), Pane::Overview),
        ] {
            assert_eq!(press(&mut app, key), Wish::GoOn);
            assert_eq!(app.pane, want);
        }
    }

    #[test]
    fn three_ways_out() {
        let mut app = App::new(1);
        assert_eq!(press(&mut app, KeyCode::Char('q')), Wish::Quit);
        assert_eq!(press(&mut app, KeyCode::Esc), Wish::Quit);
        assert_eq!(press(&mut app, KeyCode::Char('c')), Wish::GoOn);
        assert_eq!(app.key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), Wish::Quit);
    }

    #[test]
    fn scrolling_stays_on_the_rows() {
        let mut app = App::new(1);
        app.take(samples::busy());
        press(&mut app, KeyCode::Char('2'));
        press(&mut app, KeyCode::End);
        assert_eq!(app.window(1), 1);
        assert_eq!(app.window(10), 0);
        press(&mut app, KeyCode::Up);
        press(&mut app, KeyCode::PageDown);
        assert_eq!(app.window(1), 1);
    }
}
