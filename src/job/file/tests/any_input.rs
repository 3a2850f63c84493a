//! Any text and any values: refused with words, or a job that can be run.

use super::*;

/// A TOML value of any kind, often nearly right.
fn toml_value() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "\"1 GiB\"",
        "\"10 minutes\"",
        "\"earliest\"",
        "\"keep\"",
        "\"id\"",
        "[\"id\"]",
        "[\"day(ts)\"]",
        "\"e.n\"",
        "{}",
        "[]",
        "\"env:A\"",
        "\"file:b\"",
        "\"${TWELVE}\"",
        "\"${NOT_SET}\"",
        "\"${\"",
        "true",
        "1979-05-27T07:32:00Z",
        "07:32:00",
        "{ type = \"string\" }",
        "{ a = { 0 = 1 } }",
        "\"\"",
        "nan",
        "-0.0",
        "inf",
        "[[[{ a = [1] }]]]",
    ]);
    prop_oneof![
        words.prop_map(str::to_owned),
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| format!("{number:?}").replace("NaN", "nan")),
        "\\PC{0,12}".prop_map(|text| format!("{text:?}")),
        "[$.\\[\\]'\"(),:/a-z0-9 -]{0,16}".prop_map(|text| format!("'''{}'''", text.replace('\'', ""))),
    ]
}

fn field_path() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "version",
        "name",
        "memory",
        "threads",
        "state_dir",
        "source",
        "source.kafka",
        "source.kafka.topics",
        "source.kafka.start",
        "source.kafka.properties",
        "source.kafka.properties.\"sasl.password\"",
        "source.kafka.properties.\"x.y\"",
        "decode",
        "decode.format",
        "decode.arrays",
        "decode.max_record",
        "decode.unknown_fields",
        "decode.columns",
        "decode.columns.id",
        "decode.columns.id.type",
        "decode.columns.id.path",
        "decode.columns.id.from",
        "decode.columns.id.unit",
        "decode.columns.id.required",
        "decode.columns.\"é\"",
        "event_time.column",
        "event_time.watermark_delay",
        "event_time.allowed_lateness",
        "event_time.late",
        "event_time.max_ahead",
        "dedup.key",
        "dedup.window",
        "dedup.shards",
        "dedup.repeats",
        "dedup.bucket_from",
        "dedup.id_column",
        "dedup.beyond_window",
        "dedup.on_missing_keys",
        "dedup.max_probe_records",
        "microbatch",
        "microbatch.max_records",
        "microbatch.max_bytes",
        "sink.iceberg.table",
        "sink.iceberg.partition_by",
        "sink.iceberg.catalog",
        "sink.iceberg.catalog.type",
        "sink.iceberg.catalog.uri",
        "sink.iceberg.catalog.warehouse",
        "sink.iceberg.catalog.token",
        "sink.iceberg.table_properties",
        "sink.iceberg.dead_letters",
        "sink.iceberg.dead_letters.max_ratio",
        "sink.iceberg.late",
        "sink.iceberg.late.table",
        "sink.iceberg.on_rollback",
        "sink.iceberg.maintenance",
        "sink.iceberg.maintenance.every_commits",
        "sink.iceberg.maintenance.max_snapshots",
        "sink.iceberg.maintenance.orphans_older_than",
        "rules",
        "x.y.z",
    ])
    .prop_map(str::to_owned)
}

/// What must hold of every job that is let through, whatever its file says.
fn assert_sound(job: &Job) {
    let column = |name: &str| job.decode.columns.iter().find(|column| column.name == name);
    assert!(words::is_job_name(&job.name));
    assert!(job.memory_bytes > 0 && job.microbatch.records_max > 0);
    assert!(
        job.microbatch.payload_bytes_max >= job.source.record_bytes_max && job.source.record_bytes_max > 0
    );
    assert!(!job.source.topics.is_empty() && job.source.properties.contains_key("bootstrap.servers"));
    assert!(!job.dedup.key.is_empty() && job.dedup.key.iter().all(|name| column(name).is_some()));
    if let BucketFrom::Id { column: id, .. } = &job.dedup.bucket_from {
        assert!(job.dedup.key.contains(id) && job.dedup.repeats == Repeats::SameTime);
    }
    assert!(job.dedup.shards.is_power_of_two() && job.dedup.shards <= SHARDS_MAX);
    assert!(!job.dedup.window.is_zero() && job.event_time.allowed_lateness <= job.dedup.window);
    let event_time = column(&job.event_time.column).expect("the event-time column is a column");
    assert!(matches!(event_time.column_type, PrimitiveType::Timestamp | PrimitiveType::Timestamptz));
    assert!(job.sink.partition_by.iter().all(|field| column(&field.column).is_some()));
    assert!(job.sink.table.len() >= 2 && job.sink.dead_letters.table.len() >= 2);
    assert!((0.0..=1.0).contains(&job.sink.dead_letters.ratio_max));
    assert!(job.sink.maintenance.snapshots_max != Some(0));
    assert!(job.sink.maintenance.orphan_age >= crate::job::ORPHAN_AGE_MIN);
    let secrets = ["sasl.password", "token", "credential"];
    let properties = job.source.properties.iter().chain(&job.sink.catalog.properties);
    assert!(
        properties
            .filter(|(name, _)| secrets.contains(&name.as_str()))
            .all(|(_, setting)| setting.is_secret())
    );
}

fn assert_told(result: Result<LoadedJob, JobErrors>) {
    match result {
        Ok(loaded) => assert_sound(&loaded.job),
        Err(errors) => {
            assert!(!errors.0.is_empty(), "a refusal says why");
            assert!(
                errors.0.iter().all(|problem| !problem.found.is_empty() && !problem.found.contains('\n'))
            );
            assert!(errors.to_string().lines().all(|line| line.chars().count() < 2_000));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    /// Goal: no text makes the reader panic.
    /// Method: any text, and text of the characters that TOML gives a meaning.
    #[test]
    fn any_text_is_read_or_refused(text in prop_oneof!["\\PC{0,200}", "[\\[\\]{}=.,#\"'\\\\a-c0-1\n\r\t ${}:-]{0,200}"]) {
        assert_told(check(&text, &[]));
    }

    /// Goal: a damaged job file is refused, or is a job that can be run.
    /// Method: the example with some pieces of its text cut, doubled or replaced.
    #[test]
    fn a_damaged_example_is_refused_or_sound(
        damages in vec((any::<prop::sample::Index>(), 0usize..40, "[\\[\\]{}=.,#\"'\\\\a-z0-9\n ${}é]{0,8}"), 1..6)
    ) {
        let mut characters: Vec<char> = EXAMPLE.chars().collect();
        for (at, length, text) in damages {
            let at = at.index(characters.len());
            let end = (at + length).min(characters.len());
            characters.splice(at..end, text.chars());
        }
        assert_told(check(&characters.iter().collect::<String>(), &[]));
    }

    /// Goal: whatever the fields hold, the answer is a list of problems or a job that can be run.
    /// Method: fields of the small job overridden by values of all kinds, by `--set` and so past TOML's own checks.
    #[test]
    fn any_values_are_refused_or_sound(sets in vec((field_path(), toml_value()), 1..6)) {
        let sets = sets.into_iter().collect();
        let source = JobSource { path: "jobs/x.toml".into(), text: SMALL.to_owned(), sets };
        assert_told(source.check(&environment));
    }

    /// Goal: a literal secret never reaches a message, whatever else is wrong with the file.
    /// Method: the secret stands in the properties and in a one-line catalog of an otherwise damaged job.
    #[test]
    fn a_literal_secret_is_never_shown(fields in vec((field_path(), toml_value()), 0..4), split in any::<bool>()) {
        let secret = if split { format!("'''\n{CANARY}\n'''") } else { format!("\"{CANARY}\"") };
        let text = SMALL
            .replace("\"h:1\"", &format!("\"h:1\"\n\"sasl.password\" = {secret}"))
            .replace("\"e.n\"", &format!("\"e.n\"\ncatalog = {{ type = \"rst\", tokn = \"{CANARY}\", credential = \"{CANARY}\" }}"));
        let sets = fields.into_iter().collect();
        let source = JobSource { path: "jobs/x.toml".into(), text, sets };
        let said = source.check(&environment).map_or_else(|errors| errors.to_string(), |_| String::new());
        prop_assert!(!said.contains(CANARY), "{}", said);
    }
}
