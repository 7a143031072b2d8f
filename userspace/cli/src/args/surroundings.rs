//! What a tree finds around itself: cgroups and clocks.

use clap::ValueEnum;
use standstill_engine::{CgroupMode, TimeNamespace};
use std::path::{Component, PathBuf};

/// What to do about cgroups
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum CgroupsArg {
    /// Nothing
    #[default]
    Ignore,
    /// They must exist, and stay as they are
    None,
    /// They must exist, and get the properties that they had
    Props,
    /// Those that are missing are made, with their properties
    Soft,
    /// As soft, and those that exist get the properties that they had
    Full,
    /// All are made, and none may exist
    Strict,
}

impl From<CgroupsArg> for CgroupMode {
    fn from(arg: CgroupsArg) -> Self {
        match arg {
            CgroupsArg::Ignore => Self::Ignore,
            CgroupsArg::None => Self::None,
            CgroupsArg::Props => Self::Props,
            CgroupsArg::Soft => Self::Soft,
            CgroupsArg::Full => Self::Full,
            CgroupsArg::Strict => Self::Strict,
        }
    }
}

/// `[CONTROLLER:]/PATH`
pub(super) fn cgroup_root(text: &str) -> Result<(Option<String>, PathBuf), String> {
    let (controller, path) = match text.rsplit_once(":/") {
        Some((controller, _)) => (Some(controller.to_owned()), &text[controller.len() + 1..]),
        None => (None, text),
    };
    let path = PathBuf::from(path);
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err("a path from the root of the hierarchy, as /a/b or cpu:/a/b".into());
    }
    Ok((controller, path))
}

/// What to do about the tree's clocks
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TimensArg {
    /// As `new` if the tree had a time namespace of its own, otherwise as `none`
    #[default]
    Auto,
    /// They go on, in a new time namespace
    New,
    /// They are those of this machine
    None,
}

impl From<TimensArg> for TimeNamespace {
    fn from(arg: TimensArg) -> Self {
        match arg {
            TimensArg::Auto => Self::AsBefore,
            TimensArg::New => Self::New,
            TimensArg::None => Self::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_roots() {
        assert_eq!(cgroup_root("/a"), Ok((None, "/a".into())));
        assert_eq!(cgroup_root("name=x:/a/b"), Ok((Some("name=x".into()), "/a/b".into())));
        for text in ["", "a", "cpu:a", "/a/../b"] {
            assert!(cgroup_root(text).is_err(), "{text}");
        }
    }
}
