//! What this kernel and these privileges offer, feature by feature, found out by really trying.
//!
//! Every probe has three answers. A permission error is not a "no": whoever is not allowed to ask cannot tell.

mod child;
mod features;
mod machine;
mod memory;
mod process;
mod sys;

use child::Bench;
use nix::errno::Errno;
use serde::Serialize;
use std::{fmt, io};

/// Answer of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Answer {
    /// It is there.
    #[serde(rename = "yes")]
    Yes,
    /// It is not there.
    #[serde(rename = "no")]
    No,
    /// The probe was not permitted, or failed for a reason of its own.
    #[serde(rename = "cannot tell")]
    CannotTell,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Yes => "yes",
            Self::No => "no",
            Self::CannotTell => "cannot tell",
        })
    }
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the feature.
    pub feature: &'static str,
    /// Whether it is there.
    pub answer: Answer,
    /// Whether dump or restore need it for every tree.
    pub required: bool,
    /// Kernel version that brought it, where one did.
    pub since: Option<&'static str>,
    /// What does not work without it.
    pub lost: &'static str,
    /// What was seen, or why there is no clear answer.
    pub detail: String,
}

/// Why a probe does not say yes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Failed {
    No(String),
    CannotTell(String),
}

/// What was seen, in case of a yes; may be empty.
type Outcome = Result<String, Failed>;

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        match errno {
            // What kernels say to requests that they do not know. ptrace(2) says EIO.
            Errno::ENOSYS
            | Errno::EINVAL
            | Errno::ENOTTY
            | Errno::ENOENT
            | Errno::EIO
            | Errno::EOPNOTSUPP
            | Errno::ENODEV => Self::No(errno.to_string()),
            // Not permitted, or out of something.
            _ => Self::CannotTell(errno.to_string()),
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        error.raw_os_error().map_or_else(|| Self::CannotTell(error.to_string()), |n| Errno::from_raw(n).into())
    }
}

impl Failed {
    /// "No" unless `there`.
    fn unless(there: bool, why_not: &str) -> Result<(), Self> {
        if there { Ok(()) } else { Err(Self::No(why_not.into())) }
    }
}

type Probe = fn(&Bench) -> Outcome;

/// A feature and how to look for it.
struct Feature {
    name: &'static str,
    required: bool,
    since: Option<&'static str>,
    lost: &'static str,
    /// Privilege that the probe takes, for the answer "cannot tell".
    needs: Option<&'static str>,
    probe: Probe,
}

impl Feature {
    fn finding(&self, outcome: Outcome) -> Finding {
        let (answer, detail) = match outcome {
            Ok(detail) => (Answer::Yes, detail),
            Err(Failed::No(why)) => (Answer::No, why),
            Err(Failed::CannotTell(why)) => {
                let needs = self.needs.map(|n| format!("; needs {n}")).unwrap_or_default();
                (Answer::CannotTell, why + &needs)
            }
        };
        let &Self { name: feature, required, since, lost, .. } = self;
        Finding { feature, answer, required, since, lost, detail }
    }
}

/// Probes everything. A child process is made for it, and is gone when this returns.
pub fn run() -> Vec<Finding> {
    let bench = Bench::new();
    features::ALL.iter().map(|feature| feature.finding((feature.probe)(&bench))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn ask(probe: Probe) -> Finding {
        let feature = Feature { name: "x", required: true, since: None, lost: "", needs: Some("CAP_X"), probe };
        feature.finding((feature.probe)(&Bench::new()))
    }

    #[test]
    fn an_absent_system_call_is_a_no() {
        let finding = ask(|_| Ok(sys::absent().map(|()| String::new())?));
        assert_eq!((finding.answer, finding.detail.as_str()), (Answer::No, "ENOSYS: Function not implemented"));
    }

    #[test]
    fn a_permission_error_is_no_answer() {
        for finding in [ask(|_| Err(Errno::EPERM.into())), ask(|_| Err(io::Error::from(Errno::EPERM).into()))] {
            assert_eq!(finding.answer, Answer::CannotTell);
            assert_eq!(finding.detail, "EPERM: Operation not permitted; needs CAP_X");
        }
        assert_eq!(ask(|_| Err(Errno::EMFILE.into())).answer, Answer::CannotTell);
    }

    #[test]
    fn every_feature_is_answered_once_and_the_child_is_gone() {
        let pid = Bench::new().child().unwrap().pid();
        assert_eq!(crate::kernel::ptrace::try_wait(pid).unwrap_err().raw_os_error(), Some(libc::ECHILD));
        let findings = run();
        assert_eq!(findings.iter().map(|f| f.feature).collect::<HashSet<_>>().len(), features::ALL.len());
        let page = findings.iter().find(|f| f.feature == "page-size").unwrap();
        assert_eq!((page.answer, page.required), (Answer::Yes, true));
    }
}
