//! The tables of a config file. Each doc comment is also the entry in `docs/CONFIG.md`.

use super::table::{table, words};
use std::path::PathBuf;

words! {
    /// Time integrator of dx/dt = F(x, θ(t)).
    Integrator {
        /// x + h F(x), F = SA(LN x) + FF(LN(x + SA(LN x))): the seed paper's form.
        Euler = "euler",
        /// Lie splitting: x' = x + h SA(LN x); x' + h FF(LN x').
        Split = "split",
        /// Heun's second-order method; two evaluations of F a step.
        Heun = "heun",
    }
}

words! {
    /// How hyperparameters follow depth.
    Parametrization {
        /// GPT-2: residual projections initialised with std / √(2N), Adam's ε as given.
        Standard = "standard",
        /// CompleteP with α = 1: horizon 1 by default (residual multiplier 1/N), no depth factor in the initialisation, Adam's ε multiplied by h.
        CompleteP = "completep",
    }
}

words! {
    /// Element type that a net computes in.
    Dtype {
        /// Everything in f32.
        F32 = "f32",
        /// The factors of products in bf16; sums, master weights, gradients and moments in f32.
        Bf16 = "bf16",
    }
}

words! {
    /// Transfer operator between levels.
    TransferKind {
        /// Cosets: a coarse level is a strided view of the fine trajectory.
        Injection = "injection",
        /// Piecewise constant: a coarse row goes to its fine rows; restriction takes the first of them.
        Copy = "copy",
        /// Restriction averages the fine rows of a coarse row; prolongation copies.
        Average = "average",
        /// Prolongation interpolates linearly in t; restriction takes the first row.
        Linear = "linear",
    }
}

words! {
    /// How a coarse trajectory changes the fine one at an ascent.
    Update {
        /// θ_h ← P θ_H
        Replace = "replace",
        /// θ_h ← (1-α) θ_h + α P θ_H
        Mix = "mix",
        /// θ_h ← θ_h + α P (θ_H − R θ_h), θ_h as it was at the descent
        Correct = "correct",
    }
}

words! {
    /// What happens to optimizer state at a level switch.
    StateRule {
        /// Moments move with the rows, scaled by the power of h that their gradients carry.
        Scale = "scale",
        /// Moments move with the rows, unscaled.
        Move = "move",
        /// Moments and their step count start at zero on the new level.
        Reset = "reset",
        /// Each level keeps the moments it had.
        Keep = "keep",
    }
}

words! {
    /// Which coset of a coarse `injection` level is trained.
    CosetPolicy {
        /// Coset 0 only.
        First = "first",
        /// One coset after the other, the phase's steps shared equally (the seed paper's order).
        Alternate = "alternate",
        /// A coset drawn anew each step from (seed, step).
        Random = "random",
        /// All at once: a step trains every coset, each on a batch of its own.
        All = "all",
    }
}

words! {
    /// Order in which levels are visited.
    CycleKind {
        /// The fine level only.
        Flat = "flat",
        /// Every coset of the coarsest level in turn, then the fine level (arXiv 2504.18590).
        Paper = "paper",
        /// Coarsest level first, then ever finer ones: nested iteration.
        Cascade = "cascade",
        /// V-cycles: down to the coarsest level and back, repeated.
        V = "v",
        /// W-cycles: every coarse level visited twice from the next finer one.
        W = "w",
        /// F-cycles: a cascade in which every new level starts with a V-cycle.
        F = "f",
        /// A cascade that leaves a level when its loss decrease per FLOP has fallen off.
        Adaptive = "adaptive",
        /// The list `cycle.phases`.
        Phases = "phases",
    }
}

words! {
    OptimizerKind {
        /// Stochastic gradient descent with (Nesterov) momentum.
        Sgd = "sgd",
        /// Adam with decoupled weight decay.
        AdamW = "adamw",
        /// Newton–Schulz orthogonalised momentum on block matrices, AdamW on the rest.
        Muon = "muon",
    }
}

words! {
    ScheduleKind {
        /// Warm-up, then the learning rate as given.
        Constant = "constant",
        /// Warm-up, then half a cosine down to `final_ratio`.
        Cosine = "cosine",
        /// Warm-up, stable, then a linear decay to `final_ratio` over the last `decay` of the steps.
        Wsd = "wsd",
    }
}

words! {
    DeviceKind {
        /// A GPU where the build and the machine have one, else the CPU.
        Auto = "auto",
        /// The CPU cores the rank may use.
        Cpu = "cpu",
        /// One NVIDIA GPU a rank.
        Cuda = "cuda",
    }
}

words! {
    /// Which ranks work on which level.
    Placement {
        /// All ranks work on each level in turn.
        Sequential = "sequential",
        /// The cosets of a coarse level train at the same time, each on a group of the ranks.
        Cosets = "cosets",
        /// One group of the ranks smooths the fine level while another trains coarse levels.
        Beside = "beside",
    }
}

/// One phase of `cycle.kind = "phases"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Level, 0 = finest.
    pub level: usize,
    /// Optimizer steps on it.
    pub steps: u64,
}

table! {
    /// The run as a whole.
    RunTable {
        /// Optimizer steps over all levels together.
        steps: u64 = 1000,
        /// Seed of the initialisation, the data order and every random choice.
        seed: u64 = 1337,
        /// Stop after this many minutes of wall-clock with a checkpoint and exit 75; 0 = no limit.
        max_minutes: f64 = 0.0,
    }
}

table! {
    /// What the net reads.
    DataTable {
        /// Folder written by `vcycle data prepare` (llm.c and nanoGPT shards are read too). Required.
        dir: PathBuf = PathBuf::new(),
        /// T: tokens in a sequence.
        context: usize = 256,
        /// B: sequences in a global batch, over all ranks.
        batch: usize = 16,
        /// Sequences a rank differentiates at once; more are accumulated. 0 = a rank's whole share of the batch.
        micro_batch: usize = 0,
    }
}

table! {
    /// The ODE Transformer on the finest level.
    ModelTable {
        /// Rows of the embedding. Default: the data's vocabulary padded to a multiple of 64.
        vocab: Option<usize> = None,
        /// d: channels of the state x.
        width: usize = 256,
        /// Attention heads; divides `width`.
        heads: usize = 8,
        /// N: blocks, i.e. time steps on the finest level.
        depth: usize = 12,
        /// End of the time interval; h = horizon / depth. Default: `depth` (h = 1), or 1 with `completep`.
        horizon: Option<f64> = None,
        /// `euler`, `split` or `heun`.
        integrator: Integrator = Integrator::Euler,
        /// `standard` or `completep`: how hyperparameters follow depth.
        parametrization: Parametrization = Parametrization::Standard,
        /// The head shares the token embedding's matrix.
        tied: bool = true,
        /// Standard deviation of the initial weights (GPT-2).
        init_std: f64 = 0.02,
        /// Keep only each block's input and recompute its activations in the backward pass.
        recompute: bool = false,
        /// `f32` or `bf16`: what the factors of products are rounded to; on GPUs activations are kept in it too. Parameters, their gradients and optimizer state are f32 always.
        dtype: Dtype = Dtype::F32,
    }
}

table! {
    /// The hierarchy of depth discretisations.
    LevelsTable {
        /// Number of levels; 1 = the fine net alone.
        count: usize = 1,
        /// c: rows of level l over rows of level l+1; c^(count-1) divides `model.depth`.
        factor: usize = 2,
        /// `injection`, `copy`, `average` or `linear`.
        transfer: TransferKind = TransferKind::Copy,
        /// `replace`, `mix` or `correct`: how an ascent changes the finer level.
        update: Update = Update::Replace,
        /// α of `mix` and `correct`.
        alpha: f64 = 1.0,
        /// `replace`: after an ascent, twin rows, which are copies of each other, are parted by normal noise of this share of the root mean square of each matrix; their mean stays.
        noise: f64 = 0.0,
        /// `scale`, `move`, `reset` or `keep`: what a switch does to optimizer state.
        state: StateRule = StateRule::Scale,
        /// Add the first-order coherence term −<v, θ_H> (MG/OPT, FAS) to coarse objectives.
        coherence: bool = false,
        /// Share of the steps before which descents add no coherence term.
        coherence_from: f64 = 0.0,
        /// Batches over which the coherence term is measured at a descent.
        coherence_batches: u64 = 4,
        /// Sequences in a global batch on each level, finest first. Default: `data.batch` on all.
        batch: Option<Vec<usize>> = None,
        /// Tokens in a sequence on each level, finest first: sequences of `data.context` are cut into pieces of so many. Default: `data.context` on all.
        context: Option<Vec<usize>> = None,
        /// `first`, `alternate`, `random` or `all`: which coset of an `injection` level is trained. A step of `all` trains each one on a batch of its own, so it does the work of as many steps as there are cosets.
        coset: CosetPolicy = CosetPolicy::First,
        /// `injection`: after a coarse step, neighbouring rows (one of each coset) move towards their mean by this share of the way.
        pull: f64 = 0.0,
    }
}

table! {
    /// The order in which levels are trained.
    CycleTable {
        /// `flat`, `paper`, `cascade`, `v`, `w`, `f`, `adaptive` or `phases`.
        kind: CycleKind = CycleKind::Flat,
        /// `paper`, `cascade`, `adaptive`: share of the steps on each level, coarsest first; they add up to 1. `adaptive`: at most. Default: `paper` half each; `cascade` 0.2 on each of the two finest levels, the rest shared equally by the coarser ones; `adaptive` 0.7 on the coarsest, the rest shared equally.
        fractions: Option<Vec<f64>> = None,
        /// `v`, `w`, `f`: steps on a level before descending from it.
        pre: u64 = 10,
        /// `v`, `w`, `f`: steps on a level after ascending to it.
        post: u64 = 10,
        /// `v`, `w`, `f`: steps on the coarsest level at each visit.
        coarse: u64 = 50,
        /// `v`, `w`, `f`: share of the steps spent on the fine level at the end. Before it, steps that fill no further cycle are spread over the visits in proportion.
        finish: f64 = 0.2,
        /// `adaptive`: steps between measurements of what a coarse level does not resolve of the finer one's gradient.
        window: u64 = 50,
        /// `adaptive`: leave a level when the part of the finer one's gradient that it does not resolve is, squared, this many times c - 1 of the part that it does (mean of five measurements).
        threshold: f64 = 1.0,
        /// `phases`: the list of `{ level = L, steps = S }`; switches are inserted between them.
        phases: Vec<Phase> = Vec::new(),
    }
}

table! {
    /// The update rule.
    OptimizerTable {
        /// `sgd`, `adamw` or `muon`.
        kind: OptimizerKind = OptimizerKind::AdamW,
        /// Peak learning rate.
        lr: f64 = 1e-3,
        /// Weight decay, decoupled, on matrices only.
        weight_decay: f64 = 0.1,
        /// Clip the global gradient norm to this; 0 = off.
        clip: f64 = 1.0,
        /// AdamW: decay of the first moment.
        beta1: f64 = 0.9,
        /// AdamW: decay of the second moment.
        beta2: f64 = 0.95,
        /// AdamW: ε in the denominator.
        eps: f64 = 1e-8,
        /// SGD, Muon: momentum.
        momentum: f64 = 0.9,
        /// SGD, Muon: Nesterov's form of momentum.
        nesterov: bool = true,
        /// Muon: learning rate of the matrices, over `lr`.
        muon_lr_ratio: f64 = 10.0,
    }
}

table! {
    /// The learning rate over the run.
    ScheduleTable {
        /// `constant`, `cosine` or `wsd`.
        kind: ScheduleKind = ScheduleKind::Wsd,
        /// Share of the steps spent warming up linearly from 0.
        warmup: f64 = 0.02,
        /// `wsd`: share of the steps spent decaying at the end.
        decay: f64 = 0.2,
        /// Learning rate at the last step over the peak.
        final_ratio: f64 = 0.0,
        /// Multiplier of the learning rate on each level, finest first. Default: 1 on all.
        level_multipliers: Option<Vec<f64>> = None,
        /// Steps of linear re-warm-up after a level switch; 0 = none.
        rewarm: u64 = 0,
    }
}

table! {
    /// Devices and ranks.
    ParallelTable {
        /// `auto`, `cpu` or `cuda`.
        device: DeviceKind = DeviceKind::Auto,
        /// `sequential`: all ranks work on each level in turn. `cosets`: the cosets of an `injection` level are trained at the same time, each by a group of the ranks; sets `levels.coset = "all"`. `beside`: one group smooths the fine level while another trains coarse levels, in `v`, `w`, `f` and `phases` (docs/PLACEMENT.md).
        placement: Placement = Placement::Sequential,
        /// Ranks of each group; `beside`: fine level, coarse level. Empty: so that groups finish together by their FLOPs.
        groups: Vec<usize> = Vec::new(),
        /// Steps of a group until all meet. `levels.coset = "all"`: 1 sums the ends' gradients each step, more averages ends and their moments after so many. `beside`: counts the steps of the side with fewer. Signals and checkpoints wait for a meeting.
        sync_every: u64 = 1,
        /// ZeRO stage. 0: every rank keeps all moments of the optimizer. 1: each keeps and updates a part of the columns of every row; for placement `sequential` with `sync_every = 1` (docs/CLUSTER.md).
        zero: u64 = 0,
        /// Threads a rank computes with. 0 = the cores it may use, shared with the ranks on its node.
        threads: usize = 0,
        /// Seconds without progress in a collective before a run is given up on every rank.
        timeout: f64 = 600.0,
    }
}

table! {
    /// Checkpoints.
    CheckpointTable {
        /// Write one every this many steps; 0 = only when a run ends or is stopped.
        every_steps: u64 = 0,
        /// Write one every this many minutes; 0 = off.
        every_minutes: f64 = 0.0,
        /// Newest checkpoints kept; 0 = all.
        keep: usize = 3,
    }
}

table! {
    /// What a run records.
    LogTable {
        /// Steps between lines of `metrics.jsonl` and of the console.
        every_steps: u64 = 10,
        /// Steps between evaluations of the fine net on validation data; the last step is always evaluated. 0 = only the last.
        eval_every: u64 = 200,
        /// Validation sequences an evaluation reads; 0 = all of them.
        eval_sequences: usize = 64,
    }
}

/// A whole config file.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Config {
    pub run: RunTable,
    pub data: DataTable,
    pub model: ModelTable,
    pub levels: LevelsTable,
    pub cycle: CycleTable,
    pub optimizer: OptimizerTable,
    pub schedule: ScheduleTable,
    pub parallel: ParallelTable,
    pub checkpoint: CheckpointTable,
    pub log: LogTable,
}

/// Every table with its documentation and keys, in the order of [`Config`].
pub const TABLES: &[(&str, &str, &[super::table::Key])] = &[
    ("run", RunTable::DOC, RunTable::KEYS),
    ("data", DataTable::DOC, DataTable::KEYS),
    ("model", ModelTable::DOC, ModelTable::KEYS),
    ("levels", LevelsTable::DOC, LevelsTable::KEYS),
    ("cycle", CycleTable::DOC, CycleTable::KEYS),
    ("optimizer", OptimizerTable::DOC, OptimizerTable::KEYS),
    ("schedule", ScheduleTable::DOC, ScheduleTable::KEYS),
    ("parallel", ParallelTable::DOC, ParallelTable::KEYS),
    ("checkpoint", CheckpointTable::DOC, CheckpointTable::KEYS),
    ("log", LogTable::DOC, LogTable::KEYS),
];
