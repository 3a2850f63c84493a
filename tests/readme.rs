//! README names what a user may meet: every reason to stop with its exit code, every reason of a dead letter.

use tidemill::letter::ReasonCode;
use tidemill::stop::Reason;

const README: &str = include_str!("../README.md");

/// All reasons, from the text of the code: an enumeration can not list its own variants.
const STOP: &str = include_str!("../src/stop.rs");

/// Names of the variants of `Reason`, with the name that a user sees.
fn names() -> Vec<&'static str> {
    STOP.lines()
        .filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \"")?.1.strip_suffix("\","))
        .collect()
}

/// The exit code in the row of a reason.
fn code_in_readme(name: &str) -> Option<u8> {
    let row = README.lines().find_map(|line| line.strip_prefix(&format!("| `{name}` | ")))?;
    row.split_once(' ')?.0.parse().ok()
}

#[test]
fn every_reason_to_stop_has_a_row_with_an_exit_code() {
    let names = names();
    assert!(names.len() >= 27, "{names:?}");
    for name in names {
        assert!(code_in_readme(name).is_some(), "{name} has no row in README.md");
    }
}

#[test]
fn the_exit_codes_are_those_of_the_code() {
    let reasons = [
        Reason::Unexpected,
        Reason::Usage,
        Reason::Busy,
        Reason::SourceAway,
        Reason::CatalogAway,
        Reason::Interrupted,
        Reason::StorageFailed,
        Reason::OutcomeUnknown,
        Reason::TableChanged,
        Reason::Fenced,
        Reason::Brake,
        Reason::OffsetsLost,
        Reason::TopicChanged,
        Reason::ClusterChanged,
        Reason::UnknownTopic,
        Reason::TableReplaced,
        Reason::TableRolledBack,
        Reason::OtherJob,
        Reason::TableNotEmpty,
        Reason::LedgerLost,
        Reason::LedgerCorrupt,
        Reason::SchemaDiffers,
        Reason::KeySpecChanged,
        Reason::FormatTooNew,
        Reason::NotAuthorized,
        Reason::SideFilesLost,
        Reason::MissingKeys,
    ];
    for reason in reasons {
        assert_eq!(code_in_readme(reason.name()), Some(reason.exit_code()), "{}", reason.name());
    }
    assert_eq!(reasons.len(), names().len(), "a reason is missing in this test");
}

#[test]
fn every_reason_of_a_dead_letter_stands_in_the_table() {
    for code in ReasonCode::ALL {
        let row = README.lines().any(|line| line.starts_with("| `") && line.contains(&format!("`{code}`")));
        assert!(row, "{code} has no row in README.md");
    }
}
