//! Errors of stages as reasons to stop: the one place that knows all their types.

use std::path::Path;

use iceberg::TableIdent;

use crate::catalog::{CatalogError, reason_of};
use crate::commit::ledger::{Kind, LedgerError};
use crate::commit::lock::LockError;
use crate::commit::side::SideError;
use crate::commit::switch::SwitchError;
use crate::dedup::StoreError;
use crate::sink::schema::SchemaError;
use crate::source::{ACLS_NEEDED, SourceError};
use crate::stop::{Reason, Stop};

/// The end of every way out that is only to try again. `JOB` is replaced by the file that the user named.
const RUN_AGAIN: &str = "nothing is lost, the next run goes on from the last commit:\n  tidemill run JOB";

/// Kafka.
pub fn source(error: SourceError) -> Stop {
    let way_out = match error.reason() {
        Reason::NotAuthorized if !says_topic(&error) => {
            "nothing was read or written; mend the credentials in [source.kafka.properties], then:\n  tidemill run JOB"
                .to_owned()
        }
        Reason::SourceAway => format!("check that the brokers are up; {RUN_AGAIN}"),
        Reason::UnknownTopic => {
            "nothing was read or written; mend source.kafka.topics in the job file or create the topic, then:\n  \
             tidemill run JOB"
                .to_owned()
        }
        Reason::NotAuthorized => {
            "nothing was read or written; grant the principal READ and DESCRIBE on the topics, nothing else is needed, \
             then:\n  tidemill run JOB"
                .to_owned()
        }
        Reason::Usage => "nothing was read or written; mend the job file, then:\n  tidemill check JOB".to_owned(),
        Reason::OffsetsLost => {
            "everything before is committed; to go on without the lost events, with the ranges written into the \
             ledger:\n  tidemill accept-loss JOB"
                .to_owned()
        }
        Reason::TopicChanged => {
            "nothing was written; if the topic was made again on purpose (keys already seen stay seen):\n  \
             tidemill rebase-offsets JOB"
                .to_owned()
        }
        _ => format!("please report this; {RUN_AGAIN}"),
    };
    Stop::new(error.reason(), error.to_string(), way_out)
}

/// Whether a refusal is about topics, which an administrator grants, and not about who asks.
fn says_topic(error: &SourceError) -> bool {
    matches!(error, SourceError::NotAuthorized { needed, .. } if *needed == ACLS_NEEDED)
}

/// Kafka, in the middle of a batch.
pub fn reading(error: SourceError) -> Stop {
    let damaged = matches!(error, SourceError::Damaged { .. });
    let stop = source(error);
    let dropped = "the open batch was dropped, everything before it is committed";
    let way_out = match damaged {
        true => format!(
            "{dropped}; repair or delete the damaged records on the broker, then:\n  tidemill run JOB"
        ),
        false => ["nothing was read or written", "nothing was written", "everything before is committed"]
            .iter()
            .fold(stop.way_out, |text, untrue| text.replace(untrue, dropped)),
    };
    Stop { way_out, ..stop }
}

/// A signal asked the run to end.
pub fn interrupted() -> Stop {
    Stop::new(
        Reason::Interrupted,
        "interrupted by a signal",
        "an open batch was dropped, everything before it is committed; to go on:\n  tidemill run JOB",
    )
}

/// Catalog and warehouse.
pub fn catalog(error: CatalogError) -> Stop {
    let reason = error.reason();
    let way_out = match reason {
        Reason::CatalogAway => format!("check that the catalog and its storage are up; {RUN_AGAIN}"),
        Reason::StorageFailed => format!("free space for the catalog and the warehouse; {RUN_AGAIN}"),
        Reason::NotAuthorized => {
            "mend the credentials of sink.iceberg.catalog, or what they may do, then:\n  tidemill run JOB"
                .to_owned()
        }
        Reason::Usage => "mend sink.iceberg.catalog in the job file, then:\n  tidemill plan JOB".to_owned(),
        _ => format!("please report this; {RUN_AGAIN}"),
    };
    Stop { reason, what: error.to_string(), way_out, source: below(error) }
}

/// Tables.
pub fn schema(error: SchemaError) -> Stop {
    match error {
        SchemaError::Catalog(error) => catalog(error),
        error => Stop {
            reason: error.reason(),
            what: error.to_string(),
            way_out: "mend the columns or partition fields of the job file, then:\n  tidemill check JOB"
                .to_owned(),
            source: below(error),
        },
    }
}

/// Keeps what lies below an error, whose own text is said already.
fn below(
    error: impl std::error::Error + Send + Sync + 'static,
) -> Option<Box<dyn std::error::Error + Send + Sync>> {
    error.source().map(|source| chain(source).into())
}

/// The rest of a chain as one sentence.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

/// Whether a full or failing disk is below an error.
fn disk(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
            return matches!(io.kind(), StorageFull | QuotaExceeded | FileTooLarge | ReadOnlyFilesystem);
        }
        next = error.source();
    }
    let text = chain(error);
    ["No space left", "StorageFull", "File too large", "Disk quota"].iter().any(|sign| text.contains(sign))
}

/// A data file that can not be written or a scan that fails.
pub fn data(
    what: impl Into<String>,
    reason: Reason,
    error: impl std::error::Error + Send + Sync + 'static,
) -> Stop {
    let reason = if disk(&error) { Reason::StorageFailed } else { reason };
    let way_out = match reason {
        Reason::Usage => "mend the table's properties or the job file, then:\n  tidemill plan JOB".to_owned(),
        Reason::NotAuthorized => {
            "mend the credentials of the warehouse, or what they may do, then:\n  tidemill run JOB".to_owned()
        }
        Reason::Unexpected => format!("please report this; {RUN_AGAIN}"),
        Reason::StorageFailed => format!("free space in the warehouse; {RUN_AGAIN}"),
        _ => format!("check that the warehouse is reachable; {RUN_AGAIN}"),
    };
    Stop::new(reason, what, way_out).because(chain(&error))
}

/// The ledger.
pub fn ledger(table: &TableIdent, error: LedgerError) -> Stop {
    let (reason, way_out) = match error {
        LedgerError::Newer { .. } => {
            (Reason::FormatTooNew, "nothing was read or written; run the newer tidemill that wrote it")
        }
        _ => (
            Reason::LedgerCorrupt,
            "nothing was read or written; put the table property tidemill.ledger back from an earlier metadata file",
        ),
    };
    Stop::new(reason, format!("ledger of table {table} can not be used"), way_out).because(error)
}

/// The lock of the state folder.
pub fn lock(error: LockError) -> Stop {
    match error {
        held @ LockError::Held { .. } => Stop::new(
            Reason::Busy,
            held.to_string(),
            "nothing was read or written; the run in progress does the work, try again later:\n  tidemill run JOB",
        ),
        error => Stop {
            reason: Reason::StorageFailed,
            what: error.to_string(),
            way_out: format!("check state_dir: is it writable, is there space? {RUN_AGAIN}"),
            source: below(error),
        },
    }
}

/// The dedup state, where the caller can not rebuild it.
pub fn state(folder: &Path, error: StoreError) -> Stop {
    let newer = matches!(error, StoreError::NewerFormat { .. });
    let (reason, way_out) = if newer {
        (Reason::FormatTooNew, "nothing was read or written; run the newer tidemill that wrote it".to_owned())
    } else if disk(&error) {
        (Reason::StorageFailed, format!("free space in the state folder; {RUN_AGAIN}"))
    } else if error.is_rebuildable() {
        (Reason::StorageFailed, format!("the state is rebuilt from the table by the next run; {RUN_AGAIN}"))
    } else {
        (Reason::Unexpected, format!("please report this; {RUN_AGAIN}"))
    };
    Stop::new(reason, format!("dedup state in {} failed", folder.display()), way_out).because(chain(&error))
}

/// Where a commit stands when it fails.
#[derive(Debug, Clone, Copy)]
pub struct Committing<'a> {
    /// Epoch of the commit.
    pub epoch: u64,
    /// Whether this process has had a commit land: a lost race before that is BUSY, after it FENCED (R9).
    pub owned: bool,
    /// What the commit was to do.
    pub kind: Kind,
    /// The job file, for commands.
    pub job_shown: &'a str,
}

impl Committing<'_> {
    /// What is visible of a commit that did not land.
    fn unseen(&self) -> &'static str {
        match self.kind {
            Kind::Data => "nothing of this batch is visible, every one before it is committed",
            _ => "every batch before is committed, no batch was open",
        }
    }
}

/// A main commit that did not land.
pub fn switch(error: SwitchError, committing: Committing<'_>) -> Stop {
    match error {
        SwitchError::Moved { table, found, metadata } => moved(&table, &found, &metadata, committing),
        error @ SwitchError::Replaced { .. } => Stop::new(
            Reason::TableReplaced,
            error.to_string(),
            format!("{}; put the table back under its name, then:\n  tidemill run JOB", committing.unseen()),
        ),
        error @ SwitchError::FilesGone { .. } => Stop::new(
            Reason::StorageFailed,
            error.to_string(),
            format!("the batch is not visible (is an orphan-file clean-up too eager?); {RUN_AGAIN}"),
        ),
        error @ SwitchError::ClockBehind { .. } => Stop::new(
            Reason::CatalogAway,
            error.to_string(),
            format!("mend this machine's clock; {RUN_AGAIN}"),
        ),
        SwitchError::Refused { definite: true, ref source, .. } => {
            let way_out = format!("{}; mend what the catalog refuses; {RUN_AGAIN}", committing.unseen());
            Stop { reason: reason_of(source), what: error.to_string(), way_out, source: below(error) }
        }
        SwitchError::Away { sent: false, .. } | SwitchError::Refused { sends: 0, .. } => {
            let full = disk(&error);
            let reason = if full { Reason::StorageFailed } else { Reason::CatalogAway };
            let way_out = format!("{}; {RUN_AGAIN}", committing.unseen());
            Stop { reason, what: error.to_string(), way_out, source: below(error) }
        }
        error => Stop {
            reason: Reason::OutcomeUnknown,
            what: error.to_string(),
            way_out: "the commit may or may not be visible; nothing was deleted, and the next run finds out by itself:\n  \
                      tidemill run JOB"
                .to_owned(),
            source: below(error),
        },
    }
}

fn moved(
    table: &str,
    found: &str,
    metadata: &iceberg::spec::TableMetadata,
    committing: Committing<'_>,
) -> Stop {
    use crate::commit::ledger::{Found, inspect};
    match inspect(metadata) {
        Ok(Found::Record(record) | Found::CutOff(record)) if record.epoch >= committing.epoch => {
            if !committing.owned {
                return super::start::busy(
                    table,
                    Some(record.owner),
                    Some(record.lease_until_ms),
                    committing.job_shown,
                );
            }
            Stop::new(
                Reason::Fenced,
                format!(
                    "owner {} took table {table} over with epoch {}; this run has epoch {}",
                    record.owner, record.epoch, committing.epoch
                ),
                format!("{}; do not restart this copy unless the other one is to end", committing.unseen()),
            )
        }
        Ok(Found::RolledBack { .. }) => Stop::new(
            Reason::TableRolledBack,
            format!("table {table} was rolled back while a batch was written"),
            format!("{}; to see more:\n  tidemill plan {}", committing.unseen(), committing.job_shown),
        ),
        _ => Stop::new(
            Reason::TableChanged,
            format!("table {table} changed while a batch was written: {found}"),
            format!("{}; {RUN_AGAIN}", committing.unseen()),
        ),
    }
}

/// A side table that could not follow.
pub fn side(error: SideError, committing: Committing<'_>) -> Stop {
    match error {
        error @ SideError::Ahead { .. } => Stop::new(
            Reason::TableRolledBack,
            error.to_string(),
            "roll main forward again, or the side table back to the same batch, with your engine, then:\n  \
             tidemill run JOB",
        ),
        error @ SideError::OtherJob { .. } => Stop::new(
            Reason::OtherJob,
            error.to_string(),
            "nothing of its rows is lost; give each job a side table of its own (sink.iceberg.dead_letters.table), then:\n  \
             tidemill run JOB",
        ),
        SideError::Mark { table, source } => {
            let way_out = "put the table property tidemill.side back from an earlier metadata file, then:\n  tidemill run JOB";
            Stop::new(Reason::LedgerCorrupt, format!("mark of side table {table} can not be used"), way_out)
                .because(source)
        }
        SideError::Switch { table, source } => {
            let mut stop = switch(source, committing);
            stop.what = format!("side table {table} could not follow main: {}", stop.what);
            if !matches!(stop.reason, Reason::NotAuthorized | Reason::Usage) {
                stop.way_out =
                    "main is committed, and the next run brings the side table forward:\n  tidemill run JOB"
                        .to_owned();
            }
            stop
        }
    }
}
