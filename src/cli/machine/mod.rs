//! A machine as a few numbers, and what the α-β model says of a run on it.
//!
//! `plan --machine` and `scaling` use it; `bench machine` measures the numbers. docs/SCALING.md has the equations and how
//! far they were off.

mod file;
mod forecast;
mod stage;
mod sum;

pub use file::{Link, Machine};
pub use forecast::{Forecast, LevelForecast};
pub use stage::StageForecast;
pub use sum::{Cost, Duration, Sum};

#[cfg(test)]
pub use file::tests::machine as test_machine;
