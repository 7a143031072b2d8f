//! Where a restore reads pages: uncompressed stores are read by the tasks themselves, each by descriptors that they
//! inherit. What is compressed, and what lies in many small stores, is gathered in one file in memory before.

use crate::{
    error::{Context, Result},
    image::{Image, Store, split},
    kernel::{PAGE, sys},
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use standstill_images::{
    ImageError,
    store::{PageIndex, PageReader},
};
use std::{
    cmp::Reverse,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
};

/// Descriptors of a file with pages: one that reads through the page cache, and one for large reads that need not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoreFds {
    pub cached: i32,
    pub direct: i32,
}

/// Every task inherits descriptors of so many files at most: it may not have many.
const MOST_FILES: usize = 8;

/// The files with pages that tasks inherit, and at which numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageFiles {
    /// Numbers of the stores that are read as they are.
    pub stores: Vec<(usize, StoreFds)>,
    /// The file with everything else, page n at offset n × 4096.
    pub gathered: Option<i32>,
    parts: Vec<Part>,
}

/// Pages that follow each other in a file.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub pages: Range<PageIndex>,
    /// The page at offset 0 of the file.
    pub origin: PageIndex,
    pub fds: StoreFds,
}

impl PageFiles {
    /// Decides what to gather, and takes a number for each descriptor by `number`.
    pub(crate) fn plan(image: &Image, mut number: impl FnMut() -> Result<i32>) -> Result<Self> {
        let used: Vec<u64> = image.stores.iter().map(|store| store.local(image.used()).pages()).collect();
        let (mut stores, gather): (Vec<usize>, Vec<usize>) =
            (0..image.stores.len()).filter(|&n| used[n] > 0).partition(|&n| image.stores[n].is_raw());
        if stores.len() + usize::from(!gather.is_empty()) > MOST_FILES {
            stores.sort_by_key(|&n| Reverse(used[n]));
            stores.truncate(MOST_FILES - 1);
            stores.sort_unstable();
        }
        let mut files = Self::default();
        for (n, store) in image.stores.iter().enumerate().filter(|(n, _)| used[*n] > 0) {
            let (origin, fds) = if stores.binary_search(&n).is_ok() {
                let fds = StoreFds { cached: number()?, direct: number()? };
                files.stores.push((n, fds));
                (store.first, fds)
            } else {
                let fd = files.gathered.map_or_else(&mut number, Ok)?;
                files.gathered = Some(fd);
                (0, StoreFds { cached: fd, direct: fd })
            };
            match files.parts.last_mut() {
                // Gathered stores that follow each other are read at once.
                Some(last) if (last.pages.end, last.origin, last.fds) == (store.first, origin, fds) => {
                    last.pages.end = store.range().end;
                }
                _ => files.parts.push(Part { pages: store.range(), origin, fds }),
            }
        }
        Ok(files)
    }

    /// All numbers.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = i32> + '_ {
        self.stores.iter().flat_map(|(_, fds)| [fds.cached, fds.direct]).chain(self.gathered)
    }

    /// Where the pages of `range` are, all of which the image uses: parts of it in their order.
    pub(crate) fn find(&self, range: Range<PageIndex>) -> impl Iterator<Item = Part> + '_ {
        let first = self.parts.partition_point(|part| part.pages.end <= range.start);
        let touched = self.parts[first..].iter().take_while(move |part| part.pages.start < range.end);
        touched.map(move |part| Part {
            pages: part.pages.start.max(range.start)..part.pages.end.min(range.end),
            ..part.clone()
        })
    }
}

/// The page stores of an image while it is restored.
pub(crate) struct OpenPages<'a> {
    image: &'a Image,
    stores: Vec<OpenStore<'a>>,
    gathered: Option<(File, i32)>,
}

/// A store that tasks read as it is.
struct OpenStore<'a> {
    store: &'a Store,
    reader: PageReader,
    fds: StoreFds,
    is_cached: bool,
    /// The file past the page cache.
    direct: Option<File>,
}

impl<'a> OpenPages<'a> {
    /// Opens what tasks will read, and gathers the rest, verified.
    pub(crate) fn open(image: &'a Image, files: &PageFiles) -> Result<Self> {
        let context = || "open the page store".to_string();
        let mut stores = Vec::new();
        for &(n, fds) in &files.stores {
            let store = &image.stores[n];
            let reader = store.reader()?.only(&store.local(image.used()));
            let is_cached = is_cached(reader.file()).context(context)?;
            let direct = if is_cached { None } else { direct(reader.file()).context(context)? };
            stores.push(OpenStore { store, reader, fds, is_cached, direct });
        }
        let mut pages = Self { image, stores, gathered: None };
        if let Some(fd) = files.gathered {
            pages.gathered = Some((pages.gather()?, fd));
        }
        Ok(pages)
    }

    fn gather(&self) -> Result<File> {
        let context = || "gather pages in memory".to_string();
        let file = File::from(memfd_create(c"standstill-pages", MFdFlags::MFD_CLOEXEC).context(context)?);
        // Only what is used takes memory.
        file.set_len(self.image.pages() * PAGE).context(context)?;
        for store in self.image.stores.iter().filter(|store| self.store(store.first).is_none()) {
            let used = store.local(self.image.used());
            if used.pages() > 0 {
                store.reader()?.only(&used).copy_into(&file, store.first)?;
            }
        }
        Ok(file)
    }

    fn store(&self, first: PageIndex) -> Option<&OpenStore<'a>> {
        self.stores.binary_search_by_key(&first, |s| s.store.first).ok().map(|n| &self.stores[n])
    }

    /// Every file with the number at which tasks inherit it.
    pub(crate) fn descriptors(&self) -> Vec<(&File, i32)> {
        let mut all: Vec<_> = self.gathered.iter().map(|(file, fd)| (file, *fd)).collect();
        for s in &self.stores {
            let cached = s.reader.file();
            all.extend([(cached, s.fds.cached), (s.direct.as_ref().unwrap_or(cached), s.fds.direct)]);
        }
        all
    }

    /// Reads pages as they are in the stores or were gathered.
    pub(crate) fn read(&self, first: PageIndex, pages: &mut [u8]) -> Result<(), ImageError> {
        let end = first + pages.len() as u64 / PAGE;
        for (store, part) in split(&self.image.stores, first..end) {
            let bytes = &mut pages[((part.start - first) * PAGE) as usize..((part.end - first) * PAGE) as usize];
            let (file, origin) = match (self.store(store.first), &self.gathered) {
                (Some(open), _) => (open.reader.file(), store.first),
                (None, Some((file, _))) => (file, 0),
                (None, None) => continue,
            };
            file.read_exact_at(bytes, (part.start - origin) * PAGE)
                .map_err(|source| ImageError::Io { path: store.path.clone(), source })?;
        }
        Ok(())
    }

    /// Compares the checksums of the stores that are in the page cache: tasks read them from there.
    pub(crate) fn verify_cached(&self) -> Result<()> {
        let mut cached = self.stores.iter().filter(|s| s.is_cached);
        cached.try_for_each(|s| Ok(s.reader.verify(1, |_, _| ())?))
    }

    /// The other stores that tasks read, whose checksums have to be compared with what was read: numbers of their first
    /// pages.
    pub(crate) fn uncached(&self) -> impl Iterator<Item = (PageIndex, &PageReader)> {
        self.stores.iter().filter(|s| !s.is_cached).map(|s| (s.store.first, &s.reader))
    }
}

/// Whether most of a file is in the page cache; no where the kernel cannot tell.
fn is_cached(pages: &File) -> io::Result<bool> {
    let length = pages.metadata()?.len();
    let cached = sys::cached_pages(pages.as_fd(), length).unwrap_or(0) * PAGE;
    Ok(cached > length / 2)
}

/// The file past the page cache, if its file system has direct I/O: page cache that is used once costs only the time and
/// memory to make it.
fn direct(pages: &File) -> io::Result<Option<File>> {
    let path = format!("/proc/self/fd/{}", pages.as_raw_fd());
    match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        other => other.map(Some),
    }
}
