//! vcycle trains deep ODE Transformers on several discretisations of depth.
//!
//! Data flows one way; a module uses only what stands to its left (`tests/architecture.rs` holds it):
//!
//! ```text
//! error → config → data → ops → model → levels → optim → cycle → comm → checkpoint → run → cli → main
//! ```
//!
//! `docs/ARCHITECTURE.md` is the map.

pub mod error;

pub mod config;

pub mod data;

pub mod ops;

pub mod model;

pub mod levels;

pub mod optim;

pub mod cycle;

pub mod comm;

pub mod checkpoint;

pub mod run;

pub mod cli;
