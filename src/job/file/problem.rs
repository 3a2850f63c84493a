//! What is wrong with a job file, and where: one [`Problem`] per mistake, all of them at once.
//!
//! A problem is plain text without colours. Its first line alone says enough for a log:
//! `jobs/x.toml:12:5: unknown field "topcs" in [source.kafka]`; an excerpt with a caret, what was expected and a
//! help line follow. Excerpts come from a masked copy of the text ([`Sources`]), so a secret that was wrongly
//! written into the file is not copied into a terminal or a log on top.

use std::cell::Cell;
use std::fmt;
use std::ops::Range;

/// Longest line that an excerpt shows whole, in characters.
const EXCERPT_CHARS_MAX: usize = 140;
/// Longest piece of a value that a message quotes, in characters.
const QUOTED_CHARS_MAX: usize = 80;

/// Most problems that are told with their place. Finding a place costs a look through the text, so this also bounds the
/// time that a file full of mistakes takes.
pub(super) const PROBLEMS_MAX: usize = 100;

/// One mistake in a job file, or one thing its author should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file as it was named, or `--set KEY` (never its value, which may be a secret).
    pub file: String,
    /// Line, from 1. 0 = the problem has no place in the text.
    pub line: usize,
    /// Column in characters, from 1. 0 = the problem has no place in the text.
    pub column: usize,
    /// Dotted path of the field: `sink.iceberg.table`. Empty = the file as a whole.
    pub field: String,
    /// What was found: the first line of the message.
    pub found: String,
    /// What was expected. Empty = the first line says it all.
    pub expected: String,
    /// The way out: the nearest name, or what to write instead.
    pub hint: Option<String>,
    excerpt: Option<Excerpt>,
}

/// The masked source line and what to underline in it, in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Excerpt {
    line: String,
    underline: Range<usize>,
}

/// Every problem of a job file in the order of the text; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobErrors(pub Vec<Problem>);

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(out, "{}: {}", self.file, self.found)?,
            line => write!(out, "{}:{line}:{}: {}", self.file, self.column, self.found)?,
        }
        if let Some(excerpt) = &self.excerpt {
            let number = self.line.to_string();
            let gutter = " ".repeat(number.len());
            // a tab is copied, so that the caret stands under its character however wide the tab is shown
            let pad: String = excerpt.line.chars().take(excerpt.underline.start).map(blank_of).collect();
            let carets = "^".repeat(excerpt.underline.len().max(1));
            write!(out, "\n{gutter} |\n{number} | {}\n{gutter} | {pad}{carets}", excerpt.line)?;
        }
        if !self.expected.is_empty() {
            write!(out, "\nexpected: {}", self.expected)?;
        }
        if let Some(hint) = &self.hint {
            write!(out, "\nhelp: {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Display for JobErrors {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                out.write_str("\n\n")?;
            }
            problem.fmt(out)?;
        }
        Ok(())
    }
}

impl std::error::Error for JobErrors {}

fn blank_of(character: char) -> char {
    if character == '\t' { '\t' } else { ' ' }
}

/// Where something stands: in which text, and which bytes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Index into [`Sources`].
    pub source: usize,
    /// Bytes of that text. Empty at 0 = the text as a whole.
    pub span: Range<usize>,
}

/// The texts that make up one job: the file, then each `--set` in the order given.
#[derive(Debug, Default)]
pub(super) struct Sources {
    list: Vec<Source>,
    problems: Cell<usize>,
}

#[derive(Debug)]
struct Source {
    label: String,
    /// The text with secrets replaced by stars, character for character, and control characters made harmless.
    /// `None` for `--set`: its key is in the label and its value is not shown.
    shown: Option<String>,
    text: String,
}

impl Sources {
    /// Adds the file's text; `secrets` are the byte ranges that no message may show.
    pub fn add_file(&mut self, label: &str, text: &str, secrets: &[Range<usize>]) {
        let hidden = |at: usize| secrets.iter().any(|secret| secret.contains(&at));
        let shown = text
            .char_indices()
            .map(|(at, character)| match character {
                '\n' | '\t' => character,
                _ if hidden(at) => '*',
                _ if character.is_control() => '\u{fffd}',
                _ => character,
            })
            .collect();
        self.list.push(Source { label: label.to_owned(), shown: Some(shown), text: text.to_owned() });
    }

    /// Adds a `--set`.
    pub fn add_set(&mut self, key: &str) -> usize {
        let key: String =
            key.chars().take(QUOTED_CHARS_MAX).filter(|character| !character.is_control()).collect();
        let label = format!("--set {key}");
        self.list.push(Source { label, shown: None, text: String::new() });
        self.list.len() - 1
    }

    /// Makes a problem at a place. Beyond [`PROBLEMS_MAX`] the place is left out.
    pub fn problem(&self, place: &Place, field: &str, found: String) -> Problem {
        let source = &self.list[place.source];
        let mut problem = Problem {
            file: source.label.clone(),
            line: 0,
            column: 0,
            field: field.to_owned(),
            found,
            expected: String::new(),
            hint: None,
            excerpt: None,
        };
        let Some(shown) = &source.shown else { return problem };
        self.problems.set(self.problems.get() + 1);
        if self.problems.get() > PROBLEMS_MAX {
            return problem;
        }
        let before = &source.text[..floor_boundary(&source.text, place.span.start)];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let start = before[line_start..].chars().count();
        problem.line = before.matches('\n').count() + 1;
        problem.column = start + 1;
        if place.span.is_empty() && place.span.start == 0 {
            return problem;
        }
        let line = shown.split('\n').nth(problem.line - 1).unwrap_or_default();
        let line = line.trim_end_matches(['\r', '\u{fffd}']);
        let end = floor_boundary(&source.text, place.span.end).max(before.len());
        let length = source.text[before.len()..end].chars().take_while(|c| !matches!(c, '\r' | '\n')).count();
        problem.excerpt = Some(clip(line, start, length));
        problem
    }
}

impl Problem {
    /// A problem of a file whose text is not at hand.
    pub(super) fn of_file(label: &str, found: String, hint: &str) -> Self {
        Self {
            file: label.to_owned(),
            line: 0,
            column: 0,
            field: String::new(),
            found,
            expected: String::new(),
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
            excerpt: None,
        }
    }

    pub(super) fn expecting(mut self, expected: impl Into<String>) -> Self {
        self.expected = expected.into();
        self
    }

    pub(super) fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Cuts a long line around what is underlined.
fn clip(line: &str, start: usize, length: usize) -> Excerpt {
    let chars: Vec<char> = line.chars().collect();
    let start = start.min(chars.len());
    let length = length.min(chars.len() - start);
    if chars.len() <= EXCERPT_CHARS_MAX {
        return Excerpt { line: line.to_owned(), underline: start..start + length };
    }
    let from = start.saturating_sub(EXCERPT_CHARS_MAX / 4);
    let to = (from + EXCERPT_CHARS_MAX).min(chars.len());
    let lead = if from > 0 { "..." } else { "" };
    let trail = if to < chars.len() { "..." } else { "" };
    let cut: String = chars[from..to].iter().collect();
    let underline_start = start - from + lead.len();
    let underline_length = length.min(to - start);
    Excerpt {
        line: format!("{lead}{cut}{trail}"),
        underline: underline_start..underline_start + underline_length,
    }
}

fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Quotes a value for a message: escaped, and cut if it is long.
pub(super) fn quoted(text: &str) -> String {
    if text.chars().count() <= QUOTED_CHARS_MAX {
        return format!("{text:?}");
    }
    let head: String = text.chars().take(QUOTED_CHARS_MAX).collect();
    format!("{head:?}...")
}
