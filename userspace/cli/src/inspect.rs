//! `standstill inspect`.
//!
//! [`view::View`] has everything that is shown, as JSON and as text. Registers, page contents, and data waiting in pipes
//! and sockets never become part of it: they can be secrets.

mod files;
mod memory;
pub(crate) mod output;
mod processes;
mod sockets;
mod store;
mod text;
mod view;

use crate::{Failure, args::ImageArgs};
use standstill_engine::{Error, Image};
use standstill_images::publish::ImageDir;
use view::View;

pub(crate) fn run(args: &ImageArgs) -> Result<u8, Failure> {
    let image = Image::open(&args.images_dir)?;
    let parents = ImageDir::open(&args.images_dir).and_then(|open| open.parents()).map_err(Error::from)?;
    let view = View::new(&image, &parents);
    if args.json {
        output::json(&view)?;
    } else {
        output::print(&text::render(&view))?;
    }
    Ok(0)
}
