//! Commands that make the dedup state or a fact of the ledger anew: `state rebuild`, `adopt-rows`, `adopt`, `rekey`,
//! `forget`, and `watermark set`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::terminal::{Terminal, print_json};
use super::{RemakeArgs, confirm, run};
use crate::event_time::EventTimeMs;
use crate::pipeline::RunOptions;
use crate::pipeline::commands::{self, Adopting, Done};
use crate::pipeline::report::{Event, Report};
use crate::stop::{Reason, Stop};

/// Which command.
#[derive(Debug, Clone)]
pub(super) enum Remake {
    Rebuild {
        all: bool,
    },
    AdoptRows,
    Adopt(Adopting),
    Rekey,
    /// Those that a file names, or standard input as `-`.
    Forget {
        keys: PathBuf,
    },
    /// To an RFC 3339 time.
    SetWatermark {
        to: String,
    },
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Remade<'a> {
    event: &'static str,
    #[serde(flatten)]
    done: &'a Done,
}

/// Runs a command behind a bar and says what it did.
pub(super) fn remake(args: &RemakeArgs, which: &Remake, json: bool) -> Result<(), Stop> {
    let (loaded, job_shown) = (args.job.load()?, args.job.shown());
    let options = RunOptions { job_shown, takeover: args.takeover, ..RunOptions::default() };
    let mut terminal = Terminal::new(json);
    let ask = |question: &str| confirm(question, args.yes);
    let done = run::runtime()?.block_on(async {
        run::listen_for_signals(options.interrupt.clone())?;
        let heard = &mut terminal;
        match which {
            Remake::Rebuild { all } => commands::rebuild_state(&loaded, &options, *all, heard).await,
            Remake::AdoptRows => commands::adopt_rows(&loaded, &options, &ask, heard).await,
            Remake::Adopt(adopting) => {
                commands::adopt_ledger(&loaded, &options, *adopting, &ask, heard).await
            }
            Remake::Rekey => commands::rekey_state(&loaded, &options, &ask, heard).await,
            Remake::Forget { keys } => {
                commands::forget_keys(&loaded, &options, &read(keys)?, &ask, heard).await
            }
            Remake::SetWatermark { to } => {
                commands::set_watermark(&loaded, &options, time(to)?, &ask, heard).await
            }
        }
    });
    terminal.clear();
    let done = done?;
    if json {
        print_json(&Remade { event: "remade", done: &done });
        return Ok(());
    }
    for note in &done.notes {
        terminal.event(&Event::Notice { text: note.clone() });
    }
    println!("go on with: tidemill run {}", options.job_shown);
    Ok(())
}

fn read(path: &Path) -> Result<String, Stop> {
    let text = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(path)
    };
    text.map_err(|error| {
        let what = format!("the keys in {} can not be read", path.display());
        Stop::new(Reason::Usage, what, "nothing was changed; name a file of text, or - for standard input")
            .because(error)
    })
}

fn time(text: &str) -> Result<EventTimeMs, Stop> {
    let time = chrono::DateTime::parse_from_rfc3339(text).map_err(|error| {
        Stop::new(
            Reason::Usage,
            format!("{text:?} is no time"),
            "nothing was changed; write it as in --to 2026-01-31T12:00:00Z",
        )
        .because(error)
    })?;
    Ok(EventTimeMs(time.timestamp_millis()))
}
