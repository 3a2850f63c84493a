//! What a person or a script sees: bar, lines, JSON, and the end of a run that stopped.

use std::io::{IsTerminal, Write};
use std::time::Instant;

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::EnvFilter;

use crate::counts::Counts;
use crate::pipeline::profile::ProfileReport;
use crate::pipeline::report::{Event, LaneSummary, Report};
use crate::stop::Stop;

/// Logs to standard error, in the open format of `tracing`: time, level, target, fields.
pub fn start_logging(filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        eprintln!("log filter {filter:?} is not understood ({error}); showing warnings");
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// The error chain, what is safe, and the way out.
pub fn print_stop(stop: &Stop, json: bool) {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(stop);
    while let Some(error) = source {
        causes.push(error.to_string());
        source = error.source();
    }
    if json {
        print_json(&serde_json::json!({
            "event": "stop", "reason": stop.reason.name(), "exit_code": stop.reason.exit_code(),
            "what": stop.what, "causes": causes, "way_out": stop.way_out,
        }));
        return;
    }
    eprintln!("tidemill: {}: {}", stop.reason.name(), stop.what);
    for cause in causes {
        eprintln!("  because: {cause}");
    }
    for line in stop.way_out.lines() {
        eprintln!("  {line}");
    }
}

/// One line of JSON on standard output. A reader that went away is no error of ours.
pub fn print_json(value: &impl serde::Serialize) {
    let line = serde_json::to_string(value).expect("reports have string keys and finite numbers");
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Shows events as a bar on a terminal, as one line a commit elsewhere, or as JSON.
pub struct Terminal {
    json: bool,
    bar: Option<ProgressBar>,
    begun: Instant,
    lag_at_start: u64,
    /// The lane that the bar shows; `None` for live.
    lane: Option<String>,
    consumed: u64,
}

impl Terminal {
    /// A bar needs standard error on a terminal and no `--json`.
    pub fn new(json: bool) -> Self {
        let bar = (!json && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template(
                "{bar:30} {percent:>3}%  {msg}  {elapsed_precise} left {eta_precise}",
            )
            .expect("the template is a constant");
            ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style)
        });
        Self { json, bar, begun: Instant::now(), lag_at_start: 0, lane: None, consumed: 0 }
    }

    /// Takes the bar away, before a result or a question is printed.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Lets the bar begin anew when another lane is read.
    fn bar_of(&mut self, lane: Option<&String>, left: u64) {
        if self.lane.as_ref() == lane {
            return;
        }
        (self.lane, self.lag_at_start) = (lane.cloned(), left);
        if let Some(bar) = &self.bar {
            bar.set_length(left);
            bar.set_position(0);
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => {
                let _ = writeln!(std::io::stdout(), "{text}");
            }
        }
    }

    /// On standard error, where it is beside what the run said.
    fn print_profile(&mut self, profile: &ProfileReport) {
        self.clear();
        eprintln!("where the time went: {:.2} s", profile.seconds);
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(["stage", "working s", "waiting s", "of the run", "beside: working s", "waiting s"]);
        for stage in &profile.stages {
            let beside = stage.beside.unwrap_or_default();
            if stage.line.seconds() + beside.seconds() == 0.0 {
                continue;
            }
            let seconds = |seconds: f64| format!("{seconds:.3}");
            let of_beside = |time: f64| if beside.seconds() > 0.0 { seconds(time) } else { String::new() };
            table.add_row([
                stage.name().to_owned(),
                seconds(stage.line.working_seconds),
                seconds(stage.line.waiting_seconds),
                format!("{:.1} %", 100.0 * stage.line.seconds() / profile.seconds.max(f64::MIN_POSITIVE)),
                of_beside(beside.working_seconds),
                of_beside(beside.waiting_seconds),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
        eprintln!("{table}");
        let cpu = &profile.cpu;
        let threads: Vec<String> =
            cpu.threads.iter().map(|(name, seconds)| format!("{name} {seconds:.2}")).collect();
        eprintln!(
            "processor seconds: {:.2} user, {:.2} system, {:.0} % of {} processors; threads: {}",
            cpu.user_seconds,
            cpu.system_seconds,
            100.0 * cpu.seconds() / (profile.seconds * profile.processors as f64).max(f64::MIN_POSITIVE),
            profile.processors,
            threads.join(", ")
        );
        if let Some(busy) = profile.machine_busy {
            eprintln!("processors of the machine, all programs: {:.0} % busy", 100.0 * busy);
        }
        eprintln!("{}", profile.limit_in_words());
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Start { job, epoch, lag, topic_partitions, memory } => {
                self.lag_at_start = *lag;
                if let Some(bar) = &self.bar {
                    bar.set_length(*lag);
                }
                self.lane = None;
                self.line(&format!(
                    "job {job} epoch {epoch}: {} offsets to read from {topic_partitions} topic partitions",
                    HumanCount(*lag)
                ));
                tracing::info!(memory, "memory split");
            }
            Event::Backfill(lane) => {
                let to = lane.to.as_deref().unwrap_or("its end");
                let LaneSummary { lane, state, from, left, counts, .. } = lane;
                self.bar_of(Some(lane), *left);
                self.line(&format!(
                    "backfill {lane} from {from} to {to} is {state}: {} offsets left, consumed {} outside range {} written {} \
                     duplicate {}",
                    HumanCount(*left),
                    counts.consumed,
                    counts.outside_range,
                    counts.written,
                    counts.duplicate
                ));
            }
            Event::Progress { batch, consumed, lag, lane } => {
                self.consumed = *consumed;
                self.bar_of(lane.as_ref(), *lag);
                if let Some(bar) = &self.bar {
                    let rate = *consumed as f64 / self.begun.elapsed().as_secs_f64().max(0.001);
                    bar.set_position(self.lag_at_start.saturating_sub(*lag));
                    bar.set_message(format!(
                        "{}{} events  {}/s  lag {}  batch {batch}",
                        lane.as_ref().map_or_else(String::new, |lane| format!("{lane}: ")),
                        HumanCount(*consumed),
                        HumanCount(rate as u64),
                        HumanCount(*lag)
                    ));
                }
            }
            Event::Reading { table, rows, rows_total } => {
                if let Some(bar) = &self.bar {
                    let rate = *rows as f64 / self.begun.elapsed().as_secs_f64().max(0.001);
                    if let Some(total) = rows_total {
                        bar.set_length(*total);
                    }
                    bar.set_position(*rows);
                    bar.set_message(format!(
                        "keys of {table}: {} rows  {}/s",
                        HumanCount(*rows),
                        HumanCount(rate as u64)
                    ));
                }
            }
            Event::Commit {
                batch,
                counts,
                snapshot_id,
                data_files,
                sends,
                lag,
                lane,
                watermark,
                complete_since,
                buckets_lent,
            } => {
                self.line(&format!(
                    "batch {batch} committed{}: consumed {} written {} duplicate {} dead_letter {} late {}{} files {data_files} \
                     lag {lag} watermark {} complete since {} snapshot {snapshot_id}{}{}",
                    lane.as_ref().map_or_else(String::new, |lane| {
                        format!(" for backfill {lane}, outside range {}", counts.outside_range)
                    }),
                    counts.consumed,
                    counts.written,
                    counts.duplicate,
                    counts.dead_letter + counts.dead_letter_known,
                    counts.late,
                    fate_of_late(counts),
                    watermark.as_deref().unwrap_or("none"),
                    complete_since.as_deref().unwrap_or("ever"),
                    if *buckets_lent > 0 { format!(" buckets read {buckets_lent}") } else { String::new() },
                    if *sends > 1 { format!(" sends {sends}") } else { String::new() },
                ));
            }
            Event::Profile(profile) => self.print_profile(profile),
            Event::Maintained { table, done, seconds } => {
                self.line(&format!("table {table} maintained in {seconds:.1} s: {done}"));
            }
            Event::Notice { text } => self.line(&format!("note: {text}")),
            Event::Away { reason, what } => {
                self.line(&format!("away: {reason}: {what}; trying again until it is back"));
            }
            Event::Back { reason, seconds } => {
                self.line(&format!("back: {reason} is over after {seconds:.0} s"))
            }
            Event::Done(summary) => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
                let counts = &summary.counts;
                if summary.batches == 0 {
                    self.line(&format!("nothing to read: {} is at batch {}", summary.table, summary.batch));
                    return;
                }
                let rate = counts.consumed as f64 / summary.seconds.max(0.001);
                self.line(&format!(
                    "done: {} events in {} batches, {} written, {} duplicate, {} late{}, {} dead letters, {}/s, {} keys in {} of \
                     state, complete since {}",
                    HumanCount(counts.consumed),
                    summary.batches,
                    HumanCount(counts.written),
                    HumanCount(counts.duplicate),
                    HumanCount(counts.late),
                    fate_of_late(counts),
                    HumanCount(counts.dead_letter + counts.dead_letter_known),
                    HumanCount(rate as u64),
                    HumanCount(summary.state_keys),
                    bytesize::ByteSize(summary.state_bytes),
                    summary.complete_since.as_deref().unwrap_or("ever"),
                ));
            }
        }
    }
}

/// What became of late rows that main did not get.
fn fate_of_late(counts: &Counts) -> String {
    let parts: Vec<String> = [(counts.late_side, "to the late table"), (counts.late_dropped, "dropped")]
        .into_iter()
        .filter(|(rows, _)| *rows > 0)
        .map(|(rows, fate)| format!("{rows} {fate}"))
        .collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

impl Report for Terminal {
    fn event(&mut self, event: &Event) {
        if !self.json {
            self.show(event);
        } else if !matches!(event, Event::Progress { .. } | Event::Reading { .. }) {
            print_json(event);
        }
    }
}
