//! A short life: a program that fills memory, sleeps, looks whether it is still right, and ends.

use std::time::Duration;
use std::{process, thread};

use standstill_tests::workload::{Args, Book, Mapping, PAGE};

/// Never returns; ends with 0 when all is well.
pub(crate) fn run(args: &Args) -> ! {
    let mut book = Book::new(Mapping::private(64 * PAGE).expect("map"), args.value("brief", 0));
    (0..book.len()).for_each(|page| book.write(page, 1));
    for _ in 0..args.value("rounds", 1) {
        thread::sleep(Duration::from_millis(2));
        let right = (0..book.len()).all(|page| book.is_right(page));
        if !right {
            eprintln!("a short life finds its memory changed");
            process::exit(1);
        }
        (0..book.len()).step_by(3).for_each(|page| book.write(page, 2));
    }
    process::exit(0);
}
