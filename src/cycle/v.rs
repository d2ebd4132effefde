use super::{Cycle, Visit, repeat::repeat};
use crate::config::Config;

/// V-cycles from the fine level.
pub struct V;

impl Cycle for V {
    fn name(&self) -> &'static str {
        "v"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        repeat(config, &v_cycle(config, 0))
    }
}

/// V(l) = pre on l, V(l+1), post on l;  on the coarsest level `coarse` steps.
pub(super) fn v_cycle(config: &Config, level: usize) -> Vec<Visit> {
    let cycle = &config.cycle;
    if level + 1 == config.levels.count {
        return vec![Visit { level, steps: cycle.coarse }];
    }
    let mut visits = vec![Visit { level, steps: cycle.pre }];
    visits.extend(v_cycle(config, level + 1));
    visits.push(Visit { level, steps: cycle.post });
    visits
}
