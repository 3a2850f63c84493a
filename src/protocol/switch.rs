//! One compare-and-swap on a head that was judged, and its outcome as a fact.
//!
//! Flow: [`Request`] -> guard on the head -> one request that asserts that head -> reload -> [`Landed`] or a named error
//!
//! Invariants
//! 1. A request is sent only onto a head that its guard accepts, and asserts that very head.
//! 2. Success is what a reload shows: the request's own attempt id on the ancestry. The catalog's answer decides nothing.
//! 3. Nothing is ever deleted here.
//!
//! An answer that is not a success leaves the request possibly in flight. Sending the same files again on a newer head
//! is still safe: both requests assert a head, the first to land moves it, the other fails.
//!
//! Bounds: [`SENDS_MAX`] requests, each followed by a reload; [`HEADS_MAX`] heads.

use std::time::Duration;

use iceberg::spec::TableMetadata;
use iceberg::{Error, ErrorKind};

use super::world::{Answer, Request, Tables};
use crate::catalog::reason_of;
use crate::commit::ledger;
use crate::commit::switch::SwitchError;
use crate::mutant;
use crate::stop::Reason;

/// Requests for one switch before its outcome is reported as unknown or refused.
pub(crate) const SENDS_MAX: u32 = 12;
/// Heads that one switch judges: others may move the table faster than a request gets there.
const HEADS_MAX: u32 = 64;
/// iceberg refuses a snapshot more than 60 s older than the table's last update; this much less is waited out.
const CLOCK_BEHIND_MS_MAX: i64 = 50_000;
/// Longest wait for a clock that was set back.
const CLOCK_WAIT_MAX: Duration = Duration::from_secs(300);

/// Judges the head that a request would be put on; an error says what stands there instead.
pub(crate) type Guard<'a> = dyn Fn(&TableMetadata) -> Result<(), String> + 'a;

/// A request that is on the ancestry of the table's current snapshot.
pub(crate) struct Landed<Table> {
    /// The table as reloaded.
    pub(crate) table: Table,
    /// Requests that were sent.
    pub(crate) sends: u32,
}

/// Sends a request until a reload shows what became of it; calls `sending` before each request.
///
/// # Errors
/// [`SwitchError`]. After `Away { sent: true }` and `Refused` the commit may still land: delete nothing.
pub(crate) async fn switch<T: Tables>(
    tables: &T,
    request: &Request<T::File>,
    guard: &Guard<'_>,
    sending: &dyn Fn(),
) -> Result<Landed<T::Table>, SwitchError> {
    let name = request.table.to_string();
    let away = |source, sent| SwitchError::Away { table: name.clone(), sent, source };
    let (mut sends, mut heads, mut definite) = (0, 0, true);
    // The last sequence number of the first head that a request asserted: what landed came after it.
    let mut asserted = None;
    let mut table = tables.load(&request.table).await.map_err(|source| away(source, false))?;
    loop {
        if has_landed::<T>(request, guard, &table, asserted)? {
            return Ok(Landed { table, sends });
        }
        if mutant!("resent-files-unchecked", false => sends > 0) {
            check_files(tables, request, &table).await?;
        }
        wait_for_clock(tables, &name, &table).await?;
        sending();
        let last = T::metadata(&table).last_sequence_number();
        let answer = tables.send(&table, request).await;
        heads += 1;
        let sent = matches!(answer, Answer::Done | Answer::Failed(_));
        let moved = matches!(answer, Answer::HeadMoved);
        sends += u32::from(sent);
        let error = error_of(answer);
        let refused = moved || error.as_ref().is_some_and(is_definite);
        definite = mutant!("lost-reply-forgotten", refused => definite && refused);
        if let Some(error) = &error {
            tracing::warn!(table = %name, sends, sent, %error, "commit was not answered with a success, reading back");
        }
        table = tables.load(&request.table).await.map_err(|source| away(source, sends > 0))?;
        asserted = asserted.or(sent.then_some(last));
        let landed = has_landed::<T>(request, guard, &table, asserted)?;
        if mutant!("catalog-word-believed", landed || error.is_none() && !moved => landed) {
            return Ok(Landed { table, sends });
        }
        if moved && heads < HEADS_MAX {
            continue;
        }
        let error = error.unwrap_or_else(|| {
            Error::new(
                ErrorKind::Unexpected,
                "the catalog reported success, and the table does not show the commit",
            )
        });
        if sends >= SENDS_MAX || !sent || definite {
            let definite = definite && !moved;
            return Err(SwitchError::Refused { table: name, sends, definite, source: Box::new(error) });
        }
        // The reload above is the condition; the pause keeps two writers from marching in step.
        tables.back_off(sends).await;
    }
}

fn error_of(answer: Answer) -> Option<Error> {
    match answer {
        Answer::Done => None,
        Answer::HeadMoved => {
            Some(Error::new(ErrorKind::PreconditionFailed, "the head moved before the request"))
        }
        Answer::NotSent(error) | Answer::Failed(error) => Some(error),
    }
}

/// Whether an answer says that the request was refused and not done (R7): no principal, no permission, no such thing.
fn is_definite(error: &Error) -> bool {
    let refused = matches!(reason_of(error), Reason::NotAuthorized | Reason::Usage);
    mutant!("refusal-asked-again", false => refused)
}

/// Landed, still to be sent, or an error that says why it must not be sent.
fn has_landed<T: Tables>(
    request: &Request<T::File>,
    guard: &Guard<'_>,
    table: &T::Table,
    asserted: Option<i64>,
) -> Result<bool, SwitchError> {
    let metadata = T::metadata(table);
    let name = || request.table.to_string();
    if mutant!("table-uuid-not-compared", false => metadata.uuid() != request.table_uuid) {
        let (expected, found) = (request.table_uuid, metadata.uuid());
        return Err(SwitchError::Replaced { table: name(), expected, found });
    }
    // The property says it too when the table was rolled back, to a snapshot whose ancestors were expired.
    let is_there = ledger::attempt_on_ancestry(metadata, request.attempt)
        || asserted.is_none_or(|last| ledger::came_after(metadata, last));
    if is_there && ledger::has_landed(metadata, request.attempt) {
        return Ok(true);
    }
    match guard(metadata) {
        Ok(()) => Ok(false),
        Err(found) => Err(SwitchError::Moved { table: name(), found, metadata: Box::new(metadata.clone()) }),
    }
}

/// Files may have been removed by an orphan clean-up between two sends.
async fn check_files<T: Tables>(
    tables: &T,
    request: &Request<T::File>,
    table: &T::Table,
) -> Result<(), SwitchError> {
    let gone = tables.missing(table, &request.files).await;
    let name = request.table.to_string();
    let gone = gone.map_err(|source| SwitchError::Away { table: name, sent: true, source })?;
    match gone.first() {
        None => Ok(()),
        Some(first) => Err(SwitchError::FilesGone { count: gone.len(), first: first.clone() }),
    }
}

async fn wait_for_clock<T: Tables>(tables: &T, name: &str, table: &T::Table) -> Result<(), SwitchError> {
    let mut waited = Duration::ZERO;
    loop {
        let behind_ms = T::metadata(table).last_updated_ms() - tables.now_ms();
        if behind_ms <= CLOCK_BEHIND_MS_MAX {
            return Ok(());
        }
        if waited > CLOCK_WAIT_MAX {
            return Err(SwitchError::ClockBehind { table: name.to_owned(), behind_ms });
        }
        tracing::warn!(table = name, behind_ms, "clock is behind the table's last update, waiting for it");
        let wait_ms = (behind_ms - CLOCK_BEHIND_MS_MAX).clamp(100, 10_000);
        let wait = Duration::from_millis(wait_ms.unsigned_abs());
        // Until this machine's clock has caught up, which the loop looks at again.
        tables.wait(wait).await;
        waited += wait;
    }
}
