//! A hard limit of memory that counts the page cache: a cgroup that is made for one process and removed after it.
//!
//! Version 1 and 2 of cgroups are known; where none can be made (no rights, no controller) the process runs without a
//! limit and its figures say so. A process that the kernel ends at the limit is a result too.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::Failure;

const FOLDER_PREFIX: &str = "tidemill-bench-";
/// Moves the shell into the cgroup before it becomes the program.
const JOIN: &str = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;

struct Limit {
    folder: PathBuf,
    kind: &'static str,
    /// File that holds the most memory used.
    peak_file: &'static str,
}

impl Limit {
    fn create(bytes: u64) -> Option<Self> {
        Self::version_1(bytes).or_else(|| Self::version_2(bytes))
    }

    fn version_1(bytes: u64) -> Option<Self> {
        let folder = made_below(Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")?;
        let limit = Self { folder, kind: "cgroup v1", peak_file: "memory.max_usage_in_bytes" };
        fs::write(limit.folder.join("memory.limit_in_bytes"), bytes.to_string()).ok()?;
        // Without swap accounting this file is missing; then the first limit is all there is.
        let _ = fs::write(limit.folder.join("memory.memsw.limit_in_bytes"), bytes.to_string());
        Some(limit)
    }

    fn version_2(bytes: u64) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        // Refused where it is on already or may not be changed; the next write tells.
        let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        let folder = made_below(root, "cgroup.controllers")?;
        let limit = Self { folder, kind: "cgroup v2", peak_file: "memory.peak" };
        fs::write(limit.folder.join("memory.max"), bytes.to_string()).ok()?;
        let _ = fs::write(limit.folder.join("memory.swap.max"), "0");
        Some(limit)
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.folder) {
            eprintln!("{} is left behind: {error}", self.folder.display());
        }
    }
}

/// A new cgroup below `root`, if `root` holds the file that says it is one. Empty ones of runs that were ended are
/// removed first.
fn made_below(root: &Path, mark: &str) -> Option<PathBuf> {
    if !root.join(mark).exists() {
        return None;
    }
    for entry in fs::read_dir(root).ok()?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(FOLDER_PREFIX) {
            // The kernel refuses to remove one that holds a process.
            let _ = fs::remove_dir(entry.path());
        }
    }
    let folder = root.join(format!("{FOLDER_PREFIX}{}", std::process::id()));
    fs::create_dir(&folder).ok()?;
    Some(folder)
}

/// Runs a program that prints one JSON object, under a hard limit if there is one. Adds what the limit saw.
///
/// # Errors
/// If the program fails by itself. If the kernel ended it, `killed` stands in the result.
pub fn run(bytes: Option<u64>, program: &Path, words: &[String]) -> Result<Value, Failure> {
    let limit = bytes.and_then(Limit::create);
    let mut command = match &limit {
        Some(limit) => {
            let mut shell = Command::new("/bin/sh");
            shell.arg("-c").arg(JOIN).arg(&limit.folder).arg(program);
            shell
        }
        None => Command::new(program),
    };
    let output = command.args(words).stderr(Stdio::inherit()).output()?;
    let mut result: Value = match output.status.code() {
        Some(0) => serde_json::from_slice(&output.stdout)?,
        Some(code) => return Err(format!("{} ended with {code}", program.display()).into()),
        None => {
            let signal = output.status.signal().unwrap_or_default();
            json!({ "killed": format!("signal {signal}; at its limit of memory the kernel sends 9") })
        }
    };
    result["limit"] = match &limit {
        None => json!("none"),
        Some(limit) => {
            json!({ "kind": limit.kind, "bytes": bytes, "peak_bytes": limit.number(limit.peak_file),
            "hits": limit.number("memory.failcnt") })
        }
    };
    Ok(result)
}
