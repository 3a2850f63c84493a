//! `[source.kafka]`: topics, where to begin, and librdkafka's own properties minus a deny list.

use std::collections::{BTreeMap, BTreeSet};

use super::problem::quoted;
use super::reader::{Field, Section};
use super::settings::read_setting;
use super::tree::{Value, has_user_info};
use super::words;
use crate::job::{KafkaSource, RECORD_BYTES_MAX_DEFAULT, Setting, StartPosition};

const SETS_ITSELF: &str = "tidemill sets it itself";
const OFFSETS: &str =
    "offsets live in the table's ledger, and those of the group are written for lag tools only";
const PLANNER: &str = "set by the memory planner from `memory`";
const ASSIGN: &str = "topic partitions are assigned from the ledger, never by the group";

/// Properties that a job file can not set, with the reason. Aliases stand here too: librdkafka resolves them.
const DENIED: [(&str, &str); 45] = [
    ("plugin.library.paths", "it loads code into the process"),
    ("ssl.engine.location", "it loads code into the process"),
    ("ssl.engine.id", "it belongs to ssl.engine.location, which loads code into the process"),
    ("ssl.providers", "it loads code into the process"),
    ("sasl.kerberos.kinit.cmd", "it runs a shell command"),
    ("enable.sasl.oauthbearer.unsecure.jwt", "it takes unsigned tokens"),
    ("debug", "it logs settings and payloads"),
    ("internal.termination.signal", "it sends a signal to the threads of the process"),
    ("test.mock.num.brokers", "it reads from a cluster that is made up"),
    ("test.mock.broker.rtt", "it reads from a cluster that is made up"),
    ("enabled_events", "refusals of the brokers would not be heard"),
    ("log.queue", "logs would go past --log"),
    ("metadata.broker.list", "it is another name of bootstrap.servers; write that one"),
    ("enable.auto.commit", OFFSETS),
    ("auto.commit.enable", OFFSETS),
    ("auto.commit.interval.ms", OFFSETS),
    ("enable.auto.offset.store", OFFSETS),
    ("offset.store.method", OFFSETS),
    ("offset.store.path", OFFSETS),
    ("offset.store.sync.interval.ms", OFFSETS),
    (
        "auto.offset.reset",
        "tidemill sets it to error, so that lost offsets stop the run; `start` says where to begin",
    ),
    ("isolation.level", "tidemill sets it to read_committed"),
    ("enable.partition.eof", SETS_ITSELF),
    ("check.crcs", "tidemill sets it to true"),
    ("allow.auto.create.topics", "reading never creates a topic"),
    ("group.instance.id", ASSIGN),
    ("group.protocol", ASSIGN),
    ("group.protocol.type", ASSIGN),
    ("group.remote.assignor", ASSIGN),
    ("partition.assignment.strategy", ASSIGN),
    ("topic.blacklist", "list the topics to read in `topics`"),
    ("queued.min.messages", PLANNER),
    ("queued.max.messages.kbytes", PLANNER),
    ("fetch.wait.max.ms", PLANNER),
    ("fetch.queue.backoff.ms", PLANNER),
    ("fetch.message.max.bytes", PLANNER),
    ("max.partition.fetch.bytes", PLANNER),
    ("fetch.max.bytes", PLANNER),
    ("message.max.bytes", PLANNER),
    ("fetch.min.bytes", PLANNER),
    ("fetch.error.backoff.ms", PLANNER),
    ("receive.message.max.bytes", PLANNER),
    ("consume.callback.max.messages", SETS_ITSELF),
    ("statistics.interval.ms", SETS_ITSELF),
    ("transactional.id", "tidemill does not produce"),
];

/// The ways to log in that the client of this program is built with.
const SASL_MECHANISMS: [&str; 3] = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];

/// Reads `[source.kafka]`.
pub(super) fn read_kafka(section: Option<Section<'_, '_>>) -> KafkaSource {
    let mut source = KafkaSource {
        topics: Vec::new(),
        start: StartPosition::Earliest,
        properties: BTreeMap::new(),
        record_bytes_max: RECORD_BYTES_MAX_DEFAULT,
    };
    let Some(mut section) = section else { return source };
    if let Some(field) = section.need("topics", "an array of topic names") {
        source.topics = read_topics(&field);
    }
    if let Some(field) = section.get("start") {
        source.start = read_start(&field, &source.topics).unwrap_or(StartPosition::Earliest);
    }
    let patterns =
        "topic patterns; list the topics in topics = [...], so that a new one can not come in unseen";
    for name in ["topics_pattern", "topic_pattern", "topics.regex", "subscribe", "subscribePattern"] {
        section.not_built(name, patterns);
    }
    if let Some(properties) = section.need_table("properties", "a table with \"bootstrap.servers\"") {
        source.properties = read_properties(properties);
    }
    section.finish();
    source
}

fn read_topics(field: &Field<'_, '_>) -> Vec<String> {
    let mut topics = Vec::new();
    let mut seen = BTreeSet::new();
    let Some(elements) = field.texts("an array of topic names") else { return topics };
    if elements.is_empty() && matches!(field.value(), Value::List(list) if list.is_empty()) {
        field.wrong("topics is empty").expecting("at least one topic");
    }
    for (element, topic) in elements {
        if let Err(problem) = words::check_topic(topic) {
            element.wrong(problem.found).hinting(problem.hint);
        } else if seen.insert(topic) {
            topics.push(topic.to_owned());
        } else {
            element.wrong(format!("topic {} stands twice", quoted(topic))).hinting("name it once");
        }
    }
    topics
}

fn read_start(field: &Field<'_, '_>, topics: &[String]) -> Option<StartPosition> {
    const EXPECTED: &str =
        "\"earliest\", \"latest\", a time as in \"2026-01-31T00:00:00Z\", or { \"topic\" = { 0 = 42 } }";
    match field.value() {
        Value::Text(text) => match text.text.as_str() {
            "earliest" => Some(StartPosition::Earliest),
            "latest" => Some(StartPosition::Latest),
            text => read_start_time(field, text, EXPECTED),
        },
        Value::Time(time) => read_start_time(field, &time.to_string(), EXPECTED),
        Value::Table(_) => read_start_offsets(field.table()?, topics).map(StartPosition::Offsets),
        _ => {
            field.wrong_type(EXPECTED);
            None
        }
    }
}

fn read_start_time(field: &Field<'_, '_>, text: &str, expected: &str) -> Option<StartPosition> {
    let time = match chrono::DateTime::parse_from_rfc3339(text) {
        Ok(time) => time,
        Err(_) => {
            let pending = field.wrong(format!("start is {}", field.shown())).expecting(expected);
            let digits = text.starts_with(|c: char| c.is_ascii_digit());
            match words::nearest(text, ["earliest", "latest"].into_iter()) {
                Some(word) => drop(pending.hinting(format!("did you mean {word:?}?"))),
                None if digits => {
                    drop(pending.hinting("a time needs date, time and offset from UTC: 2026-01-31T00:00:00Z"))
                }
                None => {}
            }
            return None;
        }
    };
    // the first record at or after this time: a part of a millisecond counts up, since Kafka keeps milliseconds
    let rounds_up = time.timestamp_subsec_nanos() % 1_000_000 != 0;
    let ms = time.timestamp_millis() + i64::from(rounds_up);
    if ms < 0 {
        field.wrong(format!("start is {}", field.shown())).expecting("a time since 1970");
        return None;
    }
    Some(StartPosition::Timestamp(ms))
}

fn read_start_offsets(
    section: Section<'_, '_>,
    topics: &[String],
) -> Option<BTreeMap<String, BTreeMap<i32, i64>>> {
    let mut by_topic = BTreeMap::new();
    for (entry, field) in section.free_entries() {
        if !topics.contains(&entry.name) {
            let pending = section
                .wrong_name(entry, format!("start names {}, which is not in topics", quoted(&entry.name)));
            if let Some(topic) = words::nearest(&entry.name, topics.iter().map(String::as_str)) {
                pending.hinting(format!("did you mean {}?", quoted(topic)));
            }
            continue;
        }
        let Value::Table(_) = field.value() else {
            field.wrong_type("a table of offsets by partition, as in { 0 = 42 }");
            continue;
        };
        let Some(partitions) = field.table() else { continue };
        let mut offsets = BTreeMap::new();
        for (entry, field) in partitions.free_entries() {
            let partition = match entry.name.parse::<i32>() {
                Ok(partition) if partition >= 0 && entry.name == partition.to_string() => partition,
                _ => {
                    let found = format!("{} is not the number of a topic partition", quoted(&entry.name));
                    partitions.wrong_name(entry, found).expecting("an integer from 0");
                    continue;
                }
            };
            let Some(offset) = field.integer() else { continue };
            if offset < 0 {
                field.wrong(format!("offset {offset} is negative")).expecting("an offset from 0");
                continue;
            }
            offsets.insert(partition, offset);
        }
        by_topic.insert(entry.name.clone(), offsets);
    }
    if section.free_entries().next().is_none() {
        section
            .wrong("start names no offset".to_owned())
            .hinting("write \"earliest\", or { \"topic\" = { 0 = 42 } }");
        return None;
    }
    Some(by_topic)
}

fn read_properties(mut section: Section<'_, '_>) -> BTreeMap<String, Setting> {
    let mut properties = BTreeMap::new();
    let servers = section.need("bootstrap.servers", "the brokers: \"host:9092,host:9092\"");
    if let Some(field) =
        servers.filter(|field| field.text_node().is_some_and(|text| text.text.trim().is_empty()))
    {
        field.wrong("bootstrap.servers is empty").expecting("the brokers: \"host:9092,host:9092\"");
    }
    for (entry, field) in section.free_entries() {
        let name = entry.name.as_str();
        // librdkafka's names are lowercase; another spelling would slip past the lists
        if name != name.to_ascii_lowercase() {
            section
                .wrong_name(entry, format!("unknown property {}", quoted(name)))
                .hinting(format!("librdkafka writes it {}", quoted(&name.to_ascii_lowercase())));
            continue;
        }
        if let Some((_, reason)) = DENIED.iter().find(|(denied, _)| *denied == name) {
            section.wrong_name(entry, format!("property {} can not be set: {reason}", quoted(name)));
            continue;
        }
        let secret = is_secret(name);
        if let Some(setting) = read_setting(entry, &field, secret) {
            check_value(&field, name, &setting);
            properties.insert(name.to_owned(), setting);
        }
    }
    warn_of_open_credentials(&section, &properties);
    let sasl =
        matches!(properties.get("security.protocol"), Some(Setting::Plain(protocol)) if is_sasl(protocol));
    if sasl && !["sasl.mechanism", "sasl.mechanisms"].iter().any(|name| properties.contains_key(*name)) {
        // librdkafka's own default is GSSAPI, which its build here does not have
        section.missing("sasl.mechanism", "\"PLAIN\", \"SCRAM-SHA-256\" or \"SCRAM-SHA-512\"");
    }
    section.finish_free();
    properties
}

fn is_sasl(protocol: &str) -> bool {
    protocol.to_ascii_lowercase().starts_with("sasl_")
}

/// Whether a librdkafka property holds a secret (CONFIGURATION.md of librdkafka 2.12).
fn is_secret(name: &str) -> bool {
    name.ends_with("password")
        || name.ends_with("passphrase")
        || name.ends_with("secret")
        || matches!(
            name,
            "ssl.key.pem" | "sasl.oauthbearer.config" | "sasl.oauthbearer.assertion.private.key.pem"
        )
}

fn check_value(field: &Field<'_, '_>, name: &str, setting: &Setting) {
    let Setting::Plain(value) = setting else { return };
    match name {
        "sasl.mechanism" | "sasl.mechanisms" if !SASL_MECHANISMS.contains(&value.as_str()) => {
            field
                .wrong(format!("not built yet: {name} = {}", quoted(value)))
                .expecting("\"PLAIN\", \"SCRAM-SHA-256\" or \"SCRAM-SHA-512\"")
                .hinting("client certificates work too: \"security.protocol\" = \"SSL\"");
        }
        "security.protocol" => {
            let known = ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"];
            if !known.contains(&value.to_ascii_lowercase().as_str()) {
                let pending = field
                    .wrong(format!("security.protocol is {}", field.shown()))
                    .expecting("PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL");
                if let Some(nearest) = words::nearest(value, known.into_iter()) {
                    pending.hinting(format!("did you mean {:?}?", nearest.to_ascii_uppercase()));
                }
            }
        }
        "sasl.oauthbearer.token.endpoint.url" | "https.proxy" => {
            if has_user_info(value) {
                field.wrong(format!("{name} holds a password")).hinting("name the whole address as env:NAME");
            } else if !value.starts_with("https://") && !value.starts_with("http://") {
                field.wrong(format!("{name} is {}", field.shown())).expecting("an https:// address");
            } else if value.starts_with("http://") {
                field.warn(format!("{name} is not encrypted"), "use https://");
            }
        }
        "enable.ssl.certificate.verification" if value == "false" => field.warn(
            "brokers are not verified".to_owned(),
            "anyone on the path can read and answer; name the CA with \"ssl.ca.location\"",
        ),
        "ssl.endpoint.identification.algorithm" if value == "none" => field.warn(
            "names of brokers are not verified".to_owned(),
            "anyone with a certificate of the same CA can answer; leave it at https",
        ),
        _ => {}
    }
}

fn warn_of_open_credentials(section: &Section<'_, '_>, properties: &BTreeMap<String, Setting>) {
    let protocol = match properties.get("security.protocol") {
        Some(Setting::Plain(protocol)) => protocol.to_ascii_lowercase(),
        Some(_) => return,
        None => "plaintext".to_owned(),
    };
    let has_credential = properties.keys().any(|name| is_secret(name) && name.starts_with("sasl."));
    match protocol.as_str() {
        "plaintext" | "ssl" if has_credential => section.warn(
            format!("a SASL credential is set, and security.protocol {protocol} never sends it"),
            "set \"security.protocol\" = \"SASL_SSL\"",
        ),
        "sasl_plaintext" if has_credential => section.warn(
            "credentials cross the network unencrypted".to_owned(),
            "set \"security.protocol\" = \"SASL_SSL\"",
        ),
        _ => {}
    }
}
