use super::{Cycle, Visit, split};
use crate::config::Config;

/// Nested iteration: coarsest level first, each for its share of the steps.
pub struct Cascade;

impl Cycle for Cascade {
    fn name(&self) -> &'static str {
        "cascade"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        shares(config)
    }
}

/// A visit of each level, coarsest first, for the steps that `cycle.fractions` gives it.
pub(super) fn shares(config: &Config) -> Vec<Visit> {
    let fractions = config.cycle.fractions.as_deref().expect("resolved by config::parse");
    let steps = split(config.run.steps, fractions);
    let levels = (0..fractions.len()).rev();
    levels.zip(steps).map(|(level, steps)| Visit { level, steps }).collect()
}
