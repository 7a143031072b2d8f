//! The panes that are tables.

use super::{
    app::{App, Pane},
    metrics::kind_name,
    output::plain,
};
use indicatif::HumanBytes;
use ratatui::{
    buffer::Buffer,
    layout::{Constraint, Rect},
    style::Style,
    text::{Line, Text},
    widgets::{Cell, Row, Table, Widget},
};
use standstill_engine::watch::{DescriptorRow, MappingRow, ProcessRow, Sample, SocketRow};
use std::cmp::Ordering;

/// A column: title, width, how it is sorted (if it is), and whether numbers are in it.
struct Column {
    title: &'static str,
    width: Constraint,
    sort: Option<usize>,
    number: bool,
}

const fn column(title: &'static str, width: Constraint, sort: Option<usize>, number: bool) -> Column {
    Column { title, width, sort, number }
}

/// For the column that takes what the others leave.
const REST: Constraint = Constraint::Fill(1);

const PROCESSES: [Column; 8] = [
    column("PID", Constraint::Length(8), Some(0), true),
    column("PPID", Constraint::Length(8), None, true),
    column("S", Constraint::Length(1), None, false),
    column("THREADS", Constraint::Length(7), Some(3), true),
    column("FDS", Constraint::Length(6), Some(4), true),
    column("RESIDENT", Constraint::Length(11), Some(1), true),
    column("ANONYMOUS", Constraint::Length(11), Some(2), true),
    column("NAME", REST, None, false),
];

const MEMORY: [Column; 6] = [
    column("KIND", Constraint::Length(9), None, false),
    column("COUNT", Constraint::Length(6), Some(3), true),
    column("VIRTUAL", Constraint::Length(11), Some(2), true),
    column("RESIDENT", Constraint::Length(11), Some(0), true),
    column("DIRTY", Constraint::Length(11), Some(1), true),
    column("NAME", REST, None, false),
];

/// With writes tracked.
const WRITTEN: [Column; 7] = [
    column("KIND", Constraint::Length(9), None, false),
    column("COUNT", Constraint::Length(6), Some(3), true),
    column("VIRTUAL", Constraint::Length(11), Some(2), true),
    column("RESIDENT", Constraint::Length(11), Some(0), true),
    column("DIRTY", Constraint::Length(11), Some(1), true),
    column("WRITTEN/S", Constraint::Length(11), Some(4), true),
    column("NAME", REST, None, false),
];

const DESCRIPTORS: [Column; 3] = [
    column("COUNT", Constraint::Length(10), Some(0), true),
    column("KIND", Constraint::Length(20), Some(1), false),
    column("STATE", REST, None, false),
];

const SOCKETS: [Column; 8] = [
    column("PID", Constraint::Length(8), Some(1), true),
    column("FD", Constraint::Length(5), None, true),
    column("KIND", Constraint::Length(6), Some(2), false),
    column("STATE", Constraint::Length(11), None, false),
    column("RECV", Constraint::Length(7), Some(0), true),
    column("SEND", Constraint::Length(7), None, true),
    column("LOCAL", REST, None, false),
    column("PEER", REST, None, false),
];

pub(super) fn render(app: &mut App, area: Rect, buffer: &mut Buffer) {
    // The first line is the header.
    let height = usize::from(area.height.saturating_sub(1));
    let top = app.window(height);
    let sort = app.sort[app.pane.number()];
    let Some(sample) = &app.sample else { return };
    let (columns, rows): (&[Column], _) = match app.pane {
        Pane::Overview => return,
        Pane::Processes => (&PROCESSES, processes(sample, sort)),
        Pane::Memory if writes_are_known(sample) => (&WRITTEN, memory(sample, sort)),
        Pane::Memory => (&MEMORY, memory(sample, sort)),
        Pane::Descriptors => (&DESCRIPTORS, descriptors(sample, sort)),
        Pane::Sockets => (&SOCKETS, sockets(sample, sort)),
    };
    let title = |c: &Column| {
        let mark = if c.sort == Some(sort) { "▾" } else { "" };
        cell(format!("{}{mark}", c.title), c.number)
    };
    let header = Row::new(columns.iter().map(title)).style(Style::new().bold());
    let room = room(columns, area.width);
    let shown = |text: String, c: &Column| cell(if c.width == REST { tail(text, room) } else { text }, c.number);
    let rows = rows.into_iter().skip(top).take(height);
    let rows = rows.map(|row| Row::new(row.into_iter().zip(columns).map(|(text, c)| shown(text, c))));
    Table::new(rows, columns.iter().map(|c| c.width)).header(header).render(area, buffer);
}

/// Width of a column that takes the rest, or its part of it.
fn room(columns: &[Column], width: u16) -> usize {
    let fixed = |c: &Column| if let Constraint::Length(n) = c.width { n } else { 0 };
    // Columns are one apart.
    let others = columns.iter().map(fixed).sum::<u16>() + columns.len() as u16 - 1;
    let parts = columns.iter().filter(|c| c.width == REST).count().max(1);
    usize::from(width.saturating_sub(others)) / parts
}

/// The end of a text that is too long: that of a path says most.
fn tail(text: String, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text;
    }
    let rest: String = text.chars().skip(length + 1 - width.max(1)).collect();
    format!("…{rest}")
}

fn cell(text: String, number: bool) -> Cell<'static> {
    let line = Line::from(text);
    Cell::from(Text::from(if number { line.right_aligned() } else { line }))
}

/// References in the order of the column `sort`.
fn ordered<'a, T>(rows: &'a [T], sort: usize, orders: &[fn(&T, &T) -> Ordering]) -> Vec<&'a T> {
    let mut rows: Vec<&T> = rows.iter().collect();
    if let Some(order) = orders.get(sort) {
        rows.sort_by(|a, b| order(a, b));
    }
    rows
}

fn bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

fn processes(sample: &Sample, sort: usize) -> Vec<Vec<String>> {
    let orders: [fn(&ProcessRow, &ProcessRow) -> Ordering; 5] = [
        |a, b| a.pid.cmp(&b.pid),
        |a, b| b.resident.cmp(&a.resident),
        |a, b| b.anonymous.cmp(&a.anonymous),
        |a, b| b.threads.cmp(&a.threads),
        |a, b| b.descriptors.cmp(&a.descriptors),
    ];
    let row = |p: &ProcessRow| {
        vec![
            p.pid.to_string(),
            p.ppid.to_string(),
            p.state.to_string(),
            p.threads.to_string(),
            p.descriptors.to_string(),
            bytes(p.resident),
            bytes(p.anonymous),
            plain(&p.comm),
        ]
    };
    ordered(&sample.processes, sort, &orders).into_iter().map(row).collect()
}

fn writes_are_known(sample: &Sample) -> bool {
    sample.memory.iter().any(|m| m.written_per_second.is_some())
}

fn memory(sample: &Sample, sort: usize) -> Vec<Vec<String>> {
    let writes = writes_are_known(sample);
    let orders: [fn(&MappingRow, &MappingRow) -> Ordering; 5] = [
        |a, b| b.resident.cmp(&a.resident),
        |a, b| b.private_dirty.cmp(&a.private_dirty),
        |a, b| b.size.cmp(&a.size),
        |a, b| b.count.cmp(&a.count),
        |a, b| b.written_per_second.unwrap_or(-1.0).total_cmp(&a.written_per_second.unwrap_or(-1.0)),
    ];
    let row = |m: &MappingRow| {
        let mut cells = vec![
            kind_name(m.kind).to_owned(),
            m.count.to_string(),
            bytes(m.size),
            bytes(m.resident),
            bytes(m.private_dirty),
        ];
        if writes {
            cells.push(m.written_per_second.map_or_else(|| "-".into(), |rate| bytes(rate as u64)));
        }
        cells.push(plain(&m.name));
        cells
    };
    ordered(&sample.memory, sort, &orders).into_iter().map(row).collect()
}

fn descriptors(sample: &Sample, sort: usize) -> Vec<Vec<String>> {
    let orders: [fn(&DescriptorRow, &DescriptorRow) -> Ordering; 2] =
        [|a, b| b.count.cmp(&a.count), |a, b| (&a.kind, &a.state).cmp(&(&b.kind, &b.state))];
    let row =
        |d: &DescriptorRow| vec![d.count.to_string(), plain(&d.kind), plain(d.state.as_deref().unwrap_or_default())];
    ordered(&sample.descriptors, sort, &orders).into_iter().map(row).collect()
}

fn sockets(sample: &Sample, sort: usize) -> Vec<Vec<String>> {
    let orders: [fn(&SocketRow, &SocketRow) -> Ordering; 3] = [
        // As they come: those in which most waits first.
        |_, _| Ordering::Equal,
        |a, b| (a.pid, a.fd).cmp(&(b.pid, b.fd)),
        |a, b| (&a.kind, &a.state).cmp(&(&b.kind, &b.state)),
    ];
    let number = |n: Option<u64>| n.map_or_else(|| "-".into(), |n| n.to_string());
    let row = |s: &SocketRow| {
        vec![
            s.pid.to_string(),
            s.fd.to_string(),
            plain(&s.kind),
            plain(s.state.as_deref().unwrap_or_default()),
            number(s.receive),
            number(s.send),
            plain(&s.local),
            plain(&s.peer),
        ]
    };
    ordered(&sample.sockets, sort, &orders).into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_show_their_ends() {
        assert_eq!(tail("/usr/lib/libc.so.6".into(), 10), "…libc.so.6");
        assert_eq!(tail("short".into(), 5), "short");
        assert_eq!(tail("ähm".into(), 0), "…");
        assert_eq!(room(&MEMORY, 80), 80 - 9 - 6 - 3 * 11 - 5);
        assert_eq!(room(&MEMORY, 3), 0);
        assert_eq!(room(&SOCKETS, 80), (80 - 44 - 7) / 2);
    }
}
