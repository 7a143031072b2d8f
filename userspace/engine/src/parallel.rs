//! The same work for many items, by several threads.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// Items from which on another thread is worth while.
const WORTH_A_THREAD: usize = 16;

/// How many of `threads` work on so many items.
pub(crate) fn workers(items: usize, threads: usize) -> usize {
    threads.min(items / WORTH_A_THREAD).max(1)
}

/// What `each` makes of the items, in their order; the calling thread is one of the `workers`.
///
/// # Errors
/// One of those of `each`, after which no more items are begun.
pub(crate) fn map<T: Sync, R: Send, E: Send>(
    items: &[T],
    workers: usize,
    each: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    if workers < 2 {
        return items.iter().map(each).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::with_capacity(items.len() / workers);
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(n) else { return Ok(done) };
            match each(item) {
                Ok(result) => done.push((n, result)),
                Err(e) => {
                    next.store(items.len(), Ordering::Relaxed);
                    return Err(e);
                }
            }
        }
    };
    let mut all = thread::scope(|scope| -> Result<_, E> {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut all = work()?;
        for other in others {
            all.extend(other.join().expect("no panic")?);
        }
        Ok(all)
    })?;
    all.sort_unstable_by_key(|(n, _)| *n);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        let items: Vec<usize> = (0..500).collect();
        for threads in [1, 2, 3, 8] {
            let doubled = map(&items, threads, |n| Ok::<_, Error>(2 * n)).unwrap();
            assert_eq!(doubled, (0..1000).step_by(2).collect::<Vec<_>>());
        }
        assert!(map(&items[..0], 4, |n| Ok::<_, Error>(*n)).unwrap().is_empty());
    }

    #[test]
    fn an_error_ends_it() {
        let items: Vec<i32> = (0..500).collect();
        for threads in [1, 4] {
            let died = map(&items, threads, |n| if *n == 77 { Err(Error::Died(*n)) } else { Ok(()) });
            assert!(matches!(died, Err(Error::Died(77))));
        }
    }
}
