//! Ends of the protocol as reasons to stop: what happened, what is safe, and the way out.

use iceberg::TableIdent;

use crate::catalog::reason_of;
use crate::commit::ledger::{Kind, LedgerError, LedgerRecord};
use crate::commit::side::{Role, SideError};
use crate::commit::switch::SwitchError;
use crate::stop::{Reason, Stop};

/// The end of every way out that is only to try again. `JOB` is replaced by the file that the user named.
pub(crate) const RUN_AGAIN: &str =
    "nothing is lost, the next run goes on from the last commit:\n  tidemill run JOB";

/// Keeps what lies below an error, whose own text is said already.
pub(crate) fn below(
    error: impl std::error::Error + Send + Sync + 'static,
) -> Option<Box<dyn std::error::Error + Send + Sync>> {
    error.source().map(|source| chain(source).into())
}

/// The rest of a chain as one sentence.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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
pub(crate) fn disk(error: &(dyn std::error::Error + 'static)) -> bool {
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

/// A table that can not be read.
pub(crate) fn unreadable(table: &TableIdent, error: iceberg::Error) -> Stop {
    if error.kind() == iceberg::ErrorKind::TableNotFound {
        let what = format!("table {table} is gone: it was there when this run began");
        let way_out =
            "everything before is committed; put the table back under its name, then:\n  tidemill run JOB";
        return Stop::new(Reason::TableReplaced, what, way_out).because(error);
    }
    data(format!("table {table} can not be read"), reason_of(&error), error)
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

/// Where a commit stands when it fails.
#[derive(Debug, Clone, Copy)]
pub struct Committing<'a> {
    /// Epoch of the commit.
    pub epoch: u64,
    /// Who commits.
    pub(crate) owner: uuid::Uuid,
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
            let way_out = format!(
                "{}; mend what the catalog or its storage refuses, whose credentials stand in sink.iceberg.catalog; \
                 {RUN_AGAIN}",
                committing.unseen()
            );
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
    // A head that still carries a record of this very owner was moved by no rival: its schema or spec was changed.
    let is_rival = |record: &LedgerRecord| {
        record.epoch > committing.epoch
            || (record.epoch == committing.epoch && record.owner != committing.owner)
    };
    match inspect(metadata) {
        Ok(Found::Record(record) | Found::CutOff(record)) if is_rival(&record) => {
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

/// A side table that another ledger of the job wrote to while this one began.
pub(super) fn side_went_on(table: &TableIdent, role: Role) -> Stop {
    Stop::new(
        Reason::TableChanged,
        format!(
            "{} {table} was written to by another ledger of this job while this run began",
            role.table_in_words()
        ),
        format!("no event was read; {RUN_AGAIN}"),
    )
}

/// A side table that was found without the files of a batch, and has been given them since.
pub(super) fn came_meanwhile(table: &str, batch: u64) -> Stop {
    Stop::new(
        Reason::SideFilesLost,
        format!("table {table} has followed batch {batch} meanwhile, with the files that were found gone"),
        "this command has written nothing to it; put back what is still gone of these files, or take it out of that table \
         with your engine, then:\n  tidemill run JOB",
    )
}

/// The snapshot to which a side table of batch `side` is rolled back where main is at another batch, or another one of the same
/// number.
pub(super) fn where_main_is(side: u64, main: u64) -> String {
    if side == main { format!("before batch {main}") } else { format!("of batch {main} or before") }
}

/// A side table that could not follow.
pub fn side(error: SideError, committing: Committing<'_>) -> Stop {
    match error {
        error @ SideError::Ahead { side, main, .. } => Stop::new(
            Reason::TableRolledBack,
            error.to_string(),
            format!(
                "with your engine, roll main forward again, or the side table back to its last snapshot {} (tidemill.side in \
                 its summary), then:\n  tidemill run JOB",
                where_main_is(side, main)
            ),
        ),
        error @ SideError::OtherJob { .. } => Stop::new(
            Reason::OtherJob,
            error.to_string(),
            "main is committed, and nothing of its rows is lost; the next run claims the side table again, or says what to \
             put back:\n  tidemill run JOB",
        ),
        error @ SideError::NotRestorable { .. } => Stop::new(
            Reason::SideNotRestorable,
            error.to_string(),
            "nothing was read or written; roll main forward again with your engine, or bring the metadata file of that \
             batch of the side table back (register_table), then:\n  tidemill run JOB",
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
