//! Where the time of a run goes: what it worked at, what it waited for, and what limits it.
//!
//! Flow: `turn_to` at every change of stage -> `report` at the end
//!
//! A run has one line of work that is in exactly one [`Stage`] at any time, so the seconds of its stages add up to those of
//! the run; what belongs to no stage is a stage of its own. A second line reads ahead beside it, and a third one writes: their
//! seconds are counted apart and add up to nothing.
//!
//! Of a stage's seconds the line's own thread worked as long as its processor clock moved; the rest it waited: for the
//! broker, the disk, the catalog, other threads, or for a processor to run on.
//!
//! Bounds: two clocks are read for each change of stage, a few of them per chunk; no lock but at the end of a life.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Clock ticks in a second of the files under `/proc`: what Linux tells programs, whatever the kernel's own is (`proc(5)`).
const TICKS_PER_SECOND: f64 = 100.0;
/// Share of the processors' time in use from which on they are said to be what is missing.
const PROCESSORS_FULL: f64 = 0.9;

/// What a run is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// From the survey to the opened state.
    Start,
    /// A run without end has nothing to read.
    WaitForRecords,
    /// Records are taken from the client. What it waits for is the broker.
    Fetch,
    /// Records become rows.
    Decode,
    /// Records are read ahead beside this line, and it needs them now.
    ReadAhead,
    /// Times are judged and keys looked up.
    Probe,
    /// Rows wait on local disk for their verdict.
    Aside,
    /// Rows and letters go to data files, which are closed at the cut. What it waits for is the line that writes beside it, too.
    Write,
    /// The next generation of the dedup state is written.
    State,
    /// The main table's commit.
    Commit,
    /// The side tables follow.
    SideTables,
    /// Tables are kept small.
    Maintenance,
    /// The table is given back, copies of the state are finished.
    End,
    /// A run without end waits before it begins again: something is away.
    Pause,
    /// Everything else between two microbatches.
    Other,
}

const STAGES: [(Stage, &str); 15] = [
    (Stage::Start, "start"),
    (Stage::WaitForRecords, "wait for records"),
    (Stage::Fetch, "fetch"),
    (Stage::Decode, "decode"),
    (Stage::ReadAhead, "wait for reading ahead"),
    (Stage::Probe, "probe"),
    (Stage::Aside, "lay aside"),
    (Stage::Write, "write"),
    (Stage::State, "state"),
    (Stage::Commit, "commit"),
    (Stage::SideTables, "side tables"),
    (Stage::Maintenance, "maintenance"),
    (Stage::End, "end"),
    (Stage::Pause, "pause"),
    (Stage::Other, "other"),
];

/// Seconds of one stage on one line, in nanoseconds.
#[derive(Debug, Default)]
struct Account {
    wall_ns: AtomicU64,
    cpu_ns: AtomicU64,
}

impl Account {
    fn add(&self, wall_ns: u64, cpu_ns: u64) {
        self.wall_ns.fetch_add(wall_ns, Ordering::Relaxed);
        // The clocks are not read at the same instant.
        self.cpu_ns.fetch_add(cpu_ns.min(wall_ns), Ordering::Relaxed);
    }

    fn time(&self) -> Time {
        let seconds = |nanos: &AtomicU64| nanos.load(Ordering::Relaxed) as f64 / 1e9;
        let (wall, working) = (seconds(&self.wall_ns), seconds(&self.cpu_ns));
        Time { working_seconds: working, waiting_seconds: wall - working }
    }
}

/// The stage that a line is in, and its clocks when it came there.
#[derive(Debug)]
struct Standing {
    stage: AtomicUsize,
    since_ns: AtomicU64,
    cpu_since_ns: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Profile {
    begun: Instant,
    machine_at_begin: Option<MachineTicks>,
    standing: Standing,
    line: [Account; STAGES.len()],
    beside: [Account; STAGES.len()],
    /// Processor time of each thread that was seen, by its id.
    threads: Mutex<BTreeMap<u64, (String, f64)>>,
}

impl Default for Profile {
    /// Begins now, in [`Stage::Start`].
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            machine_at_begin: MachineTicks::now(),
            standing: Standing {
                stage: AtomicUsize::new(Stage::Start as usize),
                since_ns: AtomicU64::new(0),
                cpu_since_ns: AtomicU64::new(thread_ns()),
            },
            line: std::array::from_fn(|_| Account::default()),
            beside: std::array::from_fn(|_| Account::default()),
            threads: Mutex::default(),
        }
    }
}

/// Processor time of the calling thread so far.
fn thread_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Whole nanoseconds; a run of 584 years overflows them.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Profile {
    /// The run's line is at this from now on. Gives what it was at. Of one thread only.
    pub(super) fn turn_to(&self, stage: Stage) -> Stage {
        let (now_ns, cpu_ns) = (nanos(self.begun.elapsed()), thread_ns());
        let Standing { stage: standing, since_ns, cpu_since_ns } = &self.standing;
        let before = standing.swap(stage as usize, Ordering::Relaxed);
        let wall_ns = now_ns.saturating_sub(since_ns.swap(now_ns, Ordering::Relaxed));
        self.line[before].add(wall_ns, cpu_ns.saturating_sub(cpu_since_ns.swap(cpu_ns, Ordering::Relaxed)));
        STAGES[before].0
    }

    /// Does something that belongs to a stage on a line beside that of the run.
    pub(super) fn beside<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let (begun, cpu_ns) = (Instant::now(), thread_ns());
        let done = work();
        self.beside[stage as usize].add(nanos(begun.elapsed()), thread_ns().saturating_sub(cpu_ns));
        done
    }

    /// Notes the processor time of the threads that there are, before some of them end.
    pub(super) fn note_threads(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.extend(threads_now());
    }

    /// What the time was spent on, until now. `is_endless` = the run follows its topics, so that waiting for records is what it
    /// is there for.
    pub fn report(&self, is_endless: bool) -> ProfileReport {
        self.turn_to(STAGES[self.standing.stage.load(Ordering::Relaxed)].0);
        self.note_threads();
        let seconds = self.begun.elapsed().as_secs_f64();
        let stages: Vec<StageTime> = STAGES
            .iter()
            .map(|&(stage, _)| StageTime {
                stage,
                line: self.line[stage as usize].time(),
                beside: Some(self.beside[stage as usize].time()).filter(|time| time.seconds() > 0.0),
            })
            .collect();
        let cpu = self.cpu();
        let machine_busy =
            self.machine_at_begin.zip(MachineTicks::now()).and_then(|(begin, end)| end.busy_since(begin));
        let (limit, limit_seconds) = limit(&stages);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let are_full =
            machine_busy.unwrap_or(cpu.seconds() / (seconds * processors as f64)) >= PROCESSORS_FULL;
        let limited_by = Limit {
            cause: limit,
            share: limit_seconds / seconds.max(f64::MIN_POSITIVE),
            processors_are_full: are_full,
        };
        ProfileReport { seconds, processors, stages, cpu, machine_busy, limited_by, is_endless }
    }

    fn cpu(&self) -> CpuAccount {
        let ticks = fs::read_to_string("/proc/self/stat").ok().and_then(|stat| ticks_of(&stat));
        let (user_seconds, system_seconds) = ticks.unwrap_or_default();
        let mut threads: BTreeMap<String, f64> = BTreeMap::new();
        for (name, seconds) in self.threads.lock().unwrap_or_else(PoisonError::into_inner).values() {
            *threads.entry(group_of(name).to_owned()).or_default() += seconds;
        }
        let known: f64 = threads.values().sum();
        threads.insert("ended".to_owned(), (user_seconds + system_seconds - known).max(0.0));
        CpuAccount { user_seconds, system_seconds, threads }
    }
}

/// User and system seconds of a line of `/proc/*/stat`: its fields 14 and 15, counted behind the name, which may hold anything.
fn ticks_of(stat: &str) -> Option<(f64, f64)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let mut seconds = || Some(fields.next()?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some((seconds()?, seconds()?))
}

/// Name and processor time of the threads that there are. Empty where the system has no such files.
fn threads_now() -> BTreeMap<u64, (String, f64)> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended meanwhile.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((user, system)) = ticks_of(&stat) else { continue };
        let name = match id == u64::from(std::process::id()) {
            true => "main",
            false => {
                stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')')).map_or("", |(name, _)| name)
            }
        };
        threads.insert(id, (name.to_owned(), user + system));
    }
    threads
}

/// What a thread of this name does. The system keeps 15 characters of a name.
fn group_of(name: &str) -> &str {
    match name {
        "main" | "read-ahead" | "write-files" => name,
        _ if name.starts_with("rdk:") => "kafka client",
        _ if name.starts_with("tokio") => "storage and catalog",
        _ => "lookups and merges",
    }
}

/// Time of all processors of the machine since it started.
#[derive(Debug, Clone, Copy)]
struct MachineTicks {
    all: u64,
    idle: u64,
}

impl MachineTicks {
    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The line of all processors: user, nice, system, idle, waiting for a disk, ... (`proc(5)`).
    fn parse(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace();
        let ticks = fields.take(8).map(str::parse).collect::<Result<Vec<u64>, _>>().ok()?;
        Some(Self { all: ticks.iter().sum(), idle: ticks.get(3)? + ticks.get(4)? })
    }

    /// Share of the time in which a processor was in use, by whatever program.
    fn busy_since(self, begin: Self) -> Option<f64> {
        let (all, idle) = (self.all.checked_sub(begin.all)?, self.idle.saturating_sub(begin.idle));
        (all > 0).then(|| 1.0 - idle.min(all) as f64 / all as f64)
    }
}

/// Seconds of a stage on one line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Time {
    /// In which its thread ran.
    pub working_seconds: f64,
    /// In which it did not.
    pub waiting_seconds: f64,
}

impl Time {
    /// All of them.
    pub fn seconds(self) -> f64 {
        self.working_seconds + self.waiting_seconds
    }
}

/// Time of one stage.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// On the run's line, whose seconds add up to those of the run.
    #[serde(flatten)]
    pub line: Time,
    /// On the lines beside it that read ahead and write; none = nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<Time>,
}

impl StageTime {
    /// As tables name it.
    pub fn name(&self) -> &'static str {
        STAGES[self.stage as usize].1
    }
}

/// Processor time of the process. Zero where the system does not tell.
#[derive(Debug, Clone, Serialize)]
pub struct CpuAccount {
    /// In the program.
    pub user_seconds: f64,
    /// In the system for it.
    pub system_seconds: f64,
    /// Both, by what threads do; `ended` is that of threads that are no more.
    pub threads: BTreeMap<String, f64>,
}

impl CpuAccount {
    /// User and system.
    pub fn seconds(&self) -> f64 {
        self.user_seconds + self.system_seconds
    }
}

/// What a run waits for or works at most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limit {
    /// It.
    pub cause: Cause,
    /// Its share of the run's seconds.
    pub share: f64,
    /// Whether the machine has no more to give: waiting then is waiting for a processor, too.
    pub processors_are_full: bool,
}

/// What can limit a run: a stage, and whether it works or waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// The stage.
    pub stage: Stage,
    /// Whether more of its seconds were waiting than work.
    pub waits: bool,
}

/// The stage that held the line up longest. What the line waited for one beside it is that one's doing, shared out as its seconds
/// are. Fetching is two causes: the broker's, and the copy.
fn limit(stages: &[StageTime]) -> (Cause, f64) {
    let of = |asked: Stage| stages.iter().filter(move |time| time.stage == asked);
    let awaited: f64 = of(Stage::ReadAhead).map(|time| time.line.seconds()).sum();
    let reads_ahead = |time: &&StageTime| time.beside.is_some() && time.stage != Stage::Write;
    let ahead: f64 =
        stages.iter().filter(reads_ahead).filter_map(|time| time.beside).map(Time::seconds).sum();
    let mut causes = Vec::new();
    for time in stages.iter().filter(|time| ahead == 0.0 || time.stage != Stage::ReadAhead) {
        let (stage, Time { mut working_seconds, mut waiting_seconds }) = (time.stage, time.line);
        if let Some(beside) = time.beside.filter(|beside| beside.seconds() > 0.0) {
            // The line that writes does one thing; what the run waited is its work as far as it worked.
            let awaited = if stage == Stage::Write {
                std::mem::take(&mut waiting_seconds)
            } else {
                awaited * beside.seconds() / ahead
            };
            working_seconds += awaited * beside.working_seconds / beside.seconds();
            waiting_seconds += awaited * beside.waiting_seconds / beside.seconds();
        }
        if stage == Stage::Fetch {
            causes.push((Cause { stage, waits: true }, waiting_seconds));
            causes.push((Cause { stage, waits: false }, working_seconds));
        } else {
            let waits = waiting_seconds > working_seconds;
            causes.push((Cause { stage, waits }, working_seconds + waiting_seconds));
        }
    }
    let longest = causes.into_iter().max_by(|one, other| one.1.total_cmp(&other.1));
    longest.expect("there are stages")
}

/// Where the time of a run went.
#[derive(Debug, Clone, Serialize)]
pub struct ProfileReport {
    /// Seconds of the run.
    pub seconds: f64,
    /// Processors that the process may use.
    pub processors: usize,
    /// Each stage, in the order of a run.
    pub stages: Vec<StageTime>,
    /// Processor time.
    pub cpu: CpuAccount,
    /// Share of the machine's processors in use meanwhile, by all programs; none = the system does not tell.
    pub machine_busy: Option<f64>,
    /// What limits it.
    pub limited_by: Limit,
    #[serde(skip)]
    is_endless: bool,
}

impl ProfileReport {
    /// What limits the run, as a sentence.
    pub fn limit_in_words(&self) -> String {
        let Limit { cause: Cause { stage, waits }, share, processors_are_full } = self.limited_by;
        let percent = share * 100.0;
        if self.is_endless && matches!((stage, waits), (Stage::WaitForRecords, _) | (Stage::Fetch, true)) {
            return format!(
                "limited by: nothing here; for {percent:.0} % of the time it waited for new records"
            );
        }
        let what = match (stage, waits) {
            (Stage::Start, _) => "the start",
            (Stage::WaitForRecords, _) | (Stage::Fetch, true) => "waiting for the broker",
            (Stage::Fetch, false) => "taking records from the client",
            (Stage::Decode, _) => "decode",
            (Stage::ReadAhead, _) => "reading ahead",
            (Stage::Probe, false) => "the lookup of keys",
            (Stage::Probe, true) => {
                "the lookup of keys, which mostly waits: for the disk of the state, or its threads"
            }
            (Stage::Aside, _) => "rows that wait on local disk for the lookup of their keys",
            (Stage::Write, false) => "the encoding of data files",
            (Stage::Write, true) => "the writing of data files, which mostly waits for the warehouse",
            (Stage::State, _) => "the writing of the dedup state",
            (Stage::Commit, _) => "commits: the catalog and the warehouse's metadata",
            (Stage::SideTables, _) => "commits of side tables",
            (Stage::Maintenance, _) => "maintenance of tables",
            (Stage::End, _) => "the end of the run",
            (Stage::Pause, _) => "pauses, because something was away",
            (Stage::Other, _) => "what is between microbatches",
        };
        let full = match processors_are_full {
            true => "; no processor was free, so waiting is waiting for one, too",
            false => "",
        };
        format!("limited by: {what} ({percent:.0} % of the time){full}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(stage: Stage, working_seconds: f64, waiting_seconds: f64) -> StageTime {
        StageTime { stage, line: Time { working_seconds, waiting_seconds }, beside: None }
    }

    #[test]
    fn stages_stand_in_the_table_at_their_own_number() {
        STAGES.iter().enumerate().for_each(|(number, (stage, _))| assert_eq!(*stage as usize, number));
    }

    #[test]
    fn the_seconds_of_the_stages_are_those_of_the_run() {
        let profile = Profile::default();
        for stage in [Stage::Fetch, Stage::Decode, Stage::Fetch, Stage::Commit] {
            profile.turn_to(stage);
            std::hint::black_box((0..100_000u64).map(|number| number * number).sum::<u64>());
        }
        assert_eq!(profile.turn_to(Stage::Other), Stage::Commit);
        profile.beside(Stage::Decode, || std::hint::black_box((0..100_000u64).sum::<u64>()));
        let report = profile.report(false);
        let sum: f64 = report.stages.iter().map(|time| time.line.seconds()).sum();
        // Of the two only the run's clock goes on, between the last change of stage and its own reading.
        assert!(sum <= report.seconds && sum > 0.0, "{sum} of {}", report.seconds);
        let is_beside = |time: &&StageTime| time.beside.is_some();
        let beside: Vec<Stage> = report.stages.iter().filter(is_beside).map(|time| time.stage).collect();
        assert_eq!(beside, [Stage::Decode]);
    }

    #[test]
    fn what_the_line_waited_for_the_one_beside_it_is_laid_at_the_door_of_that_ones_longest_stage() {
        let mut stages = vec![
            time(Stage::Fetch, 0.1, 0.1),
            time(Stage::Decode, 0.0, 0.0),
            time(Stage::ReadAhead, 0.0, 3.0),
        ];
        stages.push(time(Stage::Probe, 2.0, 0.1));
        assert_eq!(limit(&stages).0, Cause { stage: Stage::ReadAhead, waits: true });
        stages[0].beside = Some(Time { working_seconds: 0.5, waiting_seconds: 0.0 });
        stages[1].beside = Some(Time { working_seconds: 5.5, waiting_seconds: 0.0 });
        let (cause, seconds) = limit(&stages);
        assert_eq!(cause, Cause { stage: Stage::Decode, waits: false });
        assert!((seconds - 2.75).abs() < 1e-9);
        stages[0].beside = Some(Time { working_seconds: 0.5, waiting_seconds: 60.0 });
        assert_eq!(limit(&stages).0, Cause { stage: Stage::Fetch, waits: true });
    }

    #[test]
    fn what_the_line_waited_for_the_one_that_writes_is_the_work_of_that_one() {
        let mut stages = vec![time(Stage::ReadAhead, 0.0, 1.0), time(Stage::Write, 0.5, 3.5)];
        stages.push(time(Stage::Decode, 0.0, 0.0));
        stages[2].beside = Some(Time { working_seconds: 9.0, waiting_seconds: 0.0 });
        assert_eq!(limit(&stages), (Cause { stage: Stage::Write, waits: true }, 4.0));
        stages[1].beside = Some(Time { working_seconds: 6.0, waiting_seconds: 1.0 });
        let (cause, seconds) = limit(&stages);
        assert_eq!(cause, Cause { stage: Stage::Write, waits: false });
        assert!((seconds - 4.0).abs() < 1e-9, "{seconds}");
        stages[1].line.waiting_seconds = 0.0;
        let (cause, seconds) = limit(&stages);
        assert!(cause.stage == Stage::Decode && (seconds - 1.0).abs() < 1e-9, "{cause:?} {seconds}");
    }

    #[test]
    fn a_line_of_proc_is_read_whatever_the_name_of_the_thread_holds() {
        let stat = "31011 (rdk:) 7 (a b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0 5960249 2998272";
        assert_eq!(ticks_of(stat), Some((2.5, 0.5)));
        assert_eq!(ticks_of("31011 (x"), None);
    }

    #[test]
    fn the_busy_share_of_a_machine_counts_waiting_for_disks_as_idle() {
        let at = |text| MachineTicks::parse(text).unwrap();
        let (begin, end) = (at("cpu  10 0 10 70 10 0 0 0 0 0\n"), at("cpu  30 10 20 130 10 0 0 0 0 0\n"));
        assert_eq!(end.busy_since(begin), Some(0.4));
        assert_eq!(begin.busy_since(begin), None);
        assert!(MachineTicks::parse("intr 1").is_none());
    }
}
