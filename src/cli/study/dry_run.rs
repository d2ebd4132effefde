//! `study run --dry-run`: the runs, how far they are and what they cost.

use super::file::Study;
use super::plan::Run;
use super::state::State;
use crate::cli::text::{duration, table, tera};
use crate::cycle;
use crate::model::{Flops, Spec};
use std::fmt::Write;

/// A table of the runs of `arms`, whose vocabularies are resolved, and the sums.
pub fn text(study: &Study, arms: &[usize], states: &[State]) -> String {
    let mut lines = vec![["run", "state", "steps", "TFLOP", "in blocks"].map(str::to_owned)];
    let (mut all, mut left) = (Flops::default(), Flops::default());
    let mut settled = 0;
    let needed = study.needed(arms, states);
    for &(index, is_chosen) in &needed {
        let (run, state) = (&study.runs[index], states[index]);
        let flops = flops(run);
        all += flops;
        if is_chosen && state.is_settled() {
            settled += 1;
        } else {
            left += flops;
        }
        let arm = &study.arms[run.arm].name;
        let (name, state) = match is_chosen {
            true => (run.name.clone(), shown(state)),
            false => (format!("{arm} seed {}", run.seed), "waits for the sweep".to_owned()),
        };
        lines.push([name, state, run.config.run.steps.to_string(), tera(flops.total), tera(flops.blocks)]);
    }
    lines.push(["all".to_owned(), String::new(), String::new(), tera(all.total), tera(all.blocks)]);
    lines.push(["left to do".to_owned(), String::new(), String::new(), tera(left.total), tera(left.blocks)]);
    let mut out = table(&lines);
    let _ = writeln!(out, "\n{settled} of {} runs are done; {} at once", needed.len(), study.parallel);
    if let Some(speed) = speed(states).filter(|_| left.total > 0) {
        let seconds = left.total as f64 / speed / study.parallel as f64;
        let _ = writeln!(out, "about {} to go, at the mean speed of the finished runs", duration(seconds));
    }
    out
}

fn shown(state: State) -> String {
    match state {
        State::New => "to be run".to_owned(),
        State::Stopped { step } => format!("stopped at step {step} or later"),
        State::Finished(cost) => format!("val loss {:.4}", cost.val_loss),
        State::Diverged => "diverged".to_owned(),
    }
}

/// Of the whole plan of `run`.
fn flops(run: &Run) -> Flops {
    let ops = cycle::plan(&run.config);
    cycle::total(&cycle::plan_flops(&run.config, &Spec::new(&run.config), &ops))
}

/// FLOP/s of the finished runs, each by itself; they ran as many at once as the others will.
fn speed(states: &[State]) -> Option<f64> {
    let costs = states.iter().filter_map(|state| match state {
        State::Finished(cost) => Some((cost.flops_total as f64, cost.elapsed_s)),
        _ => None,
    });
    let (flops, seconds) = costs.fold((0.0, 0.0), |sum, cost| (sum.0 + cost.0, sum.1 + cost.1));
    (flops > 0.0 && seconds > 0.0).then(|| flops / seconds)
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::study;
    use super::super::state::tests::finished;
    use super::*;

    #[test]
    fn what_is_left_is_added_up() {
        let study = study("[arms.flat]\nsweep.optimizer.lr = [1e-3, 2e-3]\n[arms.short]\nset.run.steps = 500").unwrap();
        let mut states: Vec<State> = study.runs.iter().map(|_| State::New).collect();
        let at = |text: &str| text.lines().filter(|line| line.contains("waits for the sweep")).count();
        let before = text(&study, &[0, 1], &states);
        assert_eq!((at(&before), before.contains("0 of 5 runs")), (3, true), "{before}");
        let trials: Vec<usize> = study.trials(0).collect();
        trials.iter().for_each(|&trial| states[trial] = finished(1.5));
        let after = text(&study, &[0, 1], &states);
        assert_eq!((at(&after), after.contains("2 of 5 runs")), (0, true), "{after}");
        assert!(after.contains("to go") && after.contains("val loss 1.5000"), "{after}");
    }
}
