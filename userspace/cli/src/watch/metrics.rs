//! The latest sample as Prometheus metrics (OpenMetrics text) over HTTP.

use crate::Failure;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use standstill_engine::watch::{MappingKind, Sample};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    thread,
};
use tiny_http::{Header, Method, Request, Response, Server};

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where to listen. A port alone is one on loopback: what processes do is nobody else's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(SocketAddr);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        text.parse().map(Self).map_err(|_| "neither ADDRESS:PORT, as 127.0.0.1:9464, nor a port".into())
    }
}

/// A server of the latest sample.
pub(super) struct Metrics(Arc<Mutex<Option<Sample>>>);

fn lock(latest: &Mutex<Option<Sample>>) -> MutexGuard<'_, Option<Sample>> {
    // A value is replaced in one go: it is whole whatever panicked.
    latest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    /// Listens, and answers in a thread of its own.
    pub(super) fn serve(address: Address) -> Result<Self, Failure> {
        let failed = |e| Failure { status: 7, text: format!("listen on {}: {e}", address.0) };
        let server = Server::http(address.0).map_err(failed)?;
        let latest = Arc::new(Mutex::new(None));
        let shown = Arc::clone(&latest);
        thread::spawn(move || {
            for request in server.incoming_requests() {
                answer(request, &lock(&shown).clone());
            }
        });
        Ok(Self(latest))
    }

    /// Takes a new sample.
    pub(super) fn show(&self, sample: &Sample) {
        *lock(&self.0) = Some(sample.clone());
    }
}

fn answer(request: Request, latest: &Option<Sample>) {
    let path = request.url().split('?').next().unwrap_or_default();
    let (status, body) = match (request.method(), path, latest) {
        (Method::Get | Method::Head, "/metrics", Some(sample)) => (200, text(sample)),
        (Method::Get | Method::Head, "/metrics", None) => (503, "no sample yet\n".to_owned()),
        (Method::Get | Method::Head, ..) => (404, "the metrics are at /metrics\n".to_owned()),
        _ => (405, "GET only\n".to_owned()),
    };
    let content_type = if status == 200 { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let mut response = Response::from_string(body).with_status_code(status);
    if let Ok(header) = Header::from_bytes("Content-Type", content_type) {
        response = response.with_header(header);
    }
    // A client that has gone needs no answer.
    let _ = request.respond(response);
}

type Floats<L> = Family<L, Gauge<f64, AtomicU64>>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DescriptorLabel {
    kind: String,
    state: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TreeLabel {
    root: i32,
    reader: String,
}

fn text(sample: &Sample) -> String {
    let mut registry = Registry::with_prefix("standstill");
    let tree = Family::<TreeLabel, Gauge>::default();
    tree.get_or_create(&TreeLabel { root: sample.root, reader: sample.reader.clone() }).set(1);
    registry.register("tree", "The tree that is watched, and who reads it", tree);
    let t = &sample.totals;
    for (name, help, value) in [
        ("processes", "Living processes", t.processes),
        ("threads", "Threads of all processes", t.threads),
        ("mappings", "Memory mappings of all processes", t.mappings),
    ] {
        gauge(&mut registry, name, help, None, value as f64);
    }
    gauge(&mut registry, "resident", "Resident memory", Some(Unit::Bytes), t.resident as f64);
    gauge(&mut registry, "anonymous", "Resident memory that is no file's", Some(Unit::Bytes), t.anonymous as f64);
    let sampled = sample.cost_us as f64 / 1e6;
    gauge(&mut registry, "sample_duration", "Time that the latest sample took", Some(Unit::Seconds), sampled);
    gauge(&mut registry, "sample_timestamp", "When the latest sample was taken", Some(Unit::Seconds), sample.time);
    descriptors(&mut registry, sample);
    memory(&mut registry, sample);
    rates(&mut registry, sample);
    prediction(&mut registry, sample);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

fn gauge(registry: &mut Registry, name: &str, help: &str, unit: Option<Unit>, value: f64) {
    let gauge = Gauge::<f64, AtomicU64>::default();
    gauge.set(value);
    match unit {
        Some(unit) => registry.register_with_unit(name, help, unit, gauge),
        None => registry.register(name, help, gauge),
    }
}

fn descriptors(registry: &mut Registry, sample: &Sample) {
    let family = Family::<DescriptorLabel, Gauge>::default();
    for row in &sample.descriptors {
        let label = DescriptorLabel { kind: row.kind.clone(), state: row.state.clone().unwrap_or_default() };
        family.get_or_create(&label).set(row.count as i64);
    }
    registry.register("descriptors", "Open descriptors by kind", family);
}

fn memory(registry: &mut Registry, sample: &Sample) {
    let (size, resident, dirty) = (Floats::default(), Floats::default(), Floats::default());
    for row in &sample.memory {
        // One series for each kind: files would be too many.
        let label = KindLabel { kind: kind_name(row.kind).to_owned() };
        for (family, value) in [(&size, row.size), (&resident, row.resident), (&dirty, row.private_dirty)] {
            family.get_or_create(&label).inc_by(value as f64);
        }
    }
    if sample.memory.iter().any(|row| row.written_per_second.is_some()) {
        let written = Floats::default();
        for (row, rate) in sample.memory.iter().filter_map(|row| Some((row, row.written_per_second?))) {
            written.get_or_create(&KindLabel { kind: kind_name(row.kind).to_owned() }).inc_by(rate);
        }
        registry.register(
            "memory_written_bytes_per_second",
            "Memory that is written to, each page once a look",
            written,
        );
    }
    for (name, help, family) in [
        ("memory_mapped", "Mapped memory by kind", size),
        ("memory_resident", "Resident memory by kind", resident),
        ("memory_private_dirty", "Memory that was changed and is shared with nobody", dirty),
    ] {
        registry.register_with_unit(name, help, Unit::Bytes, family);
    }
}

/// Name of a kind of memory.
pub(super) fn kind_name(kind: MappingKind) -> &'static str {
    match kind {
        MappingKind::Heap => "heap",
        MappingKind::Stack => "stack",
        MappingKind::Anonymous => "anonymous",
        MappingKind::File => "file",
        MappingKind::Shared => "shared",
        MappingKind::Kernel => "kernel",
    }
}

/// Rates by name; those that nobody can tell are left out.
pub(super) fn rate_names(sample: &Sample) -> impl Iterator<Item = (&'static str, f64)> {
    let r = &sample.rates;
    let all = [
        ("forks", Some(r.forks)),
        ("threads", Some(r.threads)),
        ("execs", Some(r.execs)),
        ("exits", Some(r.exits)),
        ("mappings", r.mappings),
        ("descriptors", Some(r.descriptors)),
        ("sockets", r.sockets),
        ("connections", r.connections),
        ("signals", r.signals),
    ];
    all.into_iter().filter_map(|(name, rate)| Some((name, rate?)))
}

fn rates(registry: &mut Registry, sample: &Sample) {
    let family = Floats::default();
    for (what, rate) in rate_names(sample) {
        family.get_or_create(&WhatLabel { what }).set(rate);
    }
    registry.register("changes_per_second", "Changes since the sample before", family);
}

fn prediction(registry: &mut Registry, sample: &Sample) {
    let Some(p) = &sample.prediction else { return };
    let seconds = |us: u64| us as f64 / 1e6;
    gauge(
        registry,
        "predicted_freeze",
        "How long a dump would stop the tree",
        Some(Unit::Seconds),
        seconds(p.freeze_us),
    );
    gauge(registry, "predicted_image", "How large an image would be", Some(Unit::Bytes), p.image_bytes as f64);
    if let Some(plain) = &sample.prediction_without_precopy {
        let help = "How long a dump that copies nothing before the freeze would stop the tree";
        let seconds = seconds(plain.freeze_us);
        gauge(registry, "predicted_freeze_without_precopy", help, Some(Unit::Seconds), seconds);
    }
    let family = Floats::default();
    for part in &p.parts {
        family.get_or_create(&PhaseLabel { phase: part.phase.clone() }).set(seconds(part.us));
    }
    registry.register_with_unit("predicted_phase", "Phases of the predicted freeze", Unit::Seconds, family);
}

#[cfg(test)]
mod tests {
    use super::{super::app::samples, *};
    use std::{
        collections::HashMap,
        io::{Read, Write},
        net::TcpStream,
    };

    /// Series and values, as a scraper reads them.
    fn parse(text: &str) -> HashMap<String, f64> {
        assert!(text.ends_with("# EOF\n"), "{text}");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let value = |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap()));
        lines.map(|line| value(line).unwrap_or_else(|| panic!("{line}"))).collect()
    }

    #[test]
    fn metrics_of_a_sample() {
        let series = parse(&text(&samples::busy()));
        for (name, value) in [
            ("standstill_tree{root=\"4711\",reader=\"ebpf\"}", 1.0),
            ("standstill_processes", 2.0),
            ("standstill_descriptors{kind=\"tcp\",state=\"established\"}", 40.0),
            ("standstill_descriptors{kind=\"regular\",state=\"\"}", 3.0),
            ("standstill_memory_resident_bytes{kind=\"file\"}", 2_097_152.0),
            ("standstill_changes_per_second{what=\"forks\"}", 1.5),
            ("standstill_predicted_freeze_seconds", 0.012_345),
            ("standstill_predicted_freeze_without_precopy_seconds", 0.054_321),
            ("standstill_predicted_image_bytes", 71_303_168.0),
            ("standstill_predicted_phase_seconds{phase=\"pages\"}", 0.01),
        ] {
            assert_eq!(series.get(name), Some(&value), "{name} in {series:#?}");
        }
        assert!(!series.keys().any(|name| name.contains("signals")), "what nobody can tell is left out");
    }

    #[test]
    fn written_memory_by_kind() {
        let mut sample = samples::busy();
        let name = "standstill_memory_written_bytes_per_second{kind=\"anonymous\"}";
        assert!(!text(&sample).contains("written"));
        sample.memory[0].written_per_second = Some(4096.5);
        assert_eq!(parse(&text(&sample)).get(name), Some(&4096.5));
    }

    #[test]
    fn addresses() {
        assert_eq!("9464".parse::<Address>().unwrap().0.to_string(), "127.0.0.1:9464");
        assert_eq!("[::1]:80".parse::<Address>().unwrap().0.to_string(), "[::1]:80");
        assert!("example.org:80".parse::<Address>().is_err() && "99999".parse::<Address>().is_err());
    }

    #[test]
    fn over_http() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let metrics = Metrics::serve(Address(address)).unwrap();
        let ask = |line: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        assert!(ask("GET /metrics").starts_with("HTTP/1.1 503"));
        metrics.show(&samples::busy());
        let answer = ask("GET /metrics");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200") && head.contains(CONTENT_TYPE), "{head}");
        assert_eq!(parse(body)["standstill_processes"], 2.0);
        assert!(ask("GET /").starts_with("HTTP/1.1 404"));
        assert!(ask("POST /metrics").starts_with("HTTP/1.1 405"));
        let taken = Metrics::serve(Address(address)).err().unwrap();
        assert!(taken.status == 7 && taken.text.contains(&address.to_string()));
    }
}
