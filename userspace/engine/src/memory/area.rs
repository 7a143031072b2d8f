//! Mappings as the search for pages sees them.

use super::smaps::Mapped;
use crate::kernel::{PAGE, pagemap::Range, proc::MapLine};
use standstill_images::types::{Backing, Vma};

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
        Self { range, kind, untouched, registered, unforked: false, bulk }
    }

    pub(super) fn is_private(&self) -> bool {
        self.kind != Kind::Other
    }

    /// Of a mapping as it was recorded and as the kernel shows it.
    pub(super) fn of(vma: &Vma, map: &Mapped) -> Self {
        let kind = match vma.backing {
            Backing::Anonymous { .. } if vma.flags.droppable => Kind::Droppable,
            Backing::Anonymous { .. } => Kind::Anonymous,
            Backing::PrivateFile { .. } => Kind::File,
            _ => Kind::Other,
        };
        let range = Range { start: vma.start, end: vma.end };
        let unforked = vma.flags.dontfork || vma.flags.wipeonfork;
        Self { unforked, ..Self::new(range, kind, map.untouched, map.has(b"uw")) }
    }
}

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
