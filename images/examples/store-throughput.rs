//! Measures the page store: writing, and reading back with checksums.
//!
//! Usage: `store-throughput DIR [MiB]`. Prints one line per compression and kind of data, in MiB of page data per
//! second, for comparison with other runs on the same machine. `handed over` is the time until the last page was taken
//! from the caller: what a frozen tree waits for. `cpu` is what writing cost in ms of processor time per GiB, which other
//! load on the machine changes little.

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::{TimeVal, TimeValLike},
};
use standstill_images::{
    ImageError,
    store::{CHUNK, Compression, PageReader, PageWriter},
};
use std::{env, fs, path::Path, time::Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args_os().skip(1);
    let dir = args.next().ok_or("usage: store-throughput DIR [MiB]")?;
    let mib = args.next().map_or(Ok(1024), |n| n.to_string_lossy().parse())?;
    let path = Path::new(&dir).join("store-throughput.img");
    println!(
        "{:>12} {:>14} {:>12} {:>10} {:>8} {:>7}",
        "compression", "data", "handed over", "durable", "verify", "ratio"
    );
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd(1)] {
        for (data, noise) in [("incompressible", PERIOD), ("compressible", PERIOD / 4)] {
            let result = measure(&path, compression, mib, noise);
            fs::remove_file(&path)?;
            let [handed_over, durable, cpu, verify, ratio] = result?;
            let name = format!("{compression:?}");
            println!("{name:>12} {data:>14} {handed_over:>12.0} {durable:>8.0} {cpu:>6.0} {verify:>8.0} {ratio:>6.2}");
        }
    }
    Ok(())
}

/// Noise at the start of each so many bytes, the rest repeats.
const PERIOD: usize = 256;

fn measure(path: &Path, compression: Compression, mib: usize, noise: usize) -> Result<[f64; 5], ImageError> {
    // A source longer than the caches, so that the copy costs what it costs with process memory.
    let mut state = 1_u64;
    let mut source = vec![0_u8; 64 * CHUNK];
    for (n, word) in source.chunks_exact_mut(8).enumerate() {
        if n * 8 % PERIOD < noise {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        word.copy_from_slice(&state.to_le_bytes());
    }
    let mut writer = PageWriter::create(path, compression)?;
    let speed = |begin: Instant| mib as f64 / begin.elapsed().as_secs_f64();
    let (begin, cpu) = (Instant::now(), cpu_ms());
    for chunk in source.chunks_exact(CHUNK).cycle().take(mib) {
        let mut buffer = writer.take_buffer();
        buffer.spare_mut().copy_from_slice(chunk);
        buffer.advance(CHUNK);
        writer.append_buffer(buffer)?;
    }
    let handed_over = speed(begin);
    let index = writer.finish()?;
    let (durable, cpu) = (speed(begin), (cpu_ms() - cpu) * 1024.0 / mib as f64);
    let reader = PageReader::open(path, &index)?;
    let begin = Instant::now();
    reader.verify(2, |_, _| ())?;
    let verify = speed(begin);
    let stored: u64 = index.chunks.iter().map(|c| u64::from(c.stored)).sum();
    Ok([handed_over, durable, cpu, verify, (mib * CHUNK) as f64 / stored as f64])
}

/// Processor time of this process so far.
fn cpu_ms() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("no other argument is valid");
    let ms = |time: TimeVal| time.num_microseconds() as f64 / 1000.0;
    ms(usage.user_time()) + ms(usage.system_time())
}
