//! The rules of a table, under the names that Iceberg gives them, and what the job adds.

use std::collections::HashMap;
use std::str::FromStr;
use std::time::Duration;

use crate::job::{MaintenanceRule, SNAPSHOTS_MAX_DEFAULT};

const AGE: &str = "history.expire.max-snapshot-age-ms";
/// Iceberg's default of `history.expire.max-snapshot-age-ms`: five days.
const AGE_MS_DEFAULT: i64 = 5 * 24 * 60 * 60 * 1_000;
/// Iceberg's default of `history.expire.min-snapshots-to-keep`.
const SNAPSHOTS_MIN_DEFAULT: usize = 1;
/// Iceberg's default of `commit.manifest.min-count-to-merge`.
const MANIFESTS_MIN_DEFAULT: usize = 100;
/// Iceberg's default of `commit.manifest.target-size-bytes`.
const MANIFEST_BYTES_TARGET_DEFAULT: u64 = 8 << 20;

/// A table property that can not be followed; the table is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "table property {property} is {value:?}, which is not {expected}; the table is not maintained until it is mended"
)]
pub struct PropertyError {
    /// Name of the property.
    pub property: &'static str,
    /// Its value.
    pub value: String,
    /// What is taken.
    pub expected: &'static str,
}

/// What may leave a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Snapshots younger than this stay.
    pub age_ms_max: i64,
    /// So many of each branch stay whatever their age.
    pub snapshots_min: usize,
    /// No more than so many of the main branch stay for their age alone; `None` = as many as are young.
    pub snapshots_max: Option<usize>,
    /// Refs other than main whose snapshot is older leave; a ref may say otherwise of itself.
    pub ref_age_ms_max: i64,
    /// `gc.enabled`: whether files of this table may be deleted at all, and so snapshots expire.
    pub collects: bool,
    /// Whether and when manifests are merged.
    pub merge: Option<MergeRule>,
    /// Whether metadata files that left the log are deleted.
    pub deletes_metadata_files: bool,
}

/// When manifests are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeRule {
    /// At least so many small ones.
    pub manifests_min: usize,
    /// A manifest of this size is no longer small, in bytes.
    pub bytes_target: u64,
}

impl Rules {
    /// Reads the properties of a table. Where the table says nothing of age, the job's number of snapshots holds too.
    ///
    /// # Errors
    /// [`PropertyError`] names the first property that can not be followed.
    pub fn of(properties: &HashMap<String, String>, rule: &MaintenanceRule) -> Result<Self, PropertyError> {
        let properties = Properties(properties);
        let by_default = (!properties.0.contains_key(AGE)).then_some(SNAPSHOTS_MAX_DEFAULT);
        let merges = properties.flag("commit.manifest-merge.enabled", true)?;
        let merge = MergeRule {
            manifests_min: properties.number("commit.manifest.min-count-to-merge", MANIFESTS_MIN_DEFAULT)?,
            bytes_target: properties
                .number("commit.manifest.target-size-bytes", MANIFEST_BYTES_TARGET_DEFAULT)?,
        };
        Ok(Self {
            age_ms_max: properties.number(AGE, AGE_MS_DEFAULT)?,
            snapshots_min: properties
                .number("history.expire.min-snapshots-to-keep", SNAPSHOTS_MIN_DEFAULT)?
                .max(1),
            snapshots_max: rule.snapshots_max.or(by_default).map(|most| most as usize),
            ref_age_ms_max: properties.number("history.expire.max-ref-age-ms", i64::MAX)?,
            collects: properties.flag("gc.enabled", true)?,
            merge: merges.then_some(merge),
            deletes_metadata_files: properties.flag("write.metadata.delete-after-commit.enabled", false)?,
        })
    }

    /// What a person asks for instead: an age, and how many stay whatever their age.
    #[must_use]
    pub fn asked(mut self, older_than: Option<Duration>, retain_last: Option<usize>) -> Self {
        if let Some(age) = older_than {
            self.age_ms_max = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
            self.snapshots_max = None;
        }
        if let Some(least) = retain_last {
            self.snapshots_min = least.max(1);
        }
        self
    }
}

struct Properties<'a>(&'a HashMap<String, String>);

impl Properties<'_> {
    fn number<T: FromStr + PartialOrd + Default>(
        &self,
        property: &'static str,
        default: T,
    ) -> Result<T, PropertyError> {
        let Some(value) = self.0.get(property) else { return Ok(default) };
        let number = value.trim().parse().ok().filter(|number| *number >= T::default());
        number.ok_or_else(|| PropertyError { property, value: value.clone(), expected: "a whole number" })
    }

    fn flag(&self, property: &'static str, default: bool) -> Result<bool, PropertyError> {
        match self.0.get(property).map(|value| value.trim().to_ascii_lowercase()).as_deref() {
            None => Ok(default),
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(value) => {
                Err(PropertyError { property, value: value.to_owned(), expected: "true or false" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(properties: &[(&str, &str)], rule: &MaintenanceRule) -> Result<Rules, PropertyError> {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Rules::of(&properties.collect(), rule)
    }

    #[test]
    fn a_table_that_says_nothing_has_icebergs_defaults_and_a_bounded_number_of_snapshots() {
        let rules = rules(&[], &MaintenanceRule::default()).unwrap();
        assert_eq!((rules.age_ms_max, rules.snapshots_min), (432_000_000, 1));
        assert_eq!((rules.snapshots_max, rules.ref_age_ms_max), (Some(40), i64::MAX));
        assert_eq!(rules.merge, Some(MergeRule { manifests_min: 100, bytes_target: 8 << 20 }));
        assert!(rules.collects && !rules.deletes_metadata_files);
    }

    #[test]
    fn a_table_that_says_an_age_is_held_to_it_unless_the_job_names_a_number() {
        let age = [(AGE, "1000")];
        let by_table = rules(&age, &MaintenanceRule::default()).unwrap();
        assert_eq!((by_table.age_ms_max, by_table.snapshots_max), (1_000, None));
        let by_job = MaintenanceRule { snapshots_max: Some(7), ..MaintenanceRule::default() };
        assert_eq!(rules(&age, &by_job).unwrap().snapshots_max, Some(7));
    }

    #[test]
    fn what_a_person_asks_for_goes_before_the_table() {
        let asked = rules(&[], &MaintenanceRule::default()).unwrap();
        let asked = asked.asked(Some(Duration::from_secs(1)), Some(0));
        assert_eq!((asked.age_ms_max, asked.snapshots_min, asked.snapshots_max), (1_000, 1, None));
    }

    #[test]
    fn a_value_that_means_nothing_is_named_and_not_guessed() {
        for (property, value) in [
            (AGE, "five days"),
            ("history.expire.min-snapshots-to-keep", "-1"),
            ("gc.enabled", "no"),
            ("commit.manifest.min-count-to-merge", ""),
        ] {
            let error = rules(&[(property, value)], &MaintenanceRule::default()).unwrap_err();
            assert_eq!((error.property, error.value.as_str()), (property, value));
        }
    }
}
