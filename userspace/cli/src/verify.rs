//! `standstill verify`.

use crate::{Failure, args::ImageArgs};
use standstill_engine::Image;

pub(crate) fn run(args: &ImageArgs) -> Result<u8, Failure> {
    let image = Image::open(&args.images_dir)?;
    image.verify_pages()?;
    let pages = image.pages.pages();
    if args.json {
        println!("{}", serde_json::json!({ "ok": true, "processes": image.tasks.len(), "pages": pages }));
    } else {
        println!("{}: {} processes, {pages} pages, all checksums right", args.images_dir.display(), image.tasks.len());
    }
    Ok(0)
}
