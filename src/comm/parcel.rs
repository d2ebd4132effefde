//! Tensors as one buffer in host memory, for communicators that send such.

use super::Exchange;
use super::pool::Pool;
use crate::error::Result;
use crate::ops::access;
use candle_core::Tensor;
use std::ops::Range;

/// The tensors of an exchange; each part's lie one after the other in the buffer.
pub struct Parcel {
    exchange: Exchange,
    parts: Vec<Vec<Tensor>>,
    /// Where each part lies in the buffer.
    pub ranges: Vec<Range<usize>>,
}

impl Parcel {
    pub fn new(exchange: Exchange, parts: Vec<Vec<Tensor>>) -> Parcel {
        let mut end = 0;
        let range = |part: &Vec<Tensor>| {
            let begin = end;
            end += part.iter().map(Tensor::elem_count).sum::<usize>();
            begin..end
        };
        let ranges = parts.iter().map(range).collect();
        Parcel { exchange, parts, ranges }
    }

    /// Elements of all parts.
    pub fn len(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// The parts that rank `rank` brings: a gather's own one, else all.
    fn brought(&self, rank: usize) -> Range<usize> {
        if self.exchange == Exchange::Gather { rank..rank + 1 } else { 0..self.parts.len() }
    }

    /// A buffer of all parts with what rank `rank` brings.
    pub fn pack(&self, rank: usize, pool: &mut Pool) -> Result<Vec<f32>> {
        let mut buffer = pool.take(self.len());
        for part in self.brought(rank) {
            let mut rest = &mut buffer[self.ranges[part].clone()];
            for tensor in &self.parts[part] {
                let (own, others) = rest.split_at_mut(tensor.elem_count());
                own.copy_from_slice(&access::read::<f32>(tensor)?);
                rest = others;
            }
        }
        Ok(buffer)
    }

    /// The tensors of part `part` = `values`.
    pub fn unpack(&self, part: usize, values: &[f32]) -> Result<()> {
        let mut rest = values;
        for tensor in &self.parts[part] {
            let (own, others) = rest.split_at(tensor.elem_count());
            access::write(tensor, |tensor: &mut [f32]| {
                tensor.copy_from_slice(own);
                Ok(())
            })?;
            rest = others;
        }
        Ok(())
    }

    /// Every part = its stretch of `buffer`, a buffer of all parts.
    pub fn unpack_all(&self, buffer: &[f32]) -> Result<()> {
        (0..self.parts.len()).try_for_each(|part| self.unpack(part, &buffer[self.ranges[part].clone()]))
    }

    /// Every part but that of `rank` = its stretch of `buffer`.
    pub fn unpack_others(&self, rank: usize, buffer: &[f32]) -> Result<()> {
        let mut others = (0..self.parts.len()).filter(|&part| part != rank);
        others.try_for_each(|part| self.unpack(part, &buffer[self.ranges[part].clone()]))
    }
}
