//! One librdkafka client: where its logs and errors go, and how it ends in bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::topic_partition_list::TopicPartitionList;

use crate::source::error::SourceError;

/// Longest wait for a client to close. Nothing depends on it: we are no member of a group and commit nothing that is
/// read again, so a client that can not close is left to the end of the process.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(2);
/// Most events of the client itself (logs, errors, replies) served at a time.
const EVENTS_SERVED_MAX: usize = 16;

/// What the client reported beside records.
#[derive(Debug, Default)]
struct Reports {
    /// Text of the last error.
    last: Option<String>,
    /// Text of the last refusal of the connection: wrong password, certificate, mechanism.
    refused: Option<String>,
}

/// Receives logs and errors of one client.
#[derive(Debug, Default)]
pub(super) struct Context {
    reports: Mutex<Reports>,
    commit_failed: AtomicBool,
    group_refused: AtomicBool,
}

impl Context {
    /// The last error, or a sentence that there was none.
    pub fn last_error(&self) -> String {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.last.clone().unwrap_or_else(|| "the client reported no error".to_owned())
    }

    /// Why the brokers refuse the connection, if they do.
    pub fn refused(&self) -> Option<String> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).refused.clone()
    }

    /// Whether the principal may not use the consumer group.
    pub fn is_group_refused(&self) -> bool {
        self.group_refused.load(Ordering::Relaxed)
    }

    /// Notes a failed advisory commit: once, at debug, because nothing reads those offsets back.
    pub fn note_failed_commit(&self, error: &KafkaError) {
        if !self.commit_failed.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "offsets for lag tools were not written");
        }
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        match level {
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning => tracing::warn!(target: "librdkafka", facility, "{text}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                tracing::debug!(target: "librdkafka", facility, "{text}");
            }
            RDKafkaLogLevel::Debug => tracing::trace!(target: "librdkafka", facility, "{text}"),
        }
    }

    fn error(&self, error: KafkaError, text: &str) {
        let code = error.rdkafka_error_code();
        if matches!(code, Some(RDKafkaErrorCode::GroupAuthorizationFailed)) {
            // The group is only written for lag tools; reading never needs it.
            self.group_refused.store(true, Ordering::Relaxed);
            return;
        }
        tracing::debug!(target: "librdkafka", ?code, "{text}");
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let refusal = matches!(
            code,
            Some(
                RDKafkaErrorCode::Authentication
                    | RDKafkaErrorCode::SaslAuthenticationFailed
                    | RDKafkaErrorCode::UnsupportedSASLMechanism
                    | RDKafkaErrorCode::SSL
            )
        );
        if refusal || is_tls_alert(text) {
            reports.refused = Some(text.to_owned());
        }
        // "all brokers are down" says less than the error that brought the last one down.
        if reports.last.is_none() || code != Some(RDKafkaErrorCode::AllBrokersDown) {
            reports.last = Some(text.to_owned());
        }
    }
}

/// Whether a broker ended the connection with a TLS alert, as it does over a client certificate that is missing or that it
/// does not trust. TLS 1.3 tells of it after the handshake, so librdkafka calls it a transport failure.
pub(super) fn is_tls_alert(text: &str) -> bool {
    text.contains("SSL alert number") && !text.contains("close notify")
}

impl ConsumerContext for Context {
    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            self.note_failed_commit(&error);
        }
    }
}

/// A client that closes in bounded time when it is dropped.
pub(super) struct KafkaClient {
    consumer: Option<Arc<BaseConsumer<Context>>>,
}

impl KafkaClient {
    /// Starts a client. Connects in the background.
    pub fn start(config: &ClientConfig) -> Result<Self, SourceError> {
        let consumer = config.create_with_context(Context::default()).map_err(|error| {
            // The text of a refused property would hold its value; `client_config` has tried all of them, so what is
            // left are combinations (a missing certificate file, a mechanism without its user).
            let problem = match error {
                KafkaError::ClientConfig(_, _, property, _) => format!("property {property} is refused"),
                KafkaError::ClientCreation(text) => text,
                other => other.to_string(),
            };
            SourceError::Property { property: "(together)".to_owned(), problem }
        })?;
        Ok(Self { consumer: Some(Arc::new(consumer)) })
    }

    /// The client itself.
    pub fn consumer(&self) -> &Arc<BaseConsumer<Context>> {
        self.consumer.as_ref().expect("a client is there until it is dropped")
    }

    /// Its reports.
    pub fn context(&self) -> Arc<Context> {
        Arc::clone(self.consumer().client().context())
    }

    /// Hands on logs and errors that have arrived. Does not wait.
    ///
    /// # Errors
    /// [`SourceError::Client`] if a record arrives here. Topic partitions have queues of their own, redirected before
    /// the assignment; a record that is not in its queue would be a gap there.
    pub fn serve(&self) -> Result<(), SourceError> {
        for _ in 0..EVENTS_SERVED_MAX {
            // `None` also follows a served log line, so it does not end the loop; an empty queue costs a lock.
            if let Some(Ok(record)) = self.consumer().poll(Duration::ZERO) {
                let problem = format!(
                    "record {}[{}] at {} came outside the queue of its topic partition",
                    record.topic(),
                    record.partition(),
                    record.offset()
                );
                return Err(SourceError::Client { doing: "reading", problem });
            }
        }
        Ok(())
    }
}

impl Drop for KafkaClient {
    fn drop(&mut self) {
        let consumer = self.consumer.take();
        let (done, closed) = mpsc::channel();
        let closing = thread::Builder::new().name("kafka-close".to_owned()).spawn(move || {
            drop(consumer);
            // The receiver may have given up.
            let _ = done.send(());
        });
        if closing.is_ok() && closed.recv_timeout(CLOSE_TIME_MAX).is_err() {
            tracing::debug!("kafka client does not close in time, left behind");
        }
    }
}
