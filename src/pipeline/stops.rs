//! Errors of stages as reasons to stop: the one place that knows all their types.

use std::path::Path;

use crate::catalog::CatalogError;
use crate::commit::lock::LockError;
use crate::dedup::StoreError;
use crate::protocol::stops::{RUN_AGAIN, below, chain, disk};
pub use crate::protocol::stops::{data, ledger};
use crate::sink::schema::SchemaError;
use crate::source::{ACLS_NEEDED, SourceError};
use crate::stop::{Reason, Stop};

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
        // Nothing that a ledger could jump over: what is behind it may be whole.
        Reason::OffsetsLost if matches!(error, SourceError::Damaged { .. }) => {
            "nothing was read or written; repair or delete the damaged records on the broker, then the same command again, \
             or:\n  tidemill run JOB"
                .to_owned()
        }
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

/// Kafka, in the middle of a batch that is dropped.
pub fn reading(error: SourceError) -> Stop {
    in_a_batch(error, "the open batch was dropped, everything before it is committed")
}

/// Kafka, in the middle of a batch that was closed with what was read before.
pub fn after_reading(error: SourceError) -> Stop {
    in_a_batch(error, "everything before is committed")
}

fn in_a_batch(error: SourceError, outcome: &str) -> Stop {
    let stop = source(error);
    let way_out = match stop.reason {
        // What differs may have been read since the last commit, and then there is nothing to rebase.
        Reason::TopicChanged => format!(
            "{outcome}; a start compares that with the log, goes on if it is still the same, and says what to do if it is \
             not:\n  tidemill run JOB"
        ),
        _ => ["nothing was read or written", "nothing was written", "everything before is committed"]
            .iter()
            .fold(stop.way_out, |text, untrue| text.replace(untrue, outcome)),
    };
    Stop { way_out, ..stop }
}

/// A signal asked the run to end.
pub fn interrupted() -> Stop {
    Stop::new(
        Reason::Interrupted,
        "interrupted by a signal",
        "what was read is committed, or is read again; to go on:\n  tidemill run JOB",
    )
}

/// A signal asked a requeue of dead letters to end.
pub fn requeue_interrupted() -> Stop {
    Stop::new(
        Reason::Interrupted,
        "interrupted by a signal",
        "letters that were decoded again are committed and marked; to go on with the others:\n  tidemill dead-letters \
         requeue JOB",
    )
}

/// A signal asked a side table's rows not to be read again.
pub fn reread_interrupted(job_shown: &str) -> Stop {
    Stop::new(
        Reason::Interrupted,
        "interrupted by a signal",
        format!(
            "nothing was changed; to read them again from the begin:\n  tidemill side reread {job_shown}"
        ),
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
    } else if matches!(error, StoreError::Io { .. }) {
        (
            Reason::StorageFailed,
            format!("check the disk of the state folder and its permissions; {RUN_AGAIN}"),
        )
    } else if matches!(error, StoreError::TooManyBuckets { .. }) {
        let way_out = "nothing was written; where all rows of a table are read for a lost ledger, leave those before its window \
                       out:\n  tidemill state adopt JOB --after-last-row\nwhere a run says so, widen dedup.window, whose \
                       buckets are then wider";
        (Reason::Usage, way_out.to_owned())
    } else {
        (Reason::Unexpected, format!("please report this; {RUN_AGAIN}"))
    };
    Stop::new(reason, format!("dedup state in {} failed", folder.display()), way_out).because(chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offset::{NextOffset, TopicPartition};

    fn differs() -> SourceError {
        SourceError::TailDiffers { places: vec![(TopicPartition::new("sent", 0), 99)] }
    }

    fn damaged() -> SourceError {
        let (topic_partition, from) = (TopicPartition::new("sent", 0), NextOffset::at(100));
        SourceError::Damaged { topic_partition, from, reads: 4, problem: "checksum".to_owned() }
    }

    #[test]
    fn a_log_that_differs_is_rebased_at_a_start_and_compared_again_in_the_middle_of_a_run() {
        assert!(source(differs()).way_out.ends_with("tidemill rebase-offsets JOB"));
        let stop = reading(differs());
        assert_eq!(stop.reason, Reason::TopicChanged);
        assert!(stop.way_out.starts_with("the open batch was dropped"), "{}", stop.way_out);
        assert!(stop.way_out.ends_with("tidemill run JOB"), "{}", stop.way_out);
    }

    #[test]
    fn damaged_records_are_no_loss_that_a_ledger_could_accept() {
        let outcomes = [
            (source(damaged()), "nothing was read or written"),
            (reading(damaged()), "the open batch was dropped, everything before it is committed"),
            (after_reading(damaged()), "everything before is committed"),
        ];
        for (stop, outcome) in outcomes {
            assert_eq!(stop.reason, Reason::OffsetsLost);
            assert!(stop.way_out.starts_with(outcome), "{}", stop.way_out);
            assert!(stop.way_out.ends_with("tidemill run JOB"), "{}", stop.way_out);
        }
    }
}
