//! (to be written)

pub mod history;
