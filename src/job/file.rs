//! Reads a job file.
