//! What the name of a file tells: who wrote it, and when its attempt was made.
//!
//! Names of this program carry an attempt, a UUID of version 7, whose first bits are its time
//! ```text
//! ATTEMPT-XXXXXXXX-NNNNN.parquet       a data file
//! ATTEMPT-mN.avro                      a manifest
//! snap-SNAPSHOT-N-ATTEMPT.avro         a manifest list
//! ATTEMPT-merged-mN.avro, -list.avro   of a merge
//! tidemill-expiry-ATTEMPT.json         an intent
//! NNNNN-UUID[.gz].metadata.json        a metadata file; of any writer, the number is its version
//! ```
//! Java and Python write UUIDs of version 4, so their files are never taken for ours.

use iceberg::table::Table;
use uuid::Uuid;

/// Folder of a table's manifests, without a slash at its end.
pub fn metadata_folder(table: &Table) -> String {
    format!("{}/metadata", table.metadata().location().trim_end_matches('/'))
}

/// Folder of a table's data files, if it is the table's own: another may be shared by several tables.
pub(super) fn own_data_folder(table: &Table) -> Option<String> {
    let metadata = table.metadata();
    let moved = ["write.data.path", "write.folder-storage.path", "write.object-storage.path"]
        .iter()
        .any(|property| metadata.properties().contains_key(*property));
    (!moved).then(|| format!("{}/data", metadata.location().trim_end_matches('/')))
}

/// Whether a file is an intent.
pub(super) fn is_intent(path: &str) -> bool {
    let name = name_of(path);
    name.starts_with("tidemill-expiry-") && name.ends_with(".json")
}

/// When the attempt of a file of ours was made, ms since the epoch.
pub(super) fn attempt_ms(path: &str) -> Option<i64> {
    let name = name_of(path);
    let attempt = match name.strip_suffix(".avro") {
        Some(stem) => match stem.strip_prefix("snap-") {
            Some(list) => list.get(list.len().checked_sub(UUID_LEN)?..)?,
            None => stem.get(..UUID_LEN)?,
        },
        None if is_intent(path) => name.strip_prefix("tidemill-expiry-")?.strip_suffix(".json")?,
        None => {
            let stem = name.strip_suffix(".parquet")?;
            let (attempt, rest) = (stem.get(..UUID_LEN)?, stem.get(UUID_LEN..)?);
            let parts: Vec<&str> = rest.split('-').collect();
            let is_ours = matches!(parts[..], ["", writer, number]
                if writer.len() == 8 && writer.bytes().all(|byte| byte.is_ascii_hexdigit())
                    && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
            is_ours.then_some(attempt)?
        }
    };
    let attempt = Uuid::try_parse(attempt).ok().filter(|uuid| uuid.get_version_num() == 7)?;
    let (seconds, nanos) = attempt.get_timestamp()?.to_unix();
    i64::try_from(seconds).ok().map(|seconds| seconds * 1_000 + i64::from(nanos / 1_000_000))
}

/// Version of a metadata file.
pub(super) fn metadata_version(path: &str) -> Option<u64> {
    let stem = name_of(path).strip_suffix(".metadata.json")?;
    let stem = stem.strip_suffix(".gz").unwrap_or(stem);
    let (version, id) = stem.split_once('-')?;
    Uuid::try_parse(id).ok()?;
    version.parse().ok()
}

/// Length of a UUID as text.
const UUID_LEN: usize = 36;

fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// A path without what different programs write before it: `file:///a`, `file:/a` and `/a` are one, and so are `s3://`,
/// `s3a://` and `s3n://`.
pub(super) fn plain(path: &str) -> &str {
    for scheme in ["file://", "file:", "s3://", "s3a://", "s3n://"] {
        if let Some(rest) = path.strip_prefix(scheme) {
            return rest;
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: &str = "0199aaaa-bbbb-7ccc-8ddd-eeeeffff0000";
    const FOUR: &str = "41c5b0d0-9a52-4b8c-9d27-0a6f1a1f4d11";

    #[test]
    fn names_of_this_program_tell_their_attempts_time_and_others_tell_nothing() {
        let made_ms = Some(0x0199_aaaa_bbbb);
        for name in [
            format!("{SEVEN}-0a1b2c3d-00000.parquet"),
            format!("{SEVEN}-m0.avro"),
            format!("{SEVEN}-merged-m1.avro"),
            format!("{SEVEN}-merged-list.avro"),
            format!("snap-123-0-{SEVEN}.avro"),
            format!("tidemill-expiry-{SEVEN}.json"),
        ] {
            assert_eq!(attempt_ms(&format!("file:///w/t/metadata/{name}")), made_ms, "{name}");
            assert_eq!(attempt_ms(&format!("s3://b/{}", name.replace(SEVEN, FOUR))), None, "{name}");
        }
        for name in [
            format!("{SEVEN}.parquet"),
            format!("{SEVEN}-0a1b2c3d-00000.orc"),
            format!("00000-0-{SEVEN}.parquet"),
            format!("{SEVEN}-0a1b2c3-00000.parquet"),
            format!("{SEVEN}-0a1b2c3d-.parquet"),
            "snap-1.avro".to_owned(),
            "é.avro".to_owned(),
            "version-hint.text".to_owned(),
        ] {
            assert_eq!(attempt_ms(&name), None, "{name}");
        }
    }

    #[test]
    fn versions_of_metadata_files_are_read_with_and_without_compression() {
        assert_eq!(metadata_version(&format!("/w/t/metadata/00012-{FOUR}.gz.metadata.json")), Some(12));
        assert_eq!(metadata_version(&format!("00012-{SEVEN}.metadata.json")), Some(12));
        for name in ["v3.metadata.json", "00012-x.metadata.json", "00012.json", ".metadata.json"] {
            assert_eq!(metadata_version(name), None, "{name}");
        }
    }

    #[test]
    fn a_path_is_the_same_whatever_program_wrote_it() {
        for path in ["file:///w/a", "file:/w/a", "/w/a"] {
            assert_eq!(plain(path), "/w/a");
        }
        for path in ["s3://b/w/a", "s3a://b/w/a", "s3n://b/w/a"] {
            assert_eq!(plain(path), "b/w/a");
        }
    }
}
