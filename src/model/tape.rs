//! The memory of a step: activations kept for the adjoint, and scratch.
//!
//! Everything is asked for in one place, [`Workspace::build`]. It runs over three sources of tensors: one allocates, one
//! hands out views of what was allocated (a shorter micro-batch uses the first elements of every buffer), and one
//! only counts bytes.

use super::Spec;
use super::integrator::one_step;
use crate::error::Result;
use crate::ops::access;
use candle_core::{DType, Device, Tensor};

/// What one evaluation of the field keeps for its adjoint; n = B·T. The outputs of LN and GELU are not kept: they cost
/// little to compute again.
#[derive(Clone, Debug)]
pub(super) struct Evaluation {
    /// Input [n, d]; of a block's first evaluation this is the state x_n itself.
    pub x: Tensor,
    /// Mean and reciprocal deviation of x [n, 2]
    pub stats1: Tensor,
    /// q | k | v [n, 3d]
    pub qkv: Tensor,
    /// Output of attention before its projection [n, d]
    pub att: Tensor,
    /// Log-sum-exp of attention scores [B, heads, T]
    pub lse: Tensor,
    /// Input of FF [n, d]
    pub y: Tensor,
    /// Mean and reciprocal deviation of y [n, 2]
    pub stats2: Tensor,
    /// Before GELU and the bias that it adds [n, 4d]; its output, once the adjoint has been there
    pub fc: Tensor,
}

/// Tensors whose content lives no longer than one primitive or one adjoint step.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Output of a layer norm, and the adjoint state of it [n, d]
    pub normed: Tensor,
    pub dnormed: Tensor,
    /// Adjoint state of q | k | v [n, 3d]
    pub dqkv: Tensor,
    /// Output of GELU, then its adjoint state [n, 4d]
    pub hidden: Tensor,
    /// Adjoint states inside a step of the integrator, each [n, d]
    pub adjoints: Vec<Tensor>,
}

/// All tensors that a forward pass and its adjoint write to.
#[derive(Debug)]
pub(super) struct Workspace {
    /// U32 [n]
    pub tokens: Tensor,
    /// U32 [n]
    pub targets: Tensor,
    /// x_0 … x_N, each [n, d]
    pub states: Vec<Tensor>,
    /// Of each block; with `recompute` all blocks share the tensors of one, except for its input.
    pub evaluations: Vec<Vec<Evaluation>>,
    /// Mean and reciprocal deviation of x_N [n, 2]
    pub stats_f: Tensor,
    /// A chunk of logits [chunk, V]
    pub logits: Tensor,
    /// Σ of the cross-entropy, F64 [1]
    pub loss: Tensor,
    /// λ [n, d]
    pub lambda: Tensor,
    pub scratch: Scratch,
}

/// How much a workspace holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Extent {
    /// Blocks
    pub rows: usize,
    /// B
    pub sequences: usize,
    /// Rows of the logits
    chunk: usize,
}

/// At most this many logits are held (128 MiB in f32), in chunks of equal size. Smaller chunks pass more often over the
/// gradient of the head.
const MAX_LOGITS: usize = 32 << 20;
/// The same in bf16, which GPUs alone compute in (512 MiB).
const MAX_LOGITS_BF16: usize = 256 << 20;

impl Extent {
    pub fn new(spec: &Spec, rows: usize, sequences: usize) -> Extent {
        let n = sequences * spec.context;
        let most = if spec.dtype == DType::BF16 { MAX_LOGITS_BF16 } else { MAX_LOGITS };
        let chunks = n.div_ceil((most / spec.vocab).max(1));
        Extent { rows, sequences, chunk: n.div_ceil(chunks) }
    }

    /// Rows of the logits that are held.
    pub fn chunk(self) -> usize {
        self.chunk
    }

    /// The part of this extent that fewer sequences use.
    pub fn first(self, spec: &Spec, sequences: usize) -> Extent {
        Extent { sequences, chunk: self.chunk.min(sequences * spec.context), ..self }
    }
}

/// Gives a tensor of a dtype and shape.
type Source<'a> = &'a mut dyn FnMut(DType, &[usize]) -> Result<Tensor>;

/// Asks a source for tensors of the net's dtype and for sums over such.
struct Buffers<'a> {
    dtype: DType,
    source: Source<'a>,
}

impl Buffers<'_> {
    fn real(&mut self, shape: &[usize]) -> Result<Tensor> {
        (self.source)(self.dtype, shape)
    }
    fn sums(&mut self, shape: &[usize]) -> Result<Tensor> {
        (self.source)(access::sums(self.dtype), shape)
    }
}

/// The buffers of a workspace, in the order in which [`Workspace::build`] asks for them.
pub(super) fn allocate(spec: &Spec, extent: Extent, dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let mut buffers = Vec::new();
    Workspace::build(spec, extent, dtype, &mut |dtype, shape| {
        let buffer = Tensor::zeros(shape, dtype, device)?;
        buffers.push(buffer.clone());
        Ok(buffer)
    })?;
    Ok(buffers)
}

/// Bytes that [`allocate`] takes.
pub(super) fn bytes(spec: &Spec, extent: Extent, dtype: DType) -> Result<u64> {
    let mut bytes = 0;
    Workspace::build(spec, extent, dtype, &mut |dtype, shape| {
        bytes += shape.iter().product::<usize>() as u64 * dtype.size_in_bytes() as u64;
        Ok(Tensor::zeros(0, dtype, &Device::Cpu)?)
    })?;
    Ok(bytes)
}

impl Workspace {
    /// A workspace in the first elements of buffers that were allocated for at least `extent`.
    pub fn view(spec: &Spec, extent: Extent, dtype: DType, buffers: &[Tensor]) -> Result<Workspace> {
        let mut buffers = buffers.iter();
        Workspace::build(spec, extent, dtype, &mut |_, shape| {
            let buffer = buffers.next().expect("a buffer for each tensor of the workspace").flatten_all()?;
            Ok(buffer.narrow(0, 0, shape.iter().product())?.reshape(shape)?)
        })
    }

    fn build(spec: &Spec, extent: Extent, dtype: DType, source: Source) -> Result<Workspace> {
        let (n, d) = (extent.sequences * spec.context, spec.width);
        let (tokens, targets) = (source(DType::U32, &[n])?, source(DType::U32, &[n])?);
        let mut asked = Buffers { dtype, source };
        let states = (0..=extent.rows).map(|_| asked.real(&[n, d])).collect::<Result<Vec<_>>>()?;
        let inputs = &states[..extent.rows];
        let evaluations = match inputs {
            [first, ..] if spec.recompute => {
                let shared = Evaluation::of_block(spec, extent, first, &mut asked)?;
                inputs.iter().map(|x| with_input(&shared, x)).collect()
            }
            _ => inputs.iter().map(|x| Evaluation::of_block(spec, extent, x, &mut asked)).collect::<Result<_>>()?,
        };
        let method = one_step(spec.integrator);
        Ok(Workspace {
            tokens,
            targets,
            evaluations,
            states,
            stats_f: asked.sums(&[n, 2])?,
            logits: asked.real(&[extent.chunk, spec.vocab])?,
            loss: (asked.source)(DType::F64, &[1])?,
            lambda: asked.real(&[n, d])?,
            scratch: Scratch {
                normed: asked.real(&[n, d])?,
                dnormed: asked.real(&[n, d])?,
                dqkv: asked.real(&[n, 3 * d])?,
                hidden: asked.real(&[n, 4 * d])?,
                adjoints: (0..method.adjoint_states()).map(|_| asked.real(&[n, d])).collect::<Result<_>>()?,
            },
        })
    }
}

impl Evaluation {
    /// The evaluations of one block with input `x`.
    fn of_block(spec: &Spec, extent: Extent, x: &Tensor, asked: &mut Buffers) -> Result<Vec<Evaluation>> {
        let (n, d) = (extent.sequences * spec.context, spec.width);
        let evaluation = |index| {
            Ok(Evaluation {
                x: if index == 0 { x.clone() } else { asked.real(&[n, d])? },
                stats1: asked.sums(&[n, 2])?,
                qkv: asked.real(&[n, 3 * d])?,
                att: asked.real(&[n, d])?,
                lse: asked.sums(&[extent.sequences, spec.heads, spec.context])?,
                y: asked.real(&[n, d])?,
                stats2: asked.sums(&[n, 2])?,
                fc: asked.real(&[n, 4 * d])?,
            })
        };
        (0..one_step(spec.integrator).evaluations()).map(evaluation).collect()
    }
}

/// The same tensors for a block with another input.
fn with_input(evaluations: &[Evaluation], x: &Tensor) -> Vec<Evaluation> {
    let mut evaluations = evaluations.to_vec();
    evaluations[0].x = x.clone();
    evaluations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predicted_bytes_are_allocated() {
        for recompute in [false, true] {
            let spec = Spec { recompute, ..Spec::small() };
            let extent = Extent::new(&spec, 3, 2);
            let buffers = allocate(&spec, extent, DType::F32, &Device::Cpu).unwrap();
            let allocated: usize = buffers.iter().map(|b| b.elem_count() * b.dtype().size_in_bytes()).sum();
            assert_eq!(bytes(&spec, extent, DType::F32).unwrap(), allocated as u64);
        }
    }

    #[test]
    fn recompute_keeps_the_states_and_one_block() {
        let kept = |rows, recompute| {
            let spec = Spec { recompute, ..Spec::small() };
            bytes(&spec, Extent::new(&spec, rows, 1), DType::F32).unwrap()
        };
        let spec = Spec::small();
        assert_eq!(kept(9, true) - kept(8, true), 4 * (spec.context * spec.width) as u64);
        assert_eq!(kept(1, true), kept(1, false));
        assert!(kept(9, false) - kept(8, false) > 10 * (kept(9, true) - kept(8, true)));
    }

    #[test]
    fn logits_come_in_equal_chunks() {
        let chunk = |vocab, sequences| {
            let spec = Spec { vocab, context: 256, ..Spec::small() };
            Extent::new(&spec, 1, sequences).chunk
        };
        assert_eq!(chunk(257, 4), 1024);
        assert_eq!(chunk(50_257, 4), 512);
        assert_eq!(chunk(usize::MAX / 2, 1), 1);
        let spec = Spec { vocab: 50_304, context: 1024, dtype: DType::BF16, ..Spec::small() };
        assert_eq!(Extent::new(&spec, 1, 8).chunk, 4096);
    }
}
