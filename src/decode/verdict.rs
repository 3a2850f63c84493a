//! Verdicts: why a row is refused, in a form fit for a table and a terminal.
//!
//! A [`Fault`] is a reason code and a text. The text names the column and where its value was looked for, says
//! what was expected and shows at most [`EXCERPT_CHARACTERS_MAX`] characters of what was found. Whatever came
//! from outside is escaped, so a payload can not move a terminal's cursor or hide in a table.

use std::fmt::Write;

use crate::letter::{DeadLetter, ReasonCode};
use crate::offset::Place;
use crate::record::Record;

/// Longest text of a dead letter, in characters.
pub(super) const TEXT_CHARACTERS_MAX: usize = 300;
/// Longest piece of a payload or of a name that a text shows, in characters.
pub(super) const EXCERPT_CHARACTERS_MAX: usize = 60;

/// Why a row is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: ReasonCode,
    pub(super) text: String,
}

impl Fault {
    pub(super) fn new(code: ReasonCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Why one value is refused: what the reader of a value knows, without the column's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ReasonCode,
    /// What was expected, or which bound was broken.
    pub(super) why: &'static str,
}

impl Refusal {
    pub(super) fn wrong_type(why: &'static str) -> Self {
        Self { code: ReasonCode::WrongType, why }
    }

    pub(super) fn out_of_range(why: &'static str) -> Self {
        Self { code: ReasonCode::OutOfRange, why }
    }
}

/// The beginning of a text from outside, escaped, with `..` where it was cut.
pub(super) fn excerpt(text: &str) -> String {
    let mut out = String::new();
    let mut characters = text.chars();
    for _ in 0..EXCERPT_CHARACTERS_MAX {
        match characters.next() {
            Some(character) => push_escaped(&mut out, character),
            None => return out,
        }
    }
    if characters.next().is_some() {
        out.push_str("..");
    }
    out
}

/// At most [`TEXT_CHARACTERS_MAX`] characters of `text`, escaped; a text that fits and is clean stays as it is.
pub(super) fn clip(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars().take(TEXT_CHARACTERS_MAX + 1) {
        push_escaped(&mut escaped, character);
    }
    if escaped.chars().count() <= TEXT_CHARACTERS_MAX {
        return escaped;
    }
    let mut clipped: String = escaped.chars().take(TEXT_CHARACTERS_MAX - 2).collect();
    clipped.push_str("..");
    clipped
}

/// Quotes and backslashes stay; control characters, line separators and direction marks become `\u{..}`.
fn push_escaped(out: &mut String, character: char) {
    match character {
        '"' | '\'' | '\\' => out.push(character),
        _ => write!(out, "{}", character.escape_debug()).expect("a String takes what is written"),
    }
}

/// A dead letter of one row of a record. `payload` is what is kept, `payload_bytes` the length of all of it.
pub(super) fn letter(
    record: &Record<'_>,
    row_index: i32,
    payload: Option<&[u8]>,
    payload_bytes: usize,
    fault: Fault,
) -> DeadLetter {
    DeadLetter {
        place: Place { slot: record.slot(), offset: record.offset(), row_index },
        timestamp_ms: record.timestamp_ms(),
        key: record.key().map(<[u8]>::to_vec),
        payload: payload.map(<[u8]>::to_vec),
        payload_bytes: i64::try_from(payload_bytes).unwrap_or(i64::MAX),
        code: fault.code,
        text: clip(&fault.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_escapes_what_could_steer_a_terminal_and_is_cut() {
        assert_eq!(excerpt("a\u{1b}[2J\n\u{202e}\"b\""), "a\\u{1b}[2J\\n\\u{202e}\"b\"");
        let cut = excerpt(&"x".repeat(61));
        assert_eq!(cut, format!("{}..", "x".repeat(60)));
        assert_eq!(excerpt(&"é".repeat(60)), "é".repeat(60));
    }

    #[test]
    fn a_text_is_never_longer_than_its_bound_even_when_escapes_grow_it() {
        assert_eq!(clip("column a: fine").as_str(), "column a: fine");
        assert_eq!(clip(&"\u{0}".repeat(299)).chars().count(), TEXT_CHARACTERS_MAX);
        assert_eq!(clip(&"x".repeat(300)), "x".repeat(300));
        assert_eq!(clip(&"x".repeat(301)).chars().count(), TEXT_CHARACTERS_MAX);
    }
}
