//! `tidemill run`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::terminal::Terminal;
use super::{RunArgs, plan};
use crate::job::Job;
use crate::pipeline::profile::Profile;
use crate::pipeline::report::{Event, Phases, Report};
use crate::pipeline::{self, RunOptions};
use crate::stop::{Reason, Stop};

/// Exit code of a process ended by a second signal, as shells count SIGINT.
const EXIT_SECOND_SIGNAL: i32 = 130;

/// Drains a job, or follows its topics.
pub fn run(args: &RunArgs, json: bool) -> Result<(), Stop> {
    if args.dry_run {
        return plan::plan(&args.job, json);
    }
    let loaded = args.job.load()?;
    let phases = Phases::open(args.trace_phases.as_deref()).map_err(|error| {
        Stop::new(Reason::Usage, "the file of --trace-phases can not be opened", "name another file")
            .because(error)
    })?;
    let options = RunOptions {
        job_shown: args.job.shown(),
        takeover: args.takeover,
        ignore_rows: args.ignore_rows,
        trust_ledger: args.trust_ledger,
        continuous: args.continuous,
        batches_max: args.max_batches,
        backfill: None,
        end_by: args.max_time.map(|time| Instant::now() + time),
        lease: args.lease,
        stall_after: None,
        phases,
        profile: Arc::new(Profile::default()),
        interrupt: Arc::default(),
    };
    runtime_of(&loaded.job)?.block_on(async {
        listen_for_signals(Arc::clone(&options.interrupt))?;
        let mut terminal = Terminal::new(json);
        let ended = pipeline::run(&loaded, &options, &mut terminal).await;
        if args.profile {
            terminal.event(&Event::Profile(options.profile.report(options.continuous)));
        }
        ended.map(|_| ())
    })
}

/// The async runtime that catalogs and data files need.
pub fn runtime() -> Result<tokio::runtime::Runtime, Stop> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(no_threads)
}

/// The same with as many threads as the job names, for its lookups too.
pub fn runtime_of(job: &Job) -> Result<tokio::runtime::Runtime, Stop> {
    let threads = job.threads.get();
    if let Err(error) = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() {
        tracing::warn!(%error, "lookups use as many threads as there are processors");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(no_threads)
}

fn no_threads(error: std::io::Error) -> Stop {
    Stop::new(Reason::Unexpected, "threads can not be started", "check the limits of this user")
        .because(error)
}

/// The first SIGINT or SIGTERM asks the run to end in order, the second ends the process at once.
pub fn listen_for_signals(interrupt: Arc<AtomicBool>) -> Result<(), Stop> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| {
        Stop::new(Reason::Unexpected, "signals can not be listened for", "please report this").because(error)
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupted.recv() => {}
            }
            if interrupt.swap(true, Ordering::Relaxed) {
                std::process::exit(EXIT_SECOND_SIGNAL);
            }
            eprintln!(
                "ending: what was read is committed, a commit in progress is finished; once more to end at once"
            );
        }
    });
    Ok(())
}
