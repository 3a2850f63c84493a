//! A commit of given updates: what no transaction of the iceberg crate can say, a tag or a snapshot of another operation.
//!
//! The crate keeps the constructor of its `TableCommit` to itself, so these updates go to the catalog by their own way: a
//! compare-and-swap of the metadata location in the SQLite file, as `SqlCatalog` does it, or the request of the REST
//! specification ("commit updates to a table"). Requirements and updates are the crate's own types, in its own JSON.
//!
//! Invariants
//! 1. One request at most, and never a second one: what an answer means is judged by the caller, who reads the table.
//! 2. On SQLite nothing is swapped unless the location is still that of the head which the requirements were checked on.
//! 3. No resolved secret stands in a message.
//!
//! Errors are worded as the crate words its own, so that `catalog::reason_of` sorts both alike.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use iceberg::table::Table;
use iceberg::{Error, ErrorKind, MetadataLocation, TableIdent, TableRequirement, TableUpdate};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use super::{
    CATALOG_NAME, CatalogError, REQUEST_TIME_MAX, SQLITE_BUSY_TIME_MAX, resolve_properties, sqlite_path,
};
use crate::job::{CatalogConfig, CatalogKind};

/// The way of updates to a catalog.
#[derive(Clone)]
pub struct Updates {
    channel: Channel,
}

#[derive(Clone)]
enum Channel {
    /// The file of the SQL catalog.
    Sqlite(PathBuf),
    Rest(Box<Rest>),
}

/// A REST catalog, as its own configuration says once it was asked.
#[derive(Clone)]
struct Rest {
    client: reqwest::Client,
    uri: String,
    warehouse: String,
    properties: HashMap<String, String>,
}

impl std::fmt::Debug for Updates {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Updates").finish_non_exhaustive()
    }
}

impl Updates {
    /// Of a job's catalog. Sends nothing.
    ///
    /// # Errors
    /// [`CatalogError::Misconfigured`] names the field.
    pub fn of(config: &CatalogConfig) -> Result<Self, CatalogError> {
        let channel = match config.kind {
            CatalogKind::Sql => Channel::Sqlite(sqlite_path(&config.uri)?),
            CatalogKind::Rest => Channel::Rest(Box::new(Rest {
                client: reqwest::Client::new(),
                uri: config.uri.trim_end_matches('/').to_owned(),
                warehouse: config.warehouse.clone(),
                properties: resolve_properties(config)?,
            })),
        };
        Ok(Self { channel })
    }

    /// Asks the catalog once to put updates on a head, if the requirements hold.
    ///
    /// # Errors
    /// `CatalogCommitConflicts` where the head is another one; of any other kind the commit may be visible.
    pub async fn send(
        &self,
        head: &Table,
        requirements: Vec<TableRequirement>,
        updates: Vec<TableUpdate>,
    ) -> iceberg::Result<()> {
        let sending = async {
            match &self.channel {
                Channel::Sqlite(file) => swap(file, head, &requirements, updates).await,
                Channel::Rest(rest) => rest.commit(head.identifier(), requirements, updates).await,
            }
        };
        match tokio::time::timeout(REQUEST_TIME_MAX, sending).await {
            Ok(answer) => answer,
            Err(_) => Err(unexpected(format!("no answer within {} s", REQUEST_TIME_MAX.as_secs()))),
        }
    }
}

fn unexpected(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unexpected, what)
}

fn conflict(table: &TableIdent) -> Error {
    Error::new(ErrorKind::CatalogCommitConflicts, format!("Commit conflicted for table: {table}"))
}

/// Writes the next metadata file and swaps the location in the SQLite file.
async fn swap(
    file: &Path,
    head: &Table,
    requirements: &[TableRequirement],
    updates: Vec<TableUpdate>,
) -> iceberg::Result<()> {
    let (table, location) = (head.identifier(), head.metadata_location_result()?.to_owned());
    for requirement in requirements {
        requirement.check(Some(head.metadata()))?;
    }
    let mut builder = head.metadata().clone().into_builder(Some(location.clone()));
    for update in updates {
        builder = update.apply(builder)?;
    }
    let metadata = builder.build()?.metadata;
    let next = MetadataLocation::from_str(&location)?.with_next_version().with_new_metadata(&metadata);
    metadata.write_to(head.file_io(), &next).await?;
    crate::crash_point!("updates_written");
    let of_sqlite =
        |error: sqlx::Error| unexpected("the SQLite file of the catalog can not be used").with_source(error);
    let options = SqliteConnectOptions::new().filename(file).busy_timeout(SQLITE_BUSY_TIME_MAX);
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(of_sqlite)?;
    let swapped = sqlx::query(
        "UPDATE iceberg_tables SET metadata_location = ?, previous_metadata_location = ? \
         WHERE catalog_name = ? AND table_name = ? AND table_namespace = ? \
         AND (iceberg_type = 'TABLE' OR iceberg_type IS NULL) AND metadata_location = ?",
    )
    .bind(next.to_string())
    .bind(&location)
    .bind(CATALOG_NAME)
    .bind(table.name())
    .bind(table.namespace().join("."))
    .bind(&location)
    .execute(&mut connection)
    .await
    .map_err(of_sqlite)?;
    connection.close().await.map_err(of_sqlite)?;
    if swapped.rows_affected() == 0 { Err(conflict(table)) } else { Ok(()) }
}

/// What a catalog says of itself (REST specification, `GET /v1/config`).
#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    defaults: HashMap<String, String>,
    #[serde(default)]
    overrides: HashMap<String, String>,
}

#[derive(Deserialize)]
struct Token {
    access_token: String,
}

/// Body of the request (REST specification, `CommitTableRequest`).
#[derive(Serialize)]
struct Commit<'a> {
    identifier: &'a TableIdent,
    requirements: Vec<TableRequirement>,
    updates: Vec<TableUpdate>,
}

impl Rest {
    async fn commit(
        &self,
        table: &TableIdent,
        requirements: Vec<TableRequirement>,
        updates: Vec<TableUpdate>,
    ) -> iceberg::Result<()> {
        let known = self.configured().await?;
        let prefix = known.properties.get("prefix").map(|prefix| format!("/{prefix}")).unwrap_or_default();
        let (namespace, name) = (table.namespace().to_url_string(), table.name());
        let url = format!("{}/v1{prefix}/namespaces/{namespace}/tables/{name}", known.uri);
        let body = Commit { identifier: table, requirements, updates };
        let request = known.authorized(known.client.post(url).json(&body)).await?;
        let response = answered(request).await?;
        match response.status() {
            StatusCode::OK => Ok(()),
            StatusCode::NOT_FOUND => {
                Err(Error::new(ErrorKind::TableNotFound, "Tried to update a table that does not exist"))
            }
            StatusCode::CONFLICT => Err(conflict(table)),
            status if status.is_server_error() => {
                Err(unexpected("the commit state is unknown").with_context("status", status.to_string()))
            }
            status => Err(unexpected("Received response with unexpected status code")
                .with_context("status", status.to_string())),
        }
    }

    /// With what the server says: its defaults below the job's properties, its overrides above them.
    async fn configured(&self) -> iceberg::Result<Self> {
        let mut request = self.client.get(format!("{}/v1/config", self.uri));
        if !self.warehouse.is_empty() {
            request = request.query(&[("warehouse", &self.warehouse)]);
        }
        let response = answered(self.authorized(request).await?).await?;
        let mut said: Said = read(response).await?;
        let uri = said.overrides.remove("uri").unwrap_or_else(|| self.uri.clone());
        let mut properties = said.defaults;
        properties.extend(self.properties.clone());
        properties.extend(said.overrides);
        let uri = uri.trim_end_matches('/').to_owned();
        Ok(Self { client: self.client.clone(), uri, warehouse: self.warehouse.clone(), properties })
    }

    /// A request with the job's own headers and its token.
    async fn authorized(&self, request: RequestBuilder) -> iceberg::Result<RequestBuilder> {
        let own =
            self.properties.iter().filter_map(|(key, value)| Some((key.strip_prefix("header.")?, value)));
        let request = own.fold(request, |request, (name, value)| request.header(name, value));
        match (self.properties.get("token"), self.properties.get("credential")) {
            (Some(token), _) => Ok(request.bearer_auth(token)),
            (None, Some(credential)) => Ok(request.bearer_auth(self.token_for(credential).await?)),
            (None, None) => Ok(request),
        }
    }

    /// Exchanges `id:secret`, or a secret alone, for a token.
    async fn token_for(&self, credential: &str) -> iceberg::Result<String> {
        let url = self.properties.get("oauth2-server-uri").cloned();
        let url = url.unwrap_or_else(|| format!("{}/v1/oauth/tokens", self.uri));
        let property = |name: &'static str| Some((name, self.properties.get(name)?.as_str()));
        let scope = self.properties.get("scope").map_or("catalog", String::as_str);
        let mut form = vec![("grant_type", "client_credentials"), ("scope", scope)];
        form.extend(["audience", "resource"].into_iter().filter_map(property));
        match credential.split_once(':') {
            Some((id, secret)) => form.extend([("client_id", id), ("client_secret", secret)]),
            None => form.push(("client_secret", credential)),
        }
        let response = answered(self.client.post(url).form(&form)).await?;
        read::<Token>(response).await.map(|token| token.access_token)
    }
}

/// Sends a request; an answer of whatever status is an answer.
async fn answered(request: RequestBuilder) -> iceberg::Result<Response> {
    request
        .send()
        .await
        .map_err(|error| unexpected("Failed to execute http request").with_source(error.without_url()))
}

/// Reads an answer, whose body is never shown: it may hold a token.
async fn read<T: serde::de::DeserializeOwned>(response: Response) -> iceberg::Result<T> {
    let status = response.status();
    if !status.is_success() {
        return Err(unexpected("Received response with unexpected status code")
            .with_context("status", status.to_string()));
    }
    response.json().await.map_err(|_| unexpected("Failed to parse response from rest catalog server"))
}
