//! The job that fits generated events: what `tidemill demo` runs and what a reader may start from.
//!
//! Bad records of the generator are bad under this job, each for the reason that it is counted under.

use std::path::Path;

use toml_edit::Value;

/// The columns of generated events. Order of columns is order in the table.
const DECODE: &str = r#"[decode]
format = "json"
unknown_fields = "ignore"
arrays = "split"

[decode.columns]
event_id = { type = "string", required = true }
event_type = { type = "string", required = true }
event_time = { type = "timestamptz", path = "$.ts", unit = "ms", required = true }
notification_id = { type = "string" }
user_id = { type = "long" }
campaign = { type = "string" }
channel = { type = "string" }
provider = { type = "string", path = "$.delivery.provider" }
region = { type = "string", path = "$.delivery.region" }
attempt = { type = "int", path = "$.delivery.attempt" }
price = { type = "decimal(9, 2)" }
locale = { type = "string" }
trace_id = { type = "string", from = "header:traceparent" }

[event_time]
column = "event_time"
watermark_delay = "10 minutes"
late = "keep"

[dedup]
key = ["event_id"]
window = "7 days"
repeats = "any_time"
"#;

/// The text of a job file that reads `topics` from `bootstrap` and keeps state, catalog and tables below `dir`.
///
/// The tables are `demo.notifications` and `demo.notifications_dead_letters`. Up to a tenth of the records may be
/// bad before the job stops.
pub fn demo_job_toml(bootstrap: &str, dir: &Path, topics: &[String]) -> String {
    let text = |text: String| Value::from(text).to_string();
    let below = |name: &str| dir.join(name).display().to_string();
    let topics: Vec<String> = topics.iter().map(|topic| text(topic.clone())).collect();
    format!(
        r#"version = 1
name = "demo"
memory = "1 GiB"
state_dir = {state_dir}

[source.kafka]
topics = [{topics}]
start = "earliest"

[source.kafka.properties]
"bootstrap.servers" = {bootstrap}

{DECODE}
[sink.iceberg]
table = "demo.notifications"
partition_by = ["day(event_time)"]
catalog = {{ type = "sql", uri = {catalog_uri}, warehouse = {warehouse} }}
dead_letters = {{ table = "demo.notifications_dead_letters", max_ratio = 0.1 }}
maintenance = {{ max_snapshots = 1_000_000 }}   # the demo adds up the whole history at its end
"#,
        state_dir = text(below("state")),
        topics = topics.join(", "),
        bootstrap = text(bootstrap.to_owned()),
        catalog_uri = text(format!("sqlite:{}", below("catalog.db"))),
        warehouse = text(below("warehouse")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_is_toml_also_for_odd_folders_and_names_what_it_was_given() {
        let topics = ["a.generated".to_owned(), "a.sent".to_owned()];
        let text = demo_job_toml("127.0.0.1:9092", Path::new("/tmp/it's \"odd\" \\ here"), &topics);
        let job: toml_edit::DocumentMut = text.parse().unwrap();
        assert_eq!(job["state_dir"].as_str(), Some("/tmp/it's \"odd\" \\ here/state"));
        let read: Vec<&str> = job["source"]["kafka"]["topics"]
            .as_array()
            .unwrap()
            .iter()
            .map(|topic| topic.as_str().unwrap())
            .collect();
        assert_eq!(read, ["a.generated", "a.sent"]);
        assert_eq!(
            job["source"]["kafka"]["properties"]["bootstrap.servers"].as_str(),
            Some("127.0.0.1:9092")
        );
        let catalog = job["sink"]["iceberg"]["catalog"].as_inline_table().unwrap();
        assert_eq!(catalog.get("uri").unwrap().as_str(), Some("sqlite:/tmp/it's \"odd\" \\ here/catalog.db"));
        assert_eq!(job["decode"]["columns"].as_table().unwrap().len(), 13);
        assert_eq!(job["dedup"]["key"].as_array().unwrap().len(), 1);
    }
}
