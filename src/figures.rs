//! Figures that long tests leave for the reliability report (`tests/report`): one JSON file each in the folder that
//! `TIDEMILL_REPORT_DIR` names, nothing without it.

use std::path::Path;

use serde_json::Value;

pub(crate) fn leave(name: &str, facts: &Value) {
    if let Some(folder) = std::env::var_os("TIDEMILL_REPORT_DIR") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{name}.json")), format!("{facts:#}\n")).unwrap();
    }
}
