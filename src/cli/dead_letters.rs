//! `tidemill dead-letters`: refused rows, why they were refused, and the way back in.

use clap::{Args, Subcommand};

use super::plan::table;
use super::terminal::{Terminal, print_json};
use super::{JobArgs, confirm, run};
use crate::letter::ReasonCode;
use crate::pipeline::RunOptions;
use crate::pipeline::requeue;
use crate::sink::stored_letters::{StoredLetter, WITHOUT_BYTES, place_in_words};
use crate::stop::{Reason, Stop};

/// `dead-letters`.
#[derive(Debug, Subcommand)]
pub(crate) enum DeadLettersCommand {
    /// Count dead letters by reason, with the first and the last place of each; those that were requeued apart
    ///
    /// Asks the catalog and the warehouse, not the broker.
    List(JobArgs),
    /// Show dead letters with the bytes that were refused
    Show(ShowArgs),
    /// Decode dead letters again with today's job: for after the job, or a clock, was mended
    ///
    /// Their bytes go through the same rules, time and dedup as records of the topics: rows that are new go to the main or
    /// the late table, repeats are dropped, and what is refused again stays a dead letter. A letter that came in is marked
    /// by a second row of its place, with kind = 'requeued'. No offset moves. Killed at any moment, the command given again
    /// goes on. Headers are not kept in dead letters: columns read from one are null.
    ///
    /// Commits as the owner of the table, so it ends BUSY beside a run in progress.
    Requeue(RequeueArgs),
}

/// `dead-letters show`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Only those of this reason, as `dead-letters list` names it
    #[arg(long, value_name = "REASON", value_parser = reason)]
    reason: Option<String>,
    /// Only the record at this place: `notifications.sent:3:1200` is offset 1200 of topic partition 3
    #[arg(long, value_name = "TOPIC:PARTITION:OFFSET", value_parser = place)]
    at: Option<At>,
    /// Show at most so many
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
}

/// `dead-letters requeue`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RequeueArgs {
    #[command(flatten)]
    job: JobArgs,
    /// Only those of this reason, as `dead-letters list` names it
    #[arg(long, value_name = "REASON", value_parser = reason)]
    reason: Option<String>,
    /// Decode them and say how many would come in; change nothing, and ask only the catalog and the warehouse
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Take the table over from another owner, which then ends FENCED
    #[arg(long)]
    takeover: bool,
}

/// Where a record stands.
#[derive(Debug, Clone)]
struct At {
    topic: String,
    partition: i32,
    offset: i64,
}

fn reason(text: &str) -> Result<String, String> {
    let known = || ReasonCode::ALL.map(ReasonCode::as_str);
    match known().contains(&text) {
        true => Ok(text.to_owned()),
        false => Err(format!("no such reason; one of {}", known().join(", "))),
    }
}

fn place(text: &str) -> Result<At, String> {
    let parts: Vec<&str> = text.rsplitn(3, ':').collect();
    let [offset, partition, topic] = parts[..] else { return Err("as in TOPIC:PARTITION:OFFSET".to_owned()) };
    let number =
        |text: &str, what: &str| text.parse::<i64>().map_err(|_| format!("{what} {text:?} is no number"));
    let partition = i32::try_from(number(partition, "partition")?).map_err(|error| error.to_string())?;
    Ok(At { topic: topic.to_owned(), partition, offset: number(offset, "offset")? })
}

impl DeadLettersCommand {
    /// The job that the command is about.
    pub(super) fn job(&self) -> &JobArgs {
        match self {
            Self::List(job) => job,
            Self::Show(args) => &args.job,
            Self::Requeue(args) => &args.job,
        }
    }

    /// Runs it.
    pub(super) fn run(&self, json: bool) -> Result<(), Stop> {
        match self {
            Self::List(job) => list(job, json),
            Self::Show(args) => show(args, json),
            Self::Requeue(args) => requeue(args, json),
        }
    }
}

fn list(job: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = job.load()?;
    let tallies = run::runtime()?.block_on(requeue::list(&loaded))?;
    if json {
        print_json(&serde_json::json!({ "event": "dead_letters", "reasons": tallies }));
        return Ok(());
    }
    if tallies.is_empty() {
        println!("no dead letters");
        return Ok(());
    }
    let mut lines = table(["reason", "waiting", "requeued", "first", "last"]);
    for tally in &tallies {
        let counts = [tally.waiting.to_string(), tally.requeued.to_string()];
        let [waiting, requeued] = counts;
        lines.add_row([tally.reason.clone(), waiting, requeued, tally.first.clone(), tally.last.clone()]);
    }
    println!("{lines}");
    Ok(())
}

fn show(args: &ShowArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.job.load()?;
    let at = args.at.as_ref().map(|at| (at.topic.as_str(), at.partition, at.offset));
    let found = requeue::show(&loaded, args.reason.as_deref(), at, args.limit);
    let letters = run::runtime()?.block_on(found)?;
    if json {
        letters.iter().for_each(|letter| print_json(&as_json(letter)));
        return Ok(());
    }
    if letters.is_empty() {
        println!("no such dead letters");
    }
    for letter in &letters {
        println!("{}  {}", place_in_words(&letter.topic, &letter.place), letter.reason_code);
        println!("  {}", letter.reason_text);
        if let Some(key) = &letter.key {
            println!("  key: {}", in_words(key));
        }
        match &letter.payload {
            Some(payload) => println!("  payload: {}", in_words(payload)),
            None => println!("  payload: {} bytes, not kept", letter.payload_bytes),
        }
    }
    Ok(())
}

/// Text as it is, but for what would move a terminal's cursor; other bytes escaped.
fn in_words(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.chars().flat_map(|each| escaped(each).chars().collect::<Vec<_>>()).collect(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

fn escaped(character: char) -> String {
    if character.is_control() { character.escape_default().to_string() } else { character.to_string() }
}

fn as_json(letter: &StoredLetter) -> serde_json::Value {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let text = |bytes: &Option<Vec<u8>>| {
        bytes.as_deref().and_then(|bytes| std::str::from_utf8(bytes).ok()).map(str::to_owned)
    };
    serde_json::json!({
        "event": "dead_letter",
        "topic": letter.topic,
        "topic_id": letter.place.topic_id.to_string(),
        "partition": letter.place.partition,
        "offset": letter.place.offset,
        "index": letter.place.row_index,
        "timestamp_ms": letter.timestamp_ms,
        "reason": letter.reason_code,
        "reason_text": letter.reason_text,
        "batch": letter.batch,
        "key": text(&letter.key),
        "key_hex": letter.key.as_deref().map(hex),
        "payload": text(&letter.payload),
        "payload_hex": letter.payload.as_deref().map(hex),
        "payload_bytes": letter.payload_bytes,
    })
}

fn requeue(args: &RequeueArgs, json: bool) -> Result<(), Stop> {
    if let Some(reason) = args.reason.as_deref().filter(|reason| WITHOUT_BYTES.contains(reason)) {
        return Err(Stop::new(
            Reason::Usage,
            format!("dead letters of reason {reason} have no bytes that could be decoded again"),
            "read their records again from Kafka if it still has them",
        ));
    }
    let (loaded, job_shown) = (args.job.load()?, args.job.shown());
    let runtime = run::runtime()?;
    if args.dry_run {
        let would = runtime.block_on(requeue::look(&loaded, args.reason.as_deref()))?;
        if json {
            print_json(&serde_json::json!({ "event": "would_requeue", "found": would }));
            return Ok(());
        }
        println!("{} dead letters wait; today's job decodes {} rows from them", would.waiting, would.rows);
        for (reason, count) in &would.refused {
            println!("  {count} are still refused: {reason}");
        }
        return Ok(());
    }
    let options = RunOptions { job_shown, takeover: args.takeover, ..RunOptions::default() };
    let mut terminal = Terminal::new(json);
    let ask = |question: &str| confirm(question, args.yes);
    let done = runtime.block_on(async {
        run::listen_for_signals(options.interrupt.clone())?;
        requeue::requeue(&loaded, &options, args.reason.as_deref(), &ask, &mut terminal).await
    })?;
    if json {
        print_json(&serde_json::json!({ "event": "requeued", "done": done }));
        return Ok(());
    }
    let counts = &done.counts;
    println!(
        "{} dead letters decoded again: {} rows written, {} late, {} repeats, {} refused again",
        done.waiting,
        counts.written,
        counts.late_side + counts.late_dropped,
        counts.duplicate,
        counts.dead_letter + counts.dead_letter_known
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_as_text_where_they_are_text_and_never_move_the_cursor() {
        assert_eq!(in_words("{\"a\":\"ü\"}".as_bytes()), "{\"a\":\"ü\"}");
        assert_eq!(in_words(b"a\x1b[2J\n"), "a\\u{1b}[2J\\n");
        assert_eq!(in_words(&[0xff, b'a']), "\\xffa");
    }

    #[test]
    fn a_place_is_named_by_topic_topic_partition_and_offset() {
        let at = place("a:b:3:1200").unwrap();
        assert_eq!((at.topic.as_str(), at.partition, at.offset), ("a:b", 3, 1200));
        assert!(place("a:3").is_err() && place("a:x:1").is_err());
    }
}
