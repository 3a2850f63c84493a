//! `tidemill rebase-offsets` and `tidemill accept-loss`: offsets move without reading, and rows of side tables are given up, for a
//! stated reason.

use super::{OffsetsArgs, confirm, run, terminal};
use crate::pipeline::{self, OffsetCommand, RunOptions};
use crate::stop::Stop;

/// Begins again on new topics.
pub fn rebase(args: &OffsetsArgs, json: bool) -> Result<(), Stop> {
    move_offsets(args, json, OffsetCommand::Rebase)
}

/// Goes on after lost offsets, or lost files of a side table.
pub fn accept_loss(args: &OffsetsArgs, json: bool) -> Result<(), Stop> {
    move_offsets(args, json, OffsetCommand::AcceptLoss)
}

fn move_offsets(args: &OffsetsArgs, json: bool, command: OffsetCommand) -> Result<(), Stop> {
    let loaded = args.job.load()?;
    let options =
        RunOptions { job_shown: args.job.shown(), takeover: args.takeover, ..RunOptions::default() };
    let ask = |question: &str| confirm(question, args.yes);
    let moved = run::runtime()?.block_on(pipeline::move_offsets(&loaded, &options, command, &ask))?;
    if json {
        terminal::print_json(&serde_json::json!({
            "event": "offsets_moved", "reason": command.name(), "jumps": moved.jumps, "side_losses": moved.side_losses,
        }));
        return Ok(());
    }
    if moved.is_nothing() {
        println!("nothing to move: every next offset is on the broker, in the topics that the ledger knows");
    }
    for loss in &moved.side_losses {
        println!("accepted: {loss}");
    }
    for jump in &moved.jumps {
        println!("moved {}", pipeline::describe_jump(jump));
    }
    if !moved.is_nothing() {
        println!("go on with: tidemill run {}", args.job.shown());
    }
    Ok(())
}
