use super::*;
use proptest::{collection::vec, prelude::*};
use serde::Deserialize;

const FILE: &str = "test.img";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sample {
    name: String,
    numbers: Vec<(u32, i64)>,
    bytes: Option<Vec<u8>>,
}

impl Record for Sample {
    const KIND: u16 = 1000;
    const VERSION: u16 = 2;
}

/// What a newer program might write: the same kind and a newer layout, and kinds of its own.
#[derive(Serialize, Deserialize)]
struct Other<const KIND: u16, const VERSION: u16, const OPTIONAL: bool>(u64);

impl<const KIND: u16, const VERSION: u16, const OPTIONAL: bool> Record for Other<KIND, VERSION, OPTIONAL> {
    const KIND: u16 = KIND;
    const VERSION: u16 = VERSION;
    const OPTIONAL: bool = OPTIONAL;
}

fn manifest<T: Record + Serialize>(record: &T) -> Vec<u8> {
    let mut writer = RecordWriter::new();
    writer.push(record).expect("a small record");
    writer.finish()
}

/// Reads as a program does that knows only `Sample`.
fn read(bytes: &[u8]) -> Result<Vec<Sample>, ImageError> {
    let mut samples = Vec::new();
    for record in RecordReader::new(FILE.as_ref(), bytes)? {
        let record = record?;
        match record.kind() {
            Sample::KIND => samples.push(record.decode()?),
            _ => record.unknown()?,
        }
    }
    Ok(samples)
}

fn sample() -> impl Strategy<Value = Sample> {
    (any::<String>(), vec(any::<(u32, i64)>(), 0..20), any::<Option<Vec<u8>>>())
        .prop_map(|(name, numbers, bytes)| Sample { name, numbers, bytes })
}

proptest! {
    #[test]
    fn records_come_back(samples in vec(sample(), 0..5)) {
        let mut writer = RecordWriter::new();
        for sample in &samples {
            writer.push(sample).expect("a small record");
        }
        prop_assert_eq!(read(&writer.finish()).expect("what was written"), samples);
    }
}

#[test]
fn the_header_names_the_writer_and_the_layout() {
    let bytes = manifest(&Other::<7, 3, false>(300));
    let reader = RecordReader::new(FILE.as_ref(), &bytes[..]).expect("what was written");
    assert_eq!(reader.writer(), concat!("standstill ", env!("CARGO_PKG_VERSION")));
    let records: Vec<_> = reader.collect::<Result<_, _>>().expect("what was written");
    let [record] = &records[..] else { panic!("{records:?}") };
    assert_eq!((record.offset(), record.kind(), record.version()), (64, 7, 3));
    assert_eq!(record.body(), [0xac, 0x02], "the varint of postcard");
}

/// Old images must stay readable: these bytes never change.
#[test]
fn the_layout_stays() {
    let bytes = manifest(&Other::<7, 3, false>(300));
    assert_eq!(bytes[..16], *b"STNDSTLL\x01\0\0\0\0\0\0\0");
    let record = b"STNDSREC^\xa7\xd7R\xfei\x90\xec\x07\0\x03\0\x01\0\0\0\x02\0\0\0\0\0\0\0\xac\x02";
    let end = b"STNDSREC\x98\xc8&\x9b\x17[\x16\x05\0\0\x01\0\x01\0\0\0\x08\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0";
    assert_eq!(bytes[64..].escape_ascii().to_string(), [&record[..], end].concat().escape_ascii().to_string());
}

#[test]
fn newer_records_and_formats_are_named() {
    let error = read(&manifest(&Other::<1000, 3, false>(1))).expect_err("newer");
    let text = "test.img: the image is newer (record kind 1000 version 3, this program reads up to 2)";
    assert_eq!(error.to_string(), text);

    let mut bytes = manifest(&Other::<7, 1, true>(1));
    bytes[8..12].copy_from_slice(&2_u32.to_le_bytes());
    let error = read(&bytes).expect_err("newer");
    assert_eq!(error.to_string(), "test.img: the image is newer (format version 2, this program reads up to 1)");
}

#[test]
fn an_older_version_is_not_decoded_as_the_current_one() {
    let error = read(&manifest(&Other::<1000, 1, false>(1))).expect_err("older");
    assert_eq!(error.to_string(), "test.img: record kind 1000: not kind 1000 version 2 at byte 64");
}

#[test]
fn unknown_records_are_skipped_only_if_they_are_optional() {
    assert_eq!(read(&manifest(&Other::<7, 1, true>(1))).expect("optional"), []);
    let error = read(&manifest(&Other::<7, 1, false>(1))).expect_err("required");
    assert_eq!(error.to_string(), "test.img: a record of kind 7, which this program does not know, at byte 64");
}

#[test]
fn a_body_must_be_one_record_exactly() {
    #[derive(Serialize)]
    struct Longer(Sample, u8);
    impl Record for Longer {
        const KIND: u16 = Sample::KIND;
        const VERSION: u16 = Sample::VERSION;
    }
    let sample = Sample { name: "a".into(), numbers: vec![], bytes: None };
    let error = read(&manifest(&Longer(sample, 0))).expect_err("leftovers");
    assert_eq!(error.to_string(), "test.img: unexpected bytes at byte 100");
    let error = read(&manifest(&Other::<1000, 2, false>(7))).expect_err("too short");
    assert!(error.to_string().starts_with("test.img: record kind 1000: "), "{error}");
}

#[test]
fn records_lost_at_a_boundary_are_noticed() {
    let mut writer = RecordWriter::new();
    for n in 0..3 {
        writer.push(&Other::<7, 1, true>(n)).expect("a small record");
    }
    let bytes = writer.finish();
    let length = RECORD_HEADER + 1;
    let lost = [&bytes[..FILE_HEADER + length], &bytes[FILE_HEADER + 2 * length..]].concat();
    let error = read(&lost).expect_err("one is lost");
    assert_eq!(error.to_string(), "test.img: 2 records, but 3 were written, up to the end at byte 130");
    let error = read(&bytes[..FILE_HEADER + 3 * length]).expect_err("the end is lost");
    assert_eq!(error.to_string(), "test.img: truncated at byte 163");
}

#[test]
fn unknown_flags_are_refused() {
    let mut bytes = manifest(&Other::<7, 1, true>(1));
    let record = &mut bytes[FILE_HEADER..FILE_HEADER + RECORD_HEADER + 1];
    record[20] = 4;
    let checksum = XxHash3_64::oneshot(&record[CHECKED..]);
    record[8..16].copy_from_slice(&checksum.to_le_bytes());
    let error = read(&bytes).expect_err("unknown flag");
    assert_eq!(error.to_string(), "test.img: flags 0x4, which this program does not know, at byte 64");
}

#[test]
fn read_errors_are_not_taken_for_the_end() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("broken disk"))
        }
    }
    let bytes = manifest(&Other::<7, 1, true>(1));
    for at in [0, 70, bytes.len()] {
        let reader = RecordReader::new(FILE.as_ref(), bytes[..at].chain(Failing));
        let error = reader.and_then(|r| r.collect::<Result<Vec<_>, _>>()).expect_err("it fails");
        assert_eq!(error.to_string(), "test.img: broken disk");
    }
}
