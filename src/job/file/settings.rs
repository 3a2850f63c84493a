//! Properties that tidemill hands on under their own names: of librdkafka, and of catalogs and object stores.
//!
//! Invariant: a property that holds a secret is a reference (`env:NAME`, `file:PATH`) or a problem. A literal that
//! `${NAME}` brought in is a literal too: the value would stand in the process's memory dump, in `--json` output
//! and in the job's resolved form, and that is what references avoid.

use std::path::PathBuf;

use super::reader::Field;
use super::tree::{Entry, Value, path_part};
use super::words::is_variable_name;
use crate::job::Setting;

/// Reads one property.
pub(super) fn read_setting(entry: &Entry, field: &Field<'_, '_>, secret: bool) -> Option<Setting> {
    const EXPECTED: &str = "a string, env:NAME or file:PATH";
    match field.value() {
        Value::Text(text) => {
            if let Some(name) = text.text.strip_prefix("env:") {
                return read_env(field, name);
            }
            if let Some(path) = text.text.strip_prefix("file:") {
                return read_file(field, path);
            }
            if secret {
                refuse_literal(entry, field, text.whole_variable.as_deref());
                return None;
            }
            Some(Setting::Plain(text.text.clone()))
        }
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) if secret => {
            refuse_literal(entry, field, None);
            None
        }
        Value::Integer(number) => Some(Setting::Plain(number.to_string())),
        Value::Boolean(flag) => Some(Setting::Plain(flag.to_string())),
        Value::Table(entries) => {
            let mut name = entry.name.clone();
            let mut inner = entries.as_slice();
            while let [Entry { name: part, node, .. }, ..] = inner {
                name = format!("{name}.{part}");
                inner = if let Value::Table(entries) = &node.value { entries } else { &[] };
            }
            let hint =
                format!("quote a name with dots, else TOML makes tables of it: {} = ...", path_part(&name));
            field.wrong_type(EXPECTED).hinting(hint);
            None
        }
        _ => {
            field.wrong_type(EXPECTED);
            None
        }
    }
}

fn read_env(field: &Field<'_, '_>, name: &str) -> Option<Setting> {
    if !is_variable_name(name) {
        let found = format!("{} refers to an environment variable without a legal name", field.name());
        field.wrong(found).expecting("env:NAME, of letters, digits and underscores");
        return None;
    }
    Some(Setting::Env(name.to_owned()))
}

fn read_file(field: &Field<'_, '_>, path: &str) -> Option<Setting> {
    if path.is_empty() || path.starts_with("//") || path.contains('\0') {
        let found = format!("{} refers to a file without a path", field.name());
        field.wrong(found).expecting("file:PATH, as in file:/run/secrets/kafka");
        return None;
    }
    Some(Setting::File(PathBuf::from(path)))
}

fn refuse_literal(entry: &Entry, field: &Field<'_, '_>, variable: Option<&str>) {
    let found = match variable {
        Some(variable) => {
            format!("{} is a secret, and ${{{variable}}} makes it a literal", path_part(&entry.name))
        }
        None => format!("{} is a secret and stands in the job file", path_part(&entry.name)),
    };
    let fallback = entry.name.to_ascii_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    let name = variable.unwrap_or(&fallback);
    field
        .wrong(found)
        .expecting("env:NAME or file:PATH, read only when it is used")
        .hinting(format!("write \"env:{name}\", or \"file:/run/secrets/...\""));
}
