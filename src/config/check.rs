//! Defaults that depend on other keys, and the checks of a config.

use super::{Config, CosetPolicy, CycleKind, Parametrization, Placement, StateRule, TransferKind, Update};
use crate::error::{Result, ensure};

/// Fills what was not given and depends on other keys.
pub fn resolve(config: &mut Config) {
    let Config { data, model, levels, cycle, schedule, parallel, .. } = config;
    model.horizon.get_or_insert(match model.parametrization {
        Parametrization::Standard => model.depth as f64,
        Parametrization::CompleteP => 1.0,
    });
    if parallel.placement == Placement::Cosets && levels.coset != CosetPolicy::Random {
        levels.coset = CosetPolicy::All;
    }
    levels.batch.get_or_insert_with(|| vec![data.batch; levels.count]);
    levels.context.get_or_insert_with(|| vec![data.context; levels.count]);
    schedule.level_multipliers.get_or_insert_with(|| vec![1.0; levels.count]);
    if cycle.fractions.is_none() && levels.count > 0 {
        cycle.fractions = default_fractions(cycle.kind, levels.count);
    }
}

/// Shares of the steps, coarsest level first, for the cycles that use them.
fn default_fractions(kind: CycleKind, count: usize) -> Option<Vec<f64>> {
    match kind {
        CycleKind::Paper => Some(vec![0.5, 0.5]),
        // What reached the baseline's loss in the longest runs measured: docs/CHOOSING.md.
        CycleKind::Cascade => {
            const SHARE: f64 = 0.2;
            let finest = (count - 1).min(2);
            let coarser = count - finest;
            let mut fractions = vec![(1.0 - SHARE * finest as f64) / coarser as f64; count];
            fractions[coarser..].fill(SHARE);
            Some(fractions)
        }
        // The longest stays: what saved most in the shortest runs.
        CycleKind::Adaptive => {
            const COARSEST: f64 = 0.7;
            let finer = count - 1;
            let mut fractions = vec![(1.0 - COARSEST) / finer as f64; count];
            fractions[0] = if finer > 0 { COARSEST } else { 1.0 };
            Some(fractions)
        }
        _ => None,
    }
}

/// Refuses values out of range or at odds with each other; the message names the key.
pub fn check(config: &Config) -> Result<()> {
    check_run(config)?;
    check_model(config)?;
    check_levels(config)?;
    check_cycle(config)?;
    check_training(config)?;
    check_parallel(config)
}

/// `key = value` must lie in `low..=high` (NaN never does).
fn within(key: &str, value: f64, low: f64, high: f64) -> Result<()> {
    ensure!((low..=high).contains(&value), "{key} = {value}: expected a number from {low} to {high}");
    Ok(())
}

fn positive(key: &str, value: f64) -> Result<()> {
    ensure!(value > 0.0 && value.is_finite(), "{key} = {value}: expected a number above 0");
    Ok(())
}

fn at_least_one(key: &str, value: u64) -> Result<()> {
    ensure!(value >= 1, "{key} = {value}: expected at least 1");
    Ok(())
}

fn check_run(config: &Config) -> Result<()> {
    let Config { run, data, checkpoint, .. } = config;
    at_least_one("run.steps", run.steps)?;
    within("run.max_minutes", run.max_minutes, 0.0, 1e7)?;
    within("checkpoint.every_minutes", checkpoint.every_minutes, 0.0, 1e7)?;
    ensure!(!data.dir.as_os_str().is_empty(), "data.dir is missing: name the folder that `vcycle data prepare` wrote");
    at_least_one("data.context", data.context as u64)?;
    at_least_one("data.batch", data.batch as u64)
}

fn check_model(config: &Config) -> Result<()> {
    let model = &config.model;
    for (key, value) in [("model.width", model.width), ("model.heads", model.heads), ("model.depth", model.depth)] {
        at_least_one(key, value as u64)?;
    }
    ensure!(
        model.width.is_multiple_of(model.heads),
        "model.heads = {} does not divide model.width = {}",
        model.heads,
        model.width
    );
    if let Some(vocab) = model.vocab {
        at_least_one("model.vocab", vocab as u64)?;
    }
    positive("model.horizon", config.horizon())?;
    positive("model.init_std", model.init_std)
}

fn check_levels(config: &Config) -> Result<()> {
    let (levels, model) = (&config.levels, &config.model);
    at_least_one("levels.count", levels.count as u64)?;
    ensure!(levels.factor >= 2, "levels.factor = {}: expected at least 2", levels.factor);
    let coarsening = u32::try_from(levels.count - 1).ok().and_then(|l| levels.factor.checked_pow(l));
    ensure!(
        coarsening.is_some_and(|c| model.depth.is_multiple_of(c)),
        "model.depth = {} must be a multiple of levels.factor^(levels.count - 1) = {}^{}; take fewer levels or another depth",
        model.depth,
        levels.factor,
        levels.count - 1
    );
    within("levels.alpha", levels.alpha, 0.0, 2.0)?;
    at_least_one("levels.coherence_batches", levels.coherence_batches)?;
    within("levels.coherence_from", levels.coherence_from, 0.0, 1.0)?;
    check_sequences(config)?;
    within("levels.noise", levels.noise, 0.0, 1.0)?;
    ensure!(
        levels.noise == 0.0 || levels.update == Update::Replace && levels.transfer != TransferKind::Injection,
        "levels.noise = {} parts copies: it needs levels.update = \"replace\" (now \"{}\") and a levels.transfer other than \"injection\" (now \"{}\")",
        levels.noise,
        levels.update,
        levels.transfer
    );
    within("levels.pull", levels.pull, 0.0, 1.0)?;
    ensure!(
        levels.pull == 0.0
            || levels.transfer == TransferKind::Injection && config.parallel.placement != Placement::Cosets,
        "levels.pull = {} needs levels.transfer = \"injection\" (now \"{}\") and ranks that hold all rows: no parallel.placement = \"cosets\"",
        levels.pull,
        levels.transfer
    );
    if levels.transfer == TransferKind::Injection {
        // A coset is a view: what it learns is already in the fine trajectory, and so is its optimizer state.
        ensure!(
            levels.update == Update::Replace,
            "levels.update = \"{}\" does not go with levels.transfer = \"injection\": cosets are views of the fine trajectory",
            levels.update
        );
        ensure!(
            levels.state != StateRule::Move,
            "levels.state = \"move\" does not go with levels.transfer = \"injection\": cosets share the fine level's state; use \"keep\", \"scale\" or \"reset\""
        );
    } else if config.parallel.placement != Placement::Cosets {
        ensure!(
            levels.coset == CosetPolicy::First,
            "levels.coset = \"{}\" needs levels.transfer = \"injection\" (now \"{}\")",
            levels.coset,
            levels.transfer
        );
    }
    if levels.coherence {
        // v is measured at the descent, for one θ_H: a coset trained later starts from another one.
        ensure!(
            levels.coset == CosetPolicy::First && config.cycle.kind != CycleKind::Paper,
            "levels.coherence = true needs levels.coset = \"first\" and a cycle other than \"paper\": the term holds for the coset it was measured on"
        );
    }
    Ok(())
}

/// `levels.batch` and `levels.context`: a value a level, the finest's that of `[data]`.
fn check_sequences(config: &Config) -> Result<()> {
    let Config { levels, data, .. } = config;
    for (key, values, fine) in [("batch", &levels.batch, data.batch), ("context", &levels.context, data.context)] {
        let values = values.as_deref().unwrap_or_default();
        ensure!(
            values.len() == levels.count,
            "levels.{key} has {} entries: expected levels.count = {}",
            values.len(),
            levels.count
        );
        ensure!(
            values[0] == fine,
            "levels.{key} = {values:?}: its first entry is the fine level's, expected data.{key} = {fine}"
        );
        values.iter().try_for_each(|&value| at_least_one(&format!("levels.{key}"), value as u64))?;
    }
    let contexts = levels.context.as_deref().unwrap_or_default();
    ensure!(
        contexts.iter().all(|&context| data.context.is_multiple_of(context)),
        "levels.context = {contexts:?}: expected divisors of data.context = {}, whose sequences are cut into pieces",
        data.context
    );
    Ok(())
}

fn check_cycle(config: &Config) -> Result<()> {
    let (cycle, levels) = (&config.cycle, &config.levels);
    if cycle.kind == CycleKind::Flat {
        ensure!(
            levels.count == 1,
            "cycle.kind = \"flat\" trains the fine level only, but levels.count = {}: choose another cycle or levels.count = 1",
            levels.count
        );
    }
    if let Some(fractions) = &cycle.fractions {
        let expected = if cycle.kind == CycleKind::Paper { 2 } else { levels.count };
        ensure!(
            fractions.len() == expected,
            "cycle.fractions has {} entries: expected {expected}, coarsest level first",
            fractions.len()
        );
        for &fraction in fractions {
            within("cycle.fractions", fraction, 0.0, 1.0)?;
        }
        let sum: f64 = fractions.iter().sum();
        ensure!((sum - 1.0).abs() < 1e-6, "cycle.fractions add up to {sum}: expected 1");
    }
    within("cycle.finish", cycle.finish, 0.0, 1.0)?;
    ensure!(
        cycle.threshold >= 0.0 && cycle.threshold.is_finite(),
        "cycle.threshold = {}: expected a number of at least 0",
        cycle.threshold
    );
    at_least_one("cycle.window", cycle.window)?;
    match cycle.kind {
        CycleKind::Paper => {
            ensure!(levels.count == 2, "cycle.kind = \"paper\" needs levels.count = 2 (now {})", levels.count);
            ensure!(
                levels.transfer == TransferKind::Injection,
                "cycle.kind = \"paper\" trains cosets: it needs levels.transfer = \"injection\" (now \"{}\")",
                levels.transfer
            );
        }
        CycleKind::V | CycleKind::W | CycleKind::F => {
            ensure!(levels.count >= 2, "cycle.kind = \"{}\" needs levels.count of at least 2", cycle.kind);
            at_least_one("cycle.coarse", cycle.coarse)?;
            check_one_cycle_fits(config)?;
        }
        CycleKind::Phases => check_phases(config)?,
        CycleKind::Adaptive => ensure!(
            levels.transfer != TransferKind::Injection,
            "cycle.kind = \"adaptive\" compares a coarse level's rows with the finer one's: it needs levels.transfer = \"copy\", \"average\" or \"linear\" (now \"{}\")",
            levels.transfer
        ),
        _ => {}
    }
    Ok(())
}

/// A V-, W- or F-cycle must fit whole into the steps before the finish.
fn check_one_cycle_fits(config: &Config) -> Result<()> {
    let (cycle, count) = (&config.cycle, config.levels.count as u64);
    // How often one cycle smooths before or after a descent, and how often it is on the coarsest level.
    let (pairs, bottoms) = match cycle.kind {
        CycleKind::W => ((1u64 << (count - 1)) - 1, 1 << (count - 2)),
        CycleKind::F => (count * (count - 1) / 2, count),
        _ => (count - 1, 1),
    };
    let smooths = pairs.saturating_mul(cycle.pre.saturating_add(cycle.post));
    let steps = smooths.saturating_add(cycle.coarse.saturating_mul(bottoms));
    let available = config.cycled_steps();
    ensure!(
        steps <= available,
        "one \"{}\" cycle takes {steps} steps, but run.steps = {} with cycle.finish = {} leaves {available}: \
         lower cycle.pre, cycle.post, cycle.coarse or cycle.finish, or take more steps",
        cycle.kind,
        config.run.steps,
        cycle.finish
    );
    Ok(())
}

fn check_phases(config: &Config) -> Result<()> {
    let (phases, count) = (&config.cycle.phases, config.levels.count);
    ensure!(!phases.is_empty(), "cycle.kind = \"phases\" needs cycle.phases = [{{ level = 1, steps = 500 }}, ...]");
    for phase in phases {
        ensure!(phase.level < count, "cycle.phases: level {} does not exist: levels.count = {count}", phase.level);
    }
    let total: u64 = phases.iter().map(|p| p.steps).sum();
    ensure!(
        total == config.run.steps,
        "the steps of cycle.phases add up to {total}, run.steps is {}: make them equal",
        config.run.steps
    );
    ensure!(phases[phases.len() - 1].level == 0, "the last of cycle.phases must be on level 0, the net that is wanted");
    Ok(())
}

fn check_training(config: &Config) -> Result<()> {
    let (optimizer, schedule) = (&config.optimizer, &config.schedule);
    positive("optimizer.lr", optimizer.lr)?;
    positive("optimizer.eps", optimizer.eps)?;
    positive("optimizer.muon_lr_ratio", optimizer.muon_lr_ratio)?;
    within("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1e3)?;
    within("optimizer.clip", optimizer.clip, 0.0, f64::MAX)?;
    for (key, value) in [
        ("optimizer.beta1", optimizer.beta1),
        ("optimizer.beta2", optimizer.beta2),
        ("optimizer.momentum", optimizer.momentum),
    ] {
        ensure!((0.0..1.0).contains(&value), "{key} = {value}: expected a number from 0 up to, but not including, 1");
    }
    within("schedule.warmup", schedule.warmup, 0.0, 1.0)?;
    within("schedule.decay", schedule.decay, 0.0, 1.0)?;
    within("schedule.final_ratio", schedule.final_ratio, 0.0, 1.0)?;
    let multipliers = schedule.level_multipliers.as_deref().unwrap_or_default();
    ensure!(
        multipliers.len() == config.levels.count,
        "schedule.level_multipliers has {} entries: expected levels.count = {}",
        multipliers.len(),
        config.levels.count
    );
    multipliers.iter().try_for_each(|&m| positive("schedule.level_multipliers", m))
}

fn check_parallel(config: &Config) -> Result<()> {
    let parallel = &config.parallel;
    positive("parallel.timeout", parallel.timeout)?;
    at_least_one("parallel.sync_every", parallel.sync_every)?;
    check_placement(config)?;
    ensure!(
        parallel.zero <= 1,
        "parallel.zero = {}: expected 0 or 1, other stages of ZeRO are not there",
        parallel.zero
    );
    ensure!(
        parallel.zero == 0 || (parallel.placement == Placement::Sequential && parallel.sync_every == 1),
        "parallel.zero = 1 divides the optimizer's state among all ranks, so all must update together: it needs parallel.placement = \"sequential\" (now \"{}\") and parallel.sync_every = 1 (now {})",
        parallel.placement,
        parallel.sync_every
    );
    Ok(())
}

fn check_placement(config: &Config) -> Result<()> {
    let Config { levels, cycle, parallel, .. } = config;
    let (placement, groups) = (parallel.placement, &parallel.groups);
    for &ranks in groups {
        at_least_one("parallel.groups", ranks as u64)?;
    }
    match placement {
        Placement::Sequential => {
            let why = "parallel.placement = \"sequential\" puts all ranks on each level in turn";
            ensure!(
                groups.is_empty(),
                "parallel.groups = {groups:?}: {why}; leave the key out, or choose another placement"
            );
        }
        Placement::Cosets => {
            ensure!(
                levels.transfer == TransferKind::Injection && levels.count >= 2,
                "parallel.placement = \"cosets\" needs levels.transfer = \"injection\" (now \"{}\") and levels.count of at least 2 (now {}): only there has a level cosets",
                levels.transfer,
                levels.count
            );
            ensure!(
                levels.coset == CosetPolicy::All,
                "levels.coset = \"{}\" trains one coset a step, so parallel.placement = \"cosets\" has nothing to do at the same time: use \"all\"",
                levels.coset
            );
            ensure!(
                groups.is_empty() || (2..=levels.factor).contains(&groups.len()),
                "parallel.groups = {groups:?}: expected the ranks of 2 to {} groups, as many as level 1 has cosets",
                levels.factor
            );
        }
        Placement::Beside => {
            ensure!(
                levels.transfer != TransferKind::Injection && levels.count >= 2,
                "parallel.placement = \"beside\" needs coarse levels with rows of their own: levels.transfer = \"copy\", \"average\" or \"linear\" (now \"{}\") and levels.count of at least 2 (now {})",
                levels.transfer,
                levels.count
            );
            ensure!(
                matches!(cycle.kind, CycleKind::V | CycleKind::W | CycleKind::F | CycleKind::Phases),
                "cycle.kind = \"{}\" trains no coarse level after the fine one, so parallel.placement = \"beside\" has nothing to put beside it: use \"v\", \"w\", \"f\" or \"phases\"",
                cycle.kind
            );
            ensure!(
                cycle.kind != CycleKind::Phases || has_coarse_between_fine(config),
                "parallel.placement = \"beside\" has nothing to put beside each other: no coarse phase of cycle.phases stands between two on level 0"
            );
            ensure!(
                groups.is_empty() || groups.len() == 2,
                "parallel.groups = {groups:?}: expected two numbers, the ranks of the fine level and those of the coarse levels"
            );
        }
    }
    Ok(())
}

fn has_coarse_between_fine(config: &Config) -> bool {
    let mut levels = config.cycle.phases.iter().filter(|phase| phase.steps > 0).map(|phase| phase.level);
    levels.any(|level| level == 0) && levels.any(|level| level > 0) && levels.any(|level| level == 0)
}
