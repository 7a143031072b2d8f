//! Mappings as the search for pages sees them.

use super::smaps::Mapped;
use crate::kernel::{
    PAGE, hugetlb,
    pagemap::Range,
    proc::{self, MapLine},
};
use standstill_images::types::{Backing, Vma};
use std::{collections::HashMap, io};

/// Why a mapping is refused that the target tracks itself.
pub(crate) const REGISTERED: &str = "it is registered with userfaultfd: end that use, or the `watch --dirty` or `snapshot` of a tree it is in, before the dump";

/// A mapping, as far as its pages are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub range: Range,
    pub kind: Kind,
    /// It has certainly neither pages of its own nor guards.
    pub untouched: bool,
    /// Somebody tracks writes to it, as far as that was looked for.
    pub registered: bool,
    /// A fork lacks what is in it, as far as that was looked for.
    pub unforked: bool,
    /// A scan that does not look at each page pays.
    pub bulk: bool,
    /// Its pages are those of hugetlbfs.
    pub huge: bool,
}

/// Kinds of mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private memory without a file.
    Anonymous,
    /// Private memory that the kernel may empty at any time: a dump is such a time.
    Droppable,
    /// Private memory over a file.
    File,
    /// Shared, or the kernel's.
    Other,
}

impl Area {
    pub(super) fn new(range: Range, kind: Kind, untouched: bool, registered: bool) -> Self {
        let bulk = kind == Kind::Anonymous && range.end - range.start >= 256 * PAGE;
        Self { range, kind, untouched, registered, unforked: false, bulk, huge: false }
    }

    /// The mappings of a process that runs. Huge pages are looked at under the freeze only (decision 42).
    pub(crate) fn of_running(pid: i32) -> io::Result<Vec<Self>> {
        let maps = proc::maps(pid)?;
        // Whether the files of a device are hugetlbfs's. Those of a mapping that is gone again may have been.
        let mut devices: HashMap<&str, bool> = HashMap::new();
        let mut areas = Vec::with_capacity(maps.len());
        for line in &maps {
            let mut area = Self::from(line);
            if area.kind == Kind::File {
                let link = || proc::path(pid, &format!("map_files/{:x}-{:x}", line.start, line.end));
                let is_huge = || !matches!(hugetlb::page_size_at(&link()), Ok(None));
                if *devices.entry(&line.dev).or_insert_with(is_huge) {
                    area.kind = Kind::Other;
                }
            }
            areas.push(area);
        }
        Ok(areas)
    }

    pub(crate) fn is_private(&self) -> bool {
        self.kind != Kind::Other
    }

    /// Of a mapping as it was recorded and as the kernel shows it.
    pub(super) fn of(vma: &Vma, map: &Mapped) -> Self {
        let kind = match vma.backing {
            Backing::Anonymous { .. } if vma.flags.droppable => Kind::Droppable,
            Backing::Anonymous { .. } => Kind::Anonymous,
            Backing::PrivateFile { .. } => Kind::File,
            // The file behind memory without a name is empty.
            Backing::HugePages { shared: false, .. } if map.name.starts_with(b"/anon_hugepage") => Kind::Anonymous,
            Backing::HugePages { shared: false, .. } => Kind::File,
            _ => Kind::Other,
        };
        let range = Range { start: vma.start, end: vma.end };
        let huge = map.has(b"ht");
        let unforked = vma.flags.dontfork || vma.flags.wipeonfork || huge;
        let area = Self::new(range, kind, map.untouched, map.has(b"uw"));
        Self { unforked, huge, bulk: area.bulk && !huge, ..area }
    }
}

/// But for huge pages, which a line does not tell from those of other files.
impl From<&MapLine> for Area {
    fn from(line: &MapLine) -> Self {
        let kernels = ["[vdso]", "[vsyscall]", "[uprobes]", "[vectors]"].contains(&line.name.as_str());
        let kind = match line.shared || kernels || line.name.starts_with("[vvar") {
            true => Kind::Other,
            false if line.ino != 0 => Kind::File,
            false => Kind::Anonymous,
        };
        Self::new(Range { start: line.start, end: line.end }, kind, false, false)
    }
}
