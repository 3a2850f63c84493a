//! A job file as a tree of values, each with its place.
//!
//! Flow: text -> `syntax` -> `toml_edit` -> [`Entry`] tree -> every `--set` laid over it -> `${NAME}` filled in. Filling in comes
//! last, so a variable that only an overridden value named need not be set.
//!
//! Bounds: a file of [`JOB_FILE_BYTES_MAX`] bytes; values are nested at most 80 deep (`syntax`), so the recursion
//! here is bounded too.

use std::ops::Range;

use toml_edit::{Item, TableLike};

use super::problem::{Place, Problem, Sources, quoted};
use super::syntax::{self, SyntaxError};
use super::words::is_variable_name;

/// Largest job file that is read, in bytes.
pub(super) const JOB_FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads an environment variable.
pub(super) type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

/// A name and its value in a table, in the order of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub name_place: Place,
    pub node: Node,
}

/// A value and its place.
#[derive(Debug)]
pub(super) struct Node {
    pub place: Place,
    pub value: Value,
}

/// What TOML can say.
#[derive(Debug)]
pub(super) enum Value {
    Text(Text),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Time(toml_edit::Datetime),
    List(Vec<Node>),
    Table(Vec<Entry>),
    /// A value whose problem is reported already.
    Broken,
}

/// A string after `${NAME}` was filled in.
#[derive(Debug)]
pub(super) struct Text {
    pub text: String,
    /// The variable's name if the whole string was `${NAME}`.
    pub whole_variable: Option<String>,
    /// Whether any part came from the environment or a default.
    pub interpolated: bool,
    /// Whether a part came from a variable whose name speaks of a secret.
    pub secret: bool,
}

/// The tree of a job and the texts it came from.
#[derive(Debug)]
pub(super) struct Tree {
    pub sources: Sources,
    pub root: Vec<Entry>,
}

/// Reads the file's text, lays `--set` over it and fills in variables.
///
/// All problems but TOML syntax are gathered; a syntax error is alone, since nothing after it can be trusted.
pub(super) fn plant(
    label: &str,
    text: &str,
    sets: &[(String, String)],
    env: Environment<'_>,
    problems: &mut Vec<Problem>,
) -> Option<Tree> {
    let document = match syntax::parse_document(text) {
        Ok(document) => document,
        Err(error) => {
            problems.push(syntax_problem(label, text, &error));
            return None;
        }
    };
    let mut root = entries_of(document.as_table(), &(0..0));
    let mut sources = Sources::default();
    let mut secrets = Vec::new();
    gather_secrets(&root, "", &mut secrets);
    sources.add_file(label, text, &secrets);
    for (key, value) in sets {
        let source = sources.add_set(key);
        lay_over(&mut root, source, key, value, &sources, problems);
    }
    for entry in &mut root {
        let path = path_part(&entry.name);
        fill_in(&mut entry.node, &path, env, &sources, problems);
    }
    Some(Tree { sources, root })
}

fn syntax_problem(label: &str, text: &str, error: &SyntaxError) -> Problem {
    let mut sources = Sources::default();
    sources.add_file(label, text, &secret_looking_lines(text));
    let place = Place { source: 0, span: error.span.clone() };
    let message = &error.message;
    let quotes_missing = ["string", "quote", "invalid"].iter().any(|word| message.contains(word));
    let problem = sources.problem(&place, "", format!("not TOML: {message}"));
    if quotes_missing {
        return problem.hinting("words, sizes and durations stand in double quotes: memory = \"1 GiB\"");
    }
    problem
}

/// A file that does not parse can not be masked value by value, so whole right-hand sides go.
fn secret_looking_lines(text: &str) -> Vec<Range<usize>> {
    let mut hidden = Vec::new();
    let mut line_start = 0;
    let mut in_secret_block = false;
    for line in text.split_inclusive('\n') {
        let looks_secret = looks_secret(line) || line.contains("-----BEGIN");
        let value_at = if in_secret_block { Some(0) } else { line.find('=').map(|at| at + 1) };
        if looks_secret || in_secret_block {
            hidden.push(line_start + value_at.unwrap_or(0)..line_start + line.len());
        }
        let toggles = (line.matches("\"\"\"").count() + line.matches("'''").count()) % 2 == 1;
        in_secret_block = if in_secret_block { !toggles } else { looks_secret && toggles };
        line_start += line.len();
    }
    hidden
}

/// Whether a name, or a line that holds it, speaks of a secret. Wider than the list of properties that must be
/// references: it decides only what messages hide.
pub(super) fn looks_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [
        "password",
        "passphrase",
        "secret",
        "token",
        "credential",
        "authorization",
        "key.pem",
        "private",
        "api-key",
    ]
    .iter()
    .any(|word| name.contains(word))
        || name.contains("oauthbearer.config")
        || name.contains("sse.key")
}

/// Whether a message must not show the value at a path. Of a catalog only what is known to be harmless is shown: its
/// table is often one line, which a misspelt name would bring into a message.
pub(super) fn hides(path: &str) -> bool {
    const OPEN_IN_CATALOG: [&str; 8] =
        ["type", "uri", "warehouse", "scope", "audience", "resource", "oauth2-server-uri", "prefix"];
    // columns have names like `token`, and nothing secret about them
    if ["decode", "dedup", "event_time"].iter().any(|section| path.starts_with(section))
        || path.ends_with(".url\"")
    {
        return false;
    }
    if let Some(name) = path.strip_prefix("sink.iceberg.catalog.") {
        let name = name.trim_matches('"');
        let known = OPEN_IN_CATALOG.contains(&name)
            || ["s3.", "client.", "pool."].iter().any(|p| name.starts_with(p));
        return !known || looks_secret(name);
    }
    looks_secret(path)
}

/// Whether an address carries `user:password@`.
pub(super) fn has_user_info(text: &str) -> bool {
    text.split_once("://")
        .is_some_and(|(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or("").contains('@'))
}

fn gather_secrets(entries: &[Entry], path: &str, secrets: &mut Vec<Range<usize>>) {
    for entry in entries {
        let name = path_part(&entry.name);
        let path = if path.is_empty() { name } else { format!("{path}.{name}") };
        gather_node_secrets(&entry.node, &path, secrets);
    }
}

fn gather_node_secrets(node: &Node, path: &str, secrets: &mut Vec<Range<usize>>) {
    match &node.value {
        Value::Text(text) => {
            if (hides(path) && !is_bare_reference(&text.text)) || has_user_info(&text.text) {
                secrets.push(node.place.span.clone());
            }
        }
        Value::List(nodes) => nodes.iter().for_each(|node| gather_node_secrets(node, path, secrets)),
        Value::Table(entries) => gather_secrets(entries, path, secrets),
        Value::Integer(_) | Value::Float(_) if hides(path) => secrets.push(node.place.span.clone()),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Time(_) | Value::Broken => {}
    }
}

/// Whether a string only names where the secret is: safe to show, and showing it helps.
fn is_bare_reference(text: &str) -> bool {
    let variable = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
    text.starts_with("env:") || text.starts_with("file:") || variable.is_some_and(is_variable_name)
}

fn entries_of(table: &dyn TableLike, parent: &Range<usize>) -> Vec<Entry> {
    let entry_of = |(name, item): (&str, &Item)| {
        let name_span = table.key(name).and_then(|key| key.span()).unwrap_or_else(|| parent.clone());
        Entry {
            name: name.to_owned(),
            node: node_of(item, &name_span),
            name_place: Place { source: 0, span: name_span },
        }
    };
    table.iter().map(entry_of).collect()
}

fn node_of(item: &Item, parent: &Range<usize>) -> Node {
    let span = item.span().unwrap_or_else(|| parent.clone());
    let value = match item {
        Item::None => Value::Broken,
        Item::Value(value) => return value_node(value, &span),
        Item::Table(table) => Value::Table(entries_of(table, &span)),
        Item::ArrayOfTables(tables) => Value::List(
            tables
                .iter()
                .map(|table| {
                    let span = table.span().unwrap_or_else(|| span.clone());
                    Node { value: Value::Table(entries_of(table, &span)), place: Place { source: 0, span } }
                })
                .collect(),
        ),
    };
    Node { place: Place { source: 0, span }, value }
}

fn value_node(value: &toml_edit::Value, parent: &Range<usize>) -> Node {
    let span = value.span().unwrap_or_else(|| parent.clone());
    let value = match value {
        toml_edit::Value::String(text) => Value::Text(Text::plain(text.value())),
        toml_edit::Value::Integer(number) => Value::Integer(*number.value()),
        toml_edit::Value::Float(number) => Value::Float(*number.value()),
        toml_edit::Value::Boolean(flag) => Value::Boolean(*flag.value()),
        toml_edit::Value::Datetime(time) => Value::Time(*time.value()),
        toml_edit::Value::Array(array) => {
            Value::List(array.iter().map(|value| value_node(value, &span)).collect())
        }
        toml_edit::Value::InlineTable(table) => Value::Table(entries_of(table, &span)),
    };
    Node { place: Place { source: 0, span }, value }
}

impl Text {
    fn plain(text: &str) -> Self {
        Self { text: text.to_owned(), whole_variable: None, interpolated: false, secret: false }
    }
}

impl Node {
    /// Says that the whole subtree came from one `--set`.
    fn move_to(&mut self, place: &Place) {
        self.place = place.clone();
        match &mut self.value {
            Value::List(nodes) => nodes.iter_mut().for_each(|node| node.move_to(place)),
            Value::Table(entries) => {
                for entry in entries {
                    entry.name_place = place.clone();
                    entry.node.move_to(place);
                }
            }
            _ => {}
        }
    }
}

/// Lays one `--set` over the tree: the value replaces what stands there, tables on the way are made.
fn lay_over(
    root: &mut Vec<Entry>,
    source: usize,
    key: &str,
    value: &str,
    sources: &Sources,
    problems: &mut Vec<Problem>,
) {
    let place = Place { source, span: 0..0 };
    let Some(path) = syntax::parse_name(key) else {
        let problem = sources.problem(&place, "", "not a name that can be set".to_owned());
        problems.push(problem.expecting("--set key=value with a dotted key").hinting(
            "quote the parts that hold dots: --set 'source.kafka.properties.\"bootstrap.servers\"=host:9092'",
        ));
        return;
    };
    // what is not TOML is a bare word: `memory=512 MiB` needs no quotes inside quotes
    let mut node = match syntax::parse_value(value.trim()) {
        Some(value) => value_node(&value, &(0..0)),
        None => Node { place: place.clone(), value: Value::Text(Text::plain(value)) },
    };
    node.move_to(&place);
    put(root, &path, &place, node);
}

fn put(entries: &mut Vec<Entry>, path: &[String], place: &Place, node: Node) {
    let Some((name, rest)) = path.split_first() else { return };
    let index = entries.iter().position(|entry| entry.name == *name).unwrap_or_else(|| {
        let empty = Node { place: place.clone(), value: Value::Table(Vec::new()) };
        entries.push(Entry { name: name.clone(), name_place: place.clone(), node: empty });
        entries.len() - 1
    });
    let entry = &mut entries[index];
    if rest.is_empty() {
        entry.name_place = place.clone();
        entry.node = node;
        return;
    }
    if !matches!(entry.node.value, Value::Table(_)) {
        entry.node = Node { place: place.clone(), value: Value::Table(Vec::new()) };
    }
    if let Value::Table(inner) = &mut entry.node.value {
        put(inner, rest, place, node);
    }
}

fn fill_in(
    node: &mut Node,
    path: &str,
    env: Environment<'_>,
    sources: &Sources,
    problems: &mut Vec<Problem>,
) {
    match &mut node.value {
        Value::Text(text) => match interpolate(&text.text, env) {
            Ok(filled) => *text = filled,
            Err((found, hint)) => {
                problems.push(sources.problem(&node.place, path, found).hinting(hint));
                node.value = Value::Broken;
            }
        },
        Value::List(nodes) => {
            for (index, node) in nodes.iter_mut().enumerate() {
                fill_in(node, &format!("{path}[{index}]"), env, sources, problems);
            }
        }
        Value::Table(entries) => {
            for entry in entries {
                let path = format!("{path}.{}", path_part(&entry.name));
                fill_in(&mut entry.node, &path, env, sources, problems);
            }
        }
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) | Value::Time(_) | Value::Broken => {}
    }
}

/// Fills in `${NAME}` and `${NAME:-default}`; `$$` is one `$`, and a `$` before anything else stays (JSON paths).
/// As in a shell, the default also stands in for a variable that is set to nothing.
fn interpolate(raw: &str, env: Environment<'_>) -> Result<Text, (String, String)> {
    let mut text = String::with_capacity(raw.len());
    let mut interpolated = false;
    let mut secret = false;
    let mut whole_variable = None;
    let mut rest = raw;
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix('$') {
            text.push('$');
            rest = after;
            continue;
        }
        let Some(inside) = after.strip_prefix('{') else {
            text.push('$');
            rest = after;
            continue;
        };
        let Some((variable, after)) = inside.split_once('}') else {
            let hint = "close it with }, or write $${ for a plain ${".to_owned();
            return Err(("unclosed ${ in a string".to_owned(), hint));
        };
        let (name, default) = match variable.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (variable, None),
        };
        if !is_variable_name(name) {
            let hint = "names are letters, digits and underscores; write $${ for a plain ${".to_owned();
            return Err((format!("{} is not the name of an environment variable", quoted(name)), hint));
        }
        match (env(name), default) {
            (Some(value), Some(default)) if value.is_empty() => text.push_str(default),
            (Some(value), _) => text.push_str(&value),
            (None, Some(default)) => text.push_str(default),
            (None, None) => {
                let hint = format!("set it, or give a default: ${{{name}:-value}}");
                return Err((format!("environment variable {name} is not set"), hint));
            }
        }
        interpolated = true;
        secret |= looks_secret(name);
        whole_variable = (at == 0 && rest.len() == raw.len() && after.is_empty()).then(|| name.to_owned());
        rest = after;
    }
    text.push_str(rest);
    Ok(Text { text, whole_variable, interpolated, secret })
}

/// A name as it stands in a dotted path: quoted if TOML would need it.
pub(super) fn path_part(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) { name.to_owned() } else { quoted(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(raw: &str) -> Result<String, String> {
        let env = |name: &str| match name {
            "HOST" => Some("broker".to_owned()),
            "EMPTY" => Some(String::new()),
            "DOLLARS" => Some("${HOST}".to_owned()),
            _ => None,
        };
        interpolate(raw, &env).map(|text| text.text).map_err(|(found, _)| found)
    }

    #[test]
    fn variables_are_filled_in_once_and_dollars_escaped() {
        assert_eq!(filled("${HOST}:9092"), Ok("broker:9092".to_owned()));
        assert_eq!(filled("${NOPE:-a:b}/${HOST}"), Ok("a:b/broker".to_owned()));
        assert_eq!(filled("${EMPTY}|${EMPTY:-d}"), Ok("|d".to_owned()));
        assert_eq!(filled("$$HOST $${HOST} $.a.b $"), Ok("$HOST ${HOST} $.a.b $".to_owned()));
        assert_eq!(filled("${DOLLARS}"), Ok("${HOST}".to_owned()), "what a variable holds is not read again");
    }

    #[test]
    fn a_variable_without_value_name_or_end_is_a_problem() {
        assert_eq!(filled("${NOPE}"), Err("environment variable NOPE is not set".to_owned()));
        assert_eq!(filled("${}"), Err("\"\" is not the name of an environment variable".to_owned()));
        assert_eq!(filled("a${HOST"), Err("unclosed ${ in a string".to_owned()));
    }

    #[test]
    fn only_a_string_that_is_one_variable_names_it() {
        let env = |_: &str| Some("x".to_owned());
        let whole = |raw: &str| interpolate(raw, &env).expect("set").whole_variable;
        assert_eq!(whole("${A}"), Some("A".to_owned()));
        assert_eq!(whole("${A}${B}"), None);
        assert_eq!(whole("a${A}"), None);
        assert_eq!(whole("${A}a"), None);
    }

    #[test]
    fn an_address_with_a_password_is_known() {
        assert!(has_user_info("https://user:pass@host/x"));
        assert!(!has_user_info("https://host/a@b"));
        assert!(!has_user_info("user@host"));
    }
}
