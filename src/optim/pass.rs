//! One pass over the flat tensors: every element of θ, its gradient and its moments is read once and written once.
//!
//! The tensors are cut along rows, segments and pieces of fixed size. Parts are independent of each other, so a step gives
//! the same bits for any number of threads.

use super::Hyper;
use crate::error::{Result, bail, ensure};
use crate::model::{Layout, Segment, Shard};
use crate::ops::access::{check, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use crate::ops::cuda::{Address, Gpu, Rows, Stretch, Stretches};
use crate::ops::profile;
use crate::ops::real::{PIECE, Real, vectorized};
#[cfg(any(feature = "cuda", test))]
use candle_core::DType;
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// Elements that are updated together: two vectors of AVX2.
const LANES: usize = 16;

/// An update rule on segments; N - 1 is its number of moments.
pub trait Rule<const N: usize>: Sync {
    const NAME: &str;
    /// Updates one segment of one row with its `t`-th gradient, t = 1, 2, ...
    fn update<T: Real>(&self, segment: &Segment, t: u64, hyper: &Hyper, elements: Elements<T, N>);
    /// Updates all segments of the rows' shards on a GPU.
    #[cfg(any(feature = "cuda", test))]
    fn launch(&self, gpu: &Gpu, rows: &GpuRows<N>) -> Result<()>;
}

/// The shards of rows on a GPU, each with its `t`-th gradient; everything is f32.
#[cfg(any(feature = "cuda", test))]
pub struct GpuRows<'a, const N: usize> {
    pub layout: &'a Layout,
    pub t: u64,
    pub hyper: &'a Hyper,
    pub rows: Rows,
    /// Where the first row begins.
    pub grad: Address,
    /// The same of θ, then the moments.
    pub written: [Address; N],
}

#[cfg(any(feature = "cuda", test))]
impl<const N: usize> GpuRows<'_, N> {
    /// The segments that `chosen` names, with their factors on θ for weight decay λ.
    pub fn stretches(&self, weight_decay: f64, chosen: impl Fn(&Segment) -> bool) -> Result<Stretches> {
        let mut stretches = Stretches::default();
        for segment in self.layout.segments.iter().filter(|segment| chosen(segment)) {
            let (begin, end) = (segment.offset, segment.offset + segment.len());
            let keep = if segment.decay { 1.0 - self.hyper.lr * weight_decay } else { 1.0 } as f32;
            let count = stretches.count as usize;
            match stretches.of[..count].last_mut() {
                Some(last) if last.end == begin && last.keep == keep => last.end = end,
                _ => {
                    ensure!(count < Stretches::MAX, "a GPU updates at most {} stretches of a row", Stretches::MAX);
                    stretches.of[count] = Stretch { begin, end, keep };
                    stretches.count += 1;
                }
            }
        }
        Ok(stretches)
    }

    /// Where an element of a row is in each tensor: the gradient, then the written ones.
    pub fn place(&self, row: usize, element: usize) -> (Address, [Address; N]) {
        let Rows { pitch, pitch_of_moments, .. } = self.rows;
        let place = |address: Address, pitch: usize| address.offset((row * pitch + element) * size_of::<f32>());
        let written = |k: usize| place(self.written[k], if k == 0 { pitch } else { pitch_of_moments });
        (place(self.grad, pitch), std::array::from_fn(written))
    }
}

/// Rows first, first + step, ... that have had as many updates.
#[cfg(any(feature = "cuda", test))]
#[derive(Debug, PartialEq)]
struct Alike {
    first: usize,
    step: usize,
    count: usize,
    updates: u64,
}

/// The rows in order, as many at once as can be: all of a net, or every other one, are mostly alike.
#[cfg(any(feature = "cuda", test))]
fn alike(rows: &[usize], updates: &[u64]) -> Vec<Alike> {
    let mut found: Vec<Alike> = Vec::new();
    for (&row, &updates) in rows.iter().zip(updates) {
        match found.last_mut().filter(|last| last.updates == updates) {
            Some(last) if last.count == 1 && row > last.first => {
                (last.step, last.count) = (row - last.first, 2);
            }
            Some(last) if last.count > 1 && row == last.first + last.count * last.step => last.count += 1,
            _ => found.push(Alike { first: row, step: 1, count: 1, updates }),
        }
    }
    found
}

/// The same stretch of all tensors of a step.
pub struct Elements<'a, T, const N: usize> {
    pub grad: &'a [T],
    /// θ, then the moments.
    pub written: [&'a mut [T]; N],
}

impl<'a, T: Real, const N: usize> Elements<'a, T, N> {
    fn split_at(mut self, middle: usize) -> (Self, Self) {
        let (grad, grad_after) = self.grad.split_at(middle);
        let mut after = std::array::from_fn(|_| Default::default());
        let written = std::array::from_fn(|i| {
            let (before, rest) = std::mem::take(&mut self.written[i]).split_at_mut(middle);
            after[i] = rest;
            before
        });
        (Elements { grad, written }, Elements { grad: grad_after, written: after })
    }

    /// Calls `f(k, part)` in parallel for the parts k that begin at `start(k)`.
    pub fn for_each_part<S, F>(self, parts: Range<usize>, start: &S, f: &F)
    where
        S: Fn(usize) -> usize + Sync,
        F: Fn(usize, Self) + Sync,
    {
        match parts.len() {
            0 => {}
            1 => f(parts.start, self),
            n => {
                let middle = parts.start + n / 2;
                let (before, after) = self.split_at(start(middle) - start(parts.start));
                rayon::join(
                    || before.for_each_part(parts.start..middle, start, f),
                    || after.for_each_part(middle..parts.end, start, f),
                );
            }
        }
    }

    /// Calls `f(g, [θ, moments])` for every element, vectorised and in parallel, and stores what it returns.
    #[inline(always)]
    pub fn for_each(self, f: impl Fn(T, [T; N]) -> [T; N] + Sync) {
        let pieces = self.grad.len().div_ceil(PIECE);
        self.for_each_part(0..pieces, &|piece| piece * PIECE, &|_, piece| {
            vectorized(
                #[inline(always)]
                || piece.update(&f),
            )
        });
    }

    /// As [`Elements::for_each`], on this thread; to be inlined into [`vectorized`].
    #[inline(always)]
    pub fn update(mut self, f: &impl Fn(T, [T; N]) -> [T; N]) {
        let (grad, rest) = self.grad.as_chunks::<LANES>();
        for (i, g) in grad.iter().enumerate() {
            self.update_lanes(i * LANES, g, f);
        }
        for (i, g) in rest.iter().enumerate() {
            self.update_lanes(grad.len() * LANES + i, &[*g], f);
        }
    }

    /// All loads come before all stores: the compiler cannot know that the slices do not overlap.
    #[inline(always)]
    fn update_lanes<const L: usize>(&mut self, first: usize, g: &[T; L], f: &impl Fn(T, [T; N]) -> [T; N]) {
        let mut lanes: [[T; L]; N] = std::array::from_fn(|k| {
            let old = &self.written[k][first..first + L];
            std::array::from_fn(|i| old[i])
        });
        for i in 0..L {
            let new = f(g[i], std::array::from_fn(|k| lanes[k][i]));
            (0..N).for_each(|k| lanes[k][i] = new[k]);
        }
        for (written, lanes) in self.written.iter_mut().zip(&lanes) {
            written[first..first + L].copy_from_slice(lanes);
        }
    }
}

/// The tensors and numbers of one optimizer step; see [`super::Optimizer::step`].
pub struct Step<'a> {
    pub shard: &'a Shard,
    pub rows: &'a [usize],
    pub updates: &'a [u64],
    pub theta: &'a Tensor,
    pub grad: &'a Tensor,
    pub moments: &'a [Tensor],
    pub hyper: &'a Hyper,
}

impl Step<'_> {
    /// Applies `rule` to every segment of every row.
    pub fn apply<const N: usize>(&self, rule: &impl Rule<N>) -> Result<()> {
        let _time = profile::time("optimizer");
        if self.shard.columns.is_empty() {
            return Ok(());
        }
        on_device!(rule_name(rule), self.theta, gpu => self.launch(&gpu, rule), T => self.apply_as::<T, N>(rule))
    }

    #[cfg(any(feature = "cuda", test))]
    fn launch<const N: usize>(&self, gpu: &Gpu, rule: &impl Rule<N>) -> Result<()> {
        let name = rule_name(rule);
        self.check(name, N - 1)?;
        ensure!(self.theta.dtype() == DType::F32, "{name}: a GPU updates f32, not {:?}", self.theta.dtype());
        let Shard { layout, columns, .. } = self.shard;
        let (width, kept) = (self.shard.width(), columns.len());
        for Alike { first, step, count, updates } in alike(self.rows, self.updates) {
            let place = |tensor: &Tensor, element: usize| -> Result<Address> {
                Ok(gpu.at(tensor)?.offset(element * size_of::<f32>()))
            };
            let element = first * width + columns.start;
            let mut written = [place(self.theta, element)?; N];
            for (written, moment) in written[1..].iter_mut().zip(self.moments) {
                *written = place(moment, first * kept)?;
            }
            let rows = Rows { count, length: kept, pitch: step * width, pitch_of_moments: step * kept };
            let (hyper, grad) = (self.hyper, place(self.grad, element)?);
            rule.launch(gpu, &GpuRows { layout, t: updates + 1, hyper, rows, grad, written })?;
        }
        Ok(())
    }

    fn apply_as<T: Real, const N: usize>(&self, rule: &impl Rule<N>) -> Result<()> {
        let height = self.check(rule_name(rule), N - 1)?;
        let grad = read::<T>(self.grad)?;
        write(self.theta, |theta| {
            let mut written = std::array::from_fn(|_| Default::default());
            written[0] = theta;
            write_moments(self.moments, written, &mut |written| {
                self.update_rows(rule, height, &grad, written);
                Ok(())
            })
        })
    }

    fn update_rows<T: Real, const N: usize>(
        &self,
        rule: &impl Rule<N>,
        height: usize,
        grad: &[T],
        written: [&mut [T]; N],
    ) {
        let Shard { layout: Layout { segments }, columns, .. } = self.shard;
        let chosen = |row: usize| Some(self.updates[self.rows.iter().position(|&chosen| chosen == row)?] + 1);
        let update = |(row, elements): (usize, Elements<T, N>)| {
            let Some(t) = chosen(row) else { return };
            elements.for_each_part(0..segments.len(), &|s| segments[s].offset, &|s, elements| {
                rule.update(&segments[s], t, self.hyper, elements);
            });
        };
        let width = self.shard.width();
        let mut tensors = written.map(|tensor| tensor.chunks_exact_mut(tensor.len() / height));
        let rows = (0..height).map(|row| {
            let grad = &grad[row * width..][columns.clone()];
            let written = tensors.each_mut().map(|rows| {
                let row = rows.next().expect("a row of each tensor");
                // θ has all columns, a moment the shard's.
                if row.len() == columns.len() { row } else { &mut row[columns.clone()] }
            });
            (row, Elements { grad, written })
        });
        rows.collect::<Vec<_>>().into_par_iter().for_each(update);
    }

    /// Returns the number of rows of the tensors.
    fn check(&self, name: &str, moments: usize) -> Result<usize> {
        let &[height, width] = self.theta.dims() else {
            bail!("{name}: theta has shape {:?}, expected [rows, parameters]", self.theta.dims());
        };
        let (expected, kept) = (self.shard.width(), [height, self.shard.columns.len()]);
        ensure!(width == expected, "{name}: a row has {width} elements, its layout {expected}");
        ensure!(self.moments.len() == moments, "{name} keeps {moments} moments, not {}", self.moments.len());
        ensure!(
            self.updates.len() == self.rows.len() && self.rows.iter().all(|&row| row < height),
            "{name}: rows {:?} of {height} with {} update counts",
            self.rows,
            self.updates.len()
        );
        let (dtype, shape) = (self.theta.dtype(), [height, width]);
        check(name, dtype, &[("grad", self.grad, &shape)], &[("theta", self.theta, &shape)])?;
        for moment in self.moments {
            check(name, dtype, &[("theta", self.theta, &shape)], &[("a moment", moment, &kept)])?;
        }
        Ok(height)
    }
}

fn rule_name<R: Rule<N>, const N: usize>(_: &R) -> &'static str {
    R::NAME
}

/// Calls `f` with `written` and the elements of all moments behind θ, write-locked meanwhile.
fn write_moments<T: Real, const N: usize>(
    moments: &[Tensor],
    written: [&mut [T]; N],
    f: &mut dyn FnMut([&mut [T]; N]) -> Result<()>,
) -> Result<()> {
    let Some((moment, rest)) = moments.split_first() else { return f(written) };
    write(moment, |elements| {
        let mut written = written;
        written[N - moments.len()] = elements;
        write_moments(rest, written, f)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_alike_go_together() {
        let of = |rows: &[usize], updates: &[u64]| {
            let found = alike(rows, updates).into_iter();
            found.map(|Alike { first, step, count, updates }| (first, step, count, updates)).collect::<Vec<_>>()
        };
        assert_eq!(of(&[], &[]), []);
        assert_eq!(of(&[0, 1, 2, 3], &[5, 5, 5, 5]), [(0, 1, 4, 5)]);
        assert_eq!(of(&[1, 3, 5], &[5, 5, 5]), [(1, 2, 3, 5)]);
        assert_eq!(of(&[0, 1, 2, 3], &[5, 5, 6, 5]), [(0, 1, 2, 5), (2, 1, 1, 6), (3, 1, 1, 5)]);
        assert_eq!(of(&[0, 1, 3, 4], &[5; 4]), [(0, 1, 2, 5), (3, 1, 2, 5)]);
        assert_eq!(of(&[2, 0, 1], &[5; 3]), [(2, 1, 1, 5), (0, 1, 2, 5)]);
    }
}
