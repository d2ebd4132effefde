use super::{Cycle, Visit, repeat::repeat};
use crate::config::Config;

/// W-cycles from the fine level.
pub struct W;

impl Cycle for W {
    fn name(&self) -> &'static str {
        "w"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        repeat(config, &w_cycle(config, 0))
    }
}

/// W(l) = pre on l, W(l+1) twice, post on l;  on the coarsest level, which has nothing below it, `coarse` steps once.
fn w_cycle(config: &Config, level: usize) -> Vec<Visit> {
    let (cycle, coarsest) = (&config.cycle, config.levels.count - 1);
    if level == coarsest {
        return vec![Visit { level, steps: cycle.coarse }];
    }
    let times = if level + 1 == coarsest { 1 } else { 2 };
    let mut visits = vec![Visit { level, steps: cycle.pre }];
    visits.extend(w_cycle(config, level + 1).repeat(times));
    visits.push(Visit { level, steps: cycle.post });
    visits
}
