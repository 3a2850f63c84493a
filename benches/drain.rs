//! The floor of every run: a bare librdkafka consumer that reads a topic from begin to end and drops what it reads.
//!
//! `drain BROKERS TOPIC`: one JSON object with records, bytes of payload, seconds and processor seconds.

use std::error::Error;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::json;

#[path = "dedup/process.rs"]
#[allow(dead_code)] // other benches ask for more
mod process;

const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [brokers, topic] = words.as_slice() else { return Err("drain BROKERS TOPIC".into()) };
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "drain")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true")
        .set("queued.max.messages.kbytes", "65536")
        .create()?;
    let begun = Instant::now();
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_TIME_MAX)?;
    let partitions = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    let mut assignment = TopicPartitionList::new();
    for partition in 0..i32::try_from(partitions)? {
        assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&assignment)?;
    let (mut records, mut bytes, mut ended) = (0_u64, 0_u64, 0);
    while ended < partitions {
        match consumer.poll(ANSWER_TIME_MAX) {
            None => return Err("the broker gives nothing".into()),
            Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(record)) => {
                records += 1;
                bytes += record.payload_len() as u64;
            }
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu_seconds = process::cpu_time().as_secs_f64();
    println!(
        "{}",
        json!({ "records": records, "payload_bytes": bytes, "seconds": seconds, "cpu_seconds": cpu_seconds })
    );
    Ok(())
}
