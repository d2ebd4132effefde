//! One file a subcommand.

pub mod data;
