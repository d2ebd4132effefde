//! One rank alone: every reduction is the identity.

use super::{Communicator, Reduction, Ticket};
use crate::error::{Context, Result, ensure};
use std::time::Duration;

/// The only rank of its group.
#[derive(Default)]
pub struct Solo {
    started: Vec<(Ticket, Vec<f32>)>,
    next: u64,
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn set_timeout(&mut self, _timeout: Duration) {}

    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    fn start_sum(&mut self, data: Vec<f32>) -> Result<Ticket> {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.started.push((ticket, data));
        Ok(ticket)
    }

    fn progress(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Vec<f32>> {
        let i = self.started.iter().position(|(started, _)| *started == ticket);
        let i = i.with_context(|| format!("{ticket:?} was not started or was waited for before"))?;
        Ok(self.started.swap_remove(i).1)
    }

    fn reduce(&mut self, _values: &mut [f64], _reduction: Reduction) -> Result<()> {
        Ok(())
    }

    fn broadcast(&mut self, _data: &mut Vec<u8>, root: usize) -> Result<()> {
        ensure!(root == 0, "broadcast from rank {root}: there is one rank");
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        Ok(())
    }

    fn split(&mut self, color: Option<usize>) -> Result<Option<Box<dyn Communicator>>> {
        Ok(color.map(|_| Box::new(Solo::default()) as Box<dyn Communicator>))
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
