//! `tidemill state inspect FILE`: what one file of a state folder says.

use std::path::Path;

use serde::Serialize;

use super::super::plan::table;
use super::super::terminal;
use super::{bytes, reading_bar};
use crate::dedup::{self, Content, Inspection, ManifestFacts, SegmentFacts, StoreError};
use crate::event_time::EventTimeMs;
use crate::pipeline::stops;
use crate::stop::{Reason, Stop};

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Inspected<'a> {
    event: &'static str,
    #[serde(flatten)]
    inspection: &'a Inspection,
}

/// Prints a file; damage and files of other kinds end as a stop.
pub(super) fn show(path: &Path, pages: bool, json: bool) -> Result<(), Stop> {
    let bar = if json || !pages { indicatif::ProgressBar::hidden() } else { reading_bar() };
    bar.set_length(std::fs::metadata(path).map_or(0, |metadata| metadata.len()));
    let inspection = dedup::inspect(path, pages, &mut |position| bar.set_position(position));
    bar.finish_and_clear();
    let inspection = inspection.map_err(|error| damaged(path, error))?;
    if let Content::Other { looks_like } = &inspection.content {
        return Err(Stop::new(
            Reason::Usage,
            format!("{} is not a file of tidemill's dedup state: it looks like {looks_like}", path.display()),
            "name a job file that ends in .toml, a state folder, or a .manifest, .segment or .damaged file of one",
        ));
    }
    if json {
        terminal::print_json(&Inspected { event: "state_file", inspection: &inspection });
    } else {
        print(path, &inspection);
    }
    inspection.damage().map_or(Ok(()), |error| Err(damaged(path, error)))
}

/// The stop for a file that was only looked at: unlike a run, nobody rebuilds because of it.
fn damaged(path: &Path, error: StoreError) -> Stop {
    match error {
        StoreError::Corrupt { what, .. } => Stop::new(
            Reason::StorageFailed,
            format!("{} is damaged: {what}", path.display()),
            "nothing was changed; if the newest generation names the file, set it aside and rebuild the state from the \
             table:\n  tidemill state verify JOB\n  tidemill run JOB",
        ),
        StoreError::Io { source, .. } => Stop::new(
            Reason::Usage,
            format!("{} can not be read", path.display()),
            "name a job file, a state folder or a file of one that you may read",
        )
        .because(source),
        other => stops::state(path.parent().unwrap_or(path), other),
    }
}

fn print(path: &Path, inspection: &Inspection) {
    say!("file            {}", path.display());
    say!("size            {} ({} bytes)", bytes(inspection.bytes as f64), inspection.bytes);
    if inspection.set_aside {
        say!("set aside       it was found damaged once; nothing reads it any more");
    }
    for note in &inspection.notes {
        say!("note            {note}");
    }
    match &inspection.content {
        Content::Manifest(facts) => print_manifest(facts),
        Content::Segment(facts) => print_segment(facts),
        Content::Other { looks_like } => say!("looks like      {looks_like}"),
    }
}

fn print_manifest(facts: &ManifestFacts) {
    say!("kind            manifest of a generation");
    say!("checksum        {} (right)", facts.checksum);
    say!("keys            {}", facts.keys);
    say!("segment bytes   {} ({} bytes)", bytes(facts.segment_bytes as f64), facts.segment_bytes);
    say!("{:#}", facts.says);
}

fn print_segment(facts: &SegmentFacts) {
    say!("kind            segment, format version {}", facts.format_version);
    say!("job             {}", facts.job_id);
    say!("key spec        {}", facts.key_spec_hash);
    say!("generation      {}, segment {}", facts.generation, facts.number);
    say!("checksum        {} (right, over header, directory and footer)", facts.checksum);
    say!("keys            {}, {:.2} bytes each", facts.keys, facts.bytes_per_key);
    say!(
        "pages           {}",
        if facts.pages_read { "all read" } else { "not read; --pages reads and checks them" }
    );
    let mut sections = table([
        "bucket from",
        "to",
        "first event",
        "last event",
        "keys",
        "filter bits/key",
        "pages",
        "keys/page",
        "bytes/key",
        "at byte",
        "state",
    ]);
    for section in &facts.sections {
        sections.add_row([
            time(section.from),
            time(section.to),
            time(section.event_time_min),
            time(section.event_time_max),
            section.keys.to_string(),
            format!("{:.1}", section.filter_bits_per_key),
            section.pages.to_string(),
            format!("{:.0}", section.keys_per_page),
            format!("{:.2}", section.bytes_per_key),
            section.filter_position.to_string(),
            match (&section.damage, facts.pages_read) {
                (Some(damage), _) => damage.clone(),
                (None, true) => "ok".to_owned(),
                (None, false) => String::new(),
            },
        ]);
    }
    say!("{sections}");
}

/// A time for people; the open begin and end of time have no date.
fn time(time: EventTimeMs) -> String {
    match time.0 {
        i64::MIN => "open".to_owned(),
        i64::MAX => "end".to_owned(),
        _ => time.to_string(),
    }
}
