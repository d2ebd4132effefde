use super::{Cycle, Visit};
use crate::config::Config;

/// The explicit list `cycle.phases`.
pub struct Phases;

impl Cycle for Phases {
    fn name(&self) -> &'static str {
        "phases"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        config.cycle.phases.iter().map(|phase| Visit { level: phase.level, steps: phase.steps }).collect()
    }
}
