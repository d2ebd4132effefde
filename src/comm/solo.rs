//! One rank alone: every exchange is the identity.

use super::{Communicator, Exchange, Reduction, Ticket};
use crate::error::{Context, Result, ensure};
use candle_core::Tensor;
use std::time::Duration;

/// The only rank of its group.
#[derive(Default)]
pub struct Solo {
    started: Vec<Ticket>,
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

    fn start(&mut self, exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Result<Ticket> {
        exchange.check(&parts, 1)?;
        let ticket = Ticket(self.next);
        self.next += 1;
        self.started.push(ticket);
        Ok(ticket)
    }

    fn progress(&mut self) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        let i = self.started.iter().position(|started| *started == ticket);
        let i = i.with_context(|| format!("{ticket:?} was not started or was waited for before"))?;
        self.started.swap_remove(i);
        Ok(())
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
