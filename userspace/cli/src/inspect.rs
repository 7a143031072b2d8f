//! `standstill inspect`.

use crate::{Failure, args::ImageArgs};
use standstill_engine::Image;

pub(crate) fn run(args: &ImageArgs) -> Result<u8, Failure> {
    let image = Image::open(&args.images_dir)?;
    println!("{:#?}", image.tasks.keys());
    Ok(0)
}
