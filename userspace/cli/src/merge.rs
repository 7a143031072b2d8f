//! `standstill merge`.

use crate::{Failure, args::MergeArgs, inspect::output, progress};
use indicatif::HumanBytes;
use standstill_engine::merge;
use std::fmt::Write;

pub(crate) fn run(args: &MergeArgs) -> Result<u8, Failure> {
    let bar = progress::bar(0, args.json);
    let merged = merge::merge(&args.dirs, |_, done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let merged = merged?;
    if args.json {
        let one = |image: &merge::Compacted| {
            serde_json::json!({
                "directory": image.dir.display().to_string(),
                "stores_before": image.stores_before,
                "pages_written": image.pages_written,
            })
        };
        output::json(&merged.iter().map(one).collect::<Vec<_>>())?;
        return Ok(0);
    }
    let mut text = String::new();
    for image in &merged {
        let dir = image.dir.display().to_string();
        let what = match image.pages_written {
            0 => "complete in itself".to_string(),
            pages => {
                let bytes = HumanBytes(pages * 4096);
                format!("{pages} pages ({bytes}) of {} page stores, now one", image.stores_before)
            }
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}: {what}", output::plain(&dir));
    }
    output::print(&text)?;
    Ok(0)
}
