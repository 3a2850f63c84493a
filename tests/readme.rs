//! README names what a user may meet: every reason to stop with its exit code, every reason of a dead letter. The tests'
//! README names, for each known way to lose or double data, tests that exist.

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
        Reason::SideNotRestorable,
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

/// Text of all sources and tests.
fn sources() -> String {
    let mut text = String::new();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src"), root.join("tests")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let ending = path.extension().unwrap_or_default();
            if path.is_dir() {
                folders.push(path);
            } else if ending == "rs" || ending == "py" {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    text
}

#[test]
fn the_tests_that_stand_beside_each_known_failure_exist() {
    let rows: Vec<&str> = include_str!("README.md").lines().filter(|line| line.starts_with("| P")).collect();
    let sources = sources();
    for (number, row) in (1..).zip(&rows) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(cells[1], format!("P{number:02}"));
        assert!(cells[3] != "none" || !cells[4].is_empty(), "{} has no test and no reason", cells[1]);
        for name in cells[3].split('`').skip(1).step_by(2) {
            let is_there =
                sources.contains(&format!("fn {name}(")) || sources.contains(&format!("def {name}("));
            assert!(is_there, "{}: there is no test {name}", cells[1]);
        }
    }
    assert_eq!(rows.len(), 78);
}
