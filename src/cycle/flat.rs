use super::{Cycle, Visit};
use crate::config::Config;

/// The fine level only.
pub struct Flat;

impl Cycle for Flat {
    fn name(&self) -> &'static str {
        "flat"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        vec![Visit { level: 0, steps: config.run.steps }]
    }
}
