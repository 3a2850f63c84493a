//! Options of a bench, the folder in which it works, and how its result is shown.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tidemill::job::Repeats;

use super::Failure;
use super::keys::Load;
use super::ours::load_of;

/// An option: its name, and what it is when it is not given.
pub type Choice = (&'static str, &'static str);

/// The options of one run.
#[derive(Debug, Clone)]
pub struct Settings(Vec<(String, String)>);

impl Settings {
    /// Takes `--name value` and `--flag`; only what is among the choices.
    ///
    /// # Errors
    /// An option that does not exist, or one without its value.
    pub fn parse(choices: &[Choice], words: &[String]) -> Result<Self, Failure> {
        let mut values: Vec<(String, String)> =
            choices.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("{word} is no option"))?;
            let value = values.iter_mut().find(|(known, _)| known == name);
            let (_, value) = value.ok_or_else(|| {
                let names: Vec<String> = choices.iter().map(|(name, _)| format!("--{name}")).collect();
                format!("there is no option --{name}; there are {}", names.join(" "))
            })?;
            *value = match value.as_str() {
                "no" => "yes".to_owned(),
                _ => words.next().ok_or_else(|| format!("--{name} takes a value"))?.clone(),
            };
        }
        Ok(Self(values))
    }

    /// The same with one value replaced.
    pub fn with(&self, name: &str, value: String) -> Self {
        let others = self.0.iter().filter(|(known, _)| known != name).cloned();
        Self(others.chain([(name.to_owned(), value)]).collect())
    }

    /// Some of them as words for another process.
    pub fn words(&self, names: &[&str]) -> Vec<String> {
        names.iter().flat_map(|name| [format!("--{name}"), self.text(name).to_owned()]).collect()
    }

    /// As given; empty if there is none.
    pub fn text(&self, name: &str) -> &str {
        self.0.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// Whether a flag was given.
    pub fn is_set(&self, name: &str) -> bool {
        self.text(name) == "yes"
    }

    /// A number; 0 if it is none, which [`Settings::check`] refuses before.
    pub fn number(&self, name: &str) -> u64 {
        number_of(self.text(name)).unwrap_or_default()
    }

    /// Several numbers with commas between them.
    pub fn numbers(&self, name: &str) -> Result<Vec<u64>, Failure> {
        self.text(name).split(',').map(|word| number_of(word).ok_or_else(|| no_number(name, word))).collect()
    }

    /// A number of bytes.
    pub fn bytes(&self, name: &str) -> u64 {
        self.number(name)
    }

    /// Refuses what is given as a number and is none.
    pub fn check(&self) -> Result<(), Failure> {
        for name in ["keys", "rows", "count", "batches", "probe", "memory", "share", "bits", "run-seed"] {
            let text = self.text(name);
            if !text.is_empty() && number_of(text).is_none() {
                return Err(no_number(name, text));
            }
        }
        Ok(())
    }

    /// How repeats are looked for.
    pub fn repeats(&self) -> Result<Repeats, Failure> {
        match self.text("repeats") {
            "any_time" => Ok(Repeats::AnyTime),
            "same_time" => Ok(Repeats::SameTime),
            other => Err(format!("--repeats is any_time or same_time, not {other}").into()),
        }
    }

    /// Where repeats come from.
    pub fn load(&self) -> Result<Load, Failure> {
        let name = self.text("load");
        load_of(name).ok_or_else(|| format!("--load is mix or worst, not {name}").into())
    }
}

fn no_number(name: &str, text: &str) -> Failure {
    format!("--{name} takes a number such as 1000000, 1e6 or 512MiB, not {text}").into()
}

/// `1000000`, `1e6`, `1.5e6`, `512MiB`.
fn number_of(text: &str) -> Option<u64> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let units = [("KiB", 1_u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)];
    let (digits, unit) = units.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)))?;
    let number = digits.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0)?;
    Some((number * unit as f64).round() as u64)
}

/// The folder of the states: a named one that stays, or one that goes with the run.
pub struct Scratch {
    path: PathBuf,
    temporary: Option<TempDir>,
}

impl Scratch {
    /// From `--state` and `--keep`. Without `--keep` what the bench made there is removed at the end.
    pub fn of(settings: &Settings) -> Result<Self, Failure> {
        let named = settings.text("state");
        if settings.is_set("keep") && named.is_empty() {
            return Err("--keep needs --state DIR".into());
        }
        if settings.is_set("keep") {
            std::fs::create_dir_all(named)?;
            return Ok(Self { path: named.into(), temporary: None });
        }
        let folder = match named {
            "" => TempDir::with_prefix("tidemill-bench-")?,
            parent => {
                std::fs::create_dir_all(parent)?;
                TempDir::with_prefix_in("tidemill-bench-", parent)?
            }
        };
        Ok(Self { path: folder.path().to_owned(), temporary: Some(folder) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The seed of all states in this folder: drawn once, so that both engines hold the same keys.
    pub fn seed(&self) -> Result<u64, Failure> {
        let file = self.path.join("seed");
        if self.temporary.is_none() && file.exists() {
            return Ok(std::fs::read_to_string(file)?.trim().parse()?);
        }
        let seed = rand::random::<u64>();
        std::fs::write(file, seed.to_string())?;
        Ok(seed)
    }
}

/// A result as lines of name and value.
pub fn print_table(name: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(field, value)| print_table(&below(name, field), value))
        }
        Value::Array(values) if values.iter().any(Value::is_object) => {
            values
                .iter()
                .enumerate()
                .for_each(|(index, value)| print_table(&below(name, &index.to_string()), value));
        }
        // One number per batch is for programs.
        Value::Array(values) if values.len() > 16 => println!("{name:<60} {} values", values.len()),
        Value::Number(number) => println!("{name:<60} {}", grouped(number)),
        Value::String(text) => println!("{name:<60} {text}"),
        other => println!("{name:<60} {other}"),
    }
}

fn below(name: &str, field: &str) -> String {
    if name.is_empty() { field.to_owned() } else { format!("{name}.{field}") }
}

/// Digits in groups of three; few of them behind the point.
fn grouped(number: &serde_json::Number) -> String {
    let value = number.as_f64().unwrap_or_default();
    if value.abs() < 1000.0 {
        return if number.is_f64() { format!("{value:.3}") } else { number.to_string() };
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('_');
        }
        text.push(digit);
    }
    text
}
