//! Backfills: records of a time range once more, as a lane of its own beside the live one.
//!
//! Flow: [`resolve`] (reads only) -> a person approves -> [`run`]: the owner registers the lane with a commit, serves live
//! first and then the lane until it is done; beside another owner it leaves a request, watches the ledger, and takes over
//! when that owner has gone.
//!
//! Records are not in the order of their time. So a topic partition is read from its first record of the range, which the
//! broker knows, to the end that it had when the backfill was resolved, and every record's own Kafka timestamp decides.
//! What was written before is a repeat; what is older than the window is looked up in the table.
//!
//! Durable steps: the registration is a commit before the first read, with start and end of every topic partition; each
//! microbatch moves the lane's cursors. A crash anywhere leaves a lane that the next owner goes on with.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::lanes::{Blocked, LaneReader, READERS_MAX, Turn, backfill_plans};
use super::rebuild::commit_change;
use super::report::{Event, LaneSummary, Report, Summary};
use super::requests::{self, Granted, Posted, grant, topics_of};
use super::session::{Session, reader_options};
use super::survey::Survey;
use super::trouble::{BACKFILL_STALL_AFTER, is_of_lane};
use super::{RunOptions, Wish, plan_memory, stops};
use crate::commit::ledger::{Change, Lane, LaneState, LedgerRecord};
use crate::commit::request::{Ask, NewLane, Span};
use crate::event_time::EventTimeMs;
use crate::job::StartPosition;
use crate::job::file::LoadedJob;
use crate::offset::{NextOffset, TopicPartition};
use crate::record::{Record, RecordChunk};
use crate::source::{Connection, ReadLimits, ReadPlan, Reader, ReaderOptions, SourceError};
use crate::stop::{Reason, Stop};

/// Records that are read to learn what one weighs, shared by all topic partitions; at least one of each.
const SAMPLE_RECORDS: i64 = 2_000;
/// Most bytes of them.
const SAMPLE_BYTES_MAX: usize = 8 << 20;
/// Longest time for it; what was read by then tells.
const SAMPLE_TIME_MAX: Duration = Duration::from_secs(10);

/// The field that says how many dead letters a microbatch may have.
const LETTERS_RATIO_MAX: &str = "sink.iceberg.dead_letters.max_ratio";

/// What a person asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Name of the lane.
    pub lane: String,
    /// First Kafka timestamp, ms since the epoch.
    pub from_ms: i64,
    /// First Kafka timestamp after the range.
    pub to_ms: Option<i64>,
    /// Read from the earliest offsets instead of those that the broker names for `from_ms`.
    pub scan_all: bool,
}

/// What a backfill would read.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Name of the lane.
    pub lane: String,
    /// First Kafka timestamp, RFC 3339.
    pub from: String,
    /// First Kafka timestamp after the range, RFC 3339.
    pub to: Option<String>,
    /// The main table.
    pub table: String,
    /// Topic partitions, sorted.
    pub topic_partitions: Vec<PlannedPartition>,
    /// Records at most, of all.
    pub records_at_most: u64,
    /// Bytes of keys, payloads and headers of them, about.
    pub bytes_about: u64,
    /// Offsets that the live lane has still to read, which is done first.
    pub live_lag: u64,
    /// Event times before this are looked up in the table, RFC 3339; none = the dedup state knows all.
    pub complete_since: Option<String>,
    /// What is asked of an owner.
    #[serde(skip)]
    pub new_lane: NewLane,
}

/// One topic partition of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedPartition {
    /// Topic.
    pub topic: String,
    /// Topic partition.
    pub partition: i32,
    /// Oldest offset that the broker holds.
    pub low: i64,
    /// First offset that is read.
    pub start: i64,
    /// One past the last offset that is read.
    pub end: i64,
    /// Records at most: control records and gaps count, and so do records outside the range.
    pub records_at_most: u64,
    /// Bytes of keys, payloads and headers of so many records as its first ones are, uncompressed. No broker tells it.
    pub bytes_about: u64,
}

fn shown(time_ms: i64) -> String {
    EventTimeMs(time_ms).to_string()
}

/// Asks broker and ledger what a backfill would read. Changes nothing.
///
/// # Errors
/// Broker or catalog is away; `USAGE` where an owner would refuse it.
pub async fn resolve(loaded: &LoadedJob, asked: &Asked) -> Result<Plan, Stop> {
    let job = &loaded.job;
    let survey = Survey::take(job, &plan_memory(loaded)?).await?;
    let from = match asked.scan_all {
        true => StartPosition::Earliest,
        false => StartPosition::Timestamp(asked.from_ms),
    };
    let starts = survey.connection.resolve_start(&from, &survey.offsets).map_err(stops::source)?;
    let (mut spans, mut topic_partitions) = (BTreeMap::<String, BTreeMap<i32, Span>>::new(), Vec::new());
    for (name, range) in &survey.offsets {
        let span = Span { start: starts[name], end: range.end };
        spans.entry(name.topic.clone()).or_default().insert(name.partition, span);
        topic_partitions.push(PlannedPartition {
            topic: name.topic.clone(),
            partition: name.partition,
            low: range.low.get(),
            start: span.start.get(),
            end: span.end.get(),
            records_at_most: u64::try_from(span.end.get() - span.start.get()).unwrap_or(0),
            bytes_about: 0,
        });
    }
    weigh(&survey.connection, &mut topic_partitions).map_err(stops::source)?;
    let (lane, from_ms, to_ms) = (asked.lane.clone(), asked.from_ms, asked.to_ms);
    let new_lane = NewLane { lane, from_ms, to_ms, spans };
    let record = survey.record();
    if let Some(record) = record {
        let topics = job.source.topics.iter().cloned().collect();
        let granted = grant(record, &Ask::Backfill(new_lane.clone()), &topics).map_err(refused)?;
        if granted.is_none() {
            return Err(refused(format!("there is a backfill {} already", asked.lane)));
        }
    }
    let live = survey.starts(job, record)?;
    let lag = |(name, range): (&TopicPartition, &crate::source::OffsetRange)| {
        u64::try_from(range.end.get() - live[name].get()).unwrap_or(0)
    };
    Ok(Plan {
        lane: asked.lane.clone(),
        from: shown(asked.from_ms),
        to: asked.to_ms.map(shown),
        table: survey.main_ident.to_string(),
        records_at_most: topic_partitions.iter().map(|planned| planned.records_at_most).sum(),
        bytes_about: topic_partitions.iter().map(|planned| planned.bytes_about).sum(),
        topic_partitions,
        live_lag: survey.offsets.iter().map(lag).sum(),
        complete_since: record.and_then(|record| record.dedup.complete_since).map(|time| time.to_string()),
        new_lane,
    })
}

/// Reads the first records of each topic partition and fills in what all of them weigh if they are alike. One of which
/// nothing was read is taken to be like the others.
fn weigh(connection: &Connection, planned: &mut [PlannedPartition]) -> Result<(), SourceError> {
    let to_read = || planned.iter().filter(|planned| planned.records_at_most > 0);
    let each = (SAMPLE_RECORDS / i64::try_from(to_read().count().max(1)).unwrap_or(i64::MAX)).max(1);
    let plan = |planned: &PlannedPartition| ReadPlan {
        topic_partition: TopicPartition { topic: planned.topic.clone(), partition: planned.partition },
        start: NextOffset::at(planned.start),
        end: NextOffset::at(planned.end.min(planned.start.saturating_add(each))),
        low: NextOffset::at(planned.low),
        tail: None,
    };
    let mut reader = Reader::assign(connection, to_read().map(plan).collect(), ReaderOptions::default())?;
    let deadline = Instant::now() + SAMPLE_TIME_MAX;
    let limits = ReadLimits { records_max: usize::MAX, bytes_max: SAMPLE_BYTES_MAX, deadline };
    let mut chunk = RecordChunk::default();
    reader.read(&mut chunk, limits)?;
    let mut samples: Vec<(u64, u64)> = vec![(0, 0); reader.topic_partitions().len()];
    for record in chunk.iter() {
        let (records, bytes) = &mut samples[record.slot() as usize];
        *records += 1;
        *bytes += weight(&record);
    }
    let all = samples.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let by_name: BTreeMap<TopicPartition, (u64, u64)> =
        reader.topic_partitions().cloned().zip(samples.iter().copied()).collect();
    for planned in planned.iter_mut() {
        let name = TopicPartition { topic: planned.topic.clone(), partition: planned.partition };
        let own = by_name.get(&name).copied().filter(|(records, _)| *records > 0);
        let (records, bytes) = own.unwrap_or(all);
        let weighed = u128::from(planned.records_at_most) * u128::from(bytes) / u128::from(records.max(1));
        planned.bytes_about = u64::try_from(weighed).unwrap_or(u64::MAX);
    }
    Ok(())
}

fn weight(record: &Record<'_>) -> u64 {
    let headers =
        record.headers().map(|(name, value)| name.len() + value.map_or(0, <[u8]>::len)).sum::<usize>();
    let parts = [record.key(), record.payload()].map(|bytes| bytes.map_or(0, <[u8]>::len));
    (parts.iter().sum::<usize>() + headers) as u64
}

fn refused(why: String) -> Stop {
    Stop::new(
        Reason::Usage,
        why,
        "nothing was changed; to see what backfills there are, or to drop one:\n  tidemill lane list JOB\n  tidemill lane \
         drop JOB NAME",
    )
}

/// What the ledger tells of a backfill.
pub(super) fn lane_summary(name: &str, lane: &Lane) -> LaneSummary {
    let backfill = lane.backfill.clone();
    LaneSummary {
        lane: name.to_owned(),
        state: backfill.as_ref().map_or("live", |backfill| backfill.state.name()),
        from: backfill.as_ref().map_or_else(String::new, |backfill| shown(backfill.from_ms)),
        to: backfill.as_ref().and_then(|backfill| backfill.to_ms).map(shown),
        left: lane.offsets_left(),
        watermark: lane.watermark.map(|time| time.to_string()),
        counts: backfill.map(|backfill| backfill.counts).unwrap_or_default(),
    }
}

/// Backfills that the ledger tells of, by name. Needs the catalog alone.
///
/// # Errors
/// The catalog is away, or the table has no ledger.
pub async fn list(loaded: &LoadedJob) -> Result<Vec<LaneSummary>, Stop> {
    let record = requests::record_of(loaded).await?;
    Ok(record.backfills().map(|(name, lane, _)| lane_summary(name, lane)).collect())
}

/// Reads a backfill until it is done: as the owner, or beside the owner that there is, which is asked to.
///
/// # Errors
/// What a run ends with; `USAGE` where the backfill is unknown, paused, dropped or refused meanwhile.
pub async fn run(
    loaded: &LoadedJob,
    options: &RunOptions,
    report: &mut dyn Report,
) -> Result<Option<Summary>, Stop> {
    let Some(wish) = &options.backfill else { return super::run(loaded, options, report).await.map(Some) };
    let mut posted: Option<Posted> = None;
    loop {
        let busy = match super::run(loaded, options, report).await {
            Err(stop) if stop.reason == Reason::Busy => stop,
            Err(stop) => return Err(resumable(stop, wish)),
            Ok(summary) => return Ok(Some(summary)),
        };
        let under_way = match &mut posted {
            Some(under_way) => under_way,
            None => {
                let text = format!("{}; it is asked to read backfill {}", busy.what, wish.lane);
                report.event(&Event::Notice { text });
                let ask = wish.ask(loaded);
                posted.insert(Posted::post(loaded, ask).await?)
            }
        };
        if watch(under_way, options, wish, report).await.map_err(|stop| resumable(stop, wish))? {
            return Ok(None);
        }
    }
}

/// Watches the ledger until the backfill is done (true), or the table may be free (false).
async fn watch(
    posted: &mut Posted,
    options: &RunOptions,
    wish: &Wish,
    report: &mut dyn Report,
) -> Result<bool, Stop> {
    let mut told = None;
    loop {
        let look = posted.look(options).await?;
        let lane = look.record.as_ref().and_then(|record| record.lanes.get(&wish.lane));
        match lane.and_then(|lane| Some((lane, lane.backfill.as_ref()?.state))) {
            Some((lane, state)) => {
                let summary = lane_summary(&wish.lane, lane);
                if told.as_ref() != Some(&summary) {
                    report.event(&Event::Backfill(summary.clone()));
                    told = Some(summary);
                }
                match state {
                    LaneState::Done => return Ok(true),
                    LaneState::Paused if !look.is_pending => {
                        let why = format!("backfill {} is paused", wish.lane);
                        let way_out = format!(
                            "what it wrote stays; to go on:\n  tidemill backfill JOB --resume {}",
                            wish.lane
                        );
                        return Err(Stop::new(Reason::Usage, why, way_out));
                    }
                    _ => {}
                }
            }
            None if !look.is_pending => {
                return Err(refused(format!(
                    "backfill {} is not in the ledger: the owner refused it, as its log says, or it was dropped",
                    wish.lane
                )));
            }
            None => {}
        }
        if look.may_be_free {
            return Ok(false);
        }
    }
}

impl Wish {
    /// What an owner is asked for it. A backfill that goes on may have as many dead letters as who asks says with `--set`; what the
    /// job file says is the owner's to read, and may change.
    fn ask(&self, loaded: &LoadedJob) -> Ask {
        let ratio_max = loaded.job.sink.dead_letters.ratio_max;
        let letters_ratio_max = loaded.is_set(LETTERS_RATIO_MAX).then_some(ratio_max);
        let resume = || Ask::ResumeLane { lane: self.lane.clone(), letters_ratio_max };
        self.register.clone().map_or_else(resume, Ask::Backfill)
    }
}

/// The command with which a backfill goes on.
pub(super) fn resume_command(job_shown: &str, lane: &str) -> String {
    format!("tidemill backfill {job_shown} --resume {lane}")
}

/// A stop of a backfill says how that goes on.
fn resumable(stop: Stop, wish: &Wish) -> Stop {
    let way_out = match stop.reason {
        Reason::Interrupted => format!(
            "what was read is committed, and the backfill stays registered; the next run goes on with it a little, and this \
             until it is done:\n  tidemill backfill JOB --resume {}",
            wish.lane
        ),
        _ => return stop,
    };
    Stop { way_out, ..stop }
}

impl Session<'_> {
    /// Registers the backfill that this run is begun for, or lets it go on.
    pub(super) async fn begin_backfill(&mut self, report: &mut dyn Report) -> Result<(), Stop> {
        let Some(wish) = self.options.backfill.clone() else { return Ok(()) };
        // One that was asked for before, and left by an owner that has gone, is this very backfill.
        requests::take(&mut self.owner, report).await?;
        let lane = &wish.lane;
        let known = self.owner.record.lanes.get(lane).and_then(|lane| lane.backfill.as_ref());
        if wish.register.is_none() && known.is_some_and(|known| known.state == LaneState::Done) {
            report.event(&Event::Notice { text: format!("backfill {lane} is done") });
            return Ok(());
        }
        let ask = wish.ask(self.owner.world.loaded);
        let granted = grant(&self.owner.record, &ask, &topics_of(&self.owner)).map_err(refused)?;
        if let Some(Granted { next, change }) = granted {
            crate::crash_point!("backfill_to_register");
            commit_change(&mut self.owner, next, change, false).await?;
            crate::crash_point!("backfill_registered");
        }
        self.lanes.goal = Some(wish.lane);
        Ok(())
    }

    /// Pauses the backfill that could not be read on. Before requests are taken up: one may drop it, and another register a
    /// new one under its name.
    pub(super) async fn pause_unread(&mut self, report: &mut dyn Report) -> Result<(), Stop> {
        let Some((lane, stop)) = self.lanes.to_pause.take() else { return Ok(()) };
        self.pause(&lane, &Blocked::Stopped(stop), report).await
    }

    /// Serves the lane whose turn it is; false if there is none. A run without end says whether live has something; in a drain
    /// its frozen ends tell. A backfill that can not be read is paused by a commit, so
    /// that the live lane goes on and the next run does not try again.
    pub(super) async fn choose_lane(
        &mut self,
        live_has_more: Option<bool>,
        report: &mut dyn Report,
    ) -> Result<bool, Stop> {
        self.lanes.close_idle(&self.owner.record);
        self.lanes.serve_live();
        if self.ahead.is_ready() {
            // Read before a backfill was asked for: it is of the live lane.
            return Ok(true);
        }
        if live_has_more.is_none() {
            self.extend_live()?;
        }
        loop {
            let record = &self.owner.record;
            let live_has_more = live_has_more.unwrap_or_else(|| self.lanes.live().has_more(record));
            let Some(turn) = self.lanes.standing(record, live_has_more).choose() else { return Ok(false) };
            match turn {
                Turn::Live => {
                    self.lanes.serve_live();
                    return Ok(true);
                }
                Turn::Backfill(lane) if self.lanes.serve_open(&lane, record) => return Ok(true),
                Turn::Backfill(lane) => match self.open_backfill(&lane, report)? {
                    Ok(reader) => {
                        self.lanes.serve(reader);
                        report.event(&Event::Backfill(lane_summary(&lane, &self.owner.record.lanes[&lane])));
                        return Ok(true);
                    }
                    Err(Blocked::Rests) => {}
                    Err(blocked) => self.pause(&lane, &blocked, report).await?,
                },
            }
        }
    }

    /// While this life goes on for a backfill, live is read too, as often as its microbatches would close by time.
    fn extend_live(&mut self) -> Result<(), Stop> {
        let interval = self.owner.world.loaded.job.microbatch.open_time_max;
        let record = &self.owner.record;
        if !self.lanes.has_goal(record)
            || self.lanes.live().has_more(record)
            || !self.lanes.live_is_due(interval)
        {
            return Ok(());
        }
        let held = self.connection.offsets(&self.lanes.live().slots).map_err(stops::source)?;
        self.lanes.extend_live(&held).map_err(stops::source)
    }

    fn open_backfill(
        &mut self,
        lane: &str,
        report: &mut dyn Report,
    ) -> Result<Result<LaneReader, Blocked>, Stop> {
        let job = &self.owner.world.loaded.job;
        let record = &self.owner.record;
        let cursors = record.lanes.get(lane).into_iter().flat_map(Lane::cursors);
        let (ours, gone): (Vec<_>, Vec<_>) =
            cursors.map(|(name, _)| name).partition(|name| job.source.topics.contains(&name.topic));
        if let Some(name) = gone.first() {
            return Ok(Err(Blocked::NoTopic(name.topic.clone())));
        }
        let rests = |error: &SourceError, goal: Option<&str>| {
            error.reason() == Reason::SourceAway && goal != Some(lane)
        };
        let held = match self.connection.offsets(&ours) {
            Ok(held) => held,
            Err(error) if rests(&error, self.lanes.goal.as_deref()) => {
                self.rest(lane, &error, report);
                return Ok(Err(Blocked::Rests));
            }
            Err(error) => return Err(stops::source(error)),
        };
        let plans = match backfill_plans(record, lane, &held) {
            Ok(plans) => plans,
            Err(blocked) => return Ok(Err(blocked)),
        };
        self.lanes.make_room().map_err(stops::source)?;
        let mut reading = ReaderOptions { queue_parts: READERS_MAX, ..reader_options(job, self.options) };
        if self.options.continuous {
            reading.stall_after = reading.stall_after.min(BACKFILL_STALL_AFTER);
        }
        match LaneReader::open(&self.connection, Some(record), lane, plans, reading, &job.event_time) {
            Ok(reader) => Ok(Ok(reader)),
            Err(error) if is_of_lane(error.reason()) => {
                Ok(Err(Blocked::Stopped(self.backfill_unread(lane, error))))
            }
            Err(error) if rests(&error, self.lanes.goal.as_deref()) => {
                self.rest(lane, &error, report);
                Ok(Err(Blocked::Rests))
            }
            Err(error) => Err(stops::source(error)),
        }
    }

    async fn pause(&mut self, lane: &str, blocked: &Blocked, report: &mut dyn Report) -> Result<(), Stop> {
        let why = match blocked {
            Blocked::NoTopic(name) => format!("the job does not read {name} any more"),
            Blocked::Lost(ranges) => {
                let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                format!("the broker no longer holds what it was to read: {}", ranges.join(", "))
            }
            Blocked::Stopped(stop) => stop.what.clone(),
            Blocked::Rests => return Ok(()),
        };
        let what = format!("backfill {lane} is paused: {why}");
        let mut next: LedgerRecord = self.owner.record.clone();
        if let Some(backfill) = next.lanes.get_mut(lane).and_then(|lane| lane.backfill.as_mut()) {
            backfill.state = LaneState::Paused;
        }
        let drop_it = format!(
            "what it wrote stays, and live is not touched; drop it, and begin another one over what is left:\n  \
             tidemill lane drop {} {lane}",
            self.options.job_shown
        );
        // Examples that a stop shows line by line are not for the ledger.
        let first_line = what.lines().next().unwrap_or_default().to_owned();
        let change = Change { by: "run".to_owned(), what: first_line };
        commit_change(&mut self.owner, next, change, false).await?;
        let text = match blocked {
            Blocked::Stopped(stop) => format!("{what}\n{}", stop.way_out),
            _ => format!("{what}\n{drop_it}"),
        };
        report.event(&Event::Notice { text });
        if self.lanes.goal.as_deref() != Some(lane) {
            return Ok(());
        }
        let way_out = match blocked {
            Blocked::Stopped(stop) => stop.way_out.clone(),
            _ => drop_it,
        };
        Err(Stop::new(blocked.reason(), what, way_out))
    }
}
