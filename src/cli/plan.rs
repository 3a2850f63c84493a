//! `tidemill plan`: what a job resolves to, from broker and catalog; changes nothing.

use comfy_table::{Table, presets};
use serde::Serialize;

use super::cadence::{self, Cadence};
use super::{JobArgs, run, terminal};
use crate::commit::side::Role;
use crate::job::StartPosition;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
use crate::pipeline::survey::Survey;
use crate::pipeline::{self, describe_start};
use crate::sink::schema;
use crate::stop::Stop;

/// What is printed.
#[derive(Debug, Serialize)]
struct Plan {
    event: &'static str,
    job: String,
    job_hash: String,
    cluster_id: Option<String>,
    topics: Vec<TopicPlan>,
    lag: u64,
    table: TablePlan,
    dead_letter_table: TablePlan,
    #[serde(skip_serializing_if = "Option::is_none")]
    late_table: Option<TablePlan>,
    ledger: Option<LedgerPlan>,
    memory: MemoryPlan,
    memory_text: String,
    cadence: Cadence,
    verdict: String,
}

#[derive(Debug, Serialize)]
struct TopicPlan {
    topic: String,
    id: Option<String>,
    partitions: Vec<PartitionPlan>,
}

#[derive(Debug, Serialize)]
struct PartitionPlan {
    partition: i32,
    start: i64,
    end: i64,
    low: i64,
}

#[derive(Debug, Serialize)]
struct TablePlan {
    name: String,
    exists: bool,
    action: String,
    columns: Vec<ColumnPlan>,
    partition_by: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ColumnPlan {
    name: String,
    column_type: String,
    required: bool,
}

#[derive(Debug, Serialize)]
struct LedgerPlan {
    batch: u64,
    epoch: u64,
    released: bool,
    owner: String,
    watermark: Option<String>,
    complete_since: Option<String>,
}

/// Asks, prints, changes nothing. Stops that a run would end with are printed as its verdict.
pub fn plan(args: &JobArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.load()?;
    let memory = pipeline::plan_memory(&loaded)?;
    let plan = run::runtime()?.block_on(async {
        let survey = Survey::take(&loaded.job, &memory).await?;
        build(&loaded, memory, &survey, args)
    })?;
    if json {
        terminal::print_json(&plan);
    } else {
        print(&plan);
    }
    Ok(())
}

fn build(loaded: &LoadedJob, memory: MemoryPlan, survey: &Survey, args: &JobArgs) -> Result<Plan, Stop> {
    let job = &loaded.job;
    let starts = survey.starts(job, survey.record())?;
    let mut topics: Vec<TopicPlan> = Vec::new();
    let mut lag = 0;
    for (name, range) in &survey.offsets {
        let start = starts[name].get();
        lag += (range.end.get() - start).max(0).unsigned_abs();
        let partition =
            PartitionPlan { partition: name.partition, start, end: range.end.get(), low: range.low.get() };
        match topics.last_mut() {
            Some(topic) if topic.topic == name.topic => topic.partitions.push(partition),
            _ => topics.push(TopicPlan {
                topic: name.topic.clone(),
                id: survey.topic_id(&name.topic).map(|id| id.to_string()),
                partitions: vec![partition],
            }),
        }
    }
    let verdict = match describe_start(loaded, survey, &args.shown()) {
        Ok(text) => text,
        Err(stop) => format!("a run would stop with {}: {}\n{}", stop.reason.name(), stop.what, stop.way_out),
    };
    Ok(Plan {
        event: "plan",
        job: job.name.clone(),
        job_hash: loaded.resolved_hash.clone(),
        cluster_id: survey.cluster.cluster_id.clone(),
        topics,
        lag,
        table: main_plan(loaded, survey)?,
        dead_letter_table: side_plan(loaded, survey, Role::DeadLetters)?,
        late_table: match survey.side_idents.contains_key(&Role::Late) {
            true => Some(side_plan(loaded, survey, Role::Late)?),
            false => None,
        },
        ledger: survey.record().map(|record| LedgerPlan {
            batch: record.batch,
            epoch: record.epoch,
            released: record.released,
            owner: record.owner.to_string(),
            watermark: record.live().watermark.map(|time| time.to_string()),
            complete_since: record.dedup.complete_since.map(|time| time.to_string()),
        }),
        memory,
        memory_text: memory.to_string(),
        cadence: cadence_of(loaded, &memory, survey),
        verdict,
    })
}

fn columns_of(schema: &iceberg::spec::Schema) -> Vec<ColumnPlan> {
    let fields = schema.as_struct().fields().iter();
    fields
        .map(|field| ColumnPlan {
            name: field.name.clone(),
            column_type: field.field_type.to_string(),
            required: field.required,
        })
        .collect()
}

fn main_plan(loaded: &LoadedJob, survey: &Survey) -> Result<TablePlan, Stop> {
    let job = &loaded.job;
    let wanted = schema::table_schema(job).map_err(pipeline::stops::schema)?;
    let differences = survey.comparison.refusals.iter().map(ToString::to_string);
    let additions = survey.comparison.additions.iter().map(ToString::to_string);
    let changes: Vec<String> = differences.map(|text| format!("REFUSED: {text}")).chain(additions).collect();
    let action = match (&survey.main, changes.is_empty()) {
        (None, _) => "create".to_owned(),
        (Some(_), true) => "none".to_owned(),
        (Some(_), false) => changes.join("; "),
    };
    Ok(TablePlan {
        name: survey.main_ident.to_string(),
        exists: survey.main.is_some(),
        action,
        columns: columns_of(&wanted),
        partition_by: job
            .sink
            .partition_by
            .iter()
            .map(|field| format!("{}({})", field.transform, field.column))
            .collect(),
    })
}

fn side_plan(loaded: &LoadedJob, survey: &Survey, role: Role) -> Result<TablePlan, Stop> {
    let wanted = match role {
        Role::DeadLetters => crate::sink::dead_letters::table_schema(),
        Role::Late => schema::late_schema(&loaded.job),
    };
    let wanted = wanted.map_err(pipeline::stops::schema)?;
    let table = survey.sides.get(&role);
    let additions = match table {
        Some(table) => pipeline::survey::compare_side(table, role, &loaded.job)?.additions,
        None => Vec::new(),
    };
    let additions: Vec<String> = additions.iter().map(ToString::to_string).collect();
    let action = match (table, additions.is_empty()) {
        (None, _) => "create".to_owned(),
        (Some(_), true) => "none".to_owned(),
        (Some(_), false) => additions.join("; "),
    };
    Ok(TablePlan {
        name: survey.side_idents[&role].to_string(),
        exists: table.is_some(),
        action,
        columns: columns_of(&wanted),
        partition_by: Vec::new(),
    })
}

fn print(plan: &Plan) {
    println!("job {}  (hash {})", plan.job, plan.job_hash);
    println!("cluster {}", plan.cluster_id.as_deref().unwrap_or("unknown"));
    let mut offsets =
        table(["topic", "topic id", "partition", "earliest", "read from", "to", "records at most"]);
    for topic in &plan.topics {
        for partition in &topic.partitions {
            offsets.add_row([
                topic.topic.clone(),
                topic.id.clone().unwrap_or_else(|| "unknown".to_owned()),
                partition.partition.to_string(),
                partition.low.to_string(),
                partition.start.to_string(),
                partition.end.to_string(),
                (partition.end - partition.start).max(0).to_string(),
            ]);
        }
    }
    println!("{offsets}");
    let late = plan.late_table.iter().map(|late| ("late rows", late));
    for (what, side) in
        [("table", &plan.table), ("dead letters", &plan.dead_letter_table)].into_iter().chain(late)
    {
        println!("{what} {}: {}", side.name, if side.exists { "exists" } else { "does not exist" });
        println!("  to do: {}", side.action);
        if !side.partition_by.is_empty() {
            println!("  partitioned by {}", side.partition_by.join(", "));
        }
        for column in &side.columns {
            println!(
                "  {} {}{}",
                column.name,
                column.column_type,
                if column.required { " required" } else { "" }
            );
        }
    }
    match &plan.ledger {
        None => println!("ledger: none yet"),
        Some(ledger) => println!(
            "ledger: batch {} epoch {} watermark {} complete since {} {}",
            ledger.batch,
            ledger.epoch,
            ledger.watermark.as_deref().unwrap_or("none"),
            ledger.complete_since.as_deref().unwrap_or("ever"),
            if ledger.released { "released".to_owned() } else { format!("owned by {}", ledger.owner) }
        ),
    }
    println!("memory: {}", plan.memory_text);
    cadence::print(&plan.cadence);
    println!("{}", plan.verdict);
}

/// At the rate of the last hour, as far as the broker tells it.
fn cadence_of(loaded: &LoadedJob, memory: &MemoryPlan, survey: &Survey) -> Cadence {
    let hour_ago = StartPosition::Timestamp(chrono::Utc::now().timestamp_millis() - 3_600_000);
    let since = survey.connection.resolve_start(&hour_ago, &survey.offsets).unwrap_or_default();
    let records: i64 =
        since.iter().map(|(name, start)| (survey.offsets[name].end.get() - start.get()).max(0)).sum();
    match records.unsigned_abs() / 3_600 {
        0 => cadence::of(
            &loaded.job,
            memory,
            cadence::RATE_ASSUMED,
            "assumed: the topics rested in the last hour",
        ),
        rate => cadence::of(&loaded.job, memory, rate, "as in the last hour"),
    }
}

/// A table for people, without frames.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}
