//! How far a run is: all that a resumed run must know besides tensors.

use crate::cycle::{Op, Position, Window};
use crate::model::Flops;
use serde::{Deserialize, Serialize};

/// Counters of a run. Saved in every checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The whole plan; `adaptive` shortens it on the way.
    pub plan: Vec<Op>,
    /// The op that is being done and the steps done of it.
    pub position: Position,
    /// Optimizer steps done, over all levels.
    pub step: u64,
    /// Sequences consumed by training: the sampler's cursor.
    pub sequences: u64,
    pub tokens: u64,
    pub flops_blocks: u64,
    pub flops_total: u64,
    /// Wall-clock spent training, over all processes of this run, in seconds.
    pub elapsed_s: f64,
    /// How often the fine level has been left.
    pub descents: u64,
    /// Steps since the last level switch, if there was one.
    pub since_switch: Option<u64>,
    /// Windows of the current stay on a level, oldest first; empty unless the cycle measures.
    pub windows: Vec<Window>,
    /// Loss and steps of the window being filled.
    pub open_window: (f64, u64),
}

impl Progress {
    pub fn new(plan: Vec<Op>) -> Progress {
        Progress {
            plan,
            position: Position::default(),
            step: 0,
            sequences: 0,
            tokens: 0,
            flops_blocks: 0,
            flops_total: 0,
            elapsed_s: 0.0,
            descents: 0,
            since_switch: None,
            windows: Vec::new(),
            open_window: (0.0, 0),
        }
    }

    /// Index of the current cycle: 0 until the fine level has been left a second time.
    pub fn cycle(&self) -> u64 {
        self.descents.saturating_sub(1)
    }

    /// One optimizer step over `sequences` sequences is done.
    pub fn count_step(&mut self, sequences: u64, tokens: u64, flops: Flops) {
        self.step += 1;
        self.sequences += sequences;
        self.tokens += tokens;
        self.flops_blocks += flops.blocks;
        self.flops_total += flops.total;
        self.since_switch = self.since_switch.map(|s| s + 1);
    }

    /// A level switch is done: windows and re-warm-up start anew.
    pub fn count_switch(&mut self) {
        self.since_switch = Some(0);
        self.windows.clear();
        self.open_window = (0.0, 0);
    }

    /// Adds a step's loss to the open window; closes it after `length` steps of `flops` each. True if it was closed.
    pub fn count_window(&mut self, loss: f64, flops: u64, length: u64) -> bool {
        self.open_window.0 += loss;
        self.open_window.1 += 1;
        let (sum, steps) = self.open_window;
        let full = steps == length;
        if full {
            self.windows.push(Window { loss: sum / length as f64, flops: flops * length });
            self.open_window = (0.0, 0);
        }
        full
    }
}
