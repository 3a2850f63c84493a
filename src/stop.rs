//! Why a run ended before its work was done: a named reason, an exit code, and the way out.

use std::fmt;

/// Exit code of a run that did its work.
pub const EXIT_DONE: u8 = 0;
/// Exit code of an error that no other code names: report it.
pub const EXIT_UNEXPECTED: u8 = 1;
/// Exit code of a wrong command line or job file.
pub const EXIT_USAGE: u8 = 2;

/// A named reason. 10 to 19: try again later; 20 to 29: a person decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The job file or command line is wrong.
    Usage,
    /// Another owner works on the table.
    Busy,
    /// Kafka does not answer.
    SourceAway,
    /// The catalog or the warehouse does not answer.
    CatalogAway,
    /// Interrupted by a signal; work that was begun is resolved by the next run.
    Interrupted,
    /// The disk of the state folder or the warehouse is full or fails.
    StorageFailed,
    /// A commit was sent and its outcome could not be read back.
    OutcomeUnknown,
    /// The table's schema or spec changed under an open batch.
    TableChanged,
    /// Another owner took the table over.
    Fenced,
    /// Too many dead letters.
    Brake,
    /// Offsets that were to be read are gone from the broker, or lie past its end.
    OffsetsLost,
    /// The topic was made again, or the record before the next offset is another one.
    TopicChanged,
    /// The cluster is another one.
    ClusterChanged,
    /// A topic does not exist.
    UnknownTopic,
    /// The broker or catalog refuses the principal.
    NotAuthorized,
    /// The table's schema or partition spec is not the job's.
    SchemaDiffers,
    /// The table carries the ledger of another job.
    OtherJob,
    /// The table has rows and no ledger.
    TableNotEmpty,
    /// The state folder has generations of this job and the table has no ledger.
    LedgerLost,
    /// The table or a side table was replaced or is missing.
    TableReplaced,
    /// The table was rolled back below our last commit.
    TableRolledBack,
    /// The dedup key's definition differs from the ledger's.
    KeySpecChanged,
    /// Ledger or state was written by a newer program, or the table's format is not supported.
    FormatTooNew,
    /// A side table's files are gone.
    SideFilesLost,
    /// Main went back to a batch of which a side table keeps no snapshot.
    SideNotRestorable,
    /// Ledger record can not be read.
    LedgerCorrupt,
    /// Keys rebuilt from the tables are not those that the ledger counts.
    MissingKeys,
    /// Something that can not happen happened.
    Unexpected,
}

impl Reason {
    /// Stable name for logs and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usage => "USAGE",
            Self::Busy => "BUSY",
            Self::SourceAway => "SOURCE_AWAY",
            Self::CatalogAway => "CATALOG_AWAY",
            Self::Interrupted => "INTERRUPTED",
            Self::StorageFailed => "STORAGE_FAILED",
            Self::OutcomeUnknown => "OUTCOME_UNKNOWN",
            Self::TableChanged => "TABLE_CHANGED",
            Self::Fenced => "FENCED",
            Self::Brake => "BRAKE",
            Self::OffsetsLost => "OFFSETS_LOST",
            Self::TopicChanged => "TOPIC_CHANGED",
            Self::ClusterChanged => "CLUSTER_CHANGED",
            Self::UnknownTopic => "UNKNOWN_TOPIC",
            Self::NotAuthorized => "NOT_AUTHORIZED",
            Self::SchemaDiffers => "SCHEMA_DIFFERS",
            Self::OtherJob => "OTHER_JOB",
            Self::TableNotEmpty => "TABLE_NOT_EMPTY",
            Self::LedgerLost => "LEDGER_LOST",
            Self::TableReplaced => "TABLE_REPLACED",
            Self::TableRolledBack => "TABLE_ROLLED_BACK",
            Self::KeySpecChanged => "KEY_SPEC_CHANGED",
            Self::FormatTooNew => "FORMAT_TOO_NEW",
            Self::SideFilesLost => "SIDE_FILES_LOST",
            Self::SideNotRestorable => "SIDE_NOT_RESTORABLE",
            Self::LedgerCorrupt => "LEDGER_CORRUPT",
            Self::MissingKeys => "MISSING_KEYS",
            Self::Unexpected => "UNEXPECTED",
        }
    }

    /// Exit code of the process.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => EXIT_USAGE,
            Self::Busy => 10,
            Self::SourceAway => 11,
            Self::CatalogAway => 12,
            Self::Interrupted => 13,
            Self::StorageFailed => 14,
            Self::OutcomeUnknown => 15,
            Self::TableChanged => 16,
            Self::Fenced => 20,
            Self::Brake => 21,
            Self::OffsetsLost => 22,
            Self::TopicChanged | Self::ClusterChanged | Self::UnknownTopic => 23,
            Self::TableReplaced | Self::TableRolledBack => 24,
            Self::OtherJob | Self::TableNotEmpty | Self::LedgerLost | Self::LedgerCorrupt => 25,
            Self::SchemaDiffers | Self::KeySpecChanged => 26,
            Self::FormatTooNew => 27,
            Self::NotAuthorized => 28,
            Self::SideFilesLost | Self::SideNotRestorable | Self::MissingKeys => 29,
            Self::Unexpected => EXIT_UNEXPECTED,
        }
    }
}

/// A run ended: what happened, what is safe, and what to do.
#[derive(Debug, thiserror::Error)]
pub struct Stop {
    /// The named reason.
    pub reason: Reason,
    /// What happened, with names and both numbers where two disagree.
    pub what: String,
    /// What is true of the data now, and the one command that goes on. May hold several lines.
    pub way_out: String,
    /// The error below, if any.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Stop {
    /// A stop without an error below.
    pub fn new(reason: Reason, what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { reason, what: what.into(), way_out: way_out.into(), source: None }
    }

    /// Puts the job file that the user named in the place of `JOB` in commands.
    pub fn for_job(mut self, job_shown: &str) -> Self {
        self.way_out = self.way_out.replace(" JOB", &format!(" {job_shown}"));
        self
    }

    /// Adds the error below.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.what)
    }
}
