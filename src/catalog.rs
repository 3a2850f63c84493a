//! The catalog and the storage below it: SQLite with a local folder, or REST with files or S3.
//!
//! Flow: [`CatalogConfig`] -> [`connect`] -> `Arc<dyn Catalog>` -> [`ensure_namespace`], [`load`]
//!
//! Invariants
//! 1. Every call ends: what a server does not answer within [`REQUEST_TIME_MAX`] is an error.
//! 2. The SQLite file is in journal mode WAL before a table is created in it. In the default mode a reader that
//!    holds the file makes `iceberg-catalog-sql` 0.10.1 report a commit that did not happen (its bug 3061).
//! 3. No resolved secret stands in a name, a `Debug` text or a message made here.
//!
//! Locations: a local warehouse is written as `file:///absolute/path`, which pyiceberg, DuckDB, Spark and this
//! crate read alike. Other programs open the SQLite catalog under the name [`CATALOG_NAME`].
//!
//! Storage: local files go through OpenDAL, which syncs a file when it is closed; the crate's own local backend
//! does not sync metadata files.

pub mod updates;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use iceberg::io::StorageFactory;
use iceberg::table::Table;
use iceberg::{
    Catalog, CatalogBuilder, Error, ErrorKind, Namespace, NamespaceIdent, TableCommit, TableCreation,
    TableIdent,
};
use iceberg_catalog_rest::{RestCatalog, RestCatalogBuilder};
use iceberg_catalog_sql::SqlCatalogBuilder;
use iceberg_storage_opendal::{OpenDalResolvingStorageFactory, OpenDalStorageFactory};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode};
use tokio::sync::Mutex;

use crate::job::{CatalogConfig, CatalogKind};
use crate::stop::Reason;

/// Name of the catalog inside its SQLite file. pyiceberg must use the same:
/// `load_catalog("tidemill", type="sql", uri="sqlite:////abs/catalog.db")`.
pub const CATALOG_NAME: &str = "tidemill";
/// Longest time for one catalog request before it counts as unanswered.
pub const REQUEST_TIME_MAX: Duration = Duration::from_secs(60);
/// Longest wait for another process that holds the SQLite file while it is set up.
pub const SQLITE_BUSY_TIME_MAX: Duration = Duration::from_secs(30);
/// An OAuth token older than this is exchanged before the next request: the crate does not renew tokens itself.
pub const TOKEN_AGE_MAX: Duration = Duration::from_secs(10 * 60);

/// Why the catalog can not be used. One variant per way the caller must react.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// No answer, or an answer that says "later". Try again later.
    #[error("{what}: the catalog or its storage does not answer; try again later")]
    Away {
        /// What was asked.
        what: String,
        /// The error below.
        source: Box<Error>,
    },
    /// The disk below is full or fails.
    #[error("{what}: the disk is full or fails; nothing was decided, so free it and try again")]
    Disk {
        /// What was asked.
        what: String,
        /// The error below.
        source: Box<Error>,
    },
    /// The principal may not do this.
    #[error("{what}: refused; check the credentials and what they may do")]
    Refused {
        /// What was asked.
        what: String,
        /// The error below.
        source: Box<Error>,
    },
    /// The configuration can not work.
    #[error("{what}")]
    Misconfigured {
        /// What is wrong and the way out.
        what: String,
        /// The error below, if there is one.
        source: Option<Box<Error>>,
    },
    /// Anything else.
    #[error("{what}: unexpected answer of the catalog")]
    Unexpected {
        /// What was asked.
        what: String,
        /// The error below.
        source: Box<Error>,
    },
}

impl CatalogError {
    fn misconfigured(what: impl Into<String>) -> Self {
        Self::Misconfigured { what: what.into(), source: None }
    }

    /// The catalog said that it made something, and it is not there: the SQL catalog of 0.10.1 says so where the COMMIT
    /// failed (its bug 3061).
    pub fn made_in_vain(what: impl Into<String>) -> Self {
        let source = Error::new(ErrorKind::Unexpected, "the catalog reported success, and it is not there");
        Self::Away { what: what.into(), source: Box::new(source) }
    }

    /// Sorts an error of the iceberg crates by how the caller must react. `what` says what was asked.
    ///
    /// The crates keep one kind for nearly everything, so the chain below is looked at: typed errors of SQLite
    /// and of the operating system first, then the status of an HTTP answer, then OpenDAL's words.
    pub fn classify(what: impl Into<String>, error: Error) -> Self {
        let what = what.into();
        let cause = cause_of(&error);
        let source = Box::new(without_token_bodies(error));
        match cause {
            Cause::Away => Self::Away { what, source },
            Cause::Disk => Self::Disk { what, source },
            Cause::Refused => Self::Refused { what, source },
            Cause::Misconfigured => Self::Misconfigured { what, source: Some(source) },
            Cause::Unexpected => Self::Unexpected { what, source },
        }
    }

    /// The named reason of a run that ends with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Away { .. } => Reason::CatalogAway,
            Self::Disk { .. } => Reason::StorageFailed,
            Self::Refused { .. } => Reason::NotAuthorized,
            Self::Misconfigured { .. } => Reason::Usage,
            Self::Unexpected { .. } => Reason::Unexpected,
        }
    }
}

/// The named reason of a run that ends with this error of the iceberg crates.
pub fn reason_of(error: &Error) -> Reason {
    match cause_of(error) {
        Cause::Away => Reason::CatalogAway,
        Cause::Disk => Reason::StorageFailed,
        Cause::Refused => Reason::NotAuthorized,
        Cause::Misconfigured => Reason::Usage,
        Cause::Unexpected => Reason::Unexpected,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Away,
    Disk,
    Refused,
    Misconfigured,
    Unexpected,
}

fn cause_of(error: &Error) -> Cause {
    let text = error.to_string();
    let is_network = text.contains("http request") || text.contains("error sending request");
    let mut below = std::error::Error::source(error);
    while let Some(cause) = below {
        if let Some(sql) = cause.downcast_ref::<sqlx::Error>() {
            return cause_of_sql(sql);
        }
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            // a name that can not be looked up has no kind either, and is no matter of a disk
            return match cause_of_io(io.kind()) {
                Cause::Disk if is_network => Cause::Away,
                other => other,
            };
        }
        below = cause.source();
    }
    cause_of_text(&text)
}

fn cause_of_sql(error: &sqlx::Error) -> Cause {
    match error {
        sqlx::Error::Io(io) => cause_of_io(io.kind()),
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => Cause::Away,
        sqlx::Error::Configuration(_) => Cause::Misconfigured,
        sqlx::Error::Database(database) => {
            // primary result code of SQLite, https://www.sqlite.org/rescode.html; extended ones sit above 8 bits
            let code = database.code().and_then(|code| code.parse::<i32>().ok()).map(|code| code & 0xff);
            match code {
                Some(5 | 6 | 15) => Cause::Away,       // busy, locked, protocol
                Some(10 | 13 | 14) => Cause::Disk,     // i/o error, full, can not open
                Some(3 | 8 | 23) => Cause::Refused,    // permission, read-only, authorization
                Some(11 | 26) => Cause::Misconfigured, // corrupt, not a database
                _ => Cause::Unexpected,
            }
        }
        _ => Cause::Unexpected,
    }
}

fn cause_of_io(kind: std::io::ErrorKind) -> Cause {
    use std::io::ErrorKind as Io;
    match kind {
        Io::PermissionDenied | Io::ReadOnlyFilesystem => Cause::Refused,
        Io::NotADirectory | Io::IsADirectory | Io::InvalidInput | Io::InvalidFilename => Cause::Misconfigured,
        Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => Cause::Disk,
        Io::NotFound => Cause::Unexpected,
        Io::ConnectionRefused
        | Io::ConnectionReset
        | Io::ConnectionAborted
        | Io::NotConnected
        | Io::HostUnreachable
        | Io::NetworkUnreachable
        | Io::NetworkDown
        | Io::BrokenPipe
        | Io::UnexpectedEof
        | Io::TimedOut
        | Io::Interrupted
        | Io::WouldBlock
        | Io::ResourceBusy => Cause::Away,
        // what is left comes from a file: an i/o error of the device has no kind of its own
        _ => Cause::Disk,
    }
}

fn cause_of_text(text: &str) -> Cause {
    if text.contains("NoSuchBucket") {
        return Cause::Misconfigured;
    }
    // an object that is gone is no matter of the configuration, although S3 answers 404
    if text.contains("NotFound (") {
        return Cause::Unexpected;
    }
    if let Some(status) = status_in(text) {
        return match status {
            401 | 403 | 407 => Cause::Refused,
            408 | 429 | 500..=599 => Cause::Away,
            400 | 404 | 405 | 406 | 410 | 421 => Cause::Misconfigured,
            _ => Cause::Unexpected,
        };
    }
    let holds = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if holds(&["PermissionDenied", "unauthorized_client", "invalid_client", "access_denied"]) {
        Cause::Refused
    } else if holds(&["ConfigInvalid", "builder error", "relative URL without a base", "invalid URL"]) {
        Cause::Misconfigured
    } else if holds(&[
        "Failed to execute http request",
        "commit state is unknown",
        "(temporary)",
        "(persistent)",
        "RateLimited",
        "no answer within",
        "database is locked",
        // not what a catalog says: a proxy or a login page on the way does
        "Failed to parse response from rest catalog",
    ]) {
        Cause::Away
    } else {
        Cause::Unexpected
    }
}

/// The HTTP status that an error of the REST client names in its context.
fn status_in(text: &str) -> Option<u16> {
    ["status: ", "code: "].iter().find_map(|label| {
        let (_, rest) = text.split_once(label)?;
        rest.get(..3)?.parse().ok().filter(|status| (100..600).contains(status))
    })
}

/// The body of a token answer may hold a token: an error that shows one is replaced by its kind and status.
fn without_token_bodies(error: Error) -> Error {
    let text = error.to_string();
    if !text.contains("operation: auth") {
        return error;
    }
    let status = status_in(&text).map_or(String::new(), |status| format!(" (status {status})"));
    Error::new(error.kind(), format!("the token endpoint gave an answer that can not be used{status}"))
}

/// Opens the catalog of a job under [`CATALOG_NAME`], the same for every job: two jobs that name one table meet.
///
/// `sql` creates the SQLite file, its folders and a local warehouse folder if they are missing. `rest` sends
/// nothing yet: the first call does.
///
/// # Errors
/// [`CatalogError::Misconfigured`] names the field; the others as they say.
pub async fn connect(config: &CatalogConfig) -> Result<Arc<dyn Catalog>, CatalogError> {
    let properties = resolve_properties(config)?;
    match config.kind {
        CatalogKind::Sql => connect_sql(config, CATALOG_NAME, properties).await,
        CatalogKind::Rest => connect_rest(config, CATALOG_NAME, properties).await,
    }
}

fn resolve_properties(config: &CatalogConfig) -> Result<HashMap<String, String>, CatalogError> {
    let mut properties = HashMap::new();
    for (key, setting) in &config.properties {
        let value = setting
            .resolve()
            .map_err(|reason| CatalogError::misconfigured(format!("catalog property {key}: {reason}")))?;
        check_property(key, &value)?;
        properties.insert(key.clone(), value);
    }
    Ok(properties)
}

/// Refuses what the crates below would answer with a panic or with a message that shows the value.
fn check_property(key: &str, value: &str) -> Result<(), CatalogError> {
    let refuse = |expected: &str| {
        Err(CatalogError::misconfigured(format!("catalog property {key} is not {expected}")))
    };
    match key {
        "pool.max-connections" if !value.parse::<u32>().is_ok_and(|count| count > 0) => {
            refuse("a number of connections")
        }
        "pool.idle-timeout" if value.parse::<u64>().is_err() => refuse("a number of seconds"),
        "pool.test-before-acquire" if value.parse::<bool>().is_err() => refuse("true or false"),
        _ if key.starts_with("header.") || key == "token" || key == "credential" => {
            if value.is_empty() || !value.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
                return refuse("one line of printable ASCII characters");
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

async fn connect_sql(
    config: &CatalogConfig,
    name: &str,
    mut properties: HashMap<String, String>,
) -> Result<Arc<dyn Catalog>, CatalogError> {
    let path = sqlite_path(&config.uri)?;
    create_sqlite_file(&path).await?;
    let (warehouse, factory) = warehouse_of_sql(&config.warehouse)?;
    properties.insert("warehouse".to_owned(), warehouse);
    sqlx::any::install_default_drivers();
    let what = format!("sql catalog {}", path.display());
    let catalog = SqlCatalogBuilder::default()
        .uri(sqlite_uri(&path)?)
        .sql_bind_style(iceberg_catalog_sql::SqlBindStyle::QMark)
        .with_storage_factory(factory)
        .load(name, properties)
        .await
        .map_err(|error| CatalogError::classify(what, error))?;
    Ok(Arc::new(Timed { inner: catalog }))
}

async fn connect_rest(
    config: &CatalogConfig,
    name: &str,
    mut properties: HashMap<String, String>,
) -> Result<Arc<dyn Catalog>, CatalogError> {
    let uri = config.uri.trim_end_matches('/');
    if !(uri.starts_with("http://") || uri.starts_with("https://")) {
        return Err(CatalogError::misconfigured(format!(
            "catalog uri of kind rest begins with http:// or https://, not with {:?}",
            uri.split(':').next().unwrap_or_default()
        )));
    }
    properties.insert("uri".to_owned(), uri.to_owned());
    if !config.warehouse.is_empty() {
        properties.insert("warehouse".to_owned(), config.warehouse.clone());
    }
    let renews_token = properties.contains_key("credential") && !properties.contains_key("token");
    let catalog = RestCatalogBuilder::default()
        .with_storage_factory(Arc::new(OpenDalResolvingStorageFactory::new()))
        .load(name, properties)
        .await
        .map_err(|error| CatalogError::classify("rest catalog", error))?;
    if renews_token {
        return Ok(Arc::new(Timed {
            inner: TokenRenewing { inner: catalog, renewed: Mutex::new(Instant::now()) },
        }));
    }
    Ok(Arc::new(Timed { inner: catalog }))
}

/// `sqlite:PATH`, `sqlite://PATH` or a bare path; a query part is cut.
fn sqlite_path(uri: &str) -> Result<PathBuf, CatalogError> {
    let rest = match uri.split_once(':') {
        Some(("sqlite", rest)) => rest.strip_prefix("//").unwrap_or(rest),
        Some((scheme, _)) if scheme.len() > 1 && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
            return Err(CatalogError::misconfigured(format!(
                "a catalog of kind sql lives in SQLite (sqlite:PATH); {scheme:?} is not built, use kind rest"
            )));
        }
        _ => uri,
    };
    let path = rest.split('?').next().unwrap_or_default();
    if path.is_empty() || path == ":memory:" {
        return Err(CatalogError::misconfigured("catalog uri of kind sql names a file: sqlite:PATH"));
    }
    absolute(Path::new(path))
}

/// The URI that `sqlx` reads back to exactly this path.
fn sqlite_uri(path: &Path) -> Result<String, CatalogError> {
    let text = path_text(path)?;
    let mut uri = String::from("sqlite://");
    for character in text.chars() {
        match character {
            '%' => uri.push_str("%25"),
            '?' => uri.push_str("%3F"),
            '#' => uri.push_str("%23"),
            _ => uri.push(character),
        }
    }
    uri.push_str("?mode=rwc");
    Ok(uri)
}

/// Creates the SQLite file and sets journal mode WAL, which stays in the file.
async fn create_sqlite_file(path: &Path) -> Result<(), CatalogError> {
    let what = || format!("sql catalog {}", path.display());
    let is_new = !path.exists();
    if path.is_dir() {
        return Err(CatalogError::misconfigured(format!("{} is a folder; name a file in it", what())));
    }
    if let Some(folder) = path.parent() {
        create_folder(folder)?;
    }
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .busy_timeout(SQLITE_BUSY_TIME_MAX)
        .journal_mode(SqliteJournalMode::Wal);
    let of_sqlite = |error: sqlx::Error| {
        CatalogError::classify(
            what(),
            Error::new(ErrorKind::Unexpected, "SQLite can not be opened").with_source(error),
        )
    };
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(of_sqlite)?;
    let mode: String =
        sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut connection).await.map_err(of_sqlite)?;
    connection.close().await.map_err(of_sqlite)?;
    crate::crash_point!("catalog_file_made");
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(CatalogError::misconfigured(format!(
            "{}: the file system does not let SQLite use journal mode WAL (it stays {mode}); put the catalog on a \
             local disk",
            what()
        )));
    }
    if is_new && let Some(folder) = path.parent() {
        sync_folder(folder)?;
    }
    Ok(())
}

/// Location of the warehouse and the storage that serves it.
fn warehouse_of_sql(warehouse: &str) -> Result<(String, Arc<dyn StorageFactory>), CatalogError> {
    if let Some((scheme, _)) = warehouse.split_once("://")
        && scheme != "file"
    {
        if !matches!(scheme, "s3" | "s3a" | "s3n") {
            return Err(CatalogError::misconfigured(format!(
                "warehouse {warehouse}: a folder, file:// or s3:// is built, {scheme}:// is not"
            )));
        }
        return Ok((
            warehouse.trim_end_matches('/').to_owned(),
            Arc::new(OpenDalResolvingStorageFactory::new()),
        ));
    }
    let path =
        warehouse.strip_prefix("file://").or_else(|| warehouse.strip_prefix("file:")).unwrap_or(warehouse);
    if path.is_empty() {
        return Err(CatalogError::misconfigured("warehouse is empty; name a folder, file:// or s3://"));
    }
    let path = absolute(Path::new(path))?;
    let text = path_text(&path)?;
    if text.contains(['?', '#']) {
        return Err(CatalogError::misconfigured(format!(
            "warehouse {text}: other programs read ? and # in a location as parts of a URL; choose another folder"
        )));
    }
    create_folder(&path)?;
    // the plain file backend, not the resolving one: tables made by others may name plain paths
    Ok((format!("file://{}", text.trim_end_matches('/')), Arc::new(OpenDalStorageFactory::Fs)))
}

fn absolute(path: &Path) -> Result<PathBuf, CatalogError> {
    std::path::absolute(path).map_err(|error| {
        CatalogError::misconfigured(format!("path {} is not usable: {error}", path.display()))
    })
}

fn path_text(path: &Path) -> Result<&str, CatalogError> {
    path.to_str().ok_or_else(|| CatalogError::misconfigured(format!("path {} is not UTF-8", path.display())))
}

fn create_folder(folder: &Path) -> Result<(), CatalogError> {
    std::fs::create_dir_all(folder).map_err(|error| of_folder(folder, error))
}

fn sync_folder(folder: &Path) -> Result<(), CatalogError> {
    std::fs::File::open(folder).and_then(|file| file.sync_all()).map_err(|error| of_folder(folder, error))
}

fn of_folder(folder: &Path, error: std::io::Error) -> CatalogError {
    CatalogError::classify(
        format!("folder {}", folder.display()),
        Error::new(ErrorKind::Unexpected, "the folder can not be created or synced").with_source(error),
    )
}

/// Creates a namespace and its parents where they are missing.
///
/// # Errors
/// As [`CatalogError`] says. A namespace that another program creates in the same moment is no error.
pub async fn ensure_namespace(catalog: &dyn Catalog, namespace: &NamespaceIdent) -> Result<(), CatalogError> {
    let levels = namespace.as_ref();
    for depth in 1..=levels.len() {
        let level = NamespaceIdent::from_vec(levels[..depth].to_vec())
            .map_err(|error| CatalogError::classify("namespace of the table", error))?;
        let what = || format!("namespace {level}");
        if catalog.namespace_exists(&level).await.map_err(|error| CatalogError::classify(what(), error))? {
            continue;
        }
        let made = catalog.create_namespace(&level, HashMap::new()).await;
        crate::crash_point!("namespace_made");
        let stands = catalog.namespace_exists(&level).await;
        match (made, stands) {
            (_, Ok(true)) => {}
            (Err(error), _) if error.kind() == ErrorKind::NamespaceAlreadyExists => {}
            (Err(error), _) | (Ok(_), Err(error)) => return Err(CatalogError::classify(what(), error)),
            (Ok(_), Ok(false)) => return Err(CatalogError::made_in_vain(what())),
        }
    }
    Ok(())
}

/// Loads a table; `None` where the table or its namespace does not exist.
///
/// # Errors
/// As [`CatalogError`] says.
pub async fn load(catalog: &dyn Catalog, table: &TableIdent) -> Result<Option<Table>, CatalogError> {
    match catalog.load_table(table).await {
        Ok(table) => Ok(Some(table)),
        Err(error) if matches!(error.kind(), ErrorKind::TableNotFound | ErrorKind::NamespaceNotFound) => {
            Ok(None)
        }
        Err(error) => Err(CatalogError::classify(format!("table {table}"), error)),
    }
}

/// A catalog that always answers: with an error where the one below takes longer than [`REQUEST_TIME_MAX`].
#[derive(Debug)]
struct Timed<C> {
    inner: C,
}

async fn timed<T>(call: impl Future<Output = iceberg::Result<T>>) -> iceberg::Result<T> {
    match tokio::time::timeout(REQUEST_TIME_MAX, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::new(
            ErrorKind::Unexpected,
            format!("no answer within {} s", REQUEST_TIME_MAX.as_secs()),
        )),
    }
}

/// A REST catalog whose OAuth token is exchanged before it grows old.
struct TokenRenewing {
    inner: RestCatalog,
    renewed: Mutex<Instant>,
}

impl std::fmt::Debug for TokenRenewing {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("TokenRenewing")
    }
}

impl TokenRenewing {
    /// The catalog, with a token younger than [`TOKEN_AGE_MAX`] at the start of the request.
    async fn fresh(&self) -> iceberg::Result<&RestCatalog> {
        let mut renewed = self.renewed.lock().await;
        if renewed.elapsed() >= TOKEN_AGE_MAX {
            self.inner.regenerate_token().await?;
            *renewed = Instant::now();
        }
        Ok(&self.inner)
    }
}

/// Implements [`Catalog`] by forwarding: `$reach` gives the catalog below, `$call` surrounds its future.
macro_rules! forward_catalog {
    ([$($generics:tt)*] $catalog:ty, $self:ident => $reach:expr, $call:path) => {
        #[async_trait]
        impl $($generics)* Catalog for $catalog {
            async fn list_namespaces(&$self, parent: Option<&NamespaceIdent>) -> iceberg::Result<Vec<NamespaceIdent>> {
                $call($reach.list_namespaces(parent)).await
            }
            async fn create_namespace(
                &$self,
                namespace: &NamespaceIdent,
                properties: HashMap<String, String>,
            ) -> iceberg::Result<Namespace> {
                $call($reach.create_namespace(namespace, properties)).await
            }
            async fn get_namespace(&$self, namespace: &NamespaceIdent) -> iceberg::Result<Namespace> {
                $call($reach.get_namespace(namespace)).await
            }
            async fn namespace_exists(&$self, namespace: &NamespaceIdent) -> iceberg::Result<bool> {
                $call($reach.namespace_exists(namespace)).await
            }
            async fn update_namespace(
                &$self,
                namespace: &NamespaceIdent,
                properties: HashMap<String, String>,
            ) -> iceberg::Result<()> {
                $call($reach.update_namespace(namespace, properties)).await
            }
            async fn drop_namespace(&$self, namespace: &NamespaceIdent) -> iceberg::Result<()> {
                $call($reach.drop_namespace(namespace)).await
            }
            async fn list_tables(&$self, namespace: &NamespaceIdent) -> iceberg::Result<Vec<TableIdent>> {
                $call($reach.list_tables(namespace)).await
            }
            async fn create_table(
                &$self,
                namespace: &NamespaceIdent,
                creation: TableCreation,
            ) -> iceberg::Result<Table> {
                $call($reach.create_table(namespace, creation)).await
            }
            async fn load_table(&$self, table: &TableIdent) -> iceberg::Result<Table> {
                $call($reach.load_table(table)).await
            }
            async fn drop_table(&$self, table: &TableIdent) -> iceberg::Result<()> {
                $call($reach.drop_table(table)).await
            }
            async fn purge_table(&$self, table: &TableIdent) -> iceberg::Result<()> {
                $call($reach.purge_table(table)).await
            }
            async fn table_exists(&$self, table: &TableIdent) -> iceberg::Result<bool> {
                $call($reach.table_exists(table)).await
            }
            async fn rename_table(&$self, from: &TableIdent, to: &TableIdent) -> iceberg::Result<()> {
                $call($reach.rename_table(from, to)).await
            }
            async fn register_table(&$self, table: &TableIdent, metadata_location: String) -> iceberg::Result<Table> {
                $call($reach.register_table(table, metadata_location)).await
            }
            async fn update_table(&$self, commit: TableCommit) -> iceberg::Result<Table> {
                $call($reach.update_table(commit)).await
            }
        }
    };
}

forward_catalog!([<C: Catalog>] Timed<C>, self => self.inner, timed);
forward_catalog!([] TokenRenewing, self => self.fresh().await?, std::convert::identity);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::job::Setting;

    fn config(kind: CatalogKind, uri: &str, warehouse: &str) -> CatalogConfig {
        CatalogConfig {
            kind,
            uri: uri.to_owned(),
            warehouse: warehouse.to_owned(),
            properties: BTreeMap::new(),
        }
    }

    fn of_folder_config(folder: &Path) -> CatalogConfig {
        let uri = format!("sqlite:{}", folder.join("deep/er/cat alog%.db").display());
        config(CatalogKind::Sql, &uri, &folder.join("ware house").display().to_string())
    }

    #[tokio::test]
    async fn a_sql_catalog_is_created_in_wal_mode_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let config = of_folder_config(folder.path());
        let namespace = NamespaceIdent::from_strs(["events", "raw"]).unwrap();
        let catalog = connect(&config).await.unwrap();
        ensure_namespace(catalog.as_ref(), &namespace).await.unwrap();
        ensure_namespace(catalog.as_ref(), &namespace).await.unwrap();
        drop(catalog);

        let path = folder.path().join("deep/er/cat alog%.db");
        let options = SqliteConnectOptions::new().filename(&path);
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        let mode: String =
            sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut connection).await.unwrap();
        assert_eq!(mode, "wal");
        let catalog = connect(&config).await.unwrap();
        assert!(catalog.namespace_exists(&namespace).await.unwrap());
        assert!(folder.path().join("ware house").is_dir());
    }

    #[tokio::test]
    async fn a_table_that_is_missing_is_none_and_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = connect(&of_folder_config(folder.path())).await.unwrap();
        let table = TableIdent::from_strs(["events", "nothing"]).unwrap();
        assert!(load(catalog.as_ref(), &table).await.unwrap().is_none());
    }

    /// The scenario of bug 3061: a reader holds the file while another writes. In the default journal mode the write
    /// waits for the reader, fails, and is reported as done.
    #[tokio::test]
    async fn a_reader_of_the_sqlite_file_does_not_hold_up_a_write() {
        let folder = tempfile::tempdir().unwrap();
        let config = of_folder_config(folder.path());
        let catalog = connect(&config).await.unwrap();
        let options = SqliteConnectOptions::new().filename(folder.path().join("deep/er/cat alog%.db"));
        let mut reader = SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::query("BEGIN").execute(&mut reader).await.unwrap();
        let _held: i64 =
            sqlx::query_scalar("SELECT count(*) FROM iceberg_tables").fetch_one(&mut reader).await.unwrap();

        let namespace = NamespaceIdent::new("events".to_owned());
        ensure_namespace(catalog.as_ref(), &namespace).await.unwrap();

        assert!(catalog.namespace_exists(&namespace).await.unwrap());
    }

    #[tokio::test]
    async fn configurations_that_can_not_work_are_refused_before_anything_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let good = of_folder_config(folder.path());
        let with = |key: &str, value: Setting| {
            let mut config = good.clone();
            config.properties.insert(key.to_owned(), value);
            config
        };
        let plain = |text: &str| Setting::Plain(text.to_owned());
        let cases = [
            (config(CatalogKind::Sql, "postgresql://host/db", "/tmp"), "postgresql"),
            (config(CatalogKind::Sql, "sqlite::memory:", "/tmp"), "names a file"),
            (config(CatalogKind::Sql, &good.uri, "gs://bucket/wh"), "gs:// is not"),
            (config(CatalogKind::Sql, &good.uri, ""), "warehouse is empty"),
            (config(CatalogKind::Sql, &good.uri, "/tmp/a?b"), "choose another folder"),
            (config(CatalogKind::Rest, "ftp://host", "wh"), "http://"),
            (with("pool.max-connections", plain("many")), "a number of connections"),
            (config(CatalogKind::Sql, &format!("sqlite:{}", folder.path().display()), "/tmp"), "is a folder"),
            (with("token", plain("hush\nhush")), "one line"),
            (with("credential", Setting::Env("TIDEMILL_NOT_SET".to_owned())), "TIDEMILL_NOT_SET"),
        ];
        for (config, reason) in cases {
            let error = connect(&config).await.unwrap_err();
            assert!(matches!(error, CatalogError::Misconfigured { .. }), "{error:?}");
            assert!(error.to_string().contains(reason), "{error}");
            assert!(!format!("{error:?}").contains("hush"));
        }
    }

    #[tokio::test]
    async fn a_file_that_is_no_database_is_misconfigured() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalog.db");
        std::fs::write(&path, "this is a text and no database, long enough to be read as a header of one")
            .unwrap();
        let config = config(CatalogKind::Sql, &format!("sqlite://{}", path.display()), "/tmp");
        let error = connect(&config).await.unwrap_err();
        assert!(matches!(error, CatalogError::Misconfigured { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn a_rest_catalog_that_nobody_serves_is_away() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let config = config(CatalogKind::Rest, &format!("http://{address}"), "wh");
        let catalog = connect(&config).await.unwrap();
        let table = TableIdent::from_strs(["events", "n"]).unwrap();
        let error = load(catalog.as_ref(), &table).await.unwrap_err();
        assert!(matches!(error, CatalogError::Away { .. }), "{error:?}");
        assert!(error.to_string().contains("table events.n"));
    }

    /// A server of one answer: what a REST catalog says decides how the caller must react, and no secret is shown.
    #[tokio::test]
    async fn answers_of_a_rest_catalog_are_sorted_by_what_to_do() {
        use std::io::{Read, Write};
        type Expected = fn(&CatalogError) -> bool;
        let cases: [(&str, &str, Expected); 6] = [
            ("401 Unauthorized", "", |error| matches!(error, CatalogError::Refused { .. })),
            ("403 Forbidden", "{}", |error| matches!(error, CatalogError::Refused { .. })),
            ("503 Service Unavailable", "", |error| matches!(error, CatalogError::Away { .. })),
            ("429 Too Many Requests", "later", |error| matches!(error, CatalogError::Away { .. })),
            ("200 OK", "<html>hello</html>", |error| matches!(error, CatalogError::Away { .. })),
            ("418 I'm a teapot", "", |error| matches!(error, CatalogError::Unexpected { .. })),
        ];
        for (status, body, is_right) in cases {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 4096]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let mut config = config(CatalogKind::Rest, &format!("http://{address}"), "wh");
            config.properties.insert("token".to_owned(), Setting::Plain("hush-hush".to_owned()));
            let catalog = connect(&config).await.unwrap();
            let namespace = NamespaceIdent::new("events".to_owned());
            let error = ensure_namespace(catalog.as_ref(), &namespace).await.unwrap_err();
            server.join().unwrap();
            assert!(is_right(&error), "{status}: {error:?}");
            assert!(!format!("{error:?}").contains("hush"));
        }
    }

    #[test]
    fn the_answer_of_a_token_endpoint_is_never_shown() {
        let error = Error::new(ErrorKind::Unexpected, "Failed to parse response")
            .with_context("code", "401 Unauthorized")
            .with_context("operation", "auth")
            .with_context("json", "{\"access_token\":\"hush\"}");
        let error = CatalogError::classify("namespace events", error);
        assert!(matches!(error, CatalogError::Refused { .. }));
        assert!(!format!("{error:?}").contains("hush"));
    }

    #[test]
    fn errors_of_sqlite_and_the_system_are_sorted_by_their_type() {
        let of_io = |kind| {
            let source = std::io::Error::from(kind);
            CatalogError::classify("table t", Error::new(ErrorKind::Unexpected, "io").with_source(source))
        };
        assert!(matches!(of_io(std::io::ErrorKind::StorageFull), CatalogError::Disk { .. }));
        assert!(matches!(of_io(std::io::ErrorKind::ConnectionRefused), CatalogError::Away { .. }));
        assert!(matches!(of_io(std::io::ErrorKind::PermissionDenied), CatalogError::Refused { .. }));
        let lookup = std::io::Error::other("failed to lookup address information");
        let error = Error::new(ErrorKind::Unexpected, "Failed to execute http request").with_source(lookup);
        assert_eq!(reason_of(&error), Reason::CatalogAway);
        let gone =
            Error::new(ErrorKind::Unexpected, "NotFound (permanent) at stat, context: { status: 404 }");
        assert_eq!(reason_of(&gone), Reason::Unexpected);
        let source = sqlx::Error::PoolTimedOut;
        let error = CatalogError::classify("t", Error::new(ErrorKind::Unexpected, "sql").with_source(source));
        assert!(matches!(error, CatalogError::Away { .. }));
    }
}
