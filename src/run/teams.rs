//! Groups of ranks as communicators of their own, and how tensors get from one to another.

use crate::comm::Communicator;
use crate::cycle::Groups;
use crate::error::{Result, ensure};
use crate::ops::access;
use candle_core::Tensor;

/// This rank's sub-communicator in each division of the ranks that a run uses.
pub struct Teams {
    /// In the order of the splits, the same on every rank: dropped in this order too.
    divisions: Vec<(Groups, Box<dyn Communicator>)>,
}

impl Teams {
    /// Splits `all` once a division. Collective.
    pub fn new(all: &mut dyn Communicator, divisions: Vec<Groups>) -> Result<Teams> {
        let split = |groups: Groups| {
            let own = all.split(Some(groups.of(all.rank())))?;
            Ok((groups, own.expect("a rank with a colour is in a group")))
        };
        Ok(Teams { divisions: divisions.into_iter().map(split).collect::<Result<_>>()? })
    }

    /// This rank's group in `groups`; `all` itself if they are one group.
    pub fn own<'a>(&'a mut self, all: &'a mut dyn Communicator, groups: &Groups) -> &'a mut dyn Communicator {
        match self.divisions.iter_mut().find(|(division, _)| division == groups) {
            Some((_, own)) => &mut **own,
            None => all,
        }
    }
}

/// tensors = those of rank `root` (=), f32, bit for bit. Collective.
pub fn broadcast(comm: &mut dyn Communicator, tensors: &[&Tensor], root: usize) -> Result<()> {
    let mut bytes = Vec::new();
    for tensor in tensors {
        bytes.clear();
        if comm.rank() == root {
            bytes.extend(access::read::<f32>(tensor)?.iter().flat_map(|x| x.to_ne_bytes()));
        }
        comm.broadcast(&mut bytes, root)?;
        if comm.rank() != root {
            access::write(tensor, |values: &mut [f32]| {
                let (sent, _) = bytes.as_chunks::<4>();
                ensure!(sent.len() == values.len(), "rank {root} sent {} values for {}", sent.len(), values.len());
                values.iter_mut().zip(sent).for_each(|(value, bytes)| *value = f32::from_ne_bytes(*bytes));
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// tensors = values (=).
pub fn set(tensors: &[&Tensor], values: &[Vec<f32>]) -> Result<()> {
    for (tensor, values) in tensors.iter().zip(values) {
        access::write(tensor, |to: &mut [f32]| {
            to.copy_from_slice(values);
            Ok(())
        })?;
    }
    Ok(())
}
