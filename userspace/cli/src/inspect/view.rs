//! All of an image that is shown.

use super::{
    files::{File, Pipe},
    memory::{KindTotal, SharedObject, totals},
    output::date,
    processes::Process,
    store::{Chain, Store},
};
use serde::Serialize;
use standstill_engine::Image;
use standstill_images::types::DumpStats;
use std::path::PathBuf;

/// An image. The names of the fields are those of the JSON.
#[derive(Serialize)]
pub(crate) struct View<'a> {
    pub image: Header<'a>,
    /// By pid.
    pub processes: Vec<Process<'a>>,
    /// Memory of all processes by kind.
    pub memory: Vec<KindTotal>,
    pub store: Store<'a>,
    pub chain: Chain<'a>,
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

impl<'a> View<'a> {
    pub(crate) fn new(image: &'a Image, parents: &[PathBuf]) -> Self {
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
            chain: Chain::new(image, parents),
            pipes: Pipe::all(image, &files),
            files,
            shared_memory: image.shared.values().map(SharedObject::new).collect(),
            timings: &image.stats,
        }
    }
}
