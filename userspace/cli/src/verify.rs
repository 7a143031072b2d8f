//! `standstill verify`.

use crate::{Failure, args::ImageArgs, inspect::output, progress};
use indicatif::HumanBytes;
use standstill_engine::{Error, Image};
use std::{path::Path, thread, time::Instant};

pub(crate) fn run(args: &ImageArgs) -> Result<u8, Failure> {
    let begin = Instant::now();
    let image = match verify(&args.images_dir, args.json) {
        Ok(image) => image,
        Err(error) => {
            let failure = Failure::from(error);
            if args.json {
                output::json(&serde_json::json!({ "ok": false, "error": failure.text }))?;
            }
            return Err(failure);
        }
    };
    let (processes, pages) = (image.tasks.len(), image.pages());
    if args.json {
        output::json(&serde_json::json!({ "ok": true, "processes": processes, "pages": pages }))?;
    } else {
        let bytes = pages * 4096;
        let rate = HumanBytes((bytes as f64 / begin.elapsed().as_secs_f64()) as u64);
        let dir = args.images_dir.display();
        output::print(&format!(
            "{dir}: {processes} processes, {pages} pages ({}, {rate}/s): all checksums and references are right\n",
            HumanBytes(bytes)
        ))?;
    }
    Ok(0)
}

/// Reads all of an image. Opening it checks its records and what they refer to.
fn verify(dir: &Path, json: bool) -> Result<Image, Error> {
    let image = Image::open(dir)?;
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let bar = progress::bar(image.pages() * 4096, json);
    let verified: Result<(), Error> = image.stores.iter().try_for_each(|store| {
        let before = store.first * 4096;
        Ok(store.reader()?.verify(threads, |done, _| bar.set_position(before + done))?)
    });
    bar.finish_and_clear();
    verified?;
    Ok(image)
}
