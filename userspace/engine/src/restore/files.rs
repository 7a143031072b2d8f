//! Descriptor numbers during a restore.
//!
//! The kernel gives a new descriptor the lowest free number. A task's table is known at every step of its program, so
//! every number can be told beforehand; the restorer checks each one.

use std::collections::BTreeSet;

/// The numbers in use in a table at a point of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Numbers {
    used: BTreeSet<i32>,
    /// All numbers below are in use.
    full_below: i32,
}

impl Numbers {
    /// A table with these numbers in use.
    pub(crate) fn new(used: impl IntoIterator<Item = i32>) -> Self {
        Self { used: used.into_iter().collect(), full_below: 0 }
    }

    /// The number the next new descriptor gets; it is in use from now on.
    pub(crate) fn lowest(&mut self) -> i32 {
        let mut lowest = self.full_below;
        for &used in self.used.range(lowest..) {
            if used != lowest {
                break;
            }
            lowest += 1;
        }
        self.used.insert(lowest);
        self.full_below = lowest + 1;
        lowest
    }

    /// The number is free again.
    pub(crate) fn release(&mut self, fd: i32) {
        self.used.remove(&fd);
        self.full_below = self.full_below.min(fd);
    }

    /// The number is in use from now on, whatever it was before.
    pub(crate) fn occupy(&mut self, fd: i32) {
        self.used.insert(fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The model agrees with the kernel's rule: the lowest number not in use.
        #[test]
        fn lowest_is_the_lowest_free_number(used in proptest::collection::btree_set(0..40i32, 0..40), releases in proptest::collection::vec(0..40i32, 0..8)) {
            let mut numbers = Numbers::new(used.clone());
            let mut model = used;
            for fd in releases {
                numbers.release(fd);
                model.remove(&fd);
                let free = (0..).find(|n| !model.contains(n)).unwrap();
                prop_assert_eq!(numbers.lowest(), free);
                model.insert(free);
            }
        }
    }
}
