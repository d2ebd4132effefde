//! `vcycle plan`

use super::ConfigArgs;
use super::machine::{Forecast, Machine, StageForecast};
use super::places::PlaceRows;
use super::text::{bytes, count, duration, percent, seconds, table, tera};
use crate::config::{Config, CycleKind};
use crate::cycle::{self, Coset, Phase, Places};
use crate::error::{Context, Outcome, Result, ensure};
use crate::levels::{Memory, memory};
use crate::model::{Flops, Layout, Net, Rounded, Spec};
use crate::{optim, run};
use candle_core::DType;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;

/// Levels, parameters, memory and FLOPs of a config, and what its cycle saves over a flat run of as many steps.
///
/// Trains nothing. FLOPs are model FLOPs (forward and backward, no recompute), as `vcycle train` logs them: `total` with the
/// head, `blocks` without. Without data at data.dir, give model.vocab.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Ranks that share the global batch.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Also say what a step on each level will take on these ranks of the machine in this file (docs/SCALING.md).
    #[arg(long, value_name = "FILE.toml")]
    machine: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let mut config = args.config.load()?;
    let (batch, _) = config.batches();
    ensure!(
        (1..=batch).contains(&args.ranks),
        "--ranks {}: expected 1 to {batch}, the smallest batch (data.batch, levels.batch): a sequence for each rank",
        args.ranks
    );
    let has_size = config.data.dir.exists() || config.model.vocab.is_some();
    let resolved = run::resolve_vocab(&mut config);
    if has_size {
        resolved?;
    } else {
        resolved.context("a plan needs data.dir to exist, or model.vocab to be given")?;
    }
    let mut plan = Plan::new(&config, args.ranks)?;
    if let Some(machine) = &args.machine {
        let machine = Machine::load(machine)?;
        plan.forecast = Some(Forecast::new(&config, &machine, args.ranks)?);
        plan.machine_memory = Some(machine.memory as u64);
    }
    let text = if args.json { serde_json::to_string_pretty(&plan)? + "\n" } else { plan.text() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Done)
}

/// What is printed; field names are those of `--json`.
#[derive(Serialize)]
struct Plan {
    cycle: &'static str,
    steps: u64,
    tokens_per_step: u64,
    ranks: usize,
    flops_total: u128,
    flops_blocks: u128,
    /// A run of as many steps on the fine level alone.
    flat: Work,
    /// 1 - work / flat work.
    saving: Saving,
    /// The cycle may leave a level earlier than planned: figures are those of the longest stay on each.
    longest_stay: bool,
    levels: Vec<LevelRow>,
    phases: Vec<PhaseRow>,
    /// What groups of ranks do at the same time; null if all ranks do everything together.
    placement: Option<PlaceRows>,
    memory: RankMemory,
    #[serde(skip_serializing_if = "Option::is_none")]
    forecast: Option<Forecast>,
    /// Bytes a rank of the forecast's machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine_memory: Option<u64>,
}

#[derive(Serialize)]
struct Work {
    flops_total: u128,
    flops_blocks: u128,
}

#[derive(Serialize)]
struct Saving {
    total: f64,
    blocks: f64,
}

#[derive(Serialize)]
struct LevelRow {
    level: usize,
    rows: usize,
    h: f64,
    /// Sequences in a global batch.
    batch: usize,
    /// Tokens in a sequence.
    context: usize,
    /// Parameters of a net on this level, ends included.
    parameters: u64,
    /// One optimizer step.
    step: Work,
}

#[derive(Clone, Serialize)]
struct PhaseRow {
    level: usize,
    rows: usize,
    coset: Coset,
    steps: u64,
    flops_total: u128,
    flops_blocks: u128,
    /// Done at the same time as another phase.
    beside: bool,
}

/// Bytes a rank.
#[derive(Serialize)]
pub(super) struct RankMemory {
    #[serde(flatten)]
    levels: Memory,
    /// Activations and scratch of one micro-batch.
    workspace: u64,
    /// Parameters in the type that the net computes in, if that is not f32.
    rounded: u64,
    micro_batch: usize,
    pub(super) total: u64,
}

impl From<Flops> for Work {
    fn from(Flops { blocks, total }: Flops) -> Work {
        Work { flops_total: total, flops_blocks: blocks }
    }
}

impl Plan {
    /// `config` with its vocabulary resolved.
    fn new(config: &Config, ranks: usize) -> Result<Plan> {
        let spec = Spec::new(config);
        let tokens_per_step = cycle::tokens_per_step(config, 0);
        let ops = cycle::plan(config);
        let phases = cycle::plan_flops(config, &spec, &ops);
        let smallest_group = Places::new(config, &spec, ranks)?.smallest_group(&ops);
        let work = cycle::total(&phases);
        let flat = cycle::level_flops(config, &spec, 0) * config.run.steps;
        let saved = |work: u128, flat: u128| 1.0 - work as f64 / flat as f64;
        Ok(Plan {
            cycle: config.cycle.kind.name(),
            steps: config.run.steps,
            tokens_per_step,
            ranks,
            flops_total: work.total,
            flops_blocks: work.blocks,
            saving: Saving { total: saved(work.total, flat.total), blocks: saved(work.blocks, flat.blocks) },
            flat: flat.into(),
            longest_stay: config.cycle.kind == CycleKind::Adaptive,
            levels: (0..config.levels.count).map(|level| LevelRow::new(config, &spec, level)).collect(),
            phases: phases.iter().map(|phase| PhaseRow::new(config, phase)).collect(),
            placement: PlaceRows::new(config, &spec, ranks)?,
            memory: RankMemory::new(config, &spec, ranks, smallest_group),
            forecast: None,
            machine_memory: None,
        })
    }

    fn text(&self) -> String {
        let Plan { cycle, steps, tokens_per_step, ranks, memory, .. } = self;
        let micro_batch = memory.micro_batch;
        let longest_stay = if self.longest_stay {
            "\nThe cycle may leave a coarse level earlier; the figures are those of the longest stay on each, the least work.\n"
        } else {
            ""
        };
        format!(
            "{cycle}: {steps} steps of {tokens_per_step} tokens\n\n{}\n{}{longest_stay}\n{}\
             memory a rank (ranks: {ranks}, sequences at a time: {micro_batch})\n{}{}",
            self.levels_table(),
            self.phases_table(),
            self.placement.as_ref().map_or(String::new(), |rows| rows.text() + "\n"),
            memory.table(),
            self.forecast_text(),
        )
    }

    /// Nothing without a machine.
    fn forecast_text(&self) -> String {
        let (Some(forecast), Some(room)) = (&self.forecast, self.machine_memory) else { return String::new() };
        let Forecast { machine, ranks, nodes, seconds: cycle_s, flat_seconds, .. } = forecast;
        let fits = if self.memory.total <= room { "" } else { ": it does not fit" };
        format!(
            "\npredicted for {ranks} ranks on {nodes} nodes: {machine}\n{}{}\
             all steps {}, on the fine level alone {}: {} less time; of {} a rank {} are taken{fits}\n",
            forecast_table(forecast),
            stages_table(&forecast.stages),
            duration(*cycle_s),
            duration(*flat_seconds),
            percent(1.0 - cycle_s / flat_seconds),
            bytes(room),
            bytes(self.memory.total),
        )
    }

    fn levels_table(&self) -> String {
        let row = |level: &LevelRow| {
            let LevelRow { level, rows, h, batch, context, parameters, step } = level;
            let (total, blocks) = (tera(step.flops_total), tera(step.flops_blocks));
            let [level, rows, batch, context] = [level, rows, batch, context].map(usize::to_string);
            [level, rows, h.to_string(), count(*parameters), batch, context, total, blocks]
        };
        let head = ["level", "blocks", "h", "parameters", "batch", "context", "TFLOP a step", "without head"]
            .map(str::to_owned);
        table(&std::iter::once(head).chain(self.levels.iter().map(row)).collect::<Vec<_>>())
    }

    /// The phases in order; where they are many, the sum of each kind.
    fn phases_table(&self) -> String {
        const MANY: usize = 16;
        let mut lines = vec![["phase", "blocks", "steps", "TFLOP", "without head"].map(str::to_owned)];
        let mut push = |name: String, rows: String, steps: u64, total: u128, blocks: u128| {
            lines.push([name, rows, steps.to_string(), tera(total), tera(blocks)]);
        };
        let many = self.phases.len() > MANY;
        let phases =
            if many { summed(&self.phases) } else { self.phases.iter().map(|phase| (1, phase.clone())).collect() };
        for (times, phase) in phases {
            let visits = if many { format!(", {times} visits") } else { String::new() };
            let name = format!("{}{visits}", phase.name());
            push(name, phase.rows.to_string(), phase.steps, phase.flops_total, phase.flops_blocks);
        }
        push("together".to_owned(), String::new(), self.steps, self.flops_total, self.flops_blocks);
        let Work { flops_total, flops_blocks } = self.flat;
        push("flat run".to_owned(), self.levels[0].rows.to_string(), self.steps, flops_total, flops_blocks);
        let empty = String::new;
        let Saving { total, blocks } = self.saving;
        lines.push(["saving".to_owned(), empty(), empty(), percent(total), percent(blocks)]);
        table(&lines)
    }
}

/// Seconds of a step on each level.
fn forecast_table(forecast: &Forecast) -> String {
    let head = ["level", "blocks", "compute", "update", "sums", "exposed", "step", "efficiency", "tokens/s"];
    let rows = forecast.levels.iter().map(|level| {
        let times = [level.compute_s, level.update_s, level.sums_s, level.exposed_s, level.step_s].map(seconds);
        let [compute, update, sums, exposed, step] = times;
        let (name, rows) = (level.level.to_string(), level.rows.to_string());
        let speed = format!("{:.0}", level.tokens_per_s);
        [name, rows, compute, update, sums, exposed, step, percent(level.efficiency), speed]
    });
    table(&std::iter::once(head.map(str::to_owned)).chain(rows).collect::<Vec<_>>())
}

/// Seconds of what groups of ranks do at the same time; nothing if they do not.
fn stages_table(stages: &[StageForecast]) -> String {
    if stages.is_empty() {
        return String::new();
    }
    let head =
        ["at the same time", "ranks", "times", "compute", "update", "exposed", "waits", "all", "in turn", "efficiency"];
    let mut lines = vec![head.map(str::to_owned)];
    for stage in stages {
        for (index, group) in stage.groups.iter().enumerate() {
            let once = |value: String| if index == 0 { value } else { String::new() };
            let [compute, update, exposed] = [group.compute_s, group.update_s, group.exposed_s].map(seconds);
            let [name, times] = [format!("{} steps", stage.steps), stage.times.to_string()].map(once);
            let [all, in_turn] = [stage.seconds, stage.in_turn_s].map(|s| once(seconds(s)));
            let (ranks, waits) = (group.ranks.to_string(), percent(group.idle));
            let efficiency = once(percent(stage.efficiency));
            lines.push([name, ranks, times, compute, update, exposed, waits, all, in_turn, efficiency]);
        }
        let [meetings, end] = [stage.meetings_s, stage.end_s].map(seconds);
        let empty = String::new;
        lines.push([
            "  sums over all; to all at the end".to_owned(),
            empty(),
            empty(),
            empty(),
            empty(),
            format!("{meetings}; {end}"),
            empty(),
            empty(),
            empty(),
            empty(),
        ]);
    }
    table(&lines)
}

/// Phases on the same level and coset added up, in order of their first visit, with the number of visits.
fn summed(phases: &[PhaseRow]) -> Vec<(usize, PhaseRow)> {
    let mut sums: Vec<(usize, PhaseRow)> = Vec::new();
    for phase in phases {
        match sums
            .iter_mut()
            .find(|(_, sum)| (sum.level, sum.coset, sum.beside) == (phase.level, phase.coset, phase.beside))
        {
            Some((visits, sum)) => {
                *visits += 1;
                sum.steps += phase.steps;
                sum.flops_total += phase.flops_total;
                sum.flops_blocks += phase.flops_blocks;
            }
            None => sums.push((1, phase.clone())),
        }
    }
    sums
}

impl LevelRow {
    fn new(config: &Config, spec: &Spec, level: usize) -> LevelRow {
        let rows = config.rows(level);
        let parameters = (rows * Layout::block(spec).len() + Layout::ends(spec).len()) as u64;
        let step = cycle::level_flops(config, spec, level).into();
        LevelRow {
            level,
            rows,
            h: config.step_size(level),
            batch: config.batch(level),
            context: config.context(level),
            parameters,
            step,
        }
    }
}

impl PhaseRow {
    fn new(config: &Config, &Phase { level, coset, steps, flops, beside }: &Phase) -> PhaseRow {
        let Work { flops_total, flops_blocks } = flops.into();
        PhaseRow { level, rows: config.rows(level), coset, steps, flops_total, flops_blocks, beside }
    }

    fn name(&self) -> String {
        let beside = if self.beside { ", beside" } else { "" };
        match self.coset {
            Coset::Index(0) => format!("level {}{beside}", self.level),
            Coset::Index(k) => format!("level {}, coset {k}", self.level),
            Coset::Random => format!("level {}, random cosets", self.level),
            Coset::All => format!("level {}, all cosets", self.level),
        }
    }
}

impl RankMemory {
    /// On `ranks` ranks, of which at least `smallest_group` share a global batch.
    pub(super) fn new(config: &Config, spec: &Spec, ranks: usize, smallest_group: usize) -> RankMemory {
        let optimizer = optim::new(&config.optimizer);
        let division = optim::division(&config.parallel, &*optimizer, 0, ranks);
        let levels = memory(config, spec, optimizer.moments().len(), division);
        let micro_batch = run::micro_batch(config, smallest_group);
        let workspace = Net::workspace_bytes(spec, spec.depth, micro_batch) + Net::scratch_bytes(spec, micro_batch);
        let rounded = if spec.dtype == DType::F32 { 0 } else { Rounded::bytes(spec) };
        RankMemory { levels, workspace, rounded, micro_batch, total: levels.total() + workspace + rounded }
    }

    fn table(&self) -> String {
        /// Left out where all is f32.
        const ROUNDED: &str = "parameters in bf16";
        let Memory { parameters, gradients, moments, transfer } = self.levels;
        let rows = [
            ("parameters", parameters),
            ("gradients", gradients),
            ("optimizer moments", moments),
            ("between levels", transfer),
            ("activations", self.workspace),
            (ROUNDED, self.rounded),
            ("together", self.total),
        ];
        let rows = rows.iter().filter(|(name, size)| *size > 0 || *name != ROUNDED);
        table(&rows.map(|(name, size)| [(*name).to_owned(), bytes(*size)]).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn plan(text: &str) -> Plan {
        let head =
            "[data]\ndir = 'x'\ncontext = 32\nbatch = 4\n[model]\nvocab = 64\nwidth = 16\nheads = 2\ndepth = 4\n";
        Plan::new(&config::parse(&format!("{head}{text}"), &[]).unwrap(), 2).unwrap()
    }

    #[test]
    fn a_flat_run_saves_nothing() {
        let plan = plan("[run]\nsteps = 10");
        assert_eq!((plan.flops_total, plan.flops_blocks), (plan.flat.flops_total, plan.flat.flops_blocks));
        assert_eq!((plan.saving.total, plan.saving.blocks, plan.memory.micro_batch), (0.0, 0.0, 2));
    }

    #[test]
    fn json_is_the_contract() {
        let plan = plan("[run]\nsteps = 10\n[levels]\ncount = 2\n[cycle]\nkind = 'cascade'\nfractions = [0.5, 0.5]");
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
        let (tokens, d, context, vocab) = (4 * 32, 16, 32, 64);
        let row_steps = 5 * 2 + 5 * 4;
        let blocks = row_steps * (72 * d * d + 12 * d * context) * tokens;
        assert_eq!(json["flops_blocks"], blocks);
        assert_eq!(json["flops_total"], blocks + 10 * 6 * vocab * d * tokens);
        assert_eq!(json["saving"]["blocks"], 0.25);
        assert_eq!((json["levels"].as_array().unwrap().len(), json["phases"].as_array().unwrap().len()), (2, 2));
    }

    #[test]
    fn groups_are_shown_with_their_work_and_what_they_wait() {
        let beside = "[run]\nsteps = 60\n[levels]\ncount = 2\n[cycle]\nkind = 'v'\npre = 5\ncoarse = 20\npost = 5\nfinish = 0.5\n\
                      [parallel]\nplacement = 'beside'";
        let plan = plan(beside);
        assert!(plan.phases.iter().any(|phase| phase.beside && phase.level == 1));
        let text = plan.text();
        assert!(text.contains("level 0, 5 steps  ") && text.contains("level 1, 20 steps"), "{text}");
        assert!(text.contains("predicted from FLOPs alone: ranks wait "), "{text}");
        let json = serde_json::to_value(&plan).unwrap();
        let groups = &json["placement"]["stages"][0]["groups"];
        // Fine: 5 steps of 4 blocks; coarse: 20 of 2; each with a head.
        let (fine, coarse) = (groups[0]["flops_a_rank"].as_f64().unwrap(), groups[1]["flops_a_rank"].as_f64().unwrap());
        assert_eq!(groups[0]["idle"].as_f64().unwrap(), 1.0 - fine / coarse);
        assert!(self::plan("[run]\nsteps = 10").placement.is_none());
    }

    #[test]
    fn many_phases_are_summed_and_a_longest_stay_is_said_so() {
        let text = plan("[run]\nsteps = 1000\n[levels]\ncount = 2\n[cycle]\nkind = 'v'").text();
        assert!(text.contains("level 1, 11 visits"), "{text}");
        assert!(!text.contains("longest"), "{text}");
        let text = plan("[levels]\ncount = 2\n[cycle]\nkind = 'adaptive'").text();
        assert!(text.contains("longest stay"), "{text}");
    }
}
