use super::{Cycle, Visit, cascade};
use crate::config::{Config, CosetPolicy};

/// arXiv 2504.18590: the even, then the odd coset of one coarse level, then the fine level.
pub struct Paper;

impl Cycle for Paper {
    fn name(&self) -> &'static str {
        "paper"
    }
    fn visits(&self, config: &Config) -> Vec<Visit> {
        cascade::shares(config)
    }
    /// In turn, unless all are trained at once.
    fn cosets(&self, config: &Config) -> CosetPolicy {
        match config.levels.coset {
            CosetPolicy::All => CosetPolicy::All,
            _ => CosetPolicy::Alternate,
        }
    }
}
