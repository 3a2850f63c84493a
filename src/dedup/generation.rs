//! Generations: the manifests that say which segments are the state.
//!
//! Layout of a manifest file: one line, then JSON.
//! ```text
//! tidemill dedup generation <format version> <checksum>\n
//! { "job_id": ..., "segments": [ ... ], "buckets": [ ... ] }
//! ```
//! The checksum is XXH3-128, in hex, over `<format version>\n` and the JSON. The first line stays as it is in every
//! version, so a flipped version is told apart from a newer program's file. The ledger holds the same checksum:
//! a manifest of the right name and another content is corrupt.
//!
//! Names. A generation is `e<epoch>-b<batch>-<attempt>`, its manifest `<generation>.manifest`, its segments
//! `<generation>-<number>.segment`. Epochs stand in the names so that [`sweep`] can tell an earlier life's files
//! from those of a life that is still writing.
//!
//! Bounds: a manifest grows with segments (tens) and buckets ([`BUCKETS_MAX`]), never with keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::bucket::{Bucket, BucketTally, ERAS_MAX, Era, Grid, Tally};
use super::segment::{Segment, SegmentEntry, SegmentName};
use super::{BUCKETS_MAX, StoreError, StoreSpec, disk};
use crate::event_time::EventTimeMs;
use crate::job::Repeats;
use crate::mutant;

/// Newest manifest format that this program reads, and the one that it writes. Version 1 had neither `eras` nor
/// `expired`: nothing expired, and the width never changed.
pub(super) const MANIFEST_VERSION: u32 = 2;
/// Oldest manifest format that this program reads.
const MANIFEST_VERSION_MIN: u32 = 1;
/// Largest manifest that is read.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
pub(super) const FIRST_WORDS: &str = "tidemill dedup generation ";
const MANIFEST_SUFFIX: &str = ".manifest";
const SEGMENT_SUFFIX: &str = ".segment";

/// Name of a generation: epoch and batch that made it, and the attempt, which makes the name the only one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GenerationName {
    /// Epoch of the owner that made it.
    pub epoch: u64,
    /// Batch that it belongs to.
    pub batch: u64,
    /// Attempt of that batch. Never used twice.
    pub attempt: Uuid,
}

impl GenerationName {
    /// Names a generation.
    pub fn new(epoch: u64, batch: u64, attempt: Uuid) -> Self {
        Self { epoch, batch, attempt }
    }

    /// Name of its manifest file.
    pub fn manifest_file(&self) -> String {
        format!("{self}{MANIFEST_SUFFIX}")
    }
}

impl fmt::Display for GenerationName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "e{:010}-b{:010}-{}", self.epoch, self.batch, self.attempt.hyphenated())
    }
}

impl std::str::FromStr for GenerationName {
    type Err = String;

    /// Takes exactly what `Display` writes, so that a name from a ledger never leads out of the folder.
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (epoch, rest) = text.strip_prefix('e')?.split_once("-b")?;
            let (batch, attempt) = rest.split_once('-')?;
            let name = Self::new(epoch.parse().ok()?, batch.parse().ok()?, attempt.parse().ok()?);
            (name.to_string() == text).then_some(name)
        };
        parse().ok_or_else(|| format!("{text:?} is not the name of a dedup generation"))
    }
}

impl TryFrom<String> for GenerationName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<GenerationName> for String {
    fn from(name: GenerationName) -> Self {
        name.to_string()
    }
}

/// What the ledger says of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationRef {
    /// Its name.
    pub name: GenerationName,
    /// Checksum of its manifest, which holds those of the segments: 32 hex digits.
    pub checksum: String,
}

/// A generation found in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationInfo {
    /// Name and checksum, as a ledger would name it.
    pub reference: GenerationRef,
    /// Keys in it.
    pub keys: u64,
    /// Bytes of its segments.
    pub segment_bytes: u64,
    /// Hash of the key spec that it was made for.
    pub key_spec_hash: String,
    /// From this event time on it holds all keys; `i64::MIN` if nothing has expired.
    pub complete_since: EventTimeMs,
    /// Live buckets.
    pub buckets: u64,
    /// Keys of expired buckets that are still on disk.
    pub grace_keys: u64,
}

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) job_id: Uuid,
    pub(super) key_spec_hash: String,
    pub(super) seed: u64,
    pub(super) shards: u32,
    pub(super) repeats: Repeats,
    /// Width of the buckets of all times that no era holds.
    pub(super) bucket_width_ms: i64,
    /// Earlier widths, ascending, as far as a bucket of theirs may be named.
    #[serde(default)]
    pub(super) eras: Vec<Era>,
    /// End of the open first bucket; `None` until the first key.
    pub(super) floor: Option<EventTimeMs>,
    /// Every bucket from here on holds all keys of our rows.
    pub(super) complete_since: EventTimeMs,
    /// Oldest first.
    pub(super) segments: Vec<SegmentEntry>,
    /// Live buckets, ascending: those that end after `complete_since`. Sections of buckets that are in neither list
    /// are dead.
    pub(super) buckets: Vec<BucketTally>,
    /// Buckets in their grace, ascending: expired, whole, and not probed unless a key asks for one.
    #[serde(default)]
    pub(super) expired: Vec<BucketTally>,
}

impl Manifest {
    /// The manifest of a state without keys.
    pub(super) fn empty(spec: &StoreSpec) -> Self {
        Self {
            job_id: spec.job_id,
            key_spec_hash: spec.key_spec_hash.clone(),
            seed: spec.seed,
            shards: spec.shards,
            repeats: spec.repeats,
            bucket_width_ms: spec.bucket_width_ms,
            eras: Vec::new(),
            floor: None,
            complete_since: EventTimeMs(i64::MIN),
            segments: Vec::new(),
            buckets: Vec::new(),
            expired: Vec::new(),
        }
    }

    pub(super) fn grid(&self) -> Option<Grid> {
        self.floor.map(|floor| Grid::of(floor, self.bucket_width_ms, &self.eras))
    }

    /// Buckets whose keys the segments must hold, ascending: those in their grace, then the live ones.
    pub(super) fn named_buckets(&self) -> impl Iterator<Item = &BucketTally> {
        self.expired.iter().chain(&self.buckets)
    }

    /// What [`Manifest::named_buckets`] hold.
    pub(super) fn tallies(&self) -> BTreeMap<Bucket, Tally> {
        self.named_buckets().map(|bucket| (bucket.bucket(), bucket.tally())).collect()
    }

    fn segment_files(&self) -> Vec<(String, u64)> {
        self.segments.iter().map(|segment| (segment.name.to_string(), segment.bytes)).collect()
    }

    /// Reads the manifest that a ledger names.
    pub(super) fn read(folder: &Path, reference: &GenerationRef) -> Result<Self, StoreError> {
        let file = reference.name.manifest_file();
        let (manifest, checksum) = read_manifest(folder, &file)?;
        if mutant!("local-manifest-rules", false => checksum != reference.checksum) {
            let what = format!("its checksum is {checksum} where the ledger says {}", reference.checksum);
            return Err(StoreError::corrupt(file, what));
        }
        Ok(manifest)
    }

    /// Creates the manifest file, writes and syncs it. The folder is not synced yet.
    pub(super) fn write(&self, folder: &Path, name: GenerationName) -> Result<GenerationRef, StoreError> {
        let file_name = name.manifest_file();
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| StoreError::io("write", &file_name, io::Error::other(error)))?;
        let body = format!("{MANIFEST_VERSION}\n{json}\n");
        let checksum = format!("{:032x}", xxh3_128(body.as_bytes()));
        let text = format!("{FIRST_WORDS}{MANIFEST_VERSION} {checksum}\n{json}\n");
        let file = disk::create_new(folder, &file_name)?;
        crate::crash_point!("manifest_created");
        disk::write_at(&file, &file_name, text.as_bytes(), 0)?;
        crate::crash_point!("manifest_written");
        mutant!("skip-manifest-sync", () => disk::sync(&file, &file_name)?);
        crate::crash_point!("manifest_synced");
        Ok(GenerationRef { name, checksum })
    }

    /// What the state was made for.
    pub(super) fn spec(&self) -> StoreSpec {
        StoreSpec {
            job_id: self.job_id,
            key_spec_hash: self.key_spec_hash.clone(),
            seed: self.seed,
            shards: self.shards,
            bucket_width_ms: self.bucket_width_ms,
            repeats: self.repeats,
        }
    }

    /// Refuses a spec that this state was not made for.
    pub(super) fn check_spec(&self, file: GenerationName, spec: &StoreSpec) -> Result<(), StoreError> {
        let facts: [(&'static str, String, String); 5] = [
            ("job id", spec.job_id.to_string(), self.job_id.to_string()),
            ("key spec hash", spec.key_spec_hash.clone(), self.key_spec_hash.clone()),
            ("seed", spec.seed.to_string(), self.seed.to_string()),
            ("shards", spec.shards.to_string(), self.shards.to_string()),
            ("repeats", format!("{:?}", spec.repeats), format!("{:?}", self.repeats)),
        ];
        for (fact, expected, found) in facts {
            if expected != found {
                return Err(StoreError::SpecDiffers { file: file.manifest_file(), fact, expected, found });
            }
        }
        Ok(())
    }

    /// Refuses what no writer of ours writes, so that nobody has to ask again.
    fn check(&self) -> Result<(), String> {
        if self.bucket_width_ms < 1 {
            return Err(format!("its bucket width is {} ms", self.bucket_width_ms));
        }
        let eras_ascend = self.eras.windows(2).all(|pair| pair[0].until < pair[1].until);
        if !eras_ascend || self.eras.len() > ERAS_MAX || self.eras.iter().any(|era| era.bucket_width_ms < 1) {
            return Err(format!("its eras are not at most {ERAS_MAX} that ascend"));
        }
        let named: Vec<&BucketTally> = self.named_buckets().collect();
        if named.len() > BUCKETS_MAX {
            return Err(format!("it lists {} buckets, more than {BUCKETS_MAX}", named.len()));
        }
        let ascending = named.windows(2).all(|pair| pair[0].to <= pair[1].from);
        if !ascending || named.iter().any(|bucket| bucket.from >= bucket.to || bucket.keys == 0) {
            return Err("its buckets do not ascend".to_owned());
        }
        if self.expired.iter().any(|bucket| bucket.to > self.complete_since)
            || self.buckets.iter().any(|bucket| bucket.from < self.complete_since)
        {
            return Err(format!(
                "it is complete since {}, which does not part its live buckets from the expired ones",
                self.complete_since
            ));
        }
        if !named.is_empty() && self.floor.is_none() {
            return Err("it has buckets and no floor".to_owned());
        }
        let keys = self.named_buckets().map(|bucket| bucket.keys).try_fold(0, u64::checked_add);
        let bytes = self.segments.iter().map(|segment| segment.bytes).try_fold(0, u64::checked_add);
        if keys.is_none() || bytes.is_none() {
            return Err("its keys or bytes are more than there can be".to_owned());
        }
        let names: BTreeSet<_> = self.segments.iter().map(|segment| segment.name).collect();
        if names.len() != self.segments.len() {
            return Err("it lists a segment twice".to_owned());
        }
        Ok(())
    }
}

/// Reads a manifest file: what it says, and its checksum, which was checked.
pub(super) fn read_manifest(folder: &Path, file_name: &str) -> Result<(Manifest, String), StoreError> {
    let file = disk::open(folder, file_name)?;
    let mut bytes = Vec::new();
    let read = file.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| StoreError::io("read", file_name, error))?;
    parse_manifest(bytes, file_name)
}

/// As [`read_manifest`], of bytes that were read already.
pub(super) fn parse_manifest(bytes: Vec<u8>, file_name: &str) -> Result<(Manifest, String), StoreError> {
    let corrupt = |what: String| StoreError::corrupt(file_name, what);
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(corrupt(format!("it is longer than {MANIFEST_BYTES_MAX} bytes")));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| corrupt(format!("it is not text, at byte {}", error.utf8_error().valid_up_to())))?;
    let first_words = || {
        let (line, json) = text.split_once('\n')?;
        let (version, checksum) = line.strip_prefix(FIRST_WORDS)?.split_once(' ')?;
        Some((version, checksum, json))
    };
    let (version, checksum, json) =
        first_words().ok_or_else(|| corrupt("its first line is not that of a manifest".to_owned()))?;
    let found = format!("{:032x}", xxh3_128(format!("{version}\n{json}").as_bytes()));
    if found != checksum {
        return Err(corrupt(format!(
            "its content has checksum {found} where its first line says {checksum}"
        )));
    }
    let version: u32 = version.parse().map_err(|_| corrupt(format!("its version is {version:?}")))?;
    if version > MANIFEST_VERSION {
        let file = file_name.to_owned();
        return Err(StoreError::NewerFormat { file, found: version, known: MANIFEST_VERSION });
    }
    if version < MANIFEST_VERSION_MIN {
        return Err(corrupt(format!("format version {version} never was")));
    }
    let manifest: Manifest = serde_json::from_str(json).map_err(|error| corrupt(error.to_string()))?;
    manifest.check().map_err(corrupt)?;
    Ok((manifest, found))
}

/// What a file of the state folder is, by its name.
pub(super) enum StateFile {
    Manifest(GenerationName),
    Segment(SegmentName),
}

pub(super) fn state_file(file_name: &str) -> Option<StateFile> {
    if let Some(stem) = file_name.strip_suffix(MANIFEST_SUFFIX) {
        return Some(StateFile::Manifest(stem.parse().ok()?));
    }
    file_name.ends_with(SEGMENT_SUFFIX).then(|| file_name.parse().ok().map(StateFile::Segment))?
}

fn file_names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |error| StoreError::io("list folder", folder.display(), error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The generations in a folder, oldest first, of one job or of all. A manifest that a crash cut short is no generation
/// and is left out; whether the segments are there and right is not looked at.
///
/// # Errors
/// [`StoreError::NewerFormat`] if a newer program wrote one of them, [`StoreError::Io`] if the folder can not be
/// read. A folder that is not there holds none.
pub fn list_generations(folder: &Path, job_id: Option<Uuid>) -> Result<Vec<GenerationInfo>, StoreError> {
    let mut found = Vec::new();
    for file_name in file_names(folder)? {
        let Some(StateFile::Manifest(name)) = state_file(&file_name) else { continue };
        let (manifest, checksum) = match read_manifest(folder, &file_name) {
            Ok(read) => read,
            Err(error) if error.is_rebuildable() => continue,
            Err(error) => return Err(error),
        };
        if job_id.is_none_or(|job_id| job_id == manifest.job_id) {
            found.push(GenerationInfo {
                reference: GenerationRef { name, checksum },
                keys: manifest.buckets.iter().map(|bucket| bucket.keys).sum(),
                segment_bytes: manifest.segments.iter().map(|segment| segment.bytes).sum(),
                key_spec_hash: manifest.key_spec_hash,
                complete_since: manifest.complete_since,
                buckets: manifest.buckets.len() as u64,
                grace_keys: manifest.expired.iter().map(|bucket| bucket.keys).sum(),
            });
        }
    }
    found.sort_by_key(|generation| generation.reference.name);
    Ok(found)
}

/// Names and sizes of the segments of a generation, from its manifest, which is read and checked.
///
/// # Errors
/// [`StoreError::Missing`] or [`StoreError::Corrupt`] of the manifest; [`StoreError::NewerFormat`] and [`StoreError::Io`].
pub fn segments_of(folder: &Path, reference: &GenerationRef) -> Result<Vec<(String, u64)>, StoreError> {
    Ok(Manifest::read(folder, reference)?.segment_files())
}

/// As [`segments_of`], of the bytes of a manifest, whatever ledger names it.
///
/// # Errors
/// [`StoreError::Corrupt`] and [`StoreError::NewerFormat`].
pub fn segments_in(manifest: Vec<u8>, file_name: &str) -> Result<Vec<(String, u64)>, StoreError> {
    parse_manifest(manifest, file_name).map(|(manifest, _)| manifest.segment_files())
}

/// Whether a folder has the manifest of a generation and all its segments, each of the right size. What they hold is not
/// looked at.
pub fn is_at_home(folder: &Path, reference: &GenerationRef) -> bool {
    let has = |(name, bytes): &(String, u64)| {
        fs::metadata(folder.join(name)).is_ok_and(|found| found.is_file() && found.len() == *bytes)
    };
    segments_of(folder, reference).is_ok_and(|segments| segments.iter().all(has))
}

/// The generation that wrote a file of a state folder, by the file's name; `None` for any other file.
pub fn generation_of_file(file_name: &str) -> Option<GenerationName> {
    match state_file(file_name)? {
        StateFile::Manifest(name) => Some(name),
        StateFile::Segment(name) => Some(name.generation),
    }
}

/// Renames a damaged file to `<name>.damaged`, durably, so that the next [`Store::open`](super::Store::open) finds it
/// missing and the state is rebuilt. Only files of this folder are taken.
///
/// # Errors
/// [`StoreError::Io`] if the file can not be renamed.
pub fn set_aside(folder: &Path, file: &str) -> Result<(), StoreError> {
    let Some(name) = Path::new(file).file_name() else { return Ok(()) };
    let mut damaged = name.to_owned();
    damaged.push(".damaged");
    std::fs::rename(folder.join(name), folder.join(damaged))
        .map_err(|source| StoreError::io("set aside", file, source))?;
    crate::crash_point!("damaged_file_renamed");
    disk::sync_folder(folder)?;
    crate::crash_point!("damaged_file_set_aside");
    Ok(())
}

/// What [`sweep`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SweepReport {
    /// Files removed.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Removes manifests and segments that none of the generations in `keep` names and that were written by epochs
/// lower than `epoch`. To be called only after the first commit of that epoch. Other files, files of other
/// jobs and files of this epoch are left alone; with an empty `keep` nothing is removed.
///
/// This is for who has no store open in the folder. An owner that runs merges beside it, and passes its own epoch plus
/// one, uses [`Store::sweep`](super::Store::sweep): a later owner's files are of a higher epoch, and what they share
/// with ours is named by our last generations.
///
/// # Errors
/// [`StoreError`] if a kept manifest can not be read, then nothing was removed; [`StoreError::Io`] if a file can
/// not be removed.
pub fn sweep(folder: &Path, keep: &[GenerationRef], epoch: u64) -> Result<SweepReport, StoreError> {
    sweep_others(folder, keep, epoch, BTreeSet::new())
}

/// [`sweep`], which leaves the files in `needed` alone too.
pub(super) fn sweep_others(
    folder: &Path,
    keep: &[GenerationRef],
    epoch: u64,
    needed: BTreeSet<String>,
) -> Result<SweepReport, StoreError> {
    let mut kept_files = needed;
    let mut job_ids = BTreeSet::new();
    for reference in keep {
        let manifest = Manifest::read(folder, reference)?;
        kept_files.insert(reference.name.manifest_file());
        kept_files.extend(manifest.segments.iter().map(|segment| segment.name.to_string()));
        job_ids.insert(manifest.job_id);
    }
    let mut report = SweepReport::default();
    if keep.is_empty() {
        return Ok(report);
    }
    for file_name in file_names(folder)? {
        if mutant!("sweep-takes-kept-files", false => kept_files.contains(&file_name))
            || !is_swept(folder, &file_name, &job_ids, epoch)
        {
            continue;
        }
        let path = folder.join(&file_name);
        let failed = |error| StoreError::io("remove", &file_name, error);
        let bytes = fs::metadata(&path).map_err(failed)?.len();
        crate::crash_point!("sweep_deletes");
        fs::remove_file(&path).map_err(failed)?;
        crate::crash_point!("sweep_deleted");
        report.files += 1;
        report.bytes += bytes;
    }
    crate::crash_point!("sweep_ended");
    Ok(report)
}

/// Whether a file that is not kept may go: ours by name, of an earlier epoch, and not plainly another job's.
fn is_swept(folder: &Path, file_name: &str, job_ids: &BTreeSet<Uuid>, epoch: u64) -> bool {
    match state_file(file_name) {
        Some(StateFile::Manifest(name)) => {
            name.epoch < epoch
                && read_manifest(folder, file_name).map_or_else(
                    |error| error.is_rebuildable(),
                    |(manifest, _)| job_ids.contains(&manifest.job_id),
                )
        }
        Some(StateFile::Segment(name)) => {
            let earlier = name.generation.epoch;
            mutant!("sweep-of-the-own-epoch", earlier <= epoch => earlier < epoch)
                && Segment::job_id_of(folder, file_name).is_none_or(|job_id| job_ids.contains(&job_id))
        }
        None => false,
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}-{:03}{SEGMENT_SUFFIX}", self.generation, self.number)
    }
}

impl std::str::FromStr for SegmentName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (generation, number) = text.strip_suffix(SEGMENT_SUFFIX)?.rsplit_once('-')?;
            let name = Self { generation: generation.parse().ok()?, number: number.parse().ok()? };
            (name.to_string() == text).then_some(name)
        };
        parse().ok_or_else(|| format!("{text:?} is not the name of a dedup segment"))
    }
}

impl TryFrom<String> for SegmentName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SegmentName> for String {
    fn from(name: SegmentName) -> Self {
        name.to_string()
    }
}
