//! `standstill check`.

use crate::{Failure, args::JsonArgs, inspect::output};
use standstill_engine::check::{self, Answer, Finding};

pub(crate) fn run(args: &JsonArgs) -> Result<u8, Failure> {
    let findings = check::run();
    if args.json {
        output::json(&findings)?;
    } else {
        output::print(&table(&findings))?;
    }
    let missing: Vec<String> = findings
        .iter()
        .filter(|f| f.required && f.answer != Answer::Yes)
        .map(|f| format!("{} ({})", f.feature, f.answer))
        .collect();
    if missing.is_empty() {
        return Ok(0);
    }
    Err(Failure {
        status: 6,
        text: format!("not everything that dump and restore need is there: {}", missing.join(", ")),
    })
}

/// One line a feature.
fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.feature.len()).fold("FEATURE".len(), usize::max);
    let mut text = format!("{:<width$}  {:<11}  {:<8}  {:<6}  DETAIL\n", "FEATURE", "ANSWER", "REQUIRED", "SINCE");
    for f in findings {
        let mut details = vec![f.detail.clone()];
        if f.answer != Answer::Yes {
            details.push(format!("lost: {}", f.lost));
        }
        details.retain(|d| !d.is_empty());
        let required = if f.required { "yes" } else { "" };
        let line = format!(
            "{:<width$}  {:<11}  {required:<8}  {:<6}  {}",
            f.feature,
            f.answer,
            f.since.unwrap_or(""),
            details.join("; ")
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_lost_only_where_something_is() {
        let finding = |answer, detail: &str| Finding {
            feature: "x",
            answer,
            required: true,
            since: Some("5.5"),
            lost: "all of it",
            detail: detail.into(),
        };
        let text = table(&[finding(Answer::Yes, ""), finding(Answer::CannotTell, "EPERM")]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["x", "yes", "yes", "5.5"]);
        assert!(lines[2].ends_with("EPERM; lost: all of it"));
        assert_eq!(lines[2].find("cannot tell"), lines[0].find("ANSWER"));
    }
}
