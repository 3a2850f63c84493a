//! The examples and README, held to the fields and defaults that the reader knows.

use super::*;

/// The example with the fields that most jobs leave out.
fn uncommented() -> String {
    let fields = ["\"s", "credential", "max_probe_records", "threads"];
    fields.iter().fold(EXAMPLE.to_owned(), |text, field| text.replace(&format!("# {field}"), field))
}

#[test]
fn the_commented_example_reads_cleanly() {
    let loaded = check(EXAMPLE, &[]).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(loaded.warnings, []);
    assert_eq!(loaded.job.source.topics.len(), 4);
    assert_eq!(loaded.job.sink.catalog.uri, "https://catalog/api");
    let loaded = check(&uncommented(), &[]).unwrap_or_else(|errors| panic!("{errors}"));
    assert!(loaded.job.source.properties["sasl.password"].is_secret());
    assert!(loaded.job.sink.catalog.properties["credential"].is_secret());
}

#[test]
fn the_small_example_needs_no_environment() {
    let text = include_str!("../../../../jobs/small.toml");
    let source = JobSource { path: "jobs/small.toml".into(), text: text.to_owned(), sets: Vec::new() };
    let loaded = source.check(&|_| None).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(loaded.warnings, []);
    assert_eq!(
        loaded.job.source.properties["bootstrap.servers"],
        Setting::Plain("localhost:9092".to_owned())
    );
}

/// Fields of the example as (path, name), with `*` for names that the user chooses.
fn fields_of(entries: &[tree::Entry], path: &str, fields: &mut BTreeSet<(String, String)>) {
    for entry in entries {
        fields.insert((path.to_owned(), entry.name.clone()));
        if let tree::Value::Table(inner) = &entry.node.value {
            let name = if path == "decode.columns" { "*" } else { &entry.name };
            let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            fields_of(inner, &path, fields);
        }
    }
}

#[test]
fn the_commented_example_has_every_field_that_the_reader_knows() {
    let mut known = BTreeSet::new();
    let source = JobSource { path: "x".into(), text: EXAMPLE.to_owned(), sets: Vec::new() };
    source.check_with(&environment, &mut |fields| known = fields).expect("a good job");
    let mut written = BTreeSet::new();
    let tree = tree::plant("x", &uncommented(), &[], &environment, &mut Vec::new()).expect("TOML");
    fields_of(&tree.root, "", &mut written);
    assert!(known.len() > 40, "{known:?}");
    for (path, name) in known {
        let path = match path.strip_prefix("decode.columns.") {
            Some(_) => "decode.columns.*".to_owned(),
            None => path,
        };
        assert!(written.contains(&(path.clone(), name.to_owned())), "[{path}] {name} is not in the example");
        let commented = EXAMPLE.lines().any(|line| {
            line.contains('#')
                && line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name)
        });
        let above = EXAMPLE.contains(&format!("\n{name} = ")) || EXAMPLE.contains(&format!("{name}]"));
        assert!(commented || above || name == "bootstrap.servers", "[{path}] {name} has no comment");
    }
}

#[test]
fn the_readme_has_every_field_that_the_reader_knows() {
    const README: &str = include_str!("../../../../README.md");
    let mut known = BTreeSet::new();
    let source = JobSource { path: "x".into(), text: EXAMPLE.to_owned(), sets: Vec::new() };
    source.check_with(&environment, &mut |fields| known = fields).expect("a good job");
    for (path, name) in known {
        let field = match path.as_str() {
            "" => name.to_owned(),
            column if column.starts_with("decode.columns.") => format!("column `{name}"),
            "source.kafka.properties" => name.to_owned(),
            path => format!("{path}.{name}"),
        };
        let field = if field.starts_with("column") { field } else { format!("`{field}") };
        let row = [format!("{field}`"), format!("{field}.")].iter().any(|field| README.contains(field));
        assert!(row, "[{path}] {name} is not in README.md: {field}");
    }
}

#[test]
fn the_defaults_that_the_example_names_are_those_of_the_code() {
    let whole = format!("{:?}", check(EXAMPLE, &[]).expect("a good job").job);
    let lines: Vec<&str> = EXAMPLE.lines().collect();
    let mut compared = 0;
    for (index, line) in lines.iter().enumerate() {
        let Some((field, comment)) = line.split_once("# default ").filter(|(field, _)| field.contains('='))
        else {
            continue;
        };
        let (name, value) = field.split_once('=').expect("name = value");
        let (value, default) = (value.trim(), comment.split(';').next().expect("a first part").trim());
        let is_literal = default.starts_with(|c: char| c == '"' || c.is_ascii_digit());
        assert!(!is_literal || value == default || value.contains(default.trim_matches('"')), "{line}");
        let without: Vec<&str> =
            lines.iter().enumerate().filter(|(at, _)| *at != index).map(|(_, line)| *line).collect();
        let job = check(&without.join("\n"), &[]).unwrap_or_else(|errors| panic!("{name}: {errors}")).job;
        assert_eq!(format!("{job:?}"), whole, "without {name}");
        compared += 1;
    }
    assert!(compared >= 18, "only {compared} defaults stand in the example");
}
