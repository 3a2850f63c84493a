//! The mark of a side table: how far it has followed main. `protocol/side.rs` moves it.

use std::collections::BTreeMap;

use iceberg::spec::TableMetadata;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ledger::{LedgerError, ancestry};
use super::switch::SwitchError;

/// What a side table is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Refused rows. A letter stands once per place, so those that are read again are known.
    DeadLetters,
    /// Late rows, and rows that nothing proves to be new. Main and this table hold each key once, but for the latter.
    Late,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 2] = [Self::DeadLetters, Self::Late];

    /// As the ledger and the mark name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeadLetters => "dead_letters",
            Self::Late => "late",
        }
    }

    /// The role of this name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// The table, in prose.
    pub fn table_in_words(self) -> &'static str {
        match self {
            Self::DeadLetters => "dead-letter table",
            Self::Late => "late table",
        }
    }

    /// Field of the job file that names the table.
    pub fn setting(self) -> &'static str {
        match self {
            Self::DeadLetters => "sink.iceberg.dead_letters.table",
            Self::Late => "sink.iceberg.late.table",
        }
    }

    /// Whether the dedup state is made of its rows too, so that none may stand there but what main's ledger knows.
    pub fn holds_keys(self) -> bool {
        self == Self::Late
    }
}

/// Table property and summary key of a side table's mark.
pub const MARK: &str = "tidemill.side";
/// Version of the mark that this program writes.
pub const FORMAT_VERSION: u32 = 1;

/// How far a side table has followed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideMark {
    /// Format version.
    pub format: u32,
    /// The job.
    pub job_id: Uuid,
    /// Its name.
    pub job_name: String,
    /// Name of its main table.
    pub main: String,
    /// Role of the table in the job, as in the ledger.
    pub role: String,
    /// Epoch of the writer.
    pub epoch: u64,
    /// Last microbatch whose files the table has received.
    pub batch: u64,
    /// Dedup generation of that microbatch: tells it from another one of the same number after a rollback.
    pub generation: Option<String>,
}

impl SideMark {
    /// Whether the mark is of the job of this name with this main table: after the main table was dropped and made
    /// again, that job has another id and may claim its side table again. Two living jobs never share both names.
    pub fn is_of(&self, job_name: &str, main: &str) -> bool {
        self.job_name == job_name && self.main == main
    }

    /// Whether main, at this batch and generation, can be what the mark followed.
    pub fn fits(&self, batch: u64, generation: Option<&str>) -> bool {
        self.batch < batch || (self.batch == batch && self.generation.as_deref() == generation)
    }
}

/// Why a side table could not follow.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SideError {
    /// The table's mark is above main's batch: main was rolled back.
    #[error("side table {table} is at batch {side}, main at another batch {main}: main was rolled back")]
    Ahead {
        /// The side table.
        table: String,
        /// Its batch.
        side: u64,
        /// Main's batch.
        main: u64,
    },
    /// The table carries the mark of another job.
    #[error("side table {table} belongs to job {found}, not to {expected}")]
    OtherJob {
        /// The side table.
        table: String,
        /// Job of the mark.
        found: Uuid,
        /// This job.
        expected: Uuid,
    },
    /// The mark can not be read.
    #[error("mark of side table {table}")]
    Mark {
        /// The side table.
        table: String,
        /// Why.
        source: LedgerError,
    },
    /// Main went back to a batch, and no snapshot of the table from then is kept.
    #[error("side table {table} keeps no snapshot of batch {batch}, to which main went back")]
    NotRestorable {
        /// The side table.
        table: String,
        /// Main's batch.
        batch: u64,
    },
    /// The commit did not land.
    #[error("side table {table} could not follow")]
    Switch {
        /// The side table.
        table: String,
        /// Why.
        source: SwitchError,
    },
}

/// Reads the newest mark: ancestry first, property second.
///
/// # Errors
/// [`LedgerError`] when the mark is newer than this program or broken.
pub fn inspect(metadata: &TableMetadata) -> Result<Option<SideMark>, LedgerError> {
    let on_ancestry =
        ancestry(metadata).find_map(|snapshot| snapshot.summary().additional_properties.get(MARK));
    let Some(text) = on_ancestry.or_else(|| metadata.properties().get(MARK)) else { return Ok(None) };
    parse(text).map(Some)
}

/// Batch that the text of a mark names, where it can be read.
pub fn batch_in(text: &str) -> Option<u64> {
    parse(text).ok().map(|mark| mark.batch)
}

/// What a table's history says of a batch that a ledger owes it, whoever marked the table since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Debt {
    /// It has the files.
    Paid,
    /// It lacks them.
    Open,
    /// The mark that would tell may have been expired, or another ledger has brought files since, and of the same records may
    /// have made the same rows.
    Unknown,
}

/// How a table stands with the files of a batch of this job. A ledger marks a table before it brings it files, and every
/// batch that it brings has a number of its own: marks of one number say that none came.
pub fn debt_of(metadata: &TableMetadata, job_id: Uuid, batch: u64) -> Debt {
    let (mut others, mut is_alone, mut is_whole) = (BTreeMap::new(), true, true);
    for snapshot in ancestry(metadata) {
        match snapshot.summary().additional_properties.get(MARK).map(|text| parse(text)) {
            Some(Ok(mark)) if mark.job_id == job_id && mark.batch >= batch => return Debt::Paid,
            Some(Ok(mark)) if mark.job_id == job_id => {
                return if is_alone { Debt::Open } else { Debt::Unknown };
            }
            Some(Ok(mark)) => is_alone &= *others.entry(mark.job_id).or_insert(mark.batch) == mark.batch,
            Some(Err(_)) => return Debt::Unknown,
            None => {}
        }
        is_whole = snapshot.parent_snapshot_id().is_none() && snapshot.sequence_number() <= 1;
    }
    if is_alone && is_whole { Debt::Open } else { Debt::Unknown }
}

/// The newest snapshot on the ancestry with which a side table was as main at this batch wants it: the last that followed
/// this batch or one before, or, if the table joined the job after it, the one with which it joined, which has no files.
/// `None` if it is not kept any more.
pub fn snapshot_of(
    metadata: &TableMetadata,
    job_id: Uuid,
    batch: u64,
    generation: Option<&str>,
) -> Option<i64> {
    let mut joined = None;
    for snapshot in ancestry(metadata) {
        let text = snapshot.summary().additional_properties.get(MARK);
        match text.map(|text| parse(text)) {
            Some(Ok(mark)) if mark.job_id == job_id => {
                if mark.fits(batch, generation) {
                    return Some(snapshot.snapshot_id());
                }
                joined = Some(snapshot.snapshot_id());
            }
            Some(Err(_)) => return None,
            _ => {}
        }
        let is_first = snapshot.parent_snapshot_id().is_none() && snapshot.sequence_number() <= 1;
        if is_first {
            return joined;
        }
    }
    None
}

fn parse(text: &str) -> Result<SideMark, LedgerError> {
    let corrupt =
        |why: serde_json::Error| LedgerError::Corrupt { place: MARK.to_owned(), why: why.to_string() };
    let value: serde_json::Value = serde_json::from_str(text).map_err(corrupt)?;
    match value["format"].as_u64() {
        Some(found) if found > u64::from(FORMAT_VERSION) => Err(LedgerError::Newer { found }),
        _ => serde_json::from_value(value).map_err(corrupt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> SideMark {
        SideMark {
            format: 1,
            job_id: Uuid::from_u128(1),
            job_name: "n".into(),
            main: "events.n".into(),
            role: "dead_letters".into(),
            epoch: 3,
            batch: 4,
            generation: Some("g".into()),
        }
    }

    #[test]
    fn the_golden_mark_of_format_1_is_read() {
        assert_eq!(parse(include_str!("../../fixtures/side-mark-1.json")).unwrap(), mark());
    }

    #[test]
    fn a_newer_mark_is_refused_by_name_and_a_broken_one_says_where_it_stands() {
        assert!(matches!(parse(r#"{"format": 2}"#), Err(LedgerError::Newer { found: 2 })));
        let error = parse("{}").unwrap_err().to_string();
        assert!(error.starts_with("ledger record in tidemill.side can not be read"), "{error}");
    }

    #[test]
    fn a_mark_fits_a_later_batch_and_its_own_but_not_another_of_the_same_number() {
        let mark = mark();
        assert!(mark.fits(5, Some("h")) && mark.fits(4, Some("g")));
        assert!(!mark.fits(4, Some("h")) && !mark.fits(4, None) && !mark.fits(3, Some("g")));
    }
}
