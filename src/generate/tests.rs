//! What a generated stream promises, judged from its bytes by a model that shares no code with the generator.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use xxhash_rust::xxh3::Xxh3;

use super::config::{BAD_KINDS, bad_kind, bad_of_each_kind};
use super::stream::NEAR_EVENTS_MAX;
use super::*;
use crate::job::AHEAD_MAX_DEFAULT;
use crate::letter::ReasonCode;

fn config(seed: u64, events: u64) -> GeneratorConfig {
    GeneratorConfig { seed, events, ..GeneratorConfig::default() }
}

fn generator(config: &GeneratorConfig) -> Generator {
    Generator::new(config).unwrap()
}

/// What a correct job makes of a record.
type Verdict = Result<Judged, ReasonCode>;

#[derive(Debug, Clone, PartialEq)]
struct Judged {
    event_id: String,
    event_type: String,
    notification_id: String,
    event_time_ms: i64,
    attempt: i64,
}

/// The members of an object in their order, repeated ones too.
struct Object(Vec<(String, Box<RawValue>)>);

impl<'de> serde::Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl Object {
    /// The text of a member that is there and not null.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, raw)| raw.get()).filter(|raw| *raw != "null")
    }

    fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(|raw| serde_json::from_str(raw).expect("a member of the good events is text"))
    }
}

/// The model of a job: reads the payload with serde_json and names the first fault.
fn judge(record: &GeneratedRecord) -> Verdict {
    let payload = record.payload.as_deref().ok_or(ReasonCode::Tombstone)?;
    if payload.is_empty() {
        return Err(ReasonCode::EmptyPayload);
    }
    let text = std::str::from_utf8(payload).map_err(|_| ReasonCode::InvalidUtf8)?;
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| match error.classify() {
        serde_json::error::Category::Eof => ReasonCode::TruncatedJson,
        _ if error.to_string().contains("recursion limit") => ReasonCode::TooDeep,
        _ => ReasonCode::InvalidJson,
    })?;
    match &value {
        serde_json::Value::Array(rows) if rows.is_empty() => return Err(ReasonCode::EmptyArray),
        serde_json::Value::Object(_) => {}
        _ => return Err(ReasonCode::NotAnObject),
    }
    let object: Object = serde_json::from_str(text).unwrap();
    let names: HashSet<&str> = object.0.iter().map(|(name, _)| name.as_str()).collect();
    if names.len() < object.0.len() {
        return Err(ReasonCode::DuplicateField);
    }
    let event_id = object.text("event_id").ok_or(ReasonCode::NullKey)?;
    if event_id.is_empty() {
        return Err(ReasonCode::EmptyKey);
    }
    let event_type = object.text("event_type").ok_or(ReasonCode::MissingRequired)?;
    let event_time_ms: i64 = object.get("ts").ok_or(ReasonCode::MissingEventTime)?.parse().unwrap();
    let ahead_ms = event_time_ms - record.timestamp_ms.unwrap();
    if ahead_ms > AHEAD_MAX_DEFAULT.as_millis() as i64 {
        return Err(ReasonCode::EventTimeAhead);
    }
    let user_id = object.get("user_id").unwrap();
    if !user_id.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ReasonCode::WrongType);
    }
    user_id.parse::<i64>().map_err(|_| ReasonCode::OutOfRange)?;
    if let Some(price) = object.get("price") {
        let (whole, cents) = price.split_once('.').unwrap();
        assert_eq!(cents.len(), 2);
        whole.parse::<u32>().ok().filter(|whole| *whole <= 9_999_999).ok_or(ReasonCode::OutOfRange)?;
    }
    let attempt = value["delivery"]["attempt"].as_i64().unwrap();
    i32::try_from(attempt).map_err(|_| ReasonCode::OutOfRange)?;
    assert!(value["attributes"]["device"]["os"].is_string());
    assert!(object.text("campaign").is_some() && object.text("locale").is_some());
    Ok(Judged {
        event_id,
        event_type,
        notification_id: object.text("notification_id").unwrap(),
        event_time_ms,
        attempt,
    })
}

/// Counts by the model: what [`Truth`] claims, but for the kinds of repeats and the corrections.
fn recount(records: &[GeneratedRecord]) -> (BTreeMap<String, u64>, u64, BTreeMap<String, u64>) {
    let mut seen = HashSet::new();
    let (mut distinct, mut repeats, mut bad) = (BTreeMap::new(), 0, BTreeMap::new());
    for type_name in ["generated", "sent", "delivered", "clicked"] {
        distinct.insert(type_name.to_owned(), 0);
    }
    for record in records {
        match judge(record) {
            Err(code) => *bad.entry(code.as_str().to_owned()).or_default() += 1,
            Ok(event) if seen.insert(event.event_id.clone()) => {
                *distinct.get_mut(&event.event_type).unwrap() += 1;
            }
            Ok(_) => repeats += 1,
        }
    }
    (distinct, repeats, bad)
}

fn hash_record(hash: &mut Xxh3, record: &GeneratedRecord) {
    let headers: Vec<_> =
        record.headers.iter().map(|(name, value)| (*name, Some(value.as_slice()))).collect();
    hash_parts(hash, record.timestamp_ms, record.key.as_deref(), record.payload.as_deref(), &headers);
}

fn hash_parts(
    hash: &mut Xxh3,
    timestamp_ms: Option<i64>,
    key: Option<&[u8]>,
    payload: Option<&[u8]>,
    headers: &[(&str, Option<&[u8]>)],
) {
    let mut part = |bytes: Option<&[u8]>| {
        hash.update(&bytes.map_or(-1, |bytes| bytes.len() as i64).to_le_bytes());
        hash.update(bytes.unwrap_or_default());
    };
    part(Some(&timestamp_ms.unwrap_or(-1).to_le_bytes()));
    part(key);
    part(payload);
    for (name, value) in headers {
        part(Some(name.as_bytes()));
        part(*value);
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_ever() {
    let config = GeneratorConfig { bad: bad_of_each_kind(20), ..config(1, 20_000) };
    let stream_hash = |config: &GeneratorConfig| {
        let mut hash = Xxh3::new();
        for record in generator(config).wave(20_000) {
            hash.update(record.topic.as_bytes());
            hash.update(&record.partition.to_le_bytes());
            hash_record(&mut hash, &record);
        }
        hash.digest()
    };
    // A new value here means that published seeds tell another truth: say so in the change log.
    let expected = 3_003_657_339_344_142_383;
    assert_eq!(stream_hash(&config), expected);
    assert_ne!(stream_hash(&GeneratorConfig { seed: 2, ..config }), expected);
}

#[test]
fn the_truth_is_what_a_plain_recount_finds() {
    for (seed, topics) in
        [(1, Topics::PerType("notifications".to_owned())), (u64::MAX, Topics::One("events".to_owned()))]
    {
        let config = GeneratorConfig {
            bad: bad_of_each_kind(60),
            repeats: 0.2,
            corrected: 0.5,
            topics,
            ..config(seed, 200_000)
        };
        let mut generator = generator(&config);
        let records: Vec<_> = generator.wave(200_000).collect();
        let truth = generator.truth();
        let (distinct, repeats, bad) = recount(&records);
        assert_eq!(truth.distinct_by_type, distinct);
        assert_eq!(truth.distinct, distinct.values().sum::<u64>());
        assert_eq!(truth.repeats.total(), repeats);
        assert_eq!(truth.bad, bad);
        assert_eq!(truth.bad, BAD_KINDS.iter().map(|kind| (kind.as_str().to_owned(), 60)).collect());
        assert_eq!(truth.records, records.len() as u64);
        assert_eq!((truth.events, truth.seed), (200_000, seed));
        assert_eq!(truth.events, truth.distinct + truth.repeats.total());
        assert_eq!(truth.records, truth.events + truth.bad_total());
        assert!((0.19..0.21).contains(&(repeats as f64 / 200_000.0)), "{repeats}");
    }
}

#[test]
fn the_truth_is_read_back_from_its_json() {
    let mut generator = generator(&GeneratorConfig { bad: bad_of_each_kind(2), ..config(5, 1_000) });
    generator.skip(1_000);
    let json = serde_json::to_string(&generator.truth()).unwrap();
    assert_eq!(serde_json::from_str::<Truth>(&json).unwrap(), generator.truth());
    assert!(json.contains(r#""bad":{"duplicate_field":2,"#), "{json}");
}

#[test]
fn waves_one_after_another_are_one_stream() {
    let config = GeneratorConfig { bad: bad_of_each_kind(50), ..config(3, 10_000) };
    let whole: Vec<_> = generator(&config).wave(25_000).collect();
    let mut generator = generator(&config);
    let mut parts = Vec::new();
    let mut earlier = generator.truth();
    for events in [1, 6_999, 0, 3_000, 15_000] {
        let before = parts.len();
        parts.extend(generator.wave(events));
        let added = generator.truth().since(&earlier);
        assert_eq!((added.events, added.records), (events, (parts.len() - before) as u64));
        earlier = generator.truth();
    }
    assert_eq!(parts, whole);
}

#[test]
fn skipping_goes_on_exactly_where_generating_would() {
    let config = GeneratorConfig { bad: bad_of_each_kind(50), corrected: 1.0, ..config(4, 10_000) };
    for skipped in [0, 1, 9_999, 10_000, 17_000] {
        let mut made = generator(&config);
        made.wave(skipped).for_each(drop);
        let mut skipping = generator(&config);
        skipping.skip(skipped);
        assert_eq!(skipping.truth(), made.truth());
        assert!(skipping.wave(3_000).eq(made.wave(3_000)));
        assert_eq!(skipping.truth(), made.truth());
    }
}

#[test]
fn every_stretch_holds_exactly_the_bad_records_asked_for() {
    let bad =
        BTreeMap::from([(ReasonCode::Tombstone, 3), (ReasonCode::EmptyKey, 0), (ReasonCode::TooDeep, 7)]);
    let mut generator = generator(&GeneratorConfig { bad, ..config(6, 500) });
    for stretch in 1..=5 {
        assert!(generator.wave(500).last().is_some_and(|record| !matches!(record.role, Role::Bad(_))));
        let expected = [("tombstone", 3 * stretch), ("too_deep", 7 * stretch)];
        let expected: BTreeMap<_, _> = expected.map(|(kind, count)| (kind.to_owned(), count)).into();
        assert_eq!(generator.truth().bad, expected);
    }
}

#[test]
fn bad_records_are_spread_over_the_stretch() {
    let config = GeneratorConfig { bad: [(ReasonCode::EmptyKey, 400)].into(), ..config(7, 40_000) };
    let places: Vec<usize> = generator(&config)
        .wave(40_000)
        .enumerate()
        .filter(|(_, record)| matches!(record.role, Role::Bad(_)))
        .map(|(place, _)| place)
        .collect();
    for quarter in 0..4 {
        let inside = places.iter().filter(|place| **place * 4 / 40_400 == quarter).count();
        assert!((70..=130).contains(&inside), "{inside} of 400 in quarter {quarter}");
    }
}

#[test]
fn every_kind_of_fault_is_what_it_says_in_all_its_variants() {
    for kind in BAD_KINDS {
        let config = GeneratorConfig { bad: [(kind, 300)].into(), ..config(8, 300) };
        let bad: Vec<_> =
            generator(&config).wave(300).filter(|record| matches!(record.role, Role::Bad(_))).collect();
        assert_eq!(bad.len(), 300);
        for record in &bad {
            assert_eq!(record.role, Role::Bad(kind));
            let payload = record.payload.as_deref().map(String::from_utf8_lossy);
            assert_eq!(judge(record), Err(kind), "{payload:?}");
        }
        let payloads: HashSet<_> = bad.iter().map(|record| &record.payload).collect();
        // Short prefixes of two payloads may be the same.
        let payloads_min = match kind {
            ReasonCode::Tombstone | ReasonCode::EmptyPayload | ReasonCode::EmptyArray => 1,
            ReasonCode::NotAnObject => 4,
            ReasonCode::TruncatedJson => 280,
            _ => 300,
        };
        assert!(payloads.len() >= payloads_min, "{} payloads of kind {kind}", payloads.len());
        assert_eq!(bad_kind(kind.as_str()), Some(kind));
    }
    assert_eq!(bad_kind("unknown_field"), None);
}

#[test]
fn a_corrected_event_comes_good_later_under_the_key_of_its_bad_record() {
    let config = GeneratorConfig { bad: bad_of_each_kind(25), corrected: 1.0, ..config(9, 20_000) };
    let mut generator = generator(&config);
    let records: Vec<_> = generator.wave(20_000).collect();
    let mut bad = HashMap::new();
    let mut ids = HashSet::new();
    let mut corrected = 0;
    assert!(records.is_sorted_by_key(|record| record.timestamp_ms), "kafka timestamps never decrease");
    for (place, record) in records.iter().enumerate() {
        let home = (record.key.clone(), record.topic.clone(), record.partition);
        match record.role {
            Role::Bad(_) => assert!(bad.insert(home, place).is_none()),
            Role::Corrected => {
                let bad_place = bad.remove(&home).expect("a correction follows its bad record");
                assert!(place - bad_place <= 4_000, "{}", place - bad_place);
                assert!(ids.insert(judge(record).unwrap().event_id), "a correction is an event of its own");
                corrected += 1;
            }
            Role::First => assert!(ids.insert(judge(record).unwrap().event_id)),
            Role::Repeat(_) => assert!(ids.contains(&judge(record).unwrap().event_id)),
        }
    }
    assert_eq!((corrected, generator.truth().corrected), (400, 400));
    assert!(bad.is_empty(), "every correction came within the stretch");
}

#[test]
fn records_are_about_300_bytes() {
    let records: Vec<_> = generator(&config(10, 50_000)).wave(50_000).collect();
    let sizes: Vec<usize> = records.iter().map(|record| record.payload.as_ref().unwrap().len()).collect();
    let mean = sizes.iter().sum::<usize>() as f64 / sizes.len() as f64;
    assert!((250.0..350.0).contains(&mean), "{mean}");
    assert!(sizes.iter().all(|size| (200..500).contains(size)));
    let all: u64 = records.iter().map(GeneratedRecord::bytes).sum();
    // A record in a batch has at most 20 bytes of lengths and differences (KIP-98, record format 2).
    assert!(all / 50_000 + 20 <= broker::RECORD_BYTES_IN_LOG, "{}", all / 50_000);
}

#[test]
fn repeats_reach_as_near_and_as_far_as_promised() {
    let split = RepeatSplit { near: 0.4, far: 0.4, across: 0.2 };
    let config = GeneratorConfig { repeats: 0.3, repeat_split: split, ..config(11, 150_000) };
    let mut generator = generator(&config);
    let mut first_copies: HashMap<String, (usize, GeneratedRecord)> = HashMap::new();
    let mut far_places = Vec::new();
    let mut counted = RepeatCounts::default();
    let (mut same_bytes, mut later_attempt, mut restyled) = (0, 0, 0);
    for record in generator.wave(150_000) {
        let event = judge(&record).unwrap();
        let Role::Repeat(kind) = record.role else {
            let number = first_copies.len();
            assert!(first_copies.insert(event.event_id, (number, record)).is_none());
            continue;
        };
        let (number, first) = &first_copies[&event.event_id];
        let distance = first_copies.len() - number;
        assert_eq!((&record.topic, &record.key, &record.headers), (&first.topic, &first.key, &first.headers));
        assert_eq!(record.partition == first.partition, kind != RepeatKind::Across);
        match kind {
            RepeatKind::Near => {
                assert!(distance <= NEAR_EVENTS_MAX);
                counted.near += 1;
            }
            RepeatKind::Far => {
                counted.far += 1;
                far_places.push(*number as f64 / first_copies.len() as f64);
            }
            RepeatKind::Across => counted.across += 1,
        }
        let first_event = judge(first).unwrap();
        if record.payload == first.payload {
            same_bytes += 1;
        } else if event.attempt == first_event.attempt + 1 {
            later_attempt += 1;
            assert_eq!(Judged { attempt: first_event.attempt, ..event }, first_event);
        } else {
            restyled += 1;
            assert_eq!(event, first_event);
        }
    }
    assert_eq!(generator.truth().repeats, counted);
    let repeats = counted.total() as f64;
    for (count, share) in [(counted.near, 0.4), (counted.far, 0.4), (counted.across, 0.2)] {
        assert!((count as f64 / repeats - share).abs() < 0.01, "{counted:?}");
    }
    for (count, share) in [(same_bytes, 0.6), (restyled, 0.2), (later_attempt, 0.2)] {
        assert!((f64::from(count) / repeats - share).abs() < 0.01, "{count} of {repeats}");
    }
    // Uniform over the past: each tenth of it gets a tenth of the far repeats.
    for tenth in 0..10 {
        let inside = far_places.iter().filter(|place| (**place * 10.0) as usize == tenth).count();
        let share = inside as f64 / far_places.len() as f64;
        assert!((share - 0.1).abs() < 0.012, "tenth {tenth} has {share}");
    }
}

#[test]
fn far_repeats_reach_into_earlier_waves_but_not_beyond_their_bound() {
    let hour = Duration::from_secs(3_600);
    let config = GeneratorConfig {
        repeats: 0.5,
        repeat_split: RepeatSplit { near: 0.0, far: 1.0, across: 0.0 },
        far_back_max: 4 * hour,
        ..config(12, 400_000)
    };
    let mut generator = generator(&config);
    generator.skip(300_000);
    let mut oldest_ms = 0;
    for record in generator.wave(20_000) {
        if let Role::Repeat(_) = record.role {
            let back_ms = record.timestamp_ms.unwrap() - judge(&record).unwrap().event_time_ms;
            assert!(back_ms <= 4 * 3_600_000);
            oldest_ms = oldest_ms.max(back_ms);
        }
    }
    assert!(oldest_ms > 3_900_000 * 3, "{oldest_ms}");
}

#[test]
fn notifications_live_at_realistic_rates_and_in_order() {
    let config = GeneratorConfig { repeats: 0.0, ..config(13, 120_000) };
    let mut lives: HashMap<String, Vec<Judged>> = HashMap::new();
    let (mut last_timestamp_ms, mut latest_event_ms, mut out_of_order) = (0, 0, 0);
    for record in generator(&config).wave(120_000) {
        let timestamp_ms = record.timestamp_ms.unwrap();
        assert!(timestamp_ms >= last_timestamp_ms, "kafka timestamps never decrease");
        last_timestamp_ms = timestamp_ms;
        let event = judge(&record).unwrap();
        assert!(event.event_time_ms < timestamp_ms);
        assert_eq!(&*record.topic, format!("notifications.{}", event.event_type));
        assert_eq!(record.key.as_deref(), Some(event.notification_id.as_bytes()));
        out_of_order += u32::from(event.event_time_ms < latest_event_ms - 1_000);
        latest_event_ms = latest_event_ms.max(event.event_time_ms);
        lives.entry(event.notification_id.clone()).or_default().push(event);
    }
    assert!((1_000..12_000).contains(&out_of_order), "{out_of_order} events out of order");
    let span_ms = (last_timestamp_ms - config.start_ms) as f64;
    let expected_ms = 120_000.0 / config.events_per_second * 1e3;
    assert!((span_ms / expected_ms - 1.0).abs() < 0.02, "{span_ms} of {expected_ms}");
    let having = |event_type: &str, count: usize| {
        let has =
            |life: &&Vec<Judged>| life.iter().filter(|event| event.event_type == event_type).count() >= count;
        lives.values().filter(has).count() as f64
    };
    for (share, low, high) in [
        (having("sent", 1) / having("generated", 1), 0.965, 0.975),
        (having("delivered", 1) / having("sent", 1), 0.94, 0.96),
        (having("clicked", 1) / having("delivered", 1), 0.10, 0.13),
        (having("clicked", 2) / having("clicked", 1), 0.05, 0.11),
    ] {
        assert!((low..high).contains(&share), "{share} is not in {low}..{high}");
    }
    for life in lives.values_mut() {
        life.sort_by_key(|event| event.event_time_ms);
        let step =
            |event: &Judged| EventType::ALL.iter().position(|known| known.as_str() == event.event_type);
        for pair in life.windows(2) {
            assert!(pair[0].event_time_ms < pair[1].event_time_ms);
            let both_clicked = pair.iter().all(|event| event.event_type == "clicked");
            assert!(step(&pair[0]) < step(&pair[1]) || both_clicked, "{life:?}");
        }
        assert!(life.len() <= 5);
    }
}

#[test]
fn a_million_events_fall_into_a_few_days() {
    let mut generator = generator(&config(14, 1_000_000));
    generator.skip(999_000);
    let days = |record: GeneratedRecord| record.timestamp_ms.unwrap() - config::START_MS_DEFAULT;
    let span_ms = generator.wave(1_000).map(days).last().unwrap();
    assert!((1.9..2.1).contains(&(span_ms as f64 / 86_400_000.0)), "{span_ms}");
}

#[test]
fn keys_spread_evenly_over_the_topic_partitions() {
    let config = GeneratorConfig { topics: Topics::One("events".to_owned()), ..config(15, 160_000) };
    let mut counts = [0u32; 16];
    for record in generator(&config).wave(160_000) {
        counts[record.partition as usize] += 1;
    }
    assert!(counts.iter().all(|count| (9_000..11_000).contains(count)), "{counts:?}");
}

#[test]
fn repeats_across_become_near_or_far_where_there_is_no_other_topic_partition() {
    let split = RepeatSplit { near: 0.0, far: 0.0, across: 1.0 };
    let config =
        GeneratorConfig { repeats: 0.5, repeat_split: split, partitions_per_topic: 1, ..config(16, 5_000) };
    let mut generator = generator(&config);
    assert!(generator.wave(5_000).all(|record| record.partition == 0));
    let repeats = generator.truth().repeats;
    assert_eq!(repeats.across, 0);
    assert!(repeats.near > 1_000 && repeats.far > 1_000, "{repeats:?}");
}

#[test]
fn settings_outside_their_range_are_refused_by_name() {
    let good = config(0, 10);
    let too_much = [(ReasonCode::Tombstone, u64::MAX), (ReasonCode::EmptyKey, 1)];
    let split = RepeatSplit { near: 0.5, far: 0.6, across: 0.0 };
    let cases = [
        ("events", GeneratorConfig { events: 0, ..good.clone() }),
        ("repeats", GeneratorConfig { repeats: 1.0, ..good.clone() }),
        ("repeats", GeneratorConfig { repeats: f64::NAN, ..good.clone() }),
        ("repeat_split (its sum)", GeneratorConfig { repeat_split: split, ..good.clone() }),
        ("events_per_second", GeneratorConfig { events_per_second: 0.0, ..good.clone() }),
        ("disorder", GeneratorConfig { disorder: -0.1, ..good.clone() }),
        ("corrected", GeneratorConfig { corrected: 1.1, ..good.clone() }),
        ("partitions_per_topic", GeneratorConfig { partitions_per_topic: 0, ..good.clone() }),
        ("start_ms", GeneratorConfig { start_ms: i64::MAX, ..good.clone() }),
        ("bad", GeneratorConfig { bad: [(ReasonCode::UnknownField, 1)].into(), ..good.clone() }),
        ("bad", GeneratorConfig { bad: too_much.into(), ..good.clone() }),
        ("topics", GeneratorConfig { topics: Topics::One("a/b".to_owned()), ..good.clone() }),
        ("topics", GeneratorConfig { topics: Topics::PerType("x".repeat(245)), ..good.clone() }),
    ];
    for (expected, config) in cases {
        match Generator::new(&config) {
            Err(GenerateError::Setting { setting, .. }) => assert_eq!(setting, expected),
            other => panic!("{expected} was not refused: {other:?}"),
        }
    }
    Generator::new(&good).unwrap();
}

/// Hash of all records of each topic partition, in their order, and their number.
type Contents = BTreeMap<(String, i32), (u64, u64)>;

/// Sends a wave of the stream and says what each topic partition must hold now.
fn send_and_hash(sender: &Sender, wave: Wave<'_>) -> (Contents, Sent) {
    let mut hashes: BTreeMap<(String, i32), (Xxh3, u64)> = BTreeMap::new();
    let mut told = 0;
    let sent = sender
        .send(
            wave.inspect(|record| {
                let (hash, count) = hashes.entry((record.topic.to_string(), record.partition)).or_default();
                hash_record(hash, record);
                *count += 1;
            }),
            |records| told = records,
        )
        .unwrap();
    assert_eq!(told, sent.records);
    (hashes.into_iter().map(|(place, (hash, count))| (place, (hash.digest(), count))).collect(), sent)
}

/// Reads every topic partition from the beginning, which must be offset 0, to its end.
fn read_and_hash(broker: &Broker, topics: &[String], partitions: u32) -> Contents {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", broker.bootstrap())
        .set("group.id", "reader")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error")
        .create()
        .unwrap();
    let mut assignment = TopicPartitionList::new();
    let mut records_left = 0;
    for topic in topics {
        for partition in 0..partitions as i32 {
            let (low, high) = consumer.fetch_watermarks(topic, partition, Duration::from_secs(10)).unwrap();
            assert_eq!(low, 0, "{topic}[{partition}] lost its oldest records");
            records_left += high;
            assignment.add_partition_offset(topic, partition, Offset::Offset(0)).unwrap();
        }
    }
    consumer.assign(&assignment).unwrap();
    let mut hashes: BTreeMap<(String, i32), (Xxh3, u64)> = BTreeMap::new();
    while records_left > 0 {
        let message =
            consumer.poll(Duration::from_secs(20)).expect("records come while some are left").unwrap();
        let (hash, count) = hashes.entry((message.topic().to_owned(), message.partition())).or_default();
        assert_eq!(message.offset() as u64, *count, "offsets are dense");
        let headers: Vec<_> = message
            .headers()
            .map(|headers| headers.iter().map(|header| (header.key, header.value)).collect())
            .unwrap_or_default();
        hash_parts(hash, message.timestamp().to_millis(), message.key(), message.payload(), &headers);
        *count += 1;
        records_left -= 1;
    }
    hashes.into_iter().map(|(place, (hash, count))| (place, (hash.digest(), count))).collect()
}

#[test]
fn the_broker_holds_300_000_records_over_64_topic_partitions_byte_for_byte() {
    let config = GeneratorConfig { bad: bad_of_each_kind(100), ..config(17, 300_000) };
    let topics = config.topics.names();
    assert!(Broker::wave_records_max(&config.topics, config.partitions_per_topic) > 300_000);
    let broker = Broker::start().unwrap();
    broker.create_topics(&topics, config.partitions_per_topic).unwrap();
    let sender = Sender::connect(broker.bootstrap(), &BTreeMap::new()).unwrap();
    let mut generator = generator(&config);
    let (expected, sent) = send_and_hash(&sender, generator.wave(300_000));
    assert_eq!(sent.records, generator.truth().records);
    assert!(sent.bytes > 250 * sent.records);
    assert_eq!(expected.len(), 64);
    assert!(read_and_hash(&broker, &topics, config.partitions_per_topic) == expected);
}

#[test]
fn a_wave_of_the_promised_size_loses_nothing_even_uncompressed() {
    let per_type = Topics::PerType("notifications".to_owned());
    let one = Topics::One("events".to_owned());
    for (topics, partitions_per_topic) in [(per_type, 2), (one, 3)] {
        let events = Broker::wave_records_max(&topics, partitions_per_topic);
        let config = GeneratorConfig { topics, partitions_per_topic, ..config(18, events) };
        let topics = config.topics.names();
        let broker = Broker::start().unwrap();
        broker.create_topics(&topics, partitions_per_topic).unwrap();
        let plain = BTreeMap::from([("compression.type".to_owned(), "none".to_owned())]);
        let sender = Sender::connect(broker.bootstrap(), &plain).unwrap();
        let (expected, _) = send_and_hash(&sender, generator(&config).wave(events));
        assert!(read_and_hash(&broker, &topics, partitions_per_topic) == expected);
    }
}

#[test]
fn topics_that_fit_are_taken_as_they_are_and_others_refused_with_both_numbers() {
    let broker = Broker::start().unwrap();
    let topics: Vec<String> = ["a", "b"].map(str::to_owned).to_vec();
    broker.create_topics(&topics, 3).unwrap();
    create_topics(broker.bootstrap(), &BTreeMap::new(), &topics, 3).unwrap();
    let error = create_topics(broker.bootstrap(), &BTreeMap::new(), &topics, 4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "topic a has 3 partitions and 4 are asked for; name another topic or give 3 partitions"
    );
    assert!(matches!(broker.create_topics(&topics, 3), Err(GenerateError::TopicNotCreated { .. })));
}

#[test]
fn records_that_the_broker_does_not_confirm_are_an_error() {
    let broker = Broker::start().unwrap();
    let config = GeneratorConfig { partitions_per_topic: 4, ..config(19, 1_000) };
    // Topics with fewer topic partitions than the records name.
    broker.create_topics(&config.topics.names(), 1).unwrap();
    let sender = Sender::connect(broker.bootstrap(), &BTreeMap::new()).unwrap();
    let error = sender.send(generator(&config).wave(1_000), |_| {}).unwrap_err();
    assert!(matches!(error, GenerateError::NotConfirmed { .. } | GenerateError::Refused { .. }), "{error}");
}

#[test]
fn a_refused_property_is_named_without_its_value() {
    let properties = BTreeMap::from([("sasl.pasword".to_owned(), "hunter2".to_owned())]);
    let error = Sender::connect("localhost:1", &properties).unwrap_err();
    let mut texts = vec![error.to_string(), format!("{error:?}")];
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        texts.push(inner.to_string());
        source = inner.source();
    }
    assert!(texts[0].contains("sasl.pasword"), "{texts:?}");
    assert!(texts.iter().all(|text| !text.contains("hunter2")), "{texts:?}");
}

#[test]
fn every_type_has_its_topic_and_no_two_share_one() {
    let topics = Topics::PerType("x".to_owned());
    let names: BTreeSet<String> = topics.names().into_iter().collect();
    assert_eq!(names, ["x.generated", "x.sent", "x.delivered", "x.clicked"].map(str::to_owned).into());
    assert_eq!(Topics::One("y".to_owned()).names(), ["y"]);
}
