//! Tensors of which each rank has some columns, as a whole for a checkpoint.

use crate::comm::{Communicator, Exchange};
use crate::error::Result;
use crate::model::Shard;
use candle_core::{Device, Tensor};
use std::ops::Range;

/// The whole [R, P] of which every rank has `own` [R, S], on rank 0 and in host memory; `None` on the others. Row by row, so that
/// they need room for one. Collective.
pub fn join(comm: &mut dyn Communicator, shard: &Shard, own: &Tensor) -> Result<Option<Tensor>> {
    let (rows, _) = own.dims2()?;
    let is_root = comm.rank() == 0;
    let whole = Tensor::zeros((if is_root { rows } else { 1 }, shard.width()), own.dtype(), &Device::Cpu)?;
    for row in 0..rows {
        let to = whole.narrow(0, if is_root { row } else { 0 }, 1)?;
        if !shard.columns.is_empty() {
            to.slice_set(&own.narrow(0, row, 1)?.to_device(&Device::Cpu)?, 1, shard.columns.start)?;
        }
        let part = |columns: &Range<usize>| match columns.is_empty() {
            true => Ok(Vec::new()),
            false => Ok(vec![to.narrow(1, columns.start, columns.len())?]),
        };
        let parts = shard.ranks.iter().map(part).collect::<Result<_>>()?;
        let ticket = comm.start(Exchange::Gather, parts)?;
        comm.wait(ticket)?;
    }
    Ok(is_root.then_some(whole))
}

/// own [R, S] = this rank's columns of the whole [R, P] that `read` fills.
pub fn take(shard: &Shard, own: &Tensor, mut read: impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
    let (rows, _) = own.dims2()?;
    let whole = Tensor::zeros((rows, shard.width()), own.dtype(), own.device())?;
    read(&whole)?;
    if !shard.columns.is_empty() {
        own.slice_set(&whole.narrow(1, shard.columns.start, shard.columns.len())?.contiguous()?, 0, 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::thread;
    use crate::model::{Division, Layout, Spec};

    #[test]
    fn what_ranks_take_they_join() {
        let layout = Layout::block(&Spec::small());
        let values: Vec<f32> = (0..3 * layout.len()).map(|i| i as f32).collect();
        for ranks in [1, 2, 3, 9] {
            let joined = thread::run(ranks, |comm| {
                let shard = Shard::new(&layout, Division { rank: comm.rank(), ranks, whole_matrices: true });
                let own = Tensor::zeros((3, shard.columns.len()), candle_core::DType::F32, &Device::Cpu).unwrap();
                let whole = Tensor::from_slice(&values, (3, layout.len()), &Device::Cpu).unwrap();
                take(&shard, &own, |to| Ok(to.slice_set(&whole, 0, 0)?)).unwrap();
                join(comm, &shard, &own).unwrap().map(|joined| joined.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            });
            assert_eq!(joined[0].as_ref(), Some(&values));
            assert!(joined[1..].iter().all(Option::is_none));
        }
    }
}
