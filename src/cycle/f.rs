use super::{Cycle, Visit, repeat::repeat, v::v_cycle};
use crate::config::Config;

/// F-cycles, full multigrid: `coarse` steps on the coarsest level, then a V-cycle from each finer level in turn.
pub struct F;

impl Cycle for F {
    fn name(&self) -> &'static str {
        "f"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        let f_cycle: Vec<Visit> = (0..config.levels.count).rev().flat_map(|level| v_cycle(config, level)).collect();
        repeat(config, &f_cycle)
    }
}
