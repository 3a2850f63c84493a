//! The dedup state of a life, as the protocol drives it: opened or rebuilt, prepared, published, swept.

use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

use super::copies::from_copy;
use super::keys::KeyMaker;
use super::owner::Owner;
use super::rebuild::{Restoring, restore, store_spec, total, widen};
use super::report::{Event, Report};
use super::stops;
use super::survey::state_folder;
use super::world::Outside;
use crate::commit::ledger::{BucketRecord, EraRecord, LedgerRecord};
use crate::dedup::{self, BucketTally, Era, GenerationName, GenerationRef, Store, StoreError, StoreSpec};
use crate::event_time::EventTimeMs;
use crate::job::Job;
use crate::memory::MemoryPlan;
use crate::mutant;
use crate::protocol::{DedupFacts, State, StateHome, generation};
use crate::stop::Stop;

/// Files that wait for a sweep before one is worth reading the folder: the inputs of one merge, or as many manifests. A
/// merge's inputs are then deleted with the first commit at which no kept generation names them.
const RETIRED_FILES_MIN: u64 = 8;

/// A store with what the protocol's steps need beside it.
pub(super) struct KeyState {
    pub(super) store: Store,
    folder: PathBuf,
    window: Duration,
    swept: bool,
}

impl KeyState {
    /// A damaged file is set aside, so that the next start misses it and rebuilds the state, as its stop says.
    pub(super) fn failed(&self, error: StoreError) -> Stop {
        if let StoreError::Corrupt { file, .. } = &error
            && let Err(error) = dedup::set_aside(&self.folder, file)
        {
            tracing::warn!(%error, file, "a damaged state file could not be set aside; delete it");
        }
        stops::state(&self.folder, error)
    }
}

impl State for KeyState {
    async fn prepare(
        &mut self,
        name: GenerationName,
        watermark: Option<EventTimeMs>,
    ) -> Result<DedupFacts, Stop> {
        if let Some(watermark) = watermark {
            let watermark = mutant!("expiry-by-wall-clock",
                EventTimeMs(chrono::Utc::now().timestamp_millis()) => watermark);
            self.store.expire_behind(watermark, self.window);
        }
        let generation = self.store.prepare(name).map_err(|error| self.failed(error))?;
        Ok(facts(&self.store, generation))
    }

    fn publish(&mut self) {
        self.store.publish();
    }

    fn abandon(&mut self) {
        self.store.abandon();
    }

    fn wants_sweep(&self) -> bool {
        !self.swept || self.store.retired_files() >= RETIRED_FILES_MIN
    }

    async fn sweep(&mut self, keep: &[GenerationRef], job_id: Uuid, epoch: u64) -> Result<(), StoreError> {
        self.swept = true;
        let present = dedup::list_generations(&self.folder, Some(job_id))?;
        // An older generation may have been lost with its folder; what is not there needs no keeping.
        let is_present = |kept: &&GenerationRef| present.iter().any(|found| found.reference == **kept);
        let keep: Vec<GenerationRef> = keep.iter().filter(is_present).cloned().collect();
        self.store.sweep(&keep, epoch).map(|_| ())
    }
}

/// What the ledger says of a generation that a store has prepared or uses.
pub(super) fn facts(store: &Store, generation: GenerationRef) -> DedupFacts {
    let (total, since) = (total(store.buckets()), store.complete_since());
    DedupFacts {
        generation,
        bucket_width_ms: store.bucket_width_ms(),
        eras: store.eras().iter().map(era_record).collect(),
        floor: store.floor(),
        complete_since: (since.0 > i64::MIN).then_some(since),
        keys: total.keys,
        digest: total.digest.to_string(),
        buckets: store.buckets().iter().map(bucket_record).collect(),
    }
}

fn era_record(era: &Era) -> EraRecord {
    EraRecord { until: era.until, bucket_width_ms: era.bucket_width_ms }
}

/// A bucket as the ledger counts it.
pub(super) fn bucket_record(bucket: &BucketTally) -> BucketRecord {
    BucketRecord {
        from: bucket.from.0,
        to: bucket.to.0,
        count: bucket.keys,
        digest: bucket.digest.to_string(),
    }
}

/// The state folder of a job, and the way from its tables back to it.
pub(super) struct Folder<'a> {
    job: &'a Job,
    path: PathBuf,
    keys: &'a KeyMaker,
    memory: &'a MemoryPlan,
    report: &'a mut dyn Report,
}

impl<'a> Folder<'a> {
    pub(super) fn new(
        job: &'a Job,
        keys: &'a KeyMaker,
        memory: &'a MemoryPlan,
        report: &'a mut dyn Report,
    ) -> Self {
        Self { job, path: state_folder(job), keys, memory, report }
    }
}

impl<'w> StateHome<Outside<'w>> for Folder<'_> {
    type State = KeyState;

    async fn open(
        &mut self,
        record: &LedgerRecord,
        named: Option<&GenerationRef>,
    ) -> Result<Result<KeyState, StoreError>, Stop> {
        if named.is_none() && record.lacks_generation() {
            return Ok(Err(StoreError::Missing { file: format!("of batch {}", record.batch) }));
        }
        let job = &self.job;
        // The width of the job's window rules for buckets to come, whatever the ledger's buckets have.
        let bucket_width_ms = dedup::bucket_width_ms(job.dedup.window, job.dedup.repeats);
        let spec = StoreSpec { bucket_width_ms, ..store_spec(record) };
        match Store::open(&self.path, spec, named, self.memory.dedup_lookup_bytes()) {
            Ok(store) => {
                let (folder, window) = (self.path.clone(), job.dedup.window);
                Ok(Ok(KeyState { store, folder, window, swept: false }))
            }
            Err(error) if error.is_rebuildable() => Ok(Err(error)),
            Err(error) => Err(stops::state(&self.path, error)),
        }
    }

    async fn rebuild(&mut self, owner: &mut Owner<'w>, why: &StoreError) -> Result<GenerationRef, Stop> {
        if let Some(named) = from_copy(owner, self.keys, self.memory, self.report).await? {
            return Ok(named);
        }
        self.report.event(&Event::Notice {
            text: format!(
                "the dedup state is not usable ({why}); rebuilding it from table {}",
                owner.world.terms.main
            ),
        });
        let restoring = Restoring { by: "run", salvage: true, release: false };
        let record = owner.record.clone();
        let restored = restore(owner, record, self.keys, self.memory, restoring, self.report).await?;
        self.report
            .event(&Event::Notice { text: format!("rebuilt the dedup state: {}", restored.in_words()) });
        Ok(generation(&owner.record.dedup).expect("a record that was just committed names its generation"))
    }

    async fn widen(&mut self, owner: &mut Owner<'w>, state: &mut KeyState) -> Result<(), Stop> {
        widen(owner, self.keys, self.memory, &mut state.store, self.report).await
    }

    fn failed(&self, error: StoreError) -> Stop {
        stops::state(&self.path, error)
    }
}
