//! Chains of images: each increment reads back as what it was made of, whatever is done to the chain.

use super::{dedup::drop_unused, merge::*, *};
use crate::memory::pages::{OpenPages, PageFiles};
use proptest::{collection::vec, prelude::*};
use standstill_images::{
    ImageError,
    store::{Compression, PAGE, PageWriter},
    types::*,
};
use std::{collections::BTreeMap, fs, iter::once, ops::Range, os::unix::fs::FileExt};

/// First address of the memory, whose pages are numbered from there.
const START: u64 = 0x10_0000;
const PAGES: u64 = 1 << 16;
const BYTES: u64 = PAGE as u64;

/// What the pages hold, by number: private ones, and behind [`PAGES`] those of a shared memory object.
type Memory = BTreeMap<u64, u64>;

fn page(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(PAGE / 8)
}

/// A tree of one process.
fn records(private: Vec<PageRun>, shared: Vec<PageRun>) -> Records {
    let thread = Thread {
        tid: 7,
        comm: Bytes::default(),
        context: Context::X86_64 { regs: [0; 27], xstate: Vec::new() },
        restart: Restart::Registers,
        blocked: 0,
        pending: Vec::new(),
        altstack: AltStack::default(),
        clear_child_tid: 0,
        robust_list: (0, 0),
        rseq: None,
        pdeath_signal: 0,
        creds: Creds::default(),
        sched: Sched::default(),
        timerslack_ns: 50_000,
    };
    let live = LiveTask {
        threads: vec![thread],
        address_space: 0,
        fd_table: 0,
        cwd: b"/"[..].into(),
        cwd_removed: false,
        root: b"/"[..].into(),
        umask: 0,
        sigactions: Vec::new(),
        itimers: Default::default(),
        posix_timers: Vec::new(),
        pending: Vec::new(),
        rlimits: Vec::new(),
        dumpable: 1,
        child_subreaper: false,
        personality: 0,
        oom_score_adj: 0,
        loginuid: u32::MAX,
    };
    let task = Task {
        pid: 7,
        ppid: 1,
        pgid: 7,
        sid: 7,
        state: TaskState::Running,
        exit_signal: libc::SIGCHLD,
        live: Some(live),
        comm: Bytes::default(),
    };
    let vma = Vma {
        start: START,
        end: START + PAGES * BYTES,
        prot: 3,
        backing: Backing::Anonymous { name: None },
        flags: VmaFlags::default(),
    };
    let regular = RegularFile { path: b"/x"[..].into(), size: 0, mtime: (0, 0), mode: libc::S_IFREG };
    Records {
        inventory: Inventory {
            writer: String::new(),
            kernel: String::new(),
            machine: String::new(),
            created: 0,
            root: 7,
            shell_job: false,
            vdso: Vec::new(),
        },
        tasks: vec![task],
        spaces: vec![AddressSpace {
            id: 0,
            layout: MmLayout::default(),
            auxv: Vec::new(),
            exe: 0,
            vmas: vec![vma],
            pages: private,
            guards: Vec::new(),
        }],
        shared_fs: Vec::new(),
        shared_actions: Vec::new(),
        seccomp: None,
        attributes: Vec::new(),
        labels: Vec::new(),
        cgroups: None,
        clocks: Clocks::default(),
        tables: vec![FdTable { id: 0, fds: Vec::new() }],
        files: vec![OpenFile { id: 0, flags: 0, pos: 0, owner: None, kind: FileKind::Regular(regular) }],
        pipes: Vec::new(),
        shared: vec![SharedMemory {
            id: 0,
            size: PAGES * BYTES,
            kind: SharedMemoryKind::Anonymous,
            pages: shared,
            page_size: BYTES,
        }],
    }
}

/// Runs of pages by number, with their places in the stores.
fn runs(places: &BTreeMap<u64, u64>, numbers: Range<u64>, start: u64) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for (number, store) in places.range(numbers.clone()) {
        push_run(&mut runs, PageRun { start: start + (number - numbers.start) * BYTES, pages: 1, store: *store });
    }
    runs
}

fn places(image: &Image) -> BTreeMap<u64, u64> {
    let private = image.spaces[&0].pages.iter().map(|r| ((r.start - START) / BYTES, r));
    let shared = image.shared[&0].pages.iter().map(|r| (PAGES + r.start / BYTES, r));
    private.chain(shared).flat_map(|(first, r)| (0..r.pages).map(move |n| (first + n, r.store + n))).collect()
}

/// Writes the image of `memory`, of which only what `before` has not is stored anew.
fn dump(
    dir: &Path,
    memory: &Memory,
    before: Option<(&Path, &Memory)>,
    compression: Compression,
    dedup: bool,
) -> Result<()> {
    let mut target = ImageDir::create(dir)?;
    let mut writer = PageWriter::create(&target.pages_path(), compression)?;
    let parent = before.map(|(dir, _)| Image::open(dir)).transpose()?;
    let old = parent.as_ref().map(places).unwrap_or_default();
    let first = parent.as_ref().map_or(0, Image::pages);
    let mut new = BTreeMap::new();
    for (&number, &value) in memory {
        let same = before.is_some_and(|(_, memory)| memory.get(&number) == Some(&value));
        let place = if same { old[&number] } else { first + writer.append(&page(value))? };
        new.insert(number, place);
    }
    let records = records(runs(&new, 0..PAGES, START), runs(&new, PAGES..2 * PAGES, 0));
    let mut stores: Vec<_> = parent.iter().flat_map(|p| &p.stores).map(|s| s.index.clone()).collect();
    let all = records.spaces[0].pages.iter().chain(&records.shared[0].pages);
    let dropped = parent.as_ref().filter(|_| dedup).map(|p| drop_unused(p, all)).transpose()?;
    if let Some(dropped) = &dropped {
        stores.clone_from(&dropped.stores);
    }
    stores.push(writer.finish()?);
    if let Some((before, _)) = before {
        target.set_parent(before)?;
    }
    publish(target, &records, &stores, &DumpStats::default(), None)?;
    dropped.map_or(Ok(()), |dropped| dropped.punch(dir).map(drop))
}

/// Reads an image page by page, as a restore does and by the stores themselves.
fn read(dir: &Path) -> Result<Memory> {
    let image = Image::open(dir)?;
    for store in &image.stores {
        store.reader()?.verify(1, |_, _| ())?;
    }
    let mut numbers = 10..;
    let files = PageFiles::plan(&image, || Ok(numbers.next().unwrap()))?;
    assert!(files.stores.len() + usize::from(files.gathered.is_some()) <= 8);
    let pages = OpenPages::open(&image, &files)?;
    assert_eq!(pages.descriptors().len(), files.numbers().count());
    let mut memory = Memory::new();
    let private = image.spaces[&0].pages.iter().map(|r| ((r.start - START) / BYTES, r));
    let shared = image.shared[&0].pages.iter().map(|r| (PAGES + r.start / BYTES, r));
    for (number, run) in private.chain(shared) {
        let range = run.store..run.store + run.pages;
        let (mut bytes, mut again) = (vec![0; (run.pages * BYTES) as usize], vec![0; (run.pages * BYTES) as usize]);
        pages.read(run.store, &mut bytes)?;
        let at =
            |part: &Range<u64>| ((part.start - run.store) * BYTES) as usize..((part.end - run.store) * BYTES) as usize;
        for (store, part) in split(&image.stores, range.clone()) {
            store.reader()?.read_pages(part.start - store.first, &mut again[at(&part)])?;
        }
        assert!(bytes == again);
        again.fill(0);
        // A task reads the same from the descriptors it has.
        for part in files.find(range) {
            let found = pages.descriptors().into_iter().find(|(_, fd)| *fd == part.fds.cached).unwrap().0;
            found.read_exact_at(&mut again[at(&part.pages)], (part.pages.start - part.origin) * BYTES).unwrap();
        }
        assert!(bytes == again);
        for (n, bytes) in bytes.chunks(PAGE).enumerate() {
            let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes == page(value));
            memory.insert(number + n as u64, value);
        }
    }
    Ok(memory)
}

/// One increment: pages that change from a number on, pages that go, how it is stored.
#[derive(Clone, Debug)]
struct Step {
    writes: Vec<(u64, u64)>,
    gone: Vec<(u64, u64)>,
    compression: Compression,
    dedup: bool,
}

fn step() -> impl Strategy<Value = Step> {
    // Enough for several chunks, across both kinds of memory.
    let range = || (prop_oneof![0..40_u64, PAGES - 5..PAGES + 40], prop_oneof![0..8_u64, 250..300_u64]);
    let compression = prop::sample::select(vec![Compression::None, Compression::None, Compression::Lz4]);
    (vec(range(), 0..3), vec(range(), 0..2), compression, any::<bool>())
        .prop_map(|(writes, gone, compression, dedup)| Step { writes, gone, compression, dedup })
}

/// Images of the steps, each in its directory, and what they hold.
fn chain(root: &Path, steps: &[Step]) -> Vec<(PathBuf, Memory)> {
    let mut all: Vec<(PathBuf, Memory)> = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        let mut memory = all.last().map(|(_, memory)| memory.clone()).unwrap_or_default();
        step.gone.iter().flat_map(|&(at, pages)| at..at + pages).for_each(|number| {
            memory.remove(&number);
        });
        for number in step.writes.iter().flat_map(|&(at, pages)| at..at + pages) {
            memory.insert(number, 1 + number + ((n as u64) << 32));
        }
        let dir = root.join(n.to_string());
        let before = all.last().map(|(dir, memory)| (dir.as_path(), memory));
        dump(&dir, &memory, before, step.compression, step.dedup).unwrap();
        all.push((dir, memory));
    }
    all
}

/// Whether an image was given up for a newer one.
fn is_superseded(dir: &Path) -> bool {
    match Image::open(dir) {
        Ok(_) => false,
        Err(Error::Image(ImageError::Superseded { .. })) => true,
        Err(e) => panic!("{e}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn an_increment_reads_back_like_a_whole_image(steps in vec(step(), 1..14)) {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let all = chain(root.path(), &steps);
        for (n, (dir, memory)) in all.iter().enumerate() {
            // Nothing is taken from the last image, nor from any without somebody who takes.
            let may_be_gone = steps[n + 1..].iter().any(|step| step.dedup);
            if !(may_be_gone && is_superseded(dir)) {
                prop_assert_eq!(&read(dir).unwrap(), memory);
            }
        }
    }

    #[test]
    fn merged_images_need_nobody(steps in vec(step(), 1..12), chosen in vec(any::<bool>(), 12)) {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let all = chain(root.path(), &steps);
        let (chosen, others): (Vec<_>, Vec<_>) =
            all.into_iter().enumerate().partition(|(n, (dir, _))| chosen[*n] && !is_superseded(dir));
        let dirs: Vec<PathBuf> = chosen.iter().map(|(_, (dir, _))| dir.clone()).collect();
        prop_assert_eq!(merge(&dirs, |_, done, total| assert!(done <= total)).unwrap().len(), dirs.len());
        others.iter().for_each(|(_, (dir, _))| fs::remove_dir_all(dir).unwrap());
        for (_, (dir, memory)) in &chosen {
            let image = Image::open(dir).unwrap();
            prop_assert_eq!((image.stores.len(), image.used().pages()), (1, image.pages()));
            prop_assert!(ImageDir::open(dir).unwrap().parent().is_none());
            prop_assert_eq!(&read(dir).unwrap(), memory);
            prop_assert_eq!(fs::read_dir(dir).unwrap().count(), 2);
        }
        let again = merge(&dirs, |_, _, _| ()).unwrap();
        prop_assert!(again.iter().all(|merged| (merged.stores_before, merged.pages_written) == (1, 0)));
    }

    #[test]
    fn compacting_keeps_the_contents(steps in vec(step(), 1..12), kept in vec(any::<bool>(), 12), link in any::<bool>()) {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let (dir, memory) = chain(root.path(), &steps).pop().unwrap();
        let image = Image::open(&dir).unwrap();
        if link {
            // As a store of snapshots does it: nobody is needed afterwards.
            let mut target = ImageDir::create(&dir).unwrap();
            image.stores.iter().for_each(|store| target.link(&store.path).unwrap());
            let names: Vec<_> = image.stores.iter().map(|s| &s.index.file[..]).collect();
            target.commit(&fs::read(dir.join("standstill.img")).unwrap(), &names).unwrap();
            (0..steps.len() - 1).for_each(|n| fs::remove_dir_all(root.path().join(n.to_string())).unwrap());
        }
        let names: Vec<String> =
            image.stores.iter().zip(&kept).filter(|(_, kept)| **kept).map(|(s, _)| s.index.file.clone()).collect();
        let result = compact(&dir, |store| names.contains(&store.index.file), |_, _| ()).unwrap();
        prop_assert_eq!(read(&dir).unwrap(), memory);
        let image = Image::open(&dir).unwrap();
        let rewritten = usize::from(names.len() < steps.len());
        prop_assert_eq!((result.stores_before, result.stores), (steps.len(), names.len() + rewritten));
        prop_assert!(image.stores.iter().zip(&names).all(|(store, name)| store.index.file == *name));
        prop_assert_eq!(image.stores.len(), result.stores);
        prop_assert!(compact(&dir, |_| true, |_, _| ()).unwrap().pages_written == 0);
    }
}

fn steps(dedup: bool, count: u64) -> Vec<Step> {
    let one =
        |n| Step { writes: vec![(3 * n, 5), (PAGES + n, 300)], gone: vec![], compression: Compression::None, dedup };
    (0..count).map(one).collect()
}

#[test]
fn a_chain_of_many_stores_is_gathered_in_a_few_files() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    for (dir, memory) in chain(root.path(), &steps(false, 40)).iter().skip(6).step_by(11) {
        assert_eq!(read(dir).unwrap(), *memory);
    }
}

#[test]
fn what_a_newer_image_took_is_gone_from_the_disk_and_the_parents_say_so() {
    use std::os::unix::fs::MetadataExt;
    let root = tempfile::tempdir_in("/var/tmp").unwrap();
    let all = chain(root.path(), &steps(true, 3));
    let blocks = |image: &Image| image.stores.iter().map(|s| fs::metadata(&s.path).unwrap().blocks()).sum::<u64>();
    let (last, memory) = all.last().unwrap();
    let image = Image::open(last).unwrap();
    assert!(image.used().pages() < image.pages() / 2);
    let used = image.used().pages() * BYTES;
    assert!(blocks(&image) * 512 <= used + (64 << 10), "{} bytes for {used}", blocks(&image) * 512);
    assert_eq!(read(last).unwrap(), *memory);
    for pair in all.windows(2) {
        let error = Image::open(&pair[0].0).unwrap_err();
        let words = format!("superseded by the image in {}", pair[1].0.display());
        assert!(error.to_string().contains(&words) && error.exit_status() == 5, "{error}");
    }
}

#[test]
fn nothing_is_taken_from_files_that_others_have_links_to() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = chain(root.path(), &steps(false, 2));
    let mut other = ImageDir::create(&root.path().join("other")).unwrap();
    let parent = Image::open(&all[1].0).unwrap();
    other.link(&parent.stores[0].path).unwrap();
    let dedup = drop_unused(&parent, &[]).unwrap();
    assert!(dedup.stores[0].dropped.is_empty() && !dedup.stores[1].dropped.is_empty());
}

/// A merge that dies leaves the old image; one that is merged before those that build on it would not leave these.
#[test]
fn merging_begins_with_those_who_need_others() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = chain(root.path(), &steps(false, 4));
    let dirs: Vec<PathBuf> = all.iter().map(|(dir, _)| dir.clone()).chain(once(all[2].0.clone())).collect();
    merge(&dirs, |_, _, _| ()).unwrap();
    for (dir, memory) in &all {
        assert_eq!(read(dir).unwrap(), *memory);
    }
    let missing = root.path().join("missing");
    assert!(merge(std::slice::from_ref(&missing), |_, _, _| ()).is_err() && !missing.exists());
}

#[test]
fn a_parent_that_is_missing_replaced_or_of_another_tree_is_named() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = chain(root.path(), &steps(false, 3));
    let (parent, child) = (&all[1].0, &all[2].0);
    let store = Image::open(parent).unwrap().stores[1].index.file.clone();
    let expect = |how: &str| {
        let error = Image::open(child).expect_err(how);
        let text = error.to_string();
        let words = [&store, &child.display().to_string(), "parent", "replaced", "another tree"];
        assert!(words.iter().all(|word| text.contains(*word)) && error.exit_status() == 5, "{how}: {text}");
    };
    let aside = root.path().join("aside");
    fs::rename(parent, &aside).unwrap();
    expect("missing");
    dump(parent, &Memory::from([(1, 1)]), None, Compression::None, false).unwrap();
    expect("another tree");
    fs::remove_dir_all(parent).unwrap();
    fs::rename(&aside, parent).unwrap();
    assert_eq!(read(child).unwrap(), all[2].1);
    dump(parent, &all[1].1, Some((&all[0].0, &all[0].1)), Compression::None, false).unwrap();
    expect("replaced");
}

#[test]
fn damage_in_the_store_of_a_parent_is_noticed() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let all = chain(root.path(), &steps(false, 3));
    let dir = &all[2].0;
    let path = Image::open(dir).unwrap().stores[0].path.clone();
    let bytes = fs::read(&path).unwrap();
    // The first page is still that of the first image.
    let mut damaged = bytes.clone();
    damaged[100] ^= 1;
    fs::write(&path, damaged).unwrap();
    assert!(read(dir).unwrap_err().to_string().contains("checksum"));
    assert!(merge(std::slice::from_ref(dir), |_, _, _| ()).is_err());
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = Image::open(dir).unwrap_err();
    assert!(error.to_string().contains("truncated") && error.exit_status() == 5, "{error}");
    fs::write(&path, &bytes).unwrap();
    assert_eq!(read(dir).unwrap(), all[2].1);
}

/// The reason why an image with these records is refused.
fn refusal(change: impl FnOnce(&mut Records)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let target = ImageDir::create(dir.path()).unwrap();
    let writer = PageWriter::create(&target.pages_path(), Compression::None).unwrap();
    let mut records = records(Vec::new(), Vec::new());
    change(&mut records);
    publish(target, &records, &[writer.finish().unwrap()], &DumpStats::default(), None).unwrap();
    Image::open(dir.path()).err().map_or_else(String::new, |e| e.to_string())
}

#[test]
fn records_about_processes_that_are_not_there_are_refused() {
    let under = |tid: i32, mode: SeccompMode| {
        move |records: &mut Records| {
            let filters = vec![SeccompFilter { flags: 0, program: vec![BpfInstruction::default()] }];
            records.seccomp = Some(Seccomp { filters, threads: vec![SeccompThread { tid, mode }] });
        }
    };
    let inside = |pid: i32, set: u32, path: &'static [u8]| {
        move |records: &mut Records| {
            let cgroup = Cgroup { path: path.into(), ..Cgroup::default() };
            records.cgroups =
                Some(Cgroups { sets: vec![vec![cgroup]], processes: vec![(pid, set)], ..Cgroups::default() });
        }
    };
    assert_eq!(refusal(|_| {}), "");
    assert_eq!(refusal(under(7, SeccompMode::Filter(vec![0, 0]))), "");
    assert_eq!(refusal(inside(7, 0, b"/a")), "");
    let wrong: [(String, &str); 7] = [
        (refusal(under(8, SeccompMode::Strict)), "seccomp"),
        (refusal(under(7, SeccompMode::Filter(vec![1]))), "seccomp"),
        (refusal(under(7, SeccompMode::Filter(Vec::new()))), "seccomp"),
        (refusal(inside(8, 0, b"/a")), "cgroup"),
        (refusal(inside(7, 1, b"/a")), "cgroup"),
        (refusal(inside(7, 0, b"/a/../../b")), "upwards"),
        (refusal(|records| records.shared_fs = vec![SharedFs { pids: vec![7, 8] }]), "working directory"),
    ];
    for (found, wanted) in wrong {
        assert!(found.contains(wanted), "{found:?} does not say {wanted}");
    }
}

#[test]
fn connections_that_are_not_mutual_are_refused() {
    let end = |id: u32, peer: u32, kind: i32, family: i32| {
        let pair = SocketPair { peer: Some(peer), queue: Vec::new(), shutdown: 0 };
        let socket = Socket {
            family,
            kind,
            protocol: 0,
            local: Vec::new(),
            peer: Vec::new(),
            backlog: None,
            options: Vec::new(),
            bound_file: None,
            pair: Some(pair),
        };
        OpenFile { id, flags: 0, pos: 0, owner: None, kind: FileKind::Socket(socket) }
    };
    let (stream, unix) = (libc::SOCK_STREAM, libc::AF_UNIX);
    let with = |files: &[OpenFile]| refusal(|records| records.files.extend_from_slice(files));
    assert_eq!(with(&[end(1, 2, stream, unix), end(2, 1, stream, unix)]), "");
    for wrong in [
        [end(1, 2, stream, unix), end(2, 2, stream, unix)],
        [end(1, 3, stream, unix), end(2, 1, stream, unix)],
        [end(1, 0, stream, unix), end(2, 1, stream, unix)],
        [end(1, 2, stream, unix), end(2, 1, libc::SOCK_DGRAM, unix)],
        [end(1, 2, stream, libc::AF_INET), end(2, 1, stream, libc::AF_INET)],
    ] {
        assert!(with(&wrong).contains("open file"), "{wrong:?}");
    }
}
