//! Requests to the owner of a table, by those who are not it (R9).
//!
//! Flow: a command finds a live owner -> table property [`PREFIX`]`<uuid>` -> the owner reads it between two microbatches ->
//! its next commit states what was asked and removes the property, both or neither
//!
//! A request is a wish, not a fact: it moves no snapshot and carries no record, so it can not come between an owner and its
//! head. It may arrive twice, when an answer was lost and it was sent again; each kind of request says why that is no harm.
//!
//! Bounds: `REQUEST_BYTES_MAX` a request, `REQUESTS_MAX` looked at in a turn.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ledger::LIVE_LANE;
use crate::offset::NextOffset;

/// First part of the property's name; the rest is an identity of its own.
pub const PREFIX: &str = "tidemill.request.";
/// Version of the requests that this program writes.
pub const FORMAT_VERSION: u32 = 1;
/// Longest request: a property is read with every load of the table. About 30,000 topic partitions.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Most requests that are looked at in one turn; the others wait for the next.
const REQUESTS_MAX: usize = 64;
/// Longest name of a lane.
const LANE_NAME_BYTES_MAX: usize = 40;

/// A request as it stands in the property.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Format version of this request.
    pub format: u32,
    /// Identity of the job that is asked; another job's owner, by a copied table, passes it over.
    pub job_id: Uuid,
    /// What is asked.
    pub ask: Ask,
}

/// What an owner may be asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// To read a backfill. A name that is known already is passed over, so a second arrival changes nothing.
    Backfill(NewLane),
    /// To leave a backfill alone for now. True twice if it is true once.
    PauseLane {
        /// Its name.
        lane: String,
    },
    /// To go on with a backfill.
    ResumeLane {
        /// Its name.
        lane: String,
        /// Largest share of dead letters that a microbatch of it may have from now on; without one it stays as it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        letters_ratio_max: Option<f64>,
    },
    /// To forget a backfill. Rows that it wrote stay.
    DropLane {
        /// Its name.
        lane: String,
    },
    /// To make a savepoint of the last commit. One that stands already stays as it is, so a second arrival changes nothing.
    CreateSavepoint {
        /// Its name.
        savepoint: String,
    },
    /// To let go of a savepoint. One that is gone is passed over.
    DropSavepoint {
        /// Its name.
        savepoint: String,
    },
}

/// A backfill as its user approved it: offsets are resolved before it is registered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewLane {
    /// Its name.
    pub lane: String,
    /// First Kafka timestamp of its range, ms since the epoch.
    pub from_ms: i64,
    /// First Kafka timestamp after its range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<i64>,
    /// What is read, by topic and topic partition.
    pub spans: BTreeMap<String, BTreeMap<i32, Span>>,
}

/// Offsets of one topic partition, half-open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First offset.
    pub start: NextOffset,
    /// One past the last offset.
    pub end: NextOffset,
}

impl NewLane {
    /// Offsets in all its spans, control records and gaps included.
    pub fn offsets(&self) -> u64 {
        let spans = self.spans.values().flat_map(BTreeMap::values);
        spans.map(|span| u64::try_from(span.end.get() - span.start.get()).unwrap_or(0)).sum()
    }
}

/// What became of a property that should hold a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Read {
    /// A request of this job.
    Request(Request),
    /// Nothing that this program understands, and why.
    Garbage(String),
}

impl Request {
    /// The property's name and text.
    pub fn to_property(&self, id: Uuid) -> (String, String) {
        let text = serde_json::to_string(self).expect("a request has string keys and integers");
        (format!("{PREFIX}{id}"), text)
    }
}

/// Requests that stand in a table's properties, in the order of their names, which is that of their time.
pub fn read(properties: &HashMap<String, String>, job_id: Uuid) -> Vec<(String, Read)> {
    let mut found: Vec<(&String, &String)> =
        properties.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    found.sort();
    found.truncate(REQUESTS_MAX);
    found.into_iter().map(|(name, text)| (name.clone(), read_one(text, job_id))).collect()
}

fn read_one(text: &str, job_id: Uuid) -> Read {
    if text.len() > REQUEST_BYTES_MAX {
        return Read::Garbage(format!("it has {} bytes, {REQUEST_BYTES_MAX} are possible", text.len()));
    }
    // The version first: a newer request is never half understood.
    let version = serde_json::from_str::<serde_json::Value>(text);
    match version.as_ref().ok().and_then(|value| value["format"].as_u64()) {
        Some(newer) if newer > u64::from(FORMAT_VERSION) => {
            return Read::Garbage(format!("its format {newer} is newer than {FORMAT_VERSION}"));
        }
        _ => {}
    }
    match serde_json::from_str::<Request>(text) {
        Err(error) => Read::Garbage(error.to_string()),
        Ok(request) if request.job_id != job_id => {
            Read::Garbage(format!("it is meant for job {}", request.job_id))
        }
        Ok(request) => Read::Request(request),
    }
}

/// Whether a backfill may have this name.
pub fn is_lane_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    (1..=LANE_NAME_BYTES_MAX).contains(&name.len()) && name != LIVE_LANE && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ask: Ask) -> Request {
        Request { format: FORMAT_VERSION, job_id: Uuid::from_u128(1), ask }
    }

    fn new_lane() -> NewLane {
        let span = Span { start: NextOffset::at(5), end: NextOffset::at(9) };
        let spans = BTreeMap::from([("sent".to_owned(), BTreeMap::from([(0, span)]))]);
        NewLane { lane: "june".into(), from_ms: 10, to_ms: None, spans }
    }

    #[test]
    fn requests_come_back_in_the_order_of_their_identities_and_other_properties_are_none() {
        let asks = [Ask::Backfill(new_lane()), Ask::DropLane { lane: "may".into() }];
        let mut properties = HashMap::from([("tidemill.ledger".to_owned(), "{}".to_owned())]);
        for (ask, id) in asks.iter().zip([7, 3]) {
            let (name, text) = request(ask.clone()).to_property(Uuid::from_u128(id));
            properties.insert(name, text);
        }
        let found: Vec<Read> =
            read(&properties, Uuid::from_u128(1)).into_iter().map(|(_, read)| read).collect();
        assert_eq!(found, [&asks[1], &asks[0]].map(|ask| Read::Request(request(ask.clone()))));
    }

    #[test]
    fn a_request_keeps_its_words_because_owners_of_other_versions_read_them() {
        let (_, text) = request(Ask::Backfill(new_lane())).to_property(Uuid::nil());
        assert_eq!(
            text,
            r#"{"format":1,"job_id":"00000000-0000-0000-0000-000000000001","ask":{"backfill":{"lane":"june","from_ms":10,"spans":{"sent":{"0":{"start":5,"end":9}}}}}}"#
        );
        let create = Ask::CreateSavepoint { savepoint: "before".into() };
        let (_, text) = request(create).to_property(Uuid::nil());
        assert!(text.ends_with(r#""ask":{"create_savepoint":{"savepoint":"before"}}}"#), "{text}");
    }

    #[test]
    fn what_is_newer_broken_or_of_another_job_is_named_and_never_half_understood() {
        let (_, own) = request(Ask::PauseLane { lane: "june".into() }).to_property(Uuid::nil());
        for (text, why) in [
            (own.replace("\"format\":1", "\"format\":2"), "its format 2 is newer than 1"),
            (own.replace("pause_lane", "burn_lane"), "unknown variant `burn_lane`"),
            (own.replace("000000000001", "000000000002"), "it is meant for job"),
            (own[..own.len() - 1].to_owned(), "EOF while parsing"),
            ("x".repeat(REQUEST_BYTES_MAX + 1), "1048577 bytes"),
        ] {
            match read_one(&text, Uuid::from_u128(1)) {
                Read::Garbage(found) => assert!(found.contains(why), "{found}"),
                Read::Request(request) => panic!("{request:?}"),
            }
        }
    }

    #[test]
    fn a_lane_has_a_plain_name_that_is_not_the_live_lanes() {
        assert!(is_lane_name("june_2026-a"));
        for name in ["", "live", "June", "a b", "a.b", &"x".repeat(41)] {
            assert!(!is_lane_name(name), "{name}");
        }
    }
}
