//! TOML's syntax, checked before `toml_edit` builds a tree.
//!
//! `toml_edit` goes on after an error, and its recovery can panic on what is left (version 0.23.10, on `==\n.=`). So
//! the parser below it runs first on its own, and a tree is built only of text that it found no error in.

use std::ops::Range;

use toml_edit::Document;
use toml_parser::parser::{EventReceiver, RecursionGuard};
use toml_parser::{ErrorSink, Expected, ParseError, Source};

/// Deepest nesting that is read; `toml_edit` has the same limit.
const DEPTH_MAX: u32 = 80;

/// Why a text is not TOML.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub message: String,
    pub span: Range<usize>,
}

/// Parses a whole file.
pub(super) fn parse_document(text: &str) -> Result<Document<&str>, SyntaxError> {
    if let Some(error) = first_error(text, toml_parser::parser::parse_document) {
        let span = error.unexpected().map_or(0..0, |span| span.start()..span.end());
        return Err(SyntaxError { message: message_of(&error), span });
    }
    Document::parse(text).map_err(|error| SyntaxError {
        message: error.message().replace('\n', ", "),
        span: error.span().unwrap_or(0..0),
    })
}

/// Parses one value; `None` if the text is not exactly that.
pub(super) fn parse_value(text: &str) -> Option<toml_edit::Value> {
    match first_error(text, toml_parser::parser::parse_value) {
        Some(_) => None,
        None => text.parse().ok(),
    }
}

/// Parses a dotted name into its parts; `None` if the text is not exactly that.
pub(super) fn parse_name(text: &str) -> Option<Vec<String>> {
    if first_error(text, toml_parser::parser::parse_key).is_some() {
        return None;
    }
    let keys = toml_edit::Key::parse(text).ok()?;
    (!keys.is_empty()).then(|| keys.iter().map(|key| key.get().to_owned()).collect())
}

type Parse = fn(&[toml_parser::lexer::Token], &mut dyn EventReceiver, &mut dyn ErrorSink);

fn first_error(text: &str, parse: Parse) -> Option<ParseError> {
    let tokens = Source::new(text).lex().into_vec();
    let mut nobody = ();
    let mut guard = RecursionGuard::new(&mut nobody, DEPTH_MAX);
    let mut first: Option<ParseError> = None;
    parse(&tokens, &mut guard, &mut first);
    first
}

fn message_of(error: &ParseError) -> String {
    let expected: Vec<String> = error
        .expected()
        .unwrap_or_default()
        .iter()
        .map(|expected| match expected {
            Expected::Literal("\n") => "a new line".to_owned(),
            Expected::Literal(literal) => format!("`{}`", literal.escape_debug()),
            Expected::Description(description) => (*description).to_owned(),
            _ => "something else".to_owned(),
        })
        .collect();
    match expected.as_slice() {
        [] => error.description().to_owned(),
        expected => format!("{}, expected {}", error.description(), expected.join(" or ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_on_which_recovery_panics_is_an_error() {
        assert!(parse_document("==\n.=").is_err());
        assert!(parse_value("{ a = , a.b = 1 }").is_none());
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_full_stack() {
        assert!(parse_document(&format!("a = {}", "[".repeat(100_000))).is_err());
        assert!(parse_document(&format!("a = {}1{}", "[".repeat(100), "]".repeat(100))).is_err());
        assert!(parse_document(&format!("{}a = 1", "a.".repeat(100_000))).is_err());
        assert!(parse_document(&format!("a = {}", "{ a = ".repeat(100_000))).is_err());
        assert!(parse_name(&"a.".repeat(100_000)).is_none());
        assert!(parse_document("a = [[[[1]]]]").is_ok());
    }
}
