//! How evenly the ranks work: who computes all the time, and who waits for others.

use crate::comm::{Communicator, Reduction};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How ranks spent a stretch of time. What a rank does not compute it waits in collectives: for the network, or for ranks
/// that compute longer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    /// Share of the time that a rank waits, the mean over the ranks: communication that is not hidden, and imbalance.
    pub waiting: f64,
    /// Share of the time that a rank waits for sums of gradients after its backward pass, the mean over the ranks: of `waiting`.
    #[serde(default)]
    pub exposed: f64,
    /// The rank that waits least: the others wait for it.
    pub slowest: usize,
    /// Share of the time that it computes.
    pub slowest_computes: f64,
}

impl Balance {
    /// From what this rank has waited in the last `elapsed`, in all and for sums of gradients. Collective; `None` for one rank.
    pub fn measure(
        comm: &mut dyn Communicator,
        [waited, exposed]: [Duration; 2],
        elapsed: Duration,
    ) -> Result<Option<Balance>> {
        if comm.size() == 1 {
            return Ok(None);
        }
        let (ranks, share) =
            (comm.size(), |time: Duration| time.div_duration_f64(elapsed.max(Duration::from_nanos(1))));
        let mut shares = vec![0.0; ranks + 1];
        shares[comm.rank()] = 1.0 - share(waited);
        shares[ranks] = share(exposed) / ranks as f64;
        comm.reduce(&mut shares, Reduction::Sum)?;
        Ok(Some(Balance::of(&shares[..ranks], shares[ranks])))
    }

    /// From the share of the time that each rank computes, and the mean exposed.
    fn of(computes: &[f64], exposed: f64) -> Balance {
        let most = |best: usize, rank: usize| if computes[rank] > computes[best] { rank } else { best };
        let slowest = (0..computes.len()).fold(0, most);
        let mean = computes.iter().sum::<f64>() / computes.len() as f64;
        Balance { waiting: 1.0 - mean, exposed, slowest, slowest_computes: computes[slowest] }
    }

    /// How much longer the slowest rank computes than the mean, as a share of that.
    pub fn excess(&self) -> f64 {
        self.slowest_computes / (1.0 - self.waiting) - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;

    #[test]
    fn the_rank_that_waits_least_is_the_slowest() {
        let seconds = Duration::from_secs_f64;
        let measured = thread::run(4, |comm| {
            let waited = [3.0, 4.0, 1.0, 4.0][comm.rank()];
            let exposed = [0.5, 1.0, 0.0, 0.5][comm.rank()];
            Balance::measure(comm, [waited, exposed].map(seconds), seconds(10.0)).unwrap().unwrap()
        });
        for balance in measured {
            assert_eq!((balance.slowest, balance.slowest_computes), (2, 0.9));
            assert!((balance.exposed - 0.05).abs() < 1e-12);
            assert!((balance.waiting - 0.3).abs() < 1e-12 && (balance.excess() - 2.0 / 7.0).abs() < 1e-12);
        }
    }
}
