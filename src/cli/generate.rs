//! `tidemill generate`: events with a known truth, into real topics.

use std::collections::BTreeMap;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::terminal;
use crate::generate::config::{bad_kind, bad_of_each_kind};
use crate::generate::{GenerateError, Generator, GeneratorConfig, Sender, Topics, create_topics};
use crate::job::Setting;
use crate::letter::ReasonCode;
use crate::stop::{Reason, Stop};

/// `generate`.
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// Addresses of the brokers, host:port,host:port
    #[arg(long, env = "KAFKA_BROKERS", value_name = "ADDRESSES")]
    brokers: String,
    /// Good records to send, repeats included; bad ones come on top
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    events: u64,
    /// Good records of the same stream to leave out first, so that waves follow one another
    #[arg(long, default_value_t = 0, value_name = "N")]
    skip: u64,
    /// Seed of the stream; the same seed gives the same bytes everywhere
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Share of good records that repeat an earlier event: near, far, and on another topic partition
    #[arg(long, default_value_t = 0.06)]
    repeats: f64,
    /// Prefix of the four topics, one per event type: PREFIX.generated, PREFIX.sent, ...
    #[arg(long, default_value = "notifications", conflicts_with = "topic")]
    topic_prefix: String,
    /// Send all types to this one topic instead
    #[arg(long)]
    topic: Option<String>,
    /// Topic partitions of each topic
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// Create the topics if they are missing
    #[arg(long)]
    create_topics: bool,
    /// Bad records in every 100,000 good ones: a number for each kind, or KIND=N; may be given several times
    #[arg(long, value_name = "N|KIND=N")]
    bad: Vec<String>,
    /// librdkafka property of the producer; values may be env:NAME or file:PATH
    #[arg(long = "property", value_name = "KEY=VALUE")]
    properties: Vec<String>,
    /// Print the truth and send nothing
    #[arg(long)]
    dry_run: bool,
}

/// Good records over which the bad ones are spread. A constant, so that a longer stream begins like a shorter one.
pub const STRETCH_EVENTS: u64 = 100_000;

/// Sends a stretch of a stream and prints its truth.
pub fn generate(args: &GenerateArgs, json: bool) -> Result<(), Stop> {
    let config = config_of(args)?;
    let properties = properties_of(&args.properties)?;
    let mut generator = Generator::new(&config).map_err(stop_of)?;
    generator.skip(args.skip);
    let before = generator.truth();
    if args.dry_run {
        generator.skip(args.events);
    } else {
        if args.create_topics {
            create_topics(&args.brokers, &properties, &config.topics.names(), args.partitions)
                .map_err(stop_of)?;
        }
        let sender = Sender::connect(&args.brokers, &properties).map_err(stop_of)?;
        let bar = sending_bar(args.events, json);
        sender.send(generator.wave(args.events), |sent| bar.set_position(sent)).map_err(stop_of)?;
        bar.finish_and_clear();
    }
    let truth = generator.truth();
    let wave = truth.since(&before);
    let printed = serde_json::json!({ "event": "truth", "wave": wave, "stream": truth, "topics": config.topics.names() });
    if json {
        terminal::print_json(&printed);
    } else {
        println!("{}", serde_json::to_string_pretty(&printed).expect("a truth is text and numbers"));
    }
    Ok(())
}

/// A bar on standard error; hidden for scripts.
pub fn sending_bar(events: u64, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  sending {human_pos} of {human_len}")
        .expect("the template is a constant");
    ProgressBar::new(events).with_style(style)
}

fn usage(what: String) -> Stop {
    Stop::new(Reason::Usage, what, "tidemill generate --help")
}

fn config_of(args: &GenerateArgs) -> Result<GeneratorConfig, Stop> {
    let topics = match &args.topic {
        Some(topic) => Topics::One(topic.clone()),
        None => Topics::PerType(args.topic_prefix.trim_end_matches('.').to_owned()),
    };
    let mut bad: BTreeMap<ReasonCode, u64> = BTreeMap::new();
    for given in &args.bad {
        let number = |text: &str| {
            text.parse().map_err(|_| usage(format!("--bad {given}: {text:?} is not a number of records")))
        };
        match given.split_once('=') {
            None => bad.extend(bad_of_each_kind(number(given)?)),
            Some((name, count)) => {
                let kind = bad_kind(name).ok_or_else(|| usage(format!("--bad {given}: no kind {name:?}")))?;
                bad.insert(kind, number(count)?);
            }
        }
    }
    Ok(GeneratorConfig {
        seed: args.seed,
        events: STRETCH_EVENTS,
        repeats: args.repeats,
        bad,
        topics,
        partitions_per_topic: args.partitions,
        ..GeneratorConfig::default()
    })
}

fn properties_of(given: &[String]) -> Result<BTreeMap<String, String>, Stop> {
    let mut properties = BTreeMap::new();
    for property in given {
        let (key, value) = property
            .split_once('=')
            .ok_or_else(|| usage(format!("--property {property}: give KEY=VALUE")))?;
        let setting = match value.split_once(':') {
            Some(("env", name)) => Setting::Env(name.to_owned()),
            Some(("file", path)) => Setting::File(path.into()),
            _ => Setting::Plain(value.to_owned()),
        };
        let value = setting.resolve().map_err(|why| usage(format!("--property {key}: {why}")))?;
        properties.insert(key.to_owned(), value);
    }
    Ok(properties)
}

/// Generator errors as a reason to stop.
pub fn stop_of(error: GenerateError) -> Stop {
    let reason = match error {
        GenerateError::Setting { .. } | GenerateError::Property { .. } => Reason::Usage,
        _ => Reason::SourceAway,
    };
    let way_out = match reason {
        Reason::Usage => "tidemill generate --help",
        _ => {
            "check that the brokers are up and the topics exist (--create-topics makes them), then use fresh topics"
        }
    };
    Stop::new(reason, error.to_string(), way_out)
}
