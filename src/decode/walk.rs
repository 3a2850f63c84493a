//! The walk: one pass over a JSON object that reads wanted members and skips all others without building anything.
//!
//! It gives the verdict on every row that the fast read (`fast`) does not take, and so is what says why a row is refused.
//!
//! serde_json drives; the seeds here follow the [`Tree`] of wanted members. A wanted value is taken as its raw text
//! (checked for grammar, not yet for type) and read by `value`. The first fault of a row is kept and the walk goes
//! on to the end of the payload, so that a payload that is not JSON is always called so, wherever it breaks.
//!
//! Depth: only wanted members are entered by recursion, at most [`PATH_MEMBERS_MAX`](super::plan::PATH_MEMBERS_MAX)
//! deep; skipping is iterative in serde_json. [`too_deep`] holds the limit for all parts alike.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use super::plan::{ColumnPlan, ROOT, Tree};
use super::value::{self, JsonType, Scratch, Value};
use super::verdict::{Fault, Refusal, excerpt};
use crate::job::UnknownFields;
use crate::letter::ReasonCode;

/// Deepest nesting of arrays and objects, the outermost counted as 1.
pub(super) const DEPTH_MAX: usize = 128;

/// What the walk over one row's object works on.
pub(super) struct Walk<'w, 'a> {
    pub(super) tree: &'w mut Tree,
    pub(super) columns: &'w [ColumnPlan],
    /// One value per column, null where no member stood.
    pub(super) slots: &'w mut [Value<'a>],
    pub(super) scratch: &'w mut Scratch,
    pub(super) unknown_fields: UnknownFields,
    /// Kept unknown members, `"name":value` with commas between, without the braces.
    pub(super) unknown: &'w mut String,
    /// Number of this reading; no earlier one of the same tree had it.
    pub(super) row: u64,
    /// The first fault of the row.
    fault: Option<Fault>,
    /// The member whose object is about to begin.
    entering: Option<usize>,
}

impl<'w, 'a> Walk<'w, 'a> {
    pub(super) fn new(
        tree: &'w mut Tree,
        columns: &'w [ColumnPlan],
        slots: &'w mut [Value<'a>],
        scratch: &'w mut Scratch,
        unknown_fields: UnknownFields,
        unknown: &'w mut String,
        row: u64,
    ) -> Self {
        Self { tree, columns, slots, scratch, unknown_fields, unknown, row, fault: None, entering: None }
    }

    /// Reads one object into the slots. Grammar first: a fault in a value is the verdict only of a row that is JSON.
    pub(super) fn object(mut self, text: &'a str) -> Result<(), Fault> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let seed = ObjectSeed { walk: &mut self, node: ROOT };
        let outcome = seed.deserialize(&mut deserializer).and_then(|()| deserializer.end());
        check_surrogates_after(outcome.map_err(|error| self.fault_of(&error, text)), text)?;
        match self.fault {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// What stopped the walk. Grammar, with one exception: serde_json calls a number without a finite f64 an error
    /// of grammar where it is asked for "any value", which the walk does only where an object should begin.
    fn fault_of(&self, error: &serde_json::Error, text: &str) -> Fault {
        match (self.entering, serde_json::from_str::<IgnoredAny>(text)) {
            (Some(node), Ok(_)) => Fault::new(
                ReasonCode::WrongType,
                format!("{}: expected an object, found a number", excerpt(&self.tree.nodes[node].path)),
            ),
            _ => grammar_fault(error, text),
        }
    }

    fn refuse(&mut self, code: ReasonCode, text: impl FnOnce(&Self) -> String) {
        if self.fault.is_none() {
            self.fault = Some(Fault::new(code, text(self)));
        }
    }

    /// A member that no column reads. `verbatim` says that the name stands in the payload without escapes.
    fn unknown(&mut self, node: usize, name: &str, verbatim: bool) -> Member {
        match self.unknown_fields {
            UnknownFields::Keep if node == ROOT => {
                if !self.unknown.is_empty() {
                    self.unknown.push(',');
                }
                if verbatim {
                    self.unknown.push('"');
                    self.unknown.push_str(name);
                    self.unknown.push('"');
                } else {
                    self.unknown.push_str(&serde_json::Value::from(name).to_string());
                }
                self.unknown.push(':');
                Member::Kept
            }
            UnknownFields::DeadLetter => {
                self.refuse(ReasonCode::UnknownField, |walk| {
                    let parent = excerpt(&walk.tree.nodes[node].path);
                    format!("no column reads {parent}.{}; add one or set `unknown_fields`", excerpt(name))
                });
                Member::Skipped
            }
            UnknownFields::Keep | UnknownFields::Ignore => Member::Skipped,
        }
    }

    /// What to do with the member `name` of the object at `node`.
    fn member(&mut self, node: usize, name: &str, verbatim: bool) -> Member {
        let Some(child) = self.tree.nodes[node].find(name) else {
            return self.unknown(node, name, verbatim);
        };
        let wanted = &mut self.tree.nodes[child];
        if wanted.seen_row == self.row {
            self.refuse(ReasonCode::DuplicateField, |walk| {
                format!("{} stands more than once in its object", excerpt(&walk.tree.nodes[child].path))
            });
            return Member::Skipped;
        }
        wanted.seen_row = self.row;
        if wanted.columns.is_empty() { Member::Entered(child) } else { Member::Read(child) }
    }

    /// Reads one raw value into every column that wants it.
    fn read(&mut self, node: usize, raw: &'a str) {
        for position in 0..self.tree.nodes[node].columns.len() {
            let position = self.tree.nodes[node].columns[position];
            let column = &self.columns[position].column;
            match value::from_json(raw, &column.column_type, column.unit, self.scratch) {
                Ok(value) => self.slots[position] = value,
                Err(refusal) => self.refuse(refusal.code, |walk| {
                    let found = JsonType::of(raw);
                    value_text(&walk.columns[position], refusal, found.as_str(), Some(raw))
                }),
            }
        }
    }

    fn not_an_object(&mut self, node: usize, found: JsonType) {
        self.refuse(ReasonCode::WrongType, |walk| {
            let path = excerpt(&walk.tree.nodes[node].path);
            format!("{path}: expected an object, found {} {}", article(found), found.as_str())
        });
    }
}

/// The text of a refused value.
pub(super) fn value_text(planned: &ColumnPlan, refusal: Refusal, found: &str, raw: Option<&str>) -> String {
    let raw = raw.map(|raw| format!(" {}", excerpt(raw))).unwrap_or_default();
    let (name, source) = (excerpt(&planned.column.name), excerpt(&planned.source));
    format!("column {name} ({source}): {}; found {found}{raw}", refusal.why)
}

/// The article of a JSON type's name.
pub(super) fn article(found: JsonType) -> &'static str {
    match found {
        JsonType::Array | JsonType::Object => "an",
        _ => "a",
    }
}

/// What the walk does with one member.
enum Member {
    /// Its object is walked.
    Entered(usize),
    /// Columns read its value.
    Read(usize),
    /// Its name stands in the kept members and its raw value follows.
    Kept,
    /// Nothing looks at its value.
    Skipped,
}

/// Walks the object of one node.
struct ObjectSeed<'s, 'w, 'a> {
    walk: &'s mut Walk<'w, 'a>,
    node: usize,
}

impl<'a> DeserializeSeed<'a> for ObjectSeed<'_, '_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        self.walk.entering = Some(self.node);
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for ObjectSeed<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        let ObjectSeed { walk, node } = self;
        walk.entering = None;
        walk.tree.nodes[node].rewind();
        while let Some(member) = map.next_key_seed(NameSeed { walk, node })? {
            match member {
                Member::Entered(child) => map.next_value_seed(ObjectSeed { walk, node: child })?,
                Member::Read(child) => {
                    let raw: &'a RawValue = map.next_value()?;
                    walk.read(child, raw.get());
                }
                Member::Kept => {
                    let raw: &'a RawValue = map.next_value()?;
                    walk.unknown.push_str(raw.get());
                }
                Member::Skipped => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.walk.entering = None;
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.other(JsonType::Boolean)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.other(JsonType::Number)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.other(JsonType::Number)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.other(JsonType::Number)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        self.other(JsonType::String)
    }

    fn visit_seq<S: SeqAccess<'a>>(self, mut seq: S) -> Result<(), S::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        self.other(JsonType::Array)
    }
}

impl ObjectSeed<'_, '_, '_> {
    fn other<E: Error>(self, found: JsonType) -> Result<(), E> {
        self.walk.entering = None;
        self.walk.not_an_object(self.node, found);
        Ok(())
    }
}

/// Looks a member's name up without copying it.
struct NameSeed<'s, 'w, 'a> {
    walk: &'s mut Walk<'w, 'a>,
    node: usize,
}

impl<'a> DeserializeSeed<'a> for NameSeed<'_, '_, 'a> {
    type Value = Member;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Member, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'a> for NameSeed<'_, '_, 'a> {
    type Value = Member;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a member's name")
    }

    fn visit_borrowed_str<E: Error>(self, name: &'a str) -> Result<Member, E> {
        Ok(self.walk.member(self.node, name, true))
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Member, E> {
        Ok(self.walk.member(self.node, name, false))
    }
}

/// Checks that a text is one JSON value.
pub(super) fn check_grammar(text: &str) -> Result<(), Fault> {
    let outcome = serde_json::from_str::<IgnoredAny>(text);
    check_surrogates_after(outcome.map(|_| ()).map_err(|error| grammar_fault(&error, text)), text)
}

/// Splits a JSON array into the raw texts of its elements; the grammar of all of it is checked. At most
/// `elements_max` are kept; the number of all is returned.
pub(super) fn split<'a>(
    text: &'a str,
    elements: &mut Vec<&'a str>,
    elements_max: usize,
) -> Result<usize, Fault> {
    elements.clear();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let outcome = deserializer
        .deserialize_seq(Elements { elements, elements_max })
        .and_then(|count| deserializer.end().map(|()| count));
    check_surrogates_after(outcome.map_err(|error| grammar_fault(&error, text)), text)
}

struct Elements<'s, 'a> {
    elements: &'s mut Vec<&'a str>,
    elements_max: usize,
}

impl<'a> Visitor<'a> for Elements<'_, 'a> {
    type Value = usize;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an array")
    }

    fn visit_seq<S: SeqAccess<'a>>(self, mut seq: S) -> Result<usize, S::Error> {
        let mut count = 0;
        while let Some(raw) = seq.next_element::<&'a RawValue>()? {
            count += 1;
            if count <= self.elements_max {
                self.elements.push(raw.get());
            }
        }
        Ok(count)
    }
}

/// serde_json's verdict on the grammar, as a reason.
fn grammar_fault(error: &serde_json::Error, text: &str) -> Fault {
    if error.classify() == Category::Eof || ends_inside_number(error, text) {
        return Fault::new(
            ReasonCode::TruncatedJson,
            format!("the payload ends inside a value, after {} bytes", text.len()),
        );
    }
    Fault::new(ReasonCode::InvalidJson, format!("the payload is not JSON: {error}"))
}

/// serde_json calls a number that breaks off (`-`, `1.`, `1e+`) invalid rather than cut short.
fn ends_inside_number(error: &serde_json::Error, text: &str) -> bool {
    let last_line = text.rsplit('\n').next().unwrap_or(text);
    text.ends_with(['-', '+', '.', 'e', 'E'])
        && error.column() == last_line.len()
        && error.to_string().starts_with("invalid number")
}

/// Passes a good outcome on if no `\u` escape of the text is half of a surrogate pair. serde_json checks that only
/// in the strings that it unescapes; here it holds for skipped and kept parts too.
fn check_surrogates_after<T>(outcome: Result<T, Fault>, text: &str) -> Result<T, Fault> {
    let value = outcome?;
    match lone_surrogate(text) {
        Some(byte_position) => Err(Fault::new(
            ReasonCode::InvalidJson,
            format!(
                "the payload is not JSON: the escape at byte {byte_position} is half of a surrogate pair"
            ),
        )),
        None => Ok(value),
    }
}

/// Byte position of the first `\u` escape without its other half, in a text whose grammar was checked.
fn lone_surrogate(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'\\') {
        return None;
    }
    let mut position = 0;
    while position < bytes.len() {
        if bytes[position] != b'\\' {
            position += 1;
            continue;
        }
        match code_unit(&bytes[position..]) {
            None => position += 2,
            Some(0xD800..=0xDBFF) => match bytes.get(position + 6..).and_then(code_unit) {
                Some(0xDC00..=0xDFFF) => position += 12,
                _ => return Some(position),
            },
            Some(0xDC00..=0xDFFF) => return Some(position),
            Some(_) => position += 6,
        }
    }
    None
}

/// The UTF-16 code unit of a `\uXXXX` escape at the start of `bytes`.
fn code_unit(bytes: &[u8]) -> Option<u16> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Checks that arrays and objects nest no deeper than [`DEPTH_MAX`], in any text, JSON or not.
pub(super) fn check_depth(text: &str) -> Result<(), Fault> {
    if too_deep(text) {
        let text = format!("arrays and objects nest deeper than {DEPTH_MAX}");
        return Err(Fault::new(ReasonCode::TooDeep, text));
    }
    Ok(())
}

/// Whether arrays and objects nest deeper than [`DEPTH_MAX`].
fn too_deep(text: &str) -> bool {
    let bytes = text.as_bytes();
    if opening_brackets(bytes) <= DEPTH_MAX {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// Bytes `[` and `{`, wherever they stand: nearly every payload has so few that its depth need not be counted.
fn opening_brackets(bytes: &[u8]) -> usize {
    // `[` and `{` differ in bit 5 only. Sums of at most 255 ones fit a byte, which lets the compiler count 16 or
    // more bytes at a time.
    let in_block =
        |block: &[u8]| block.iter().fold(0u8, |sum, byte| sum.wrapping_add(u8::from(byte | 0x20 == b'{')));
    bytes.chunks(255).map(|block| usize::from(in_block(block))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_of_strings_only() {
        assert!(!too_deep(&"[".repeat(DEPTH_MAX)));
        assert!(too_deep(&"[".repeat(DEPTH_MAX + 1)));
        assert!(too_deep(&"{\"a\":[".repeat(DEPTH_MAX / 2 + 1)));
        assert!(!too_deep(&format!("{{\"a\":\"{}\"}}", "[".repeat(1_000))));
        assert!(!too_deep(&format!("{{\"a\":\"\\\"{}\"}}", "[".repeat(1_000))));
        assert!(!too_deep(&format!("[{}]", vec!["{}"; 1_000].join(","))));
    }

    #[test]
    fn brackets_are_counted_past_the_end_of_a_block() {
        assert_eq!(opening_brackets(&b"[{x]}".repeat(300)), 600);
        assert_eq!(opening_brackets(b""), 0);
    }

    #[test]
    fn half_a_surrogate_pair_is_found_and_a_whole_one_is_not() {
        assert_eq!(lone_surrogate(r#""\ud83d\ude00 \\ud83d \u00e9""#), None);
        assert_eq!(lone_surrogate(r#""a\ud83d""#), Some(2));
        assert_eq!(lone_surrogate(r#""\ude00\ud83d""#), Some(1));
        assert_eq!(lone_surrogate(r#""\ud83d\u0041""#), Some(1));
        assert_eq!(lone_surrogate(r#""\ud83dxxxxxx""#), Some(1));
    }

    #[test]
    fn a_number_that_breaks_off_is_truncated_and_a_bad_one_is_invalid() {
        for text in
            ["{\"a\":-", "{\"a\":1.", "{\"a\":1e", "[1E+", "[\n1.", "{\"a\":tr", "{\"a\"", "{", "[1,", "\"a"]
        {
            assert_eq!(check_grammar(text).unwrap_err().code, ReasonCode::TruncatedJson, "{text}");
        }
        for text in [
            "{\"a\":1.x",
            "{\"a\":1.}",
            "[1e]",
            "[01]",
            "[+1]",
            "[.5]",
            "[NaN]",
            "[Infinity]",
            "[-Infinity]",
            "[1]]",
            "{'a':1}",
            "[1,]",
            "\u{feff}[]",
        ] {
            assert_eq!(check_grammar(text).unwrap_err().code, ReasonCode::InvalidJson, "{text}");
        }
    }

    #[test]
    fn elements_are_split_verbatim() {
        let mut elements = Vec::new();
        assert_eq!(split(" [ {\"a\": [1, 2]} ,2 , \"]\"]\n", &mut elements, 10), Ok(3));
        assert_eq!(elements, ["{\"a\": [1, 2]}", "2", "\"]\""]);
        assert_eq!(split("[1,2,3]", &mut elements, 2), Ok(3));
        assert_eq!(elements, ["1", "2"]);
        assert_eq!(split("[]", &mut elements, 2), Ok(0));
        assert_eq!(split("[1,2", &mut elements, 2).unwrap_err().code, ReasonCode::TruncatedJson);
    }
}
