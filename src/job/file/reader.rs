//! The strict reader: a table is asked for each field it may hold, and what nobody asked for is unknown.
//!
//! Every getter reports its own problem and then answers `None` or a default, so reading goes on and all problems
//! are found in one pass; a job made from such answers is thrown away by the caller.
//!
//! Invariant: a [`Section`] is finished once, after all its fields were asked for. So all fields of the tables that a file
//! has are known by then: they are what an unknown name is compared to, and what a test compares the commented
//! example to.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use super::problem::{Place, Problem, Sources, quoted};
use super::tree::{Entry, Node, Text, Value, has_user_info, hides, path_part};
use super::words;

/// Where problems are gathered.
pub(super) struct Desk<'t> {
    sources: &'t Sources,
    problems: RefCell<Vec<(Place, Problem)>>,
    warnings: RefCell<Vec<Problem>>,
    unknown: RefCell<Vec<Unknown>>,
    known: RefCell<BTreeSet<(String, &'static str)>>,
}

struct Unknown {
    place: Place,
    section: String,
    name: String,
    known_here: Vec<&'static str>,
}

/// A table that is being read.
pub(super) struct Section<'t, 'd> {
    desk: &'d Desk<'t>,
    /// Dotted path from the root; empty for the root itself.
    pub path: String,
    place: Place,
    entries: &'t [Entry],
    taken: Vec<&'static str>,
    refused: Vec<&'static str>,
}

/// A value that is being read, with its path.
#[derive(Clone)]
pub(super) struct Field<'t, 'd> {
    desk: &'d Desk<'t>,
    pub path: String,
    node: &'t Node,
}

impl<'t> Desk<'t> {
    pub fn new(sources: &'t Sources) -> Self {
        Self {
            sources,
            problems: RefCell::default(),
            warnings: RefCell::default(),
            unknown: RefCell::default(),
            known: RefCell::default(),
        }
    }

    /// The table at the top of the file.
    pub fn root<'d>(&'d self, entries: &'t [Entry]) -> Section<'t, 'd> {
        let place = Place { source: 0, span: 0..0 };
        Section { desk: self, path: String::new(), place, entries, taken: Vec::new(), refused: Vec::new() }
    }

    /// All problems in the order of the text, then all warnings.
    pub fn close(self) -> (Vec<Problem>, Vec<Problem>) {
        let known = self.known.into_inner();
        let mut problems = self.problems.into_inner();
        for unknown in self.unknown.into_inner() {
            let problem = unknown.problem(self.sources, &known);
            problems.push((unknown.place, problem));
        }
        problems.sort_by_key(|(place, _)| (place.source, place.span.start));
        (problems.into_iter().map(|(_, problem)| problem).collect(), self.warnings.into_inner())
    }

    /// Path and name of every field that was asked for.
    pub fn known(&self) -> BTreeSet<(String, &'static str)> {
        self.known.borrow().clone()
    }

    fn push(&self, place: &Place, problem: Problem) {
        self.problems.borrow_mut().push((place.clone(), problem));
    }
}

impl Unknown {
    fn problem(&self, sources: &Sources, known: &BTreeSet<(String, &'static str)>) -> Problem {
        let path = join(&self.section, &self.name);
        let found = format!("unknown field {}{}", quoted(&self.name), in_section(&self.section));
        let problem = sources.problem(&self.place, &path, found);
        let problem = problem.expecting(match self.known_here.is_empty() {
            true => String::new(),
            false => self.known_here.join(", "),
        });
        if let Some(nearest) = words::nearest(&self.name, self.known_here.iter().copied()) {
            return problem.hinting(format!("did you mean {nearest:?}?"));
        }
        let elsewhere = known.iter().find(|(section, name)| *section != self.section && *name == self.name);
        match elsewhere {
            Some((section, name)) if section.is_empty() => {
                problem.hinting(format!("{name:?} stands at the top of the file, before the first [table]"))
            }
            Some((section, name)) => problem.hinting(format!("{name:?} is a field of [{section}]")),
            None => problem,
        }
    }
}

impl<'t, 'd> Section<'t, 'd> {
    /// A field that may be absent.
    pub fn get(&mut self, name: &'static str) -> Option<Field<'t, 'd>> {
        self.taken.push(name);
        let node = &self.entries.iter().find(|entry| entry.name == name)?.node;
        Some(Field { desk: self.desk, path: join(&self.path, name), node })
    }

    /// A field that must be there.
    pub fn need(&mut self, name: &'static str, expected: &str) -> Option<Field<'t, 'd>> {
        let field = self.get(name);
        if field.is_none() {
            self.missing(name, expected);
        }
        field
    }

    /// Reports a field that must be there and is not.
    pub fn missing(&self, name: &str, expected: &str) {
        let found = format!("missing field {}{}", quoted(name), in_section(&self.path));
        let problem = self.desk.sources.problem(&self.place, &join(&self.path, name), found);
        self.desk.push(&self.place, problem.expecting(expected));
    }

    /// A table that may be absent: its fields are then absent too, and those that must be there are reported.
    pub fn table(&mut self, name: &'static str) -> Section<'t, 'd> {
        let path = join(&self.path, name);
        let absent = Section {
            desk: self.desk,
            path,
            place: self.place.clone(),
            entries: &[],
            taken: Vec::new(),
            refused: Vec::new(),
        };
        match self.get(name) {
            Some(field) => field.table().unwrap_or(absent),
            None => absent,
        }
    }

    /// A table that must be there: reports it once, and `None` keeps its fields from being reported one by one.
    pub fn need_table(&mut self, name: &'static str, expected: &str) -> Option<Section<'t, 'd>> {
        let Some(field) = self.get(name) else {
            let path = join(&self.path, name);
            let problem = self.desk.sources.problem(&self.place, &path, format!("missing table [{path}]"));
            self.desk.push(&self.place, problem.expecting(expected));
            return None;
        };
        field.table()
    }

    /// A field of a later version: refused by name, with what to do instead.
    pub fn not_built(&mut self, name: &'static str, sentence: &str) {
        self.refused.push(name);
        if let Some(entry) = self.entries.iter().find(|entry| entry.name == name) {
            let found = format!("not built yet: {sentence}");
            let problem = self.desk.sources.problem(&entry.name_place, &join(&self.path, name), found);
            self.desk.push(&entry.name_place, problem);
        }
    }

    /// Entries whose names the user chooses: columns, properties. Nothing is unknown then.
    pub fn free_entries(&self) -> impl Iterator<Item = (&'t Entry, Field<'t, 'd>)> + use<'t, 'd> {
        let (desk, path) = (self.desk, self.path.clone());
        let entries = self.entries;
        entries
            .iter()
            .map(move |entry| (entry, Field { desk, path: join(&path, &entry.name), node: &entry.node }))
    }

    /// Entries that no field took, for a table of fields and free properties.
    pub fn other_entries(&self) -> Vec<(&'t Entry, Field<'t, 'd>)> {
        self.free_entries().filter(|(entry, _)| !self.takes(&entry.name)).collect()
    }

    fn takes(&self, name: &str) -> bool {
        self.taken.contains(&name) || self.refused.contains(&name)
    }

    /// Reports what is wrong with the name of an entry.
    pub fn wrong_name(&self, entry: &Entry, found: String) -> Pending<'t, 'd> {
        let path = join(&self.path, &entry.name);
        let problem = self.desk.sources.problem(&entry.name_place, &path, found);
        Pending { desk: self.desk, place: entry.name_place.clone(), problem: Some(problem) }
    }

    /// A problem of the table as a whole.
    pub fn wrong(&self, found: String) -> Pending<'t, 'd> {
        let problem = self.desk.sources.problem(&self.place, &self.path, found);
        Pending { desk: self.desk, place: self.place.clone(), problem: Some(problem) }
    }

    /// Something that is not wrong but that the author should know.
    pub fn warn(&self, found: String, hint: &str) {
        let problem = self.desk.sources.problem(&self.place, &self.path, found).hinting(hint);
        self.desk.warnings.borrow_mut().push(problem);
    }

    /// Ends the table: everything that was not asked for is unknown.
    pub fn finish(self) {
        self.note_known();
        for entry in self.entries.iter().filter(|entry| !self.takes(&entry.name)) {
            self.desk.unknown.borrow_mut().push(Unknown {
                place: entry.name_place.clone(),
                section: self.path.clone(),
                name: entry.name.clone(),
                known_here: self.taken.clone(),
            });
        }
    }

    /// Ends a table whose other entries are free.
    pub fn finish_free(self) {
        self.note_known();
    }

    /// Names of the fields asked for so far.
    pub fn taken(&self) -> &[&'static str] {
        &self.taken
    }

    fn note_known(&self) {
        let mut known = self.desk.known.borrow_mut();
        known.extend(self.taken.iter().map(|name| (self.path.clone(), *name)));
    }
}

impl<'t, 'd> Field<'t, 'd> {
    /// Reports the value; the problem is complete when the answer is dropped.
    pub fn wrong(&self, found: impl Into<String>) -> Pending<'t, 'd> {
        let problem = self.desk.sources.problem(&self.node.place, &self.path, found.into());
        Pending { desk: self.desk, place: self.node.place.clone(), problem: Some(problem) }
    }

    /// Something that is not wrong but that the author should know.
    pub fn warn(&self, found: String, hint: &str) {
        let problem = self.desk.sources.problem(&self.node.place, &self.path, found).hinting(hint);
        self.desk.warnings.borrow_mut().push(problem);
    }

    /// Reports a value of another TOML type. Says nothing of a value whose problem is reported already.
    pub fn wrong_type(&self, expected: &str) -> Pending<'t, 'd> {
        if matches!(self.node.value, Value::Broken) {
            return Pending { desk: self.desk, place: self.node.place.clone(), problem: None };
        }
        self.wrong(format!("{} is {}", self.name(), self.shown())).expecting(expected)
    }

    /// The value as a message may show it: nothing that looks like a secret.
    pub fn shown(&self) -> String {
        let hidden = hides(&self.path);
        match &self.node.value {
            Value::Text(text) if hidden || text.secret => "a string".to_owned(),
            Value::Text(text) if has_user_info(&text.text) => "an address with a password".to_owned(),
            Value::Text(text) => format!("the string {}", quoted(&text.text)),
            Value::Integer(_) if hidden => "an integer".to_owned(),
            Value::Integer(number) => format!("the integer {number}"),
            Value::Float(_) if hidden => "a float".to_owned(),
            Value::Float(number) => format!("the float {number:?}"),
            Value::Boolean(flag) => format!("the boolean {flag}"),
            Value::Time(time) => format!("the time {time}"),
            Value::List(_) => "an array".to_owned(),
            Value::Table(_) => "a table".to_owned(),
            Value::Broken => "broken".to_owned(),
        }
    }

    /// The last part of the path, with its quotes if it has any.
    pub fn name(&self) -> &str {
        let dot = if self.path.ends_with('"') { self.path.rfind(".\"") } else { self.path.rfind('.') };
        &self.path[dot.map_or(0, |at| at + 1)..]
    }

    pub fn value(&self) -> &'t Value {
        &self.node.value
    }

    pub fn text_node(&self) -> Option<&'t Text> {
        match &self.node.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A string.
    pub fn text(&self) -> Option<&'t str> {
        self.text_expecting("a string")
    }

    /// A string, with what it should say.
    pub fn text_expecting(&self, expected: &str) -> Option<&'t str> {
        let text = self.text_node();
        if text.is_none() {
            self.wrong_type(expected);
        }
        text.map(|text| text.text.as_str())
    }

    /// An integer. A string that was filled in from the environment counts if it is one, since TOML has no other
    /// way to take a number from there.
    pub fn integer(&self) -> Option<i64> {
        match self.value() {
            Value::Integer(number) => return Some(*number),
            Value::Text(text) if text.interpolated => {
                if let Ok(number) = text.text.trim().replace('_', "").parse() {
                    return Some(number);
                }
            }
            _ => {}
        }
        self.wrong_type("an integer, as in 4_000_000");
        None
    }

    /// A number from 0 to 1.
    pub fn ratio(&self) -> Option<f64> {
        const EXPECTED: &str = "a number from 0 to 1";
        let number = match self.value() {
            Value::Float(number) => *number,
            // exact: only 0 and 1 are in range
            Value::Integer(number) => *number as f64,
            Value::Text(text) if text.interpolated => match text.text.trim().parse() {
                Ok(number) => number,
                Err(_) => {
                    self.wrong_type(EXPECTED);
                    return None;
                }
            },
            _ => {
                self.wrong_type(EXPECTED);
                return None;
            }
        };
        if !(0.0..=1.0).contains(&number) {
            self.wrong(format!("{} is {number}", self.name())).expecting(EXPECTED);
            return None;
        }
        Some(number)
    }

    /// `true` or `false`.
    pub fn boolean(&self) -> Option<bool> {
        match self.value() {
            Value::Boolean(flag) => return Some(*flag),
            Value::Text(text) if text.interpolated => {
                if let Ok(flag) = text.text.trim().parse() {
                    return Some(flag);
                }
            }
            _ => {}
        }
        self.wrong_type("true or false");
        None
    }

    /// A duration in words, in whole milliseconds.
    pub fn duration(&self) -> Option<Duration> {
        const EXPECTED: &str = "a duration in words, as in \"10 minutes\", \"7 days\" or \"5m\"";
        if let Value::Integer(number) = self.value() {
            let pending = self.wrong_type(EXPECTED);
            pending.hinting(format!("a number has no unit: write \"{} seconds\"", number.unsigned_abs()));
            return None;
        }
        let text = self.text_expecting(EXPECTED)?;
        match words::parse_duration(text) {
            Ok(duration) => Some(duration),
            Err(hint) => {
                self.wrong(format!("{} is {}", self.name(), self.shown())).expecting(EXPECTED).hinting(hint);
                None
            }
        }
    }

    /// A duration in words that is not zero.
    pub fn positive_duration(&self) -> Option<Duration> {
        let duration = self.duration()?;
        if duration.is_zero() {
            self.wrong(format!("{} is zero", self.name())).expecting("a duration of at least \"1ms\"");
            return None;
        }
        Some(duration)
    }

    /// A size in words, in bytes; at least 1.
    pub fn size(&self) -> Option<u64> {
        const EXPECTED: &str = "a size with its unit, as in \"512 MiB\" or \"1 GiB\"";
        if let Value::Integer(number) = self.value() {
            let pending = self.wrong_type(EXPECTED);
            let bytes = words::size_in_words(number.unsigned_abs());
            pending.hinting(format!("a number has no unit: write \"{bytes}\""));
            return None;
        }
        let text = self.text_expecting(EXPECTED)?;
        match words::parse_size(text) {
            Ok(bytes) => Some(bytes),
            Err(hint) => {
                self.wrong(format!("{} is {}", self.name(), self.shown())).expecting(EXPECTED).hinting(hint);
                None
            }
        }
    }

    /// One of some words; `later` are words of a later version, each with its sentence.
    pub fn choice<T: Copy>(&self, now: &[(&str, T)], later: &[(&str, &str)]) -> Option<T> {
        let expected = now.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
        let text = self.text_expecting(&expected)?;
        if let Some((_, value)) = now.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        if let Some((_, sentence)) = later.iter().find(|(word, _)| *word == text) {
            self.wrong(format!("not built yet: {} = {text:?}; {sentence}", self.name())).expecting(expected);
            return None;
        }
        let pending = self.wrong(format!("{} is {}", self.name(), self.shown())).expecting(expected);
        if let Some(nearest) = words::nearest(text, now.iter().map(|(word, _)| *word)) {
            pending.hinting(format!("did you mean {nearest:?}?"));
        }
        None
    }

    /// An array.
    pub fn list(&self, expected: &str) -> Option<Vec<Field<'t, 'd>>> {
        match self.value() {
            Value::List(nodes) => {
                let field =
                    |(index, node)| Field { desk: self.desk, path: format!("{}[{index}]", self.path), node };
                Some(nodes.iter().enumerate().map(field).collect())
            }
            Value::Text(text) => {
                let hint = format!("one value is an array too: [{}]", quoted(&text.text));
                self.wrong_type(expected).hinting(hint);
                None
            }
            _ => {
                self.wrong_type(expected);
                None
            }
        }
    }

    /// An array of strings; elements of another type are reported and left out.
    pub fn texts(&self, expected: &str) -> Option<Vec<(Field<'t, 'd>, &'t str)>> {
        let fields = self.list(expected)?;
        Some(fields.into_iter().filter_map(|field| field.text().map(|text| (field, text))).collect())
    }

    /// A table.
    pub fn table(&self) -> Option<Section<'t, 'd>> {
        match &self.node.value {
            Value::Table(entries) => Some(Section {
                desk: self.desk,
                path: self.path.clone(),
                place: self.node.place.clone(),
                entries,
                taken: Vec::new(),
                refused: Vec::new(),
            }),
            _ => {
                self.wrong_type("a table");
                None
            }
        }
    }
}

/// A problem that is still being written; dropping it reports it.
pub(super) struct Pending<'t, 'd> {
    desk: &'d Desk<'t>,
    place: Place,
    problem: Option<Problem>,
}

impl Pending<'_, '_> {
    pub fn expecting(mut self, expected: impl Into<String>) -> Self {
        self.problem = self.problem.take().map(|problem| problem.expecting(expected));
        self
    }

    pub fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.problem = self.problem.take().map(|problem| problem.hinting(hint));
        self
    }
}

impl Drop for Pending<'_, '_> {
    fn drop(&mut self) {
        if let Some(problem) = self.problem.take() {
            self.desk.push(&self.place, problem);
        }
    }
}

fn join(path: &str, name: &str) -> String {
    let name = path_part(name);
    if path.is_empty() { name } else { format!("{path}.{name}") }
}

fn in_section(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" in [{path}]") }
}
