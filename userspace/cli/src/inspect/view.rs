//! All of an image that is shown.

use super::{
    files::{File, Pipe},
    memory::{KindTotal, SharedObject, totals},
    output::date,
    processes::Process,
};
use serde::Serialize;
use standstill_engine::Image;
use standstill_images::{store::Compression, types::DumpStats};

/// An image. The names of the fields are those of the JSON.
#[derive(Serialize)]
pub(crate) struct View<'a> {
    pub image: Header<'a>,
    /// By pid.
    pub processes: Vec<Process<'a>>,
    /// Memory of all processes by kind.
    pub memory: Vec<KindTotal>,
    pub store: Store<'a>,
    /// Open file descriptions, and files that are only mapped or executed.
    pub files: Vec<File<'a>>,
    pub pipes: Vec<Pipe>,
    pub shared_memory: Vec<SharedObject>,
    pub timings: &'a DumpStats,
}

/// Where and with what the image was made.
#[derive(Serialize)]
pub(crate) struct Header<'a> {
    pub directory: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// The same for people.
    #[serde(skip)]
    pub created_utc: String,
    pub writer: &'a str,
    pub kernel: &'a str,
    pub machine: &'a str,
    pub root: i32,
    pub shell_job: bool,
}

/// The page store.
#[derive(Serialize)]
pub(crate) struct Store<'a> {
    pub pages_file: &'a str,
    pub compression: &'static str,
    /// Level, of a compression that has them.
    pub level: Option<i32>,
    /// Pages stored.
    pub pages: u64,
    /// Pages that are stored once but belong to several processes.
    pub shared_pages: u64,
    /// Pages not stored because they hold only zeros.
    pub zero_pages: u64,
    pub page_bytes: u64,
    pub stored_bytes: u64,
}

impl<'a> View<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        let inventory = &image.inventory;
        let files = File::all(image);
        Self {
            image: Header {
                directory: image.dir.display().to_string(),
                created: inventory.created,
                created_utc: date(inventory.created),
                writer: &inventory.writer,
                kernel: &inventory.kernel,
                machine: &inventory.machine,
                root: inventory.root,
                shell_job: inventory.shell_job,
            },
            processes: image.tasks.values().map(|t| Process::new(t, image)).collect(),
            memory: totals(image),
            store: Store::new(image),
            pipes: Pipe::all(image, &files),
            files,
            shared_memory: image.shared.values().map(SharedObject::new).collect(),
            timings: &image.stats,
        }
    }
}

impl<'a> Store<'a> {
    fn new(image: &'a Image) -> Self {
        let chunks = || image.stores.iter().flat_map(|store| &store.index.chunks);
        let (pages_file, compression) =
            image.stores.last().map_or(("", Compression::None), |own| (&own.index.file, own.index.compression));
        let (compression, level) = match compression {
            Compression::None => ("none", None),
            Compression::Lz4 => ("lz4", None),
            Compression::Zstd(level) => ("zstd", Some(level)),
        };
        Self {
            pages_file,
            compression,
            level,
            pages: image.pages(),
            shared_pages: image.stats.pages_shared,
            zero_pages: image.stats.pages_zero,
            page_bytes: chunks().map(|c| u64::from(c.raw)).sum(),
            stored_bytes: chunks().map(|c| u64::from(c.stored)).sum(),
        }
    }
}
