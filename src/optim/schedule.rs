//! Learning-rate schedules.
//!
//! At step s = 0, ..., S − 1 on level l, k steps after a level switch:
//!
//! ```text
//! η(s) = lr · level_multipliers[l] · ramp(s, W) · ramp(k, rewarm) · decay(s)
//! ramp(i, n) = min(1, (i + 1) / (n + 1))                     n steps below the peak; the first is above 0
//! decay(s) = f + (1 − f) · shape(p),   f = final_ratio,   p = max(0, (s + 1 − (S − D)) / (D + 1))
//! ```
//!
//! | kind | shape(p) | decaying steps D |
//! | --- | --- | --- |
//! | `constant` | 1 | – |
//! | `cosine` | (1 + cos π p) / 2 | S − W |
//! | `wsd` | 1 − p | round(schedule.decay · S) |
//!
//! W = round(schedule.warmup · S). The final ratio is reached at s = S, one step past the last, so that no step is
//! wasted on a learning rate of 0.

use crate::config::{ScheduleKind, ScheduleTable};
use std::f64::consts::PI;

/// η of step `step` of `total_steps` with peak rate `lr` on `level`; `steps_since_switch` is 0 at the first step after a
/// level switch, `None` before any.
pub fn learning_rate(
    schedule: &ScheduleTable,
    lr: f64,
    step: u64,
    total_steps: u64,
    level: usize,
    steps_since_switch: Option<u64>,
) -> f64 {
    let multiplier = schedule.level_multipliers.as_ref().and_then(|m| m.get(level)).copied().unwrap_or(1.0);
    let warmup = share(schedule.warmup, total_steps);
    let rewarm = steps_since_switch.map_or(1.0, |k| ramp(k, schedule.rewarm));
    lr * multiplier * ramp(step, warmup) * rewarm * decay(schedule, step, total_steps, warmup)
}

fn decay(schedule: &ScheduleTable, step: u64, total_steps: u64, warmup: u64) -> f64 {
    let progress = |steps: u64| {
        let elapsed = (step + 1).saturating_sub(total_steps - steps);
        elapsed as f64 / (steps + 1) as f64
    };
    let shape = match schedule.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => (1.0 + (PI * progress(total_steps - warmup)).cos()) / 2.0,
        ScheduleKind::Wsd => 1.0 - progress(share(schedule.decay, total_steps)),
    };
    schedule.final_ratio + (1.0 - schedule.final_ratio) * shape
}

fn ramp(i: u64, n: u64) -> f64 {
    ((i + 1) as f64 / (n + 1) as f64).min(1.0)
}

/// A share of the steps as a number of them, at most all.
fn share(share: f64, total_steps: u64) -> u64 {
    ((share * total_steps as f64).round() as u64).min(total_steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(table: &ScheduleTable, steps: u64) -> Vec<f64> {
        (0..steps).map(|s| learning_rate(table, 2.0, s, steps, 0, None)).collect()
    }

    fn table(kind: ScheduleKind, final_ratio: f64) -> ScheduleTable {
        ScheduleTable { kind, final_ratio, warmup: 0.1, decay: 0.3, ..Default::default() }
    }

    #[test]
    fn every_schedule_warms_up_and_ends_next_to_its_final_ratio() {
        for (kind, final_ratio) in [(ScheduleKind::Cosine, 0.1), (ScheduleKind::Wsd, 0.0), (ScheduleKind::Wsd, 0.25)] {
            for steps in [1, 2, 3, 7, 100, 1000] {
                let table = table(kind, final_ratio);
                let rates = rates(&table, steps);
                assert!(rates.iter().all(|&r| r > 0.0 && r <= 2.0), "{kind} over {steps}: {rates:?}");
                let next = learning_rate(&table, 2.0, steps, steps, 0, None);
                assert!((next - 2.0 * final_ratio).abs() < 1e-12, "{kind} over {steps}: one past the last {next}");
            }
            let rates = rates(&table(kind, final_ratio), 1000);
            let peak = rates.iter().position(|r| *r == rates.iter().copied().fold(0.0, f64::max)).unwrap();
            assert!((99..=100).contains(&peak), "{kind}: peak at {peak}");
            assert!(rates[..peak].is_sorted() && rates[peak..].iter().rev().is_sorted());
        }
    }

    #[test]
    fn wsd_by_hand() {
        // S = 10: W = 1, D = 3
        let expected = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5];
        assert_eq!(rates(&table(ScheduleKind::Wsd, 0.0), 10), expected);
    }

    #[test]
    fn cosine_by_hand() {
        // S = 10: W = 1, D = 9: half of the decay after s = 5
        let rates = rates(&table(ScheduleKind::Cosine, 0.5), 10);
        assert!((rates[5] - 1.5).abs() < 1e-12);
        assert_eq!((rates[0], rates[1] < 2.0), (1.0, true));
    }

    #[test]
    fn constant_stays_at_the_peak() {
        let rates = rates(&table(ScheduleKind::Constant, 0.0), 10);
        assert_eq!(rates[0], 1.0);
        assert!(rates[1..].iter().all(|&r| r == 2.0));
    }

    #[test]
    fn levels_multiply_and_switches_warm_up_again() {
        let table = ScheduleTable {
            kind: ScheduleKind::Constant,
            warmup: 0.0,
            rewarm: 3,
            level_multipliers: Some(vec![1.0, 4.0]),
            ..Default::default()
        };
        let rate = |since| learning_rate(&table, 1.0, 50, 100, 1, since);
        assert_eq!([rate(None), rate(Some(0)), rate(Some(1)), rate(Some(3)), rate(Some(9))], [4.0, 1.0, 2.0, 4.0, 4.0]);
    }
}
