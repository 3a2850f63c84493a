//! Maintenance by the owner of the tables: between microbatches when it is due, or by `table expire`.
//!
//! A pass commits as the owner commits everything (R5 to R7): a copy of the record on the head that carries the last one,
//! sent until a reload shows what became of it. Files are deleted only then ([`crate::maintenance`]). A side table's pass
//! carries its mark the same way, while it is owed nothing.
//!
//! A pass that can not read or delete ends with a notice and is tried again later; what a commit ends with, ends the
//! run, because the owner has to know its record.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iceberg::spec::TableMetadata;
use iceberg::table::Table;
use uuid::Uuid;

use super::owner::{Owner, prepare};
use super::report::{Event, Report};
use super::session::Session;
use super::start::Allow;
use super::survey::{follows, side_idents, uses};
use super::{RunOptions, stops};
use crate::catalog;
use crate::commit::ledger::{self, Found};
use crate::commit::side::{self, Role};
use crate::commit::upkeep::Upkeep;
use crate::job::MaintenanceRule;
use crate::job::file::LoadedJob;
use crate::maintenance::{
    self, Done, Keep, MaintenanceError, Orphans, Pass, PropertyError, Rules, SNAPSHOTS_EXPIRED_MAX, SUMMARY,
    retention::Ours,
};
use crate::mutant;
use crate::protocol::stops::chain;
use crate::protocol::{GENERATIONS_KEPT, World};
use crate::sink::schema;
use crate::stop::{Reason, Stop};

/// Table property: when the folder of data files was searched for orphans last, ms since the epoch.
const ORPHANS_SEARCHED: &str = "tidemill.orphans-searched-ms";
/// Time from one such search to the next: it lists and reads as much as the table is large.
const ORPHAN_SEARCH_INTERVAL_MS: i64 = 24 * 60 * 60 * 1_000;
/// Most passes of one command over one table.
const PASSES_MAX: usize = 1_000;

/// What `table expire` is asked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// Snapshots older than this leave; `None` = as table and job say.
    pub older_than: Option<Duration>,
    /// So many of each branch stay whatever their age; `None` = as the table says.
    pub retain_last: Option<usize>,
    /// Files of failed attempts older than this go; `None` = as the job says.
    pub orphans_older_than: Option<Duration>,
}

/// One table of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Which {
    Main,
    Side(Role),
}

/// How a pass ends badly.
#[derive(Debug, thiserror::Error)]
enum PassError {
    /// Nothing was sent, or it landed: the run can go on.
    #[error(transparent)]
    Maintenance(#[from] MaintenanceError),
    /// A rule of the table can not be followed.
    #[error(transparent)]
    Property(#[from] PropertyError),
    /// A commit that did not land.
    #[error("a commit of maintenance did not land")]
    Commit(Stop),
}

fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

/// Commits of a table since it was maintained last, as far as its ancestry is kept.
fn commits_since(metadata: &TableMetadata) -> usize {
    let was_maintained = |snapshot: &&iceberg::spec::SnapshotRef| {
        snapshot.summary().additional_properties.contains_key(SUMMARY)
    };
    ledger::ancestry(metadata).take_while(|snapshot| !was_maintained(snapshot)).count()
}

impl Session<'_> {
    /// Before a microbatch is begun: maintains the tables that took their number of commits.
    pub(super) async fn maintain_if_due(&mut self, report: &mut dyn Report) -> Result<(), Stop> {
        let rule = &self.owner.world.loaded.job.sink.maintenance;
        // Commits, not batches: renewals at rest leave snapshots too.
        let every = u64::from(rule.every_commits);
        if every == 0 {
            return Ok(());
        }
        for which in tables_of(&self.owner) {
            let commits = self.owner.record.sequence;
            if self.maintain_from_sequence.get(&which).is_some_and(|from| commits < *from) {
                continue;
            }
            if (commits_since(table_of(&self.owner, which).metadata()) as u64) < every {
                continue;
            }
            // Also where nothing is to be done, which no commit of the table tells.
            self.maintain_from_sequence.insert(which, commits + every);
            let mut keeper = Keeper { owner: &mut self.owner, rule };
            let (begun, table) = (Instant::now(), keeper.table(which).identifier().to_string());
            match keeper.pass(which, &Asked::default(), false).await {
                Ok(done) if done.is_nothing() => {}
                Ok(done) => {
                    let seconds = begun.elapsed().as_secs_f64();
                    report.event(&Event::Maintained { table, done, seconds });
                }
                Err(PassError::Commit(stop)) => return Err(stop),
                Err(error) => {
                    let text = format!(
                        "table {table} was not maintained, a later batch tries again: {}",
                        chain(&error)
                    );
                    report.event(&Event::Notice { text });
                }
            }
        }
        Ok(())
    }
}

/// An owner that keeps its tables small.
struct Keeper<'o, 'a> {
    owner: &'o mut Owner<'a>,
    rule: &'o MaintenanceRule,
}

fn table_of<'t>(owner: &'t Owner<'_>, which: Which) -> &'t Table {
    match which {
        Which::Main => &owner.main,
        Which::Side(role) => owner.side(role),
    }
}

fn tables_of(owner: &Owner<'_>) -> Vec<Which> {
    std::iter::once(Which::Main).chain(owner.sides.keys().map(|role| Which::Side(*role))).collect()
}

impl Keeper<'_, '_> {
    fn table(&self, which: Which) -> &Table {
        table_of(self.owner, which)
    }

    /// Whether main, as loaded last, carries the last commit of this owner.
    fn owns_head(&self) -> bool {
        match ledger::inspect(self.owner.main_metadata()) {
            Ok(Found::Record(last) | Found::CutOff(last)) => last.attempt == self.owner.record.attempt,
            _ => false,
        }
    }

    /// One pass over one table. `search` = look for orphans among the data files whenever that was done last.
    async fn pass(&mut self, which: Which, asked: &Asked, search: bool) -> Result<Done, PassError> {
        let record = &self.owner.record;
        if record.owes_side_tables() {
            // A side table waits for files that nothing names yet.
            return Ok(Done::default());
        }
        self.owner.reload().await.map_err(PassError::Commit)?;
        let mut table = self.table(which).clone();
        let rules = Rules::of(table.metadata().properties(), self.rule)?;
        let rules = rules.asked(asked.older_than, asked.retain_last);
        let keep = keep(which);
        let searches = search || is_search_due(table.metadata().properties(), keep.now_ms);
        let found = maintenance::list_metadata(&table).await?;
        let mut done = Done::default();
        if rules.collects {
            let intents = maintenance::unfinished(&table, &found).await?;
            if !intents.is_empty() || !self.owns_head() {
                // None of them is of a later epoch if this lands, and what it was judged by is not older than they are. Who
                // was fenced long ago must not judge what is an orphan either.
                mutant!("intents-finished-unproven", () => self.owner.renew().await.map_err(PassError::Commit)?);
                if let Which::Side(role) = which {
                    // The fence of this epoch moved main's head: a pass over a side table may still be on its way.
                    self.owner.fence_side(role).await.map_err(PassError::Commit)?;
                    self.owner.world.reach("maintenance_side_fenced");
                }
                self.owner.reload().await.map_err(PassError::Commit)?;
                table = self.table(which).clone();
            }
            for intent in intents {
                done.files_deleted += maintenance::finish(&table, &intent).await?;
            }
        }
        let pass = Pass::prepare(&table, &rules, &keep, Uuid::now_v7()).await?;
        // The time of a search stands in the commit of a pass, so that without one it would be done again and again.
        let in_data = search || (searches && pass.is_some());
        if let Some(pass) = pass {
            done.add(&self.carry_out(which, &rules, keep, pass, searches).await?);
        }
        if rules.collects {
            let orphan_age = asked.orphans_older_than.unwrap_or(self.rule.orphan_age);
            let orphans = orphans(&rules, orphan_age, keep.now_ms, in_data, false);
            done.add(&maintenance::sweep(self.table(which), &found, &orphans).await?);
            self.owner.world.reach("maintenance_swept");
        }
        Ok(done)
    }

    /// Commits a pass and deletes what it left unnamed. On a head that moved in between, what no longer fits is left out.
    async fn carry_out(
        &mut self,
        which: Which,
        rules: &Rules,
        keep: Keep,
        pass: Pass,
        searches: bool,
    ) -> Result<Done, PassError> {
        let (rules, planned) = (rules.clone(), pass.expiring.clone());
        let expiring = move |metadata: &TableMetadata| {
            let mut leaving = maintenance::expiring(metadata, &rules, &keep);
            leaving.retain(|id| planned.contains(id));
            leaving
        };
        let summary = serde_json::to_string(&pass.done).expect("counts are numbers");
        let searched = searches.then(|| (ORPHANS_SEARCHED.to_owned(), keep.now_ms.to_string()));
        let upkeep = Upkeep {
            expiring: Arc::new(expiring),
            merged: pass.merged.clone(),
            summary: BTreeMap::from([(SUMMARY.to_owned(), summary)]),
            properties: searched.into_iter().collect(),
            beyond: None,
        };
        if !self.commit(which, upkeep).await? {
            return Ok(Done::default());
        }
        self.owner.world.reach("maintenance_landed");
        let mut done = landed(self.table(which).metadata(), &pass);
        done.files_deleted = maintenance::finish(self.table(which), &pass.into_intent()).await?;
        self.owner.world.reach("maintenance_finished");
        Ok(done)
    }

    /// Whether it was sent: a side table that does not follow this job is left alone.
    async fn commit(&mut self, which: Which, upkeep: Upkeep) -> Result<bool, PassError> {
        match which {
            Which::Main => self.owner.keep_up_main(upkeep).await.map_err(PassError::Commit)?,
            Which::Side(role) => {
                let table = self.owner.side(role);
                let mark = side::inspect(table.metadata())
                    .map_err(|error| PassError::Commit(stops::ledger(table.identifier(), error)))?;
                let job_id = self.owner.record.job_id;
                let Some(mark) = mark.filter(|mark| mark.job_id == job_id) else { return Ok(false) };
                self.owner.keep_up_side(role, &mark, upkeep).await.map_err(PassError::Commit)?;
            }
        }
        Ok(true)
    }

    /// Passes over both tables until nothing more leaves.
    async fn expire_all(&mut self, asked: &Asked) -> Result<Vec<TableDone>, Stop> {
        let mut all = Vec::new();
        for which in tables_of(self.owner) {
            let mut total = Done::default();
            for number in 0..PASSES_MAX {
                let done = self.pass(which, asked, number == 0).await;
                let done = done.map_err(|error| failed(self.table(which), error))?;
                total.add(&done);
                if done.snapshots_expired < SNAPSHOTS_EXPIRED_MAX {
                    break;
                }
            }
            all.push(TableDone { table: self.table(which).identifier().to_string(), done: total });
        }
        Ok(all)
    }
}

fn keep(which: Which) -> Keep {
    let ours = match which {
        Which::Main => Ours::Generations(GENERATIONS_KEPT),
        // Where main goes back, so does a table with keys: to the marks of as many batches.
        Which::Side(role) if role.holds_keys() => Ours::Marks(GENERATIONS_KEPT + 1),
        Which::Side(_) => Ours::Marks(1),
    };
    Keep { now_ms: now_ms(), ours }
}

fn is_search_due(properties: &std::collections::HashMap<String, String>, now_ms: i64) -> bool {
    let last_ms = properties.get(ORPHANS_SEARCHED).and_then(|text| text.parse::<i64>().ok());
    last_ms.is_none_or(|last_ms| (now_ms - last_ms).abs() >= ORPHAN_SEARCH_INTERVAL_MS)
}

fn orphans(rules: &Rules, age: Duration, now_ms: i64, in_data: bool, dry_run: bool) -> Orphans {
    let age_ms = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    Orphans {
        before_ms: now_ms.saturating_sub(age_ms),
        in_data,
        metadata_files: rules.deletes_metadata_files,
        dry_run,
    }
}

/// What of a pass is true of the table that was read back.
fn landed(metadata: &TableMetadata, pass: &Pass) -> Done {
    let parent = metadata.current_snapshot().and_then(|snapshot| snapshot.parent_snapshot_id());
    let is_merged = pass.merged.as_ref().is_some_and(|merged| Some(merged.snapshot_id) == parent);
    Done {
        snapshots_expired: pass.expiring.iter().filter(|id| metadata.snapshot_by_id(**id).is_none()).count(),
        manifests_merged: if is_merged { pass.done.manifests_merged } else { 0 },
        manifests_written: if is_merged { pass.done.manifests_written } else { 0 },
        ..Done::default()
    }
}

/// What one table would lose or lost by `table expire`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct TableDone {
    /// Namespace and name.
    pub table: String,
    /// What was done, or would be.
    #[serde(flatten)]
    pub done: Done,
}

/// What `table expire` would do now. Asks the catalog and the storage, not the broker, and writes nothing.
///
/// # Errors
/// A [`Stop`]: catalog or storage do not answer, or a table has no record of this job.
pub async fn look(loaded: &LoadedJob, asked: &Asked) -> Result<Vec<TableDone>, Stop> {
    let job = &loaded.job;
    let catalog = catalog::connect(&job.sink.catalog).await.map_err(stops::catalog)?;
    let mut looked = Vec::new();
    let main = schema::table_ident(&job.sink.table).map_err(stops::schema)?;
    let sides = side_idents(job)?.into_iter().map(|(role, ident)| (Which::Side(role), ident));
    for (which, ident) in std::iter::once((Which::Main, main)).chain(sides) {
        let Some(table) = catalog::load(&*catalog, &ident).await.map_err(stops::catalog)? else { continue };
        if let Which::Side(role) = which
            && !uses(job, role)
            && !follows(&table, job).unwrap_or(false)
        {
            continue;
        }
        let done = would_do(&table, which, loaded, asked).await.map_err(|error| failed(&table, error))?;
        looked.push(TableDone { table: ident.to_string(), done });
    }
    Ok(looked)
}

async fn would_do(table: &Table, which: Which, loaded: &LoadedJob, asked: &Asked) -> Result<Done, PassError> {
    let rule = &loaded.job.sink.maintenance;
    let rules = Rules::of(table.metadata().properties(), rule)?.asked(asked.older_than, asked.retain_last);
    let keep = keep(which);
    let mut done = Done::default();
    if let Some(pass) = Pass::look(table, &rules, &keep, Uuid::now_v7()).await? {
        done.add(&Done { files_deleted: pass.files_to_go(), ..pass.done });
    }
    if rules.collects {
        let found = maintenance::list_metadata(table).await?;
        let orphan_age = asked.orphans_older_than.unwrap_or(rule.orphan_age);
        let orphans = orphans(&rules, orphan_age, keep.now_ms, true, true);
        done.add(&maintenance::sweep(table, &found, &orphans).await?);
    }
    Ok(done)
}

fn failed(table: &Table, error: PassError) -> Stop {
    let name = table.identifier();
    match error {
        PassError::Commit(stop) => stop,
        PassError::Maintenance(error) => {
            stops::data(format!("table {name} can not be maintained"), error.reason(), error)
        }
        PassError::Property(error) => Stop::new(
            Reason::Usage,
            format!("table {name} can not be maintained"),
            "nothing was changed; mend the property with any engine, then again:\n  tidemill table expire JOB",
        )
        .because(error),
    }
}

/// Expires snapshots and deletes files of a job's tables, as their owner: fence, passes, release.
///
/// # Errors
/// A [`Stop`], as a run's.
pub async fn expire(
    loaded: &LoadedJob,
    options: &RunOptions,
    asked: &Asked,
    confirm: &dyn Fn(&[TableDone]) -> Result<(), Stop>,
) -> Result<Vec<TableDone>, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    if prepared.record.is_none() {
        return Err(Stop::new(
            Reason::Usage,
            format!("table {} has no ledger yet: there is nothing to expire", prepared.survey.main_ident),
            format!("tidemill run {}", options.job_shown),
        ));
    }
    let looked = look(loaded, asked).await?;
    if looked.iter().all(|table| table.done.is_nothing()) {
        return Ok(looked);
    }
    confirm(&looked)?;
    let (mut owner, _, _) = prepared.take(&BTreeMap::new()).await?;
    let done = Keeper { owner: &mut owner, rule: &loaded.job.sink.maintenance }.expire_all(asked).await;
    owner.end(done).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_are_searched_once_a_day_and_again_after_a_clock_that_was_set_back() {
        let at = |ms: i64| [(ORPHANS_SEARCHED.to_owned(), ms.to_string())].into_iter().collect();
        let now_ms = 1_700_000_000_000;
        assert!(is_search_due(&std::collections::HashMap::new(), now_ms));
        assert!(!is_search_due(&at(now_ms - 1_000), now_ms));
        assert!(is_search_due(&at(now_ms - ORPHAN_SEARCH_INTERVAL_MS), now_ms));
        assert!(is_search_due(&at(now_ms + ORPHAN_SEARCH_INTERVAL_MS), now_ms));
    }
}
