use super::{Visit, split};
use crate::config::Config;

/// `cycle` as often as it fits before the run's last `cycle.finish` share of steps, which is spent on the fine level.
///
/// Steps that do not fill a further cycle are spread over the visits in proportion, so every cycle is whole.
pub(super) fn repeat(config: &Config, cycle: &[Visit]) -> Vec<Visit> {
    let steps: u64 = cycle.iter().map(|visit| visit.steps).sum();
    let available = config.cycled_steps();
    let times = (available / steps) as usize;
    let mut visits = cycle.repeat(times);
    let weights: Vec<f64> = visits.iter().map(|visit| visit.steps as f64).collect();
    for (visit, steps) in visits.iter_mut().zip(split(available, &weights)) {
        visit.steps = steps;
    }
    visits.push(Visit { level: 0, steps: config.run.steps - available });
    visits
}
