//! Inspection: what any one file of a state folder says, without the files around it.
//!
//! Flow: first bytes and name -> manifest, segment, or something else -> facts
//!
//! A file is what its bytes say; its name decides only where they say nothing, so a segment whose first byte was
//! flipped is a damaged segment and not an unknown file. Nothing here needs a manifest, an intact neighbour or the
//! job, and nothing is parsed a second time: segments and manifests are read by the code that the store reads them with.
//!
//! Bounds: a manifest is held in memory (at most 64 MiB), of a segment the frame and one page.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use uuid::Uuid;

use super::StoreError;
use super::bucket::Digest;
use super::generation::{FIRST_WORDS, GenerationName, StateFile, read_manifest, state_file};
use super::segment::alone::{self, Origin, renamed};
use super::segment::{MAGIC, Section, Segment};
use super::verify::verify_section;
use crate::event_time::EventTimeMs;

/// Ending of the name of a file that was set aside.
pub(super) const DAMAGED_SUFFIX: &str = ".damaged";
/// Bytes by which a file is recognised.
const FIRST_BYTES: usize = 512;

/// What a file is and says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Its name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// Whether `state verify` renamed it because it was damaged.
    pub set_aside: bool,
    /// Where name and content disagree.
    pub notes: Vec<String>,
    /// What it says.
    #[serde(flatten)]
    pub content: Content,
}

/// What a file says.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Content {
    /// The manifest of a generation.
    Manifest(ManifestFacts),
    /// A segment.
    Segment(SegmentFacts),
    /// Not a file of tidemill's dedup state.
    Other {
        /// What it looks like.
        looks_like: String,
    },
}

/// What a manifest says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ManifestFacts {
    /// The generation that it names itself by its file name.
    pub generation: Option<GenerationName>,
    /// Its checksum, as the ledger has it; it was found right.
    pub checksum: String,
    /// Keys of the live buckets.
    pub keys: u64,
    /// Bytes of the segments.
    pub segment_bytes: u64,
    /// All that it says.
    pub says: serde_json::Value,
}

/// What a segment says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SegmentFacts {
    /// Format version.
    pub format_version: u16,
    /// The job that it belongs to.
    pub job_id: Uuid,
    /// The key spec that it was made for.
    pub key_spec_hash: String,
    /// The generation that made it.
    pub generation: GenerationName,
    /// Its number within that generation.
    pub number: u32,
    /// Over header, directory and footer, as its manifest has it.
    pub checksum: Digest,
    /// Keys of all sections.
    pub keys: u64,
    /// Bytes of the file per key.
    pub bytes_per_key: f64,
    /// Whether every page was read, and not the frame alone.
    pub pages_read: bool,
    /// By ascending bucket.
    pub sections: Vec<SectionFacts>,
}

/// A section of a segment: the keys of one bucket.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SectionFacts {
    /// Begin of the bucket, inclusive.
    pub from: EventTimeMs,
    /// End of the bucket, exclusive.
    pub to: EventTimeMs,
    /// Smallest event time of a key.
    pub event_time_min: EventTimeMs,
    /// Largest event time of a key.
    pub event_time_max: EventTimeMs,
    /// Keys.
    pub keys: u64,
    /// Which keys.
    pub digest: Digest,
    /// Where the filter begins in the file.
    pub filter_position: u64,
    /// Bytes of the filter.
    pub filter_bytes: u64,
    /// Bits of the filter per key, without checksums.
    pub filter_bits_per_key: f64,
    /// Where the pages begin in the file.
    pub pages_position: u64,
    /// Pages of fingerprints.
    pub pages: u64,
    /// Keys of a page, on average.
    pub keys_per_page: f64,
    /// Bytes of pages and their indexes, per key.
    pub page_bytes_per_key: f64,
    /// Bytes of filter, pages and indexes, per key.
    pub bytes_per_key: f64,
    /// What is wrong with it, if its pages were read.
    pub damage: Option<String>,
}

impl Inspection {
    /// The first damage that reading the pages of a segment found, as an error of the file.
    pub fn damage(&self) -> Option<StoreError> {
        let Content::Segment(facts) = &self.content else { return None };
        let damage = facts.sections.iter().find_map(|section| section.damage.as_ref())?;
        Some(StoreError::corrupt(&self.file, damage))
    }
}

/// Whether a path leads to a file of a dedup state, by its name or by its first bytes.
pub fn is_state_file(path: &Path) -> bool {
    let file_name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let by_name = state_file(file_name.strip_suffix(DAMAGED_SUFFIX).unwrap_or(&file_name)).is_some();
    let by_content = || first_bytes(path).is_ok_and(|first| kind_of(&first, "").is_some());
    path.is_file() && (by_name || by_content())
}

/// Looks at a file. With `read_pages` every piece of a segment is read and checked, and `reached` hears of the byte
/// that was reached, about once per mebibyte; damage is then told section by section.
///
/// # Errors
/// [`StoreError::Corrupt`]: a manifest, or the frame of a segment, is damaged; it says at which byte.
/// [`StoreError::NewerFormat`]: a newer program wrote it. [`StoreError::Io`]: it can not be read.
pub fn inspect(
    path: &Path,
    read_pages: bool,
    reached: &mut dyn FnMut(u64),
) -> Result<Inspection, StoreError> {
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let failed = |error| StoreError::io("read", path.display(), error);
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let plain_name = file.strip_suffix(DAMAGED_SUFFIX).unwrap_or(&file);
    if !metadata.is_file() {
        // To read from a pipe would wait for somebody to write.
        let content = Content::Other { looks_like: "a folder, a pipe or a device".to_owned() };
        return Ok(Inspection { set_aside: false, file, bytes: 0, notes: Vec::new(), content });
    }
    let first = first_bytes(path).map_err(failed)?;
    let mut notes = Vec::new();
    let content = match kind_of(&first, plain_name) {
        Some(Kind::Manifest) => {
            let folder = path.parent().unwrap_or(Path::new(""));
            Content::Manifest(manifest_facts(folder, &file, plain_name, &mut notes)?)
        }
        Some(Kind::Segment) => {
            let opened = File::open(path).map_err(failed)?;
            let facts = segment_facts(opened, &file, read_pages, reached)?;
            let own_name = format!("{}-{:03}.segment", facts.generation, facts.number);
            if own_name != plain_name {
                notes.push(format!("its header says that it is {own_name}"));
            }
            Content::Segment(facts)
        }
        None => Content::Other { looks_like: looks_like(&first, plain_name) },
    };
    Ok(Inspection { set_aside: plain_name != file, file, bytes: metadata.len(), notes, content })
}

enum Kind {
    Manifest,
    Segment,
}

fn kind_of(first: &[u8], plain_name: &str) -> Option<Kind> {
    if first.starts_with(&MAGIC) {
        return Some(Kind::Segment);
    }
    if first.starts_with(FIRST_WORDS.as_bytes()) {
        return Some(Kind::Manifest);
    }
    match state_file(plain_name)? {
        StateFile::Manifest(_) => Some(Kind::Manifest),
        StateFile::Segment(_) => Some(Kind::Segment),
    }
}

fn first_bytes(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut first = Vec::new();
    File::open(path)?.take(FIRST_BYTES as u64).read_to_end(&mut first)?;
    Ok(first)
}

fn manifest_facts(
    folder: &Path,
    file: &str,
    plain_name: &str,
    notes: &mut Vec<String>,
) -> Result<ManifestFacts, StoreError> {
    let (manifest, checksum) = read_manifest(folder, file)?;
    let generation = match state_file(plain_name) {
        Some(StateFile::Manifest(name)) => Some(name),
        _ => {
            notes.push("a manifest has the name of its generation, and this file has another".to_owned());
            None
        }
    };
    let says = serde_json::to_value(&manifest)
        .map_err(|error| StoreError::corrupt(file, format!("it can not be shown: {error}")))?;
    Ok(ManifestFacts {
        generation,
        checksum,
        keys: manifest.buckets.iter().map(|bucket| bucket.keys).sum(),
        segment_bytes: manifest.segments.iter().map(|segment| segment.bytes).sum(),
        says,
    })
}

fn segment_facts(
    opened: File,
    file: &str,
    read_pages: bool,
    reached: &mut dyn FnMut(u64),
) -> Result<SegmentFacts, StoreError> {
    let origin = Origin::of_file(&opened, file)?;
    let (segment, origin) = alone::open(opened, file).map_err(|error| match error {
        StoreError::Corrupt { file, what } => {
            let whose = format!("of {} for job {}", origin.name, origin.job_id);
            StoreError::corrupt(file, format!("{what} (its header is intact and says: {whose})"))
        }
        other => other,
    })?;
    let mut sections = Vec::with_capacity(segment.sections.len());
    for section in &segment.sections {
        let mut facts = section_facts(section);
        if read_pages {
            facts.damage = damage_of(&segment, section, file, reached)?;
        }
        sections.push(facts);
    }
    Ok(SegmentFacts {
        format_version: origin.version,
        job_id: origin.job_id,
        key_spec_hash: origin.key_spec_hash,
        generation: origin.name.generation,
        number: origin.name.number,
        checksum: segment.entry.checksum,
        keys: segment.entry.keys,
        bytes_per_key: per_key(segment.entry.bytes, segment.entry.keys),
        pages_read: read_pages,
        sections,
    })
}

fn damage_of(
    segment: &Segment,
    section: &Section,
    file: &str,
    reached: &mut dyn FnMut(u64),
) -> Result<Option<String>, StoreError> {
    match verify_section(segment, section, reached).map_err(|error| renamed(error, file)) {
        Ok(()) => Ok(None),
        Err(StoreError::Corrupt { what, .. }) => Ok(Some(what)),
        Err(other) => Err(other),
    }
}

fn section_facts(section: &Section) -> SectionFacts {
    let keys = section.tally.keys;
    let filter_bytes = section.filter.bytes().unwrap_or_default();
    let page_bytes = section.end() - section.pages_position;
    SectionFacts {
        from: section.bucket.from,
        to: section.bucket.to,
        event_time_min: section.event_time_min,
        event_time_max: section.event_time_max,
        keys,
        digest: section.tally.digest,
        filter_position: section.filter_position,
        filter_bytes,
        filter_bits_per_key: per_key(section.filter.bits(), keys),
        pages_position: section.pages_position,
        pages: section.pages,
        keys_per_page: keys as f64 / section.pages as f64,
        page_bytes_per_key: per_key(page_bytes, keys),
        bytes_per_key: per_key(filter_bytes + page_bytes, keys),
        damage: None,
    }
}

fn per_key(bytes: u64, keys: u64) -> f64 {
    bytes as f64 / keys.max(1) as f64
}

/// Says in a few words what a file that is not ours may be.
fn looks_like(first: &[u8], file_name: &str) -> String {
    const MAGICS: [(&[u8], &str); 10] = [
        (b"PAR1", "a Parquet data file"),
        (b"Obj\x01", "an Avro file, such as an Iceberg manifest"),
        (b"SQLite format 3\0", "a SQLite database, such as an embedded catalog"),
        (b"\x1f\x8b", "a gzip file"),
        (b"\x28\xb5\x2f\xfd", "a zstd file"),
        (b"ARROW1", "an Arrow IPC file"),
        (b"PK\x03\x04", "a zip file"),
        (b"\x7fELF", "a program"),
        (b"{", "JSON"),
        (b"[", "a TOML file, such as a job, or a JSON array"),
    ];
    if first.is_empty() {
        return "an empty file".to_owned();
    }
    if file_name == "lock" {
        return "the lock of a state folder: a line for each owner that held it".to_owned();
    }
    if let Some((_, what)) = MAGICS.iter().find(|(magic, _)| first.starts_with(magic)) {
        return (*what).to_owned();
    }
    if first.iter().all(|byte| *byte == 0) {
        return "zeros, as a disk leaves them that lost its last writes".to_owned();
    }
    // The last character may be cut by the end of what was read.
    let text = match std::str::from_utf8(first) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    if text { "text".to_owned() } else { "bytes of a kind that is not known here".to_owned() }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn look(path: &Path) -> Result<Inspection, StoreError> {
        inspect(path, true, &mut |_| {})
    }

    /// A folder with copies of a released state, and its newest segment and manifest.
    fn corner() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/dedup/v1");
        for entry in fs::read_dir(fixture).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let stem = "e0000000003-b0000000001-018bcfe5-6800-7000-8000-000000000001";
        let segment = folder.path().join(format!("{stem}-000.segment"));
        let manifest = folder.path().join(format!("{stem}.manifest"));
        (folder, segment, manifest)
    }

    #[test]
    fn a_segment_is_described_without_its_manifest() {
        let (folder, segment, manifest) = corner();
        fs::remove_file(manifest).unwrap();
        let elsewhere = folder.path().join("some name.damaged");
        fs::rename(&segment, &elsewhere).unwrap();
        let found = look(&elsewhere).unwrap();
        assert!(found.set_aside && found.damage().is_none());
        assert_eq!(found.notes.len(), 1, "{:?}", found.notes);
        let Content::Segment(facts) = found.content else { panic!("{:?}", found.content) };
        assert_eq!((facts.format_version, facts.keys, facts.number), (1, 500, 0));
        assert_eq!(facts.key_spec_hash, "00112233445566778899aabbccddeeff");
        assert_eq!((facts.generation.epoch, facts.generation.batch), (3, 1));
        assert_eq!(facts.sections.iter().map(|section| section.keys).sum::<u64>(), 500);
        for section in &facts.sections {
            assert!(section.from <= section.event_time_min && section.event_time_max < section.to);
            assert!((16.0..24.0).contains(&section.filter_bits_per_key), "{section:?}");
            assert!((9.0..14.0).contains(&section.page_bytes_per_key), "{section:?}");
        }
    }

    #[test]
    fn a_manifest_is_shown_as_what_it_says() {
        let (_folder, _, manifest) = corner();
        let found = look(&manifest).unwrap();
        assert!(found.notes.is_empty() && !found.set_aside);
        let Content::Manifest(facts) = found.content else { panic!("{:?}", found.content) };
        assert_eq!(facts.keys, 500);
        assert_eq!(facts.says["segments"].as_array().unwrap().len(), 1);
        assert_eq!(facts.says["seed"], 1_234_567_890_123_456_789u64);
    }

    #[test]
    fn damage_is_told_with_its_byte() {
        let (_folder, segment, manifest) = corner();
        let good = fs::read(&segment).unwrap();
        let end = good.len();
        let wrong = |at: usize| {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&segment, &bad).unwrap();
            let found = look(&segment);
            match found {
                Ok(found) => found.damage().expect("a flipped byte is damage").to_string(),
                Err(error) => error.to_string(),
            }
        };
        assert!(wrong(0).contains("first bytes"), "{}", wrong(0));
        assert!(wrong(40).contains(&format!("the checksum at byte {} is wrong", end - 24)), "{}", wrong(40));
        assert!(wrong(200).contains("the filter page at byte 136 is wrong"), "{}", wrong(200));
        assert!(wrong(end - 1).contains(&format!("at byte {}", end - 8)), "{}", wrong(end - 1));
        assert!(
            wrong(end - 60).contains(&format!("the checksum at byte {}", end - 24)),
            "{}",
            wrong(end - 60)
        );
        fs::write(&segment, &good[..end - 100]).unwrap();
        let cut = look(&segment).unwrap_err().to_string();
        assert!(cut.contains("cut short") && cut.contains("e0000000003-b0000000001"), "{cut}");

        let good = fs::read(&manifest).unwrap();
        fs::write(&manifest, [&good[..100], &[0xff], &good[100..]].concat()).unwrap();
        let torn = look(&manifest).unwrap_err().to_string();
        assert!(torn.contains("not text, at byte 100"), "{torn}");
    }

    #[test]
    fn every_damaged_section_is_told() {
        let (_folder, segment, _) = corner();
        let Content::Segment(facts) = look(&segment).unwrap().content else { panic!("a segment") };
        let mut bytes = fs::read(&segment).unwrap();
        let (first, last) = (&facts.sections[0], facts.sections.last().unwrap());
        assert!(first.from < last.from);
        for section in [first, last] {
            bytes[section.pages_position as usize + 20] ^= 1;
        }
        fs::write(&segment, &bytes).unwrap();
        let Content::Segment(facts) = look(&segment).unwrap().content else { panic!("a segment") };
        let damaged: Vec<_> = facts.sections.iter().filter(|section| section.damage.is_some()).collect();
        assert_eq!(damaged.len(), 2);
    }

    #[test]
    fn other_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&str, &[u8], &str); 6] = [
            ("data.parquet", b"PAR1....", "Parquet"),
            ("catalog.db", b"SQLite format 3\0..", "SQLite"),
            ("lock", b"0189 7\n", "lock"),
            ("nothing", b"", "empty"),
            ("holes", &[0; 100], "zeros"),
            ("notes.txt", b"buy milk", "text"),
        ];
        for (name, bytes, expected) in cases {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            assert!(!is_state_file(&path), "{name}");
            match look(&path).unwrap().content {
                Content::Other { looks_like } => assert!(looks_like.contains(expected), "{looks_like}"),
                content => panic!("{content:?}"),
            }
        }
        let damaged = folder
            .path()
            .join("e0000000003-b0000000001-018bcfe5-6800-7000-8000-000000000001-000.segment.damaged");
        fs::write(&damaged, "overwritten").unwrap();
        assert!(is_state_file(&damaged));
        assert!(matches!(look(&damaged), Err(StoreError::Corrupt { .. })));
        assert!(matches!(look(&folder.path().join("gone")), Err(StoreError::Io { .. })));
    }
}
