//! Passes over real tables: a SQLite catalog, a local warehouse, one snapshot a microbatch.
//!
//! The oracle is the disk: what the metadata reaches must be there, what it does not reach must be gone, and the rows
//! are those that were written.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use iceberg::Catalog;
use iceberg::transaction::{ApplyTransactionAction, Transaction};
use tempfile::TempDir;
use uuid::{NoContext, Timestamp};

use super::retention::Ours;
use super::*;
use crate::commit::ledger::{LedgerRecord, PROPERTY};
use crate::commit::upkeep::Upkeep;
use crate::job::MaintenanceRule;
use crate::pipeline::world::CatalogTables;
use crate::protocol::{Request, switch::switch};
use crate::sink::durable::local_path;
use crate::sink::schema::create_main;
use crate::sink::testing::{append, catalog, events, job, read};
use crate::sink::writer::TableWriter;

const ROWS_PER_BATCH: i64 = 10;
const WRITER_BYTES: u64 = 32 << 20;

/// A table of a job, and the record of its last commit.
struct Stand {
    catalog: Arc<dyn Catalog>,
    table: Table,
    record: LedgerRecord,
    folder: TempDir,
}

impl Stand {
    async fn new(properties: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut job = job(folder.path());
        job.sink.partition_by.clear();
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        job.sink.table_properties = properties.collect();
        let catalog = catalog(&job).await;
        let table = create_main(catalog.as_ref(), &job).await.unwrap();
        let record = LedgerRecord { batch: 0, sequence: 0, ..crate::commit::ledger::tests::record() };
        Self { catalog, table, record, folder }
    }

    fn rules(&self) -> Rules {
        Rules::of(self.table.metadata().properties(), &MaintenanceRule::default()).unwrap()
    }

    fn keep(&self) -> Keep {
        Keep { now_ms: chrono::Utc::now().timestamp_millis(), ours: Ours::Generations(3) }
    }

    /// Data files of rows that no batch had before, as a microbatch writes them.
    async fn files(&self, number: i64) -> Vec<iceberg::spec::DataFile> {
        let mut writer = TableWriter::new(&self.table, Uuid::now_v7(), WRITER_BYTES, &[]).unwrap();
        writer.write(&events(number * ROWS_PER_BATCH, ROWS_PER_BATCH, 1)).await.unwrap();
        writer.finish().await.unwrap()
    }

    async fn send(&mut self, files: Vec<iceberg::spec::DataFile>, upkeep: Option<Upkeep>) {
        self.record.sequence += 1;
        self.record.attempt = Uuid::now_v7();
        let mut summary = self.record.to_summary();
        let mut properties =
            std::collections::BTreeMap::from([(PROPERTY.to_owned(), self.record.to_property())]);
        if let Some(upkeep) = &upkeep {
            summary.extend(upkeep.summary.clone());
            properties.extend(upkeep.properties.clone());
        }
        let request = Request {
            table: self.table.identifier().clone(),
            table_uuid: self.table.metadata().uuid(),
            attempt: self.record.attempt,
            files,
            summary,
            properties,
            back_to: None,
            properties_removed: Vec::new(),
            upkeep,
        };
        let tables = CatalogTables { catalog: Arc::clone(&self.catalog) };
        self.table = switch(&tables, &request, &|_| Ok(()), &|| {}).await.unwrap().table;
    }

    async fn microbatches(&mut self, count: i64) {
        for _ in 0..count {
            let number = i64::try_from(self.record.batch).unwrap();
            let files = self.files(number).await;
            self.record.batch += 1;
            self.record.dedup.generation = Some(format!("g{}", self.record.batch));
            self.send(files, None).await;
        }
    }

    /// A whole pass, without the search for orphans.
    async fn pass(&mut self, rules: &Rules) -> Done {
        let keep = self.keep();
        let Some(pass) = Pass::prepare(&self.table, rules, &keep, Uuid::now_v7()).await.unwrap() else {
            return Done::default();
        };
        self.commit(rules, &keep, &pass).await;
        let files_deleted = finish(&self.table, &pass.intent).await.unwrap();
        Done { files_deleted, ..pass.done }
    }

    async fn commit(&mut self, rules: &Rules, keep: &Keep, pass: &Pass) {
        let (rules, keep) = (rules.clone(), *keep);
        let planned = pass.expiring.clone();
        let leaving = move |metadata: &TableMetadata| {
            let mut leaving = expiring(metadata, &rules, &keep);
            leaving.retain(|id| planned.contains(id));
            leaving
        };
        let upkeep = Upkeep {
            expiring: Arc::new(leaving),
            merged: pass.merged.clone(),
            summary: [(SUMMARY.to_owned(), "{}".to_owned())].into(),
            properties: std::collections::BTreeMap::new(),
            beyond: None,
        };
        self.send(Vec::new(), Some(upkeep)).await;
    }

    async fn rows(&self) -> usize {
        read(&self.table, &["event_id"]).await.iter().map(|batch| batch.num_rows()).sum()
    }

    fn folder_of(&self, name: &str) -> PathBuf {
        local_path(&format!("{}/{name}", self.table.metadata().location())).unwrap().to_owned()
    }

    /// Files below the table's folder, without metadata files.
    fn on_disk(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        for folder in ["metadata", "data"] {
            let Ok(entries) = std::fs::read_dir(self.folder_of(folder)) else { continue };
            found.extend(entries.map(|entry| entry.unwrap().path()));
        }
        found.retain(|path| !path.to_str().unwrap().ends_with(".metadata.json"));
        found
    }

    fn metadata_files(&self) -> usize {
        let entries = std::fs::read_dir(self.folder_of("metadata")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".metadata.json")).count()
    }

    /// Everything that the table's snapshots reach.
    async fn reached(&self) -> BTreeSet<PathBuf> {
        let snapshots: Vec<SnapshotRef> = self.table.metadata().snapshots().cloned().collect();
        let reach = Reach::of(&self.table, &snapshots).await.unwrap();
        let mut files: BTreeSet<String> = reach.paths().cloned().collect();
        for manifest in reach.manifests() {
            let manifest = reach::load(&self.table, manifest).await.unwrap();
            let live = manifest.entries().iter().filter(|entry| entry.is_alive());
            files.extend(live.map(|entry| entry.file_path().to_owned()));
        }
        files.iter().map(|path| local_path(path).unwrap().to_owned()).collect()
    }

    fn ancestry(&self) -> Vec<i64> {
        crate::commit::ledger::ancestry(self.table.metadata())
            .map(|snapshot| snapshot.snapshot_id())
            .collect()
    }
}

fn small(rules: Rules) -> Rules {
    Rules { snapshots_min: 4, snapshots_max: Some(4), ..rules }
}

fn age(path: &Path, age: Duration) {
    let file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

#[tokio::test]
async fn after_a_pass_the_rows_are_the_same_and_the_disk_holds_what_the_table_reaches() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "5")]).await;
    stand.microbatches(30).await;
    let before = stand.ancestry();

    let done = stand.pass(&small(stand.rules())).await;

    assert_eq!((done.snapshots_expired, done.manifests_merged, done.manifests_written), (26, 30, 1));
    assert_eq!(stand.rows().await, 300);
    assert_eq!(stand.ancestry()[1..], before[..4], "the newest stay, below the pass's own snapshot");
    assert_eq!(stand.on_disk(), stand.reached().await);
    let head = stand.table.metadata().current_snapshot().unwrap().clone();
    let manifests = reach::manifests_of(&stand.table, &head).await.unwrap();
    assert_eq!((manifests.len(), manifests[0].existing_files_count), (1, Some(30)));
    assert_eq!(manifests[0].min_sequence_number, 1, "entries keep the sequence numbers that they have");
    let total = &head.summary().additional_properties["total-records"];
    assert_eq!(total, "300");
    assert!(matches!(
        crate::commit::ledger::inspect(stand.table.metadata()).unwrap(),
        crate::commit::ledger::Found::Record(record) if *record == stand.record
    ));
}

#[tokio::test]
async fn passes_between_microbatches_keep_the_table_as_small_as_after_the_first() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "5")]).await;
    let mut sizes = Vec::new();
    for _ in 0..4 {
        stand.microbatches(10).await;
        stand.pass(&small(stand.rules())).await;
        sizes.push((stand.table.metadata().snapshots().len(), stand.on_disk().len()));
    }
    // Data files grow, and nothing else does.
    let others: Vec<usize> = (0..4).map(|pass| sizes[pass].1 - (pass + 1) * 10).collect();
    assert_eq!(others[1..], [others[1]; 3], "{sizes:?}");
    assert!(others[0].abs_diff(others[1]) <= 1, "the first pass has no merged manifest below it: {sizes:?}");
    assert_eq!(sizes.iter().map(|(snapshots, _)| *snapshots).collect::<Vec<_>>(), [5, 5, 5, 5]);
    assert_eq!(stand.rows().await, 400);
    assert_eq!(stand.on_disk(), stand.reached().await);
}

#[tokio::test]
async fn a_snapshot_that_a_tag_names_is_read_after_everything_around_it_left() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "2")]).await;
    stand.microbatches(3).await;
    let tagged = stand.table.metadata().current_snapshot_id().unwrap();
    tag(&stand, tagged).await;
    stand.microbatches(20).await;

    stand.pass(&small(stand.rules())).await;

    assert!(stand.table.metadata().snapshot_by_id(tagged).is_some());
    let scan = stand.table.scan().snapshot_id(tagged).select(["event_id"]).build().unwrap();
    let batches: Vec<_> = scan.to_arrow().await.unwrap().collect().await;
    let rows: usize = batches.into_iter().map(|batch| batch.unwrap().num_rows()).sum();
    assert_eq!((rows, stand.rows().await), (30, 230));
    assert_eq!(stand.on_disk(), stand.reached().await);
}

/// The crate sets no tags, so the metadata file is written with one, under the name that the catalog knows.
async fn tag(stand: &Stand, snapshot_id: i64) {
    let location = stand.table.metadata_location().unwrap();
    let mut metadata = serde_json::to_value(stand.table.metadata()).unwrap();
    metadata["refs"]["savepoint"] = serde_json::json!({ "snapshot-id": snapshot_id, "type": "tag" });
    let metadata: TableMetadata = serde_json::from_value(metadata).unwrap();
    metadata.write_to(stand.table.file_io(), &location.parse().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_pass_that_ended_before_its_commit_is_undone_by_the_next() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "5")]).await;
    stand.microbatches(8).await;
    let before = stand.on_disk();
    let rules = small(stand.rules());
    let pass = Pass::prepare(&stand.table, &rules, &stand.keep(), Uuid::now_v7()).await.unwrap().unwrap();
    assert_eq!(stand.on_disk().difference(&before).count(), 3, "intent, merged manifest, merged list");
    drop(pass);

    let found = list_metadata(&stand.table).await.unwrap();
    let intents = unfinished(&stand.table, &found).await.unwrap();
    assert_eq!(intents.len(), 1);
    assert_eq!(finish(&stand.table, &intents[0]).await.unwrap(), 2);

    assert_eq!(stand.on_disk(), before, "no file that the table reaches was deleted");
    stand.pass(&rules).await;
    assert_eq!((stand.rows().await, stand.on_disk()), (80, stand.reached().await));
}

#[tokio::test]
async fn a_pass_that_ended_after_its_commit_is_finished_by_the_next_whatever_came_between() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "5")]).await;
    stand.microbatches(8).await;
    let rules = small(stand.rules());
    let keep = stand.keep();
    let pass = Pass::prepare(&stand.table, &rules, &keep, Uuid::now_v7()).await.unwrap().unwrap();
    stand.commit(&rules, &keep, &pass).await;
    stand.microbatches(2).await;

    let found = list_metadata(&stand.table).await.unwrap();
    for intent in unfinished(&stand.table, &found).await.unwrap() {
        assert!(finish(&stand.table, &intent).await.unwrap() > 0);
        assert_eq!(finish(&stand.table, &intent).await.unwrap(), already_gone(&intent), "twice is once");
    }
    assert_eq!((stand.rows().await, stand.on_disk()), (100, stand.reached().await));
}

/// A second finish asks for the same deletes again: the storage does not say what was there.
fn already_gone(intent: &Intent) -> usize {
    intent.files.iter().filter(|path| !local_path(path).unwrap().exists()).count()
}

#[tokio::test]
async fn a_commit_of_others_in_between_keeps_its_rows_and_the_merge_waits() {
    let mut stand = Stand::new(&[("commit.manifest.min-count-to-merge", "5")]).await;
    stand.microbatches(8).await;
    let rules = small(stand.rules());
    let keep = stand.keep();
    let pass = Pass::prepare(&stand.table, &rules, &keep, Uuid::now_v7()).await.unwrap().unwrap();
    let foreign = stand.files(100).await;
    append(stand.catalog.as_ref(), &stand.table, foreign).await;

    stand.commit(&rules, &keep, &pass).await;
    finish(&stand.table, &pass.intent).await.unwrap();

    let head = stand.table.metadata().current_snapshot().unwrap().clone();
    assert_eq!(reach::manifests_of(&stand.table, &head).await.unwrap().len(), 9, "nothing was merged");
    assert_eq!((stand.rows().await, stand.on_disk()), (90, stand.reached().await));
}

#[tokio::test]
async fn what_failed_attempts_left_goes_after_the_bound_and_what_others_left_stays() {
    let mut stand = Stand::new(&[]).await;
    stand.microbatches(2).await;
    let kept = stand.on_disk();
    let day = Duration::from_secs(86_400);
    let made_s = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() - 10 * day;
    let old = Uuid::new_v7(Timestamp::from_unix(NoContext, made_s.as_secs(), 0));
    let (metadata, data) = (stand.folder_of("metadata"), stand.folder_of("data"));
    let ours = [
        metadata.join(format!("{old}-m0.avro")),
        metadata.join(format!("snap-77-0-{old}.avro")),
        metadata.join(format!("{old}-merged-list.avro")),
        data.join(format!("{old}-0a1b2c3d-00000.parquet")),
    ];
    let four = Uuid::new_v4();
    let others = [
        metadata.join(format!("{four}-m0.avro")),
        data.join(format!("00000-0-{four}.parquet")),
        data.join(format!("{}-0a1b2c3d-00000.parquet", Uuid::now_v7())),
    ];
    let young = data.join(format!("{old}-0a1b2c3d-00001.parquet"));
    for path in ours.iter().chain(&others).chain([&young]) {
        std::fs::write(path, "lost").unwrap();
        age(path, if *path == young { day } else { 10 * day });
    }
    let orphans = Orphans {
        before_ms: chrono::Utc::now().timestamp_millis() - 3 * 86_400_000,
        in_data: true,
        metadata_files: true,
        dry_run: true,
    };
    let found = list_metadata(&stand.table).await.unwrap();
    assert_eq!(sweep(&stand.table, &found, &orphans).await.unwrap().orphans_deleted, 4);
    assert!(ours.iter().all(|path| path.exists()), "a dry run deletes nothing");

    let done = sweep(&stand.table, &found, &Orphans { dry_run: false, ..orphans }).await.unwrap();

    assert_eq!(done.orphans_deleted, 4);
    let mut expected = kept;
    expected.extend(others.iter().cloned().chain([young]));
    assert_eq!(stand.on_disk(), expected);
}

#[tokio::test]
async fn no_orphan_goes_while_a_file_of_the_table_is_not_where_it_should_be() {
    let mut stand = Stand::new(&[]).await;
    stand.microbatches(1).await;
    let file = stand.on_disk().into_iter().find(|path| path.extension().unwrap() == "parquet").unwrap();
    std::fs::remove_file(file).unwrap();
    let orphans = Orphans { before_ms: i64::MAX, in_data: true, metadata_files: true, dry_run: false };
    let error = sweep(&stand.table, &[], &orphans).await.unwrap_err();
    assert!(matches!(error, MaintenanceError::NamesDiffer { missing: 1, .. }), "{error}");
}

#[tokio::test]
async fn metadata_files_that_left_the_log_go_at_once_and_a_lost_race_after_the_bound() {
    let mut stand = Stand::new(&[("write.metadata.previous-versions-max", "3")]).await;
    stand.microbatches(12).await;
    assert_eq!(stand.metadata_files(), 13);
    let lost = format!("00011-{}.gz.metadata.json", Uuid::new_v4());
    let ahead = format!("00099-{}.gz.metadata.json", Uuid::new_v4());
    for name in [&lost, &ahead] {
        std::fs::write(stand.folder_of("metadata").join(name), "x").unwrap();
    }
    let orphans = Orphans { before_ms: 0, in_data: false, metadata_files: true, dry_run: false };
    let found = list_metadata(&stand.table).await.unwrap();
    assert_eq!(sweep(&stand.table, &found, &orphans).await.unwrap().metadata_files_deleted, 9);
    assert_eq!(stand.metadata_files(), 1 + 3 + 2, "the current one, the log, the two that are not of it");
    assert!(stand.table.metadata().metadata_log().iter().all(|entry| {
        local_path(&entry.metadata_file).unwrap().exists()
            && entry.metadata_file.ends_with(".gz.metadata.json")
    }));

    let late = Orphans { before_ms: i64::MAX, ..orphans };
    let found = list_metadata(&stand.table).await.unwrap();
    assert_eq!(sweep(&stand.table, &found, &late).await.unwrap().metadata_files_deleted, 1);
    assert!(stand.folder_of("metadata").join(ahead).exists(), "a version to come may be on its way");
}

#[tokio::test]
async fn a_table_that_is_not_to_be_collected_loses_no_snapshot() {
    let mut stand = Stand::new(&[("gc.enabled", "false"), ("commit.manifest-merge.enabled", "false")]).await;
    stand.microbatches(8).await;
    assert!(stand.pass(&small(stand.rules())).await.is_nothing());
    assert_eq!(stand.table.metadata().snapshots().len(), 8);
}

#[tokio::test]
async fn a_file_that_a_snapshot_of_others_removed_goes_with_the_last_snapshot_that_reads_it() {
    let mut stand = Stand::new(&[]).await;
    stand.microbatches(3).await;
    let metadata = stand.table.metadata();
    let leaving: Vec<SnapshotRef> = crate::commit::ledger::ancestry(metadata).skip(1).cloned().collect();
    assert!(!may_drop_data_files(metadata, &leaving), "appends only: no data file is looked at");
    for (place, operation) in [(0, "overwrite"), (1, "delete")] {
        let mut json = serde_json::to_value(metadata).unwrap();
        let id = crate::commit::ledger::ancestry(metadata).nth(place).unwrap().snapshot_id();
        for snapshot in json["snapshots"].as_array_mut().unwrap() {
            if snapshot["snapshot-id"].as_i64() == Some(id) {
                snapshot["summary"]["operation"] = operation.into();
            }
        }
        let metadata: TableMetadata = serde_json::from_value(json).unwrap();
        let leaving: Vec<SnapshotRef> = crate::commit::ledger::ancestry(&metadata).skip(1).cloned().collect();
        assert!(may_drop_data_files(&metadata, &leaving), "{operation} at {place}");
    }
}

#[tokio::test]
async fn the_folder_of_a_stand_is_its_own() {
    let stand = Stand::new(&[("write.data.path", "file:///elsewhere")]).await;
    assert!(names::own_data_folder(&stand.table).is_none());
    assert!(names::metadata_folder(&stand.table).contains(stand.folder.path().to_str().unwrap()));
    let transaction = Transaction::new(&stand.table);
    let update = transaction.update_table_properties().remove("write.data.path".to_owned());
    let table = update.apply(transaction).unwrap().commit(stand.catalog.as_ref()).await.unwrap();
    assert!(names::own_data_folder(&table).is_some());
}
