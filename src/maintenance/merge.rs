//! Small manifests into larger ones: a commit adds one each time, and a reader opens every one of them.
//!
//! The live entries of several manifests are written into one as existing, with the snapshot and the sequence numbers
//! that they have. Entries of deleted files end here, as in Iceberg's own merge: a file that is gone needs no mention
//! in a later snapshot. Deletes manifests and manifests of a spec that can not be written any more stay as they are.
//!
//! Bounds: a merged manifest holds at most [`ENTRIES_MAX`] data files, a few tens of MB while it is made.

use std::collections::BTreeMap;

use iceberg::spec::{
    Manifest, ManifestContentType, ManifestFile, ManifestListWriter, ManifestWriterBuilder, PartitionSpec,
    Schema, SnapshotRef,
};
use iceberg::table::Table;
use uuid::Uuid;

use super::rules::MergeRule;
use super::{MaintenanceError, names, reach};
use crate::commit::upkeep::MergedHead;
use crate::sink::durable::sync_folders;

/// Most data files in a merged manifest.
pub(super) const ENTRIES_MAX: u64 = 8_192;

/// A merge that is planned.
pub(super) struct Merging {
    head: SnapshotRef,
    manifests: Vec<ManifestFile>,
    /// Places in `manifests`, each group to become one.
    bins: Vec<Vec<usize>>,
    attempt: Uuid,
    folder: String,
}

impl Merging {
    /// What is to be merged of the head, if there is enough of it.
    pub(super) async fn plan(
        table: &Table,
        head: &SnapshotRef,
        rule: &MergeRule,
        attempt: Uuid,
    ) -> Result<Option<Self>, MaintenanceError> {
        let manifests = reach::manifests_of(table, head).await?;
        let writable = |spec_id: i32| {
            let spec = table.metadata().partition_spec_by_id(spec_id);
            spec.is_some_and(|spec| spec.partition_type(table.metadata().current_schema()).is_ok())
        };
        let bins = bins(&manifests, rule, &writable);
        let folder = names::metadata_folder(table);
        let merging = Self { head: head.clone(), manifests, bins, attempt, folder };
        Ok((!merging.bins.is_empty()).then_some(merging))
    }

    /// Number of manifests that are replaced.
    pub(super) fn manifests_merged(&self) -> usize {
        self.bins.iter().map(Vec::len).sum()
    }

    /// Number of manifests that take their place.
    pub(super) fn bins(&self) -> usize {
        self.bins.len()
    }

    /// What the commit is told.
    pub(super) fn head(&self) -> MergedHead {
        MergedHead { snapshot_id: self.head.snapshot_id(), manifest_list: self.list_path() }
    }

    /// Every file that is written, the list first.
    pub(super) fn paths(&self) -> Vec<String> {
        let manifests = (0..self.bins.len()).map(|number| self.manifest_path(number));
        std::iter::once(self.list_path()).chain(manifests).collect()
    }

    fn list_path(&self) -> String {
        format!("{}/{}-merged-list.avro", self.folder, self.attempt)
    }

    fn manifest_path(&self, number: usize) -> String {
        format!("{}/{}-merged-m{number}.avro", self.folder, self.attempt)
    }

    /// Writes merged manifests, then the list that names them and those that stay, in the order of the head's.
    pub(super) async fn write(self, table: &Table) -> Result<(), MaintenanceError> {
        let mut replaced: BTreeMap<usize, Vec<ManifestFile>> = BTreeMap::new();
        for (number, bin) in self.bins.iter().enumerate() {
            let written = self.write_bin(table, number, bin).await?;
            replaced.extend(bin.iter().map(|place| (*place, Vec::new())));
            replaced.insert(bin[0], written);
        }
        let manifests = self.manifests.iter().enumerate().flat_map(|(place, manifest)| {
            replaced.get(&place).cloned().unwrap_or_else(|| vec![manifest.clone()])
        });
        let path = self.list_path();
        let what = || MaintenanceError::storage(format!("writing manifest list {path}"));
        let output = table.file_io().new_output(&path).map_err(what())?;
        let writer = output.writer().await.map_err(what())?;
        let (id, parent) = (self.head.snapshot_id(), self.head.parent_snapshot_id());
        let mut list = ManifestListWriter::v2(writer, id, parent, self.head.sequence_number());
        list.add_manifests(manifests).map_err(what())?;
        list.close().await.map_err(what())?;
        let paths = self.paths();
        sync_folders(&paths.iter().map(String::as_str).collect::<Vec<_>>(), &self.folder).await?;
        Ok(())
    }

    /// The merged manifest of one bin, none if it has no live entry, and those of the bin that can not be merged.
    async fn write_bin(
        &self,
        table: &Table,
        number: usize,
        bin: &[usize],
    ) -> Result<Vec<ManifestFile>, MaintenanceError> {
        let path = self.manifest_path(number);
        let what = || MaintenanceError::storage(format!("writing manifest {path}"));
        let metadata = table.metadata();
        let spec: &PartitionSpec = metadata
            .partition_spec_by_id(self.manifests[bin[0]].partition_spec_id)
            .expect("only manifests of a known spec are planned");
        let schema = metadata.current_schema().clone();
        let output = table.file_io().new_output(&path).map_err(what())?;
        let base = self.head.snapshot_id();
        let mut writer =
            ManifestWriterBuilder::new(output, Some(base), schema.clone(), spec.clone()).build_v2_data();
        let (mut entries, mut apart) = (0, Vec::new());
        for place in bin {
            let manifest = reach::load(table, &self.manifests[*place]).await?;
            if !has_types_of(&manifest, &schema) {
                apart.push(self.manifests[*place].clone());
                continue;
            }
            for entry in manifest.entries().iter().filter(|entry| entry.is_alive()) {
                let (Some(snapshot), Some(sequence)) = (entry.snapshot_id(), entry.sequence_number()) else {
                    let error = iceberg::Error::new(
                        iceberg::ErrorKind::DataInvalid,
                        format!("the entry of {} has no sequence number", entry.file_path()),
                    );
                    return Err(what()(error));
                };
                let file_sequence = entry.file_sequence_number;
                writer
                    .add_existing_file(entry.data_file().clone(), snapshot, sequence, file_sequence)
                    .map_err(what())?;
                entries += 1;
            }
        }
        if entries == 0 {
            return Ok(apart);
        }
        let mut merged = writer.write_manifest_file().await.map_err(what())?;
        merged.sequence_number = self.head.sequence_number();
        apart.insert(0, merged);
        Ok(apart)
    }
}

/// Whether the bounds of a manifest's entries can be written under another schema: every column that is still there
/// has its type.
fn has_types_of(manifest: &Manifest, schema: &Schema) -> bool {
    let mut written = manifest.metadata().schema().as_struct().fields().iter();
    written.all(|field| schema.field_by_id(field.id).is_none_or(|now| now.field_type == field.field_type))
}

/// Groups of small data manifests of one spec, each to become one manifest of at most the target size. None where the
/// spec has fewer small ones than the rule asks for.
fn bins(manifests: &[ManifestFile], rule: &MergeRule, writable: &dyn Fn(i32) -> bool) -> Vec<Vec<usize>> {
    let mut small: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
    for (place, manifest) in manifests.iter().enumerate() {
        let is_small = bytes(manifest) < rule.bytes_target && entries(manifest) < ENTRIES_MAX;
        if is_small && manifest.content == ManifestContentType::Data && writable(manifest.partition_spec_id) {
            small.entry(manifest.partition_spec_id).or_default().push(place);
        }
    }
    let enough = small.into_values().filter(|places| places.len() >= rule.manifests_min.max(2));
    enough.flat_map(|places| pack(manifests, rule, &places)).filter(|bin| bin.len() > 1).collect()
}

/// Places one after another into bins.
fn pack(manifests: &[ManifestFile], rule: &MergeRule, places: &[usize]) -> Vec<Vec<usize>> {
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let (mut bin_bytes, mut bin_entries) = (0, 0);
    for place in places {
        let manifest = &manifests[*place];
        (bin_bytes, bin_entries) = (bin_bytes + bytes(manifest), bin_entries + entries(manifest));
        match bins.last_mut() {
            Some(bin) if bin_bytes <= rule.bytes_target && bin_entries <= ENTRIES_MAX => bin.push(*place),
            _ => {
                bins.push(vec![*place]);
                (bin_bytes, bin_entries) = (bytes(manifest), entries(manifest));
            }
        }
    }
    bins
}

fn bytes(manifest: &ManifestFile) -> u64 {
    u64::try_from(manifest.manifest_length).unwrap_or(0)
}

/// Data files that a manifest may hold; one that does not say counts as full.
fn entries(manifest: &ManifestFile) -> u64 {
    let counts = [manifest.added_files_count, manifest.existing_files_count, manifest.deleted_files_count];
    counts.iter().map(|count| count.map_or(ENTRIES_MAX, u64::from)).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest(place: usize, bytes: i64, spec: i32, files: u32) -> ManifestFile {
        ManifestFile {
            manifest_path: format!("m{place}"),
            manifest_length: bytes,
            partition_spec_id: spec,
            content: ManifestContentType::Data,
            sequence_number: 1,
            min_sequence_number: 1,
            added_snapshot_id: 1,
            added_files_count: Some(files),
            existing_files_count: Some(0),
            deleted_files_count: Some(0),
            added_rows_count: Some(0),
            existing_rows_count: Some(0),
            deleted_rows_count: Some(0),
            partitions: None,
            key_metadata: None,
            first_row_id: None,
        }
    }

    proptest! {
        /// Goal: whatever the manifests, a merged one keeps to its bounds, holds one spec, and no manifest is in two.
        /// Method: any sizes, two specs of which one can not be written, few or many.
        #[test]
        fn bins_keep_to_their_bounds(
            given in prop::collection::vec((0i64..200, 0i32..3, 0u32..5_000), 0..40), manifests_min in 0usize..6
        ) {
            let rule = MergeRule { manifests_min, bytes_target: 100 };
            let manifests: Vec<_> = given
                .iter()
                .enumerate()
                .map(|(place, (bytes, spec, files))| manifest(place, *bytes, *spec, *files))
                .collect();
            let bins = bins(&manifests, &rule, &|spec| spec < 2);
            let mut seen = std::collections::BTreeSet::new();
            for bin in &bins {
                prop_assert!(bin.len() > 1);
                prop_assert!(bin.iter().map(|place| bytes(&manifests[*place])).sum::<u64>() <= rule.bytes_target);
                prop_assert!(bin.iter().map(|place| entries(&manifests[*place])).sum::<u64>() <= ENTRIES_MAX);
                let spec = manifests[bin[0]].partition_spec_id;
                prop_assert!(spec < 2 && bin.iter().all(|place| manifests[*place].partition_spec_id == spec));
                prop_assert!(bin.iter().all(|place| seen.insert(*place)));
            }
            for spec in 0..2 {
                let small = manifests.iter().filter(|manifest| {
                    manifest.partition_spec_id == spec && manifest.manifest_length < 100
                });
                let merged = bins.iter().any(|bin| manifests[bin[0]].partition_spec_id == spec);
                prop_assert!(small.count() >= manifests_min || !merged);
            }
        }
    }

    #[test]
    fn manifests_of_deletes_and_large_ones_stay() {
        let rule = MergeRule { manifests_min: 2, bytes_target: 100 };
        let mut manifests: Vec<_> = (0..5).map(|place| manifest(place, 10, 0, 1)).collect();
        manifests[1].content = ManifestContentType::Deletes;
        manifests[3].manifest_length = 100;
        assert_eq!(bins(&manifests, &rule, &|_| true), [vec![0, 2, 4]]);
        assert!(bins(&manifests, &MergeRule { manifests_min: 4, ..rule }, &|_| true).is_empty());
    }
}
