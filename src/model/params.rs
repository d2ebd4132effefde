//! Views of the parameters, or of the gradients, of one net.

use super::{Layout, Spec};
use crate::error::{Context, Result, ensure};
use crate::ops::access;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// One block's parameters θ_n, views into a row of the trajectory. Linear weights are [outputs, inputs].
#[derive(Clone, Debug)]
pub(super) struct BlockParams {
    /// [2, d]: weight, bias
    pub ln1: Tensor,
    pub qkv: Linear,
    pub attn_proj: Linear,
    /// [2, d]
    pub ln2: Tensor,
    pub fc: Linear,
    pub mlp_proj: Linear,
}

#[derive(Clone, Debug)]
pub(super) struct Linear {
    pub weight: Tensor,
    pub bias: Tensor,
}

/// The parameters outside the blocks, views into the ends.
#[derive(Clone, Debug)]
pub(super) struct EndsParams {
    /// Token embedding [V, d]
    pub wte: Tensor,
    /// Position embedding [T, d]
    pub wpe: Tensor,
    /// [2, d]
    pub ln_f: Tensor,
    /// [V, d]; `wte` itself if tied
    pub head: Tensor,
}

/// Views of the parameters (or, alike, the gradients) of one net: a list of trajectory rows and the ends.
#[derive(Clone, Debug)]
pub struct Params {
    pub(super) blocks: Vec<BlockParams>,
    pub(super) ends: EndsParams,
    /// The rows that these are views of, each run of neighbours [_, P] as one tensor.
    storage_of_rows: Vec<Tensor>,
    /// The same of the ends, [1, E].
    storage_of_ends: Tensor,
    /// Step size of a net of these rows.
    pub h: f64,
}

impl Params {
    /// Views, no copies, of `rows` of `trajectory` [_, P] and of `ends` [1, E]; `h` is the step size of a net of these
    /// rows.
    pub fn view(spec: &Spec, trajectory: &Tensor, rows: &[usize], ends: &Tensor, h: f64) -> Result<Params> {
        let layout = Layout::block(spec);
        let blocks = rows.iter().map(|&row| block(&layout, trajectory, row)).collect::<Result<_>>()?;
        let runs = rows.chunk_by(|row, next| *next == row + 1);
        let storage_of_rows = runs.map(|run| trajectory.narrow(0, run[0], run.len()));
        let storage_of_rows = storage_of_rows.collect::<candle_core::Result<_>>()?;
        let storage_of_ends = ends.clone();
        let mut ends = segments(&Layout::ends(spec), ends, 0).context("the ends")?.into_iter();
        let mut next = || ends.next().expect("segments of Layout::ends");
        let (wte, wpe, ln_f) = (next(), next(), next());
        let head = if spec.tied { wte.clone() } else { next() };
        Ok(Params { blocks, ends: EndsParams { wte, wpe, ln_f, head }, storage_of_rows, storage_of_ends, h })
    }

    /// The same net for sequences of at most `context` tokens: it has no positions after them.
    pub fn with_context(mut self, context: usize) -> Result<Params> {
        self.ends.wpe = self.ends.wpe.narrow(0, 0, context)?;
        Ok(self)
    }

    /// T: tokens in a sequence.
    pub fn context(&self) -> Result<usize> {
        Ok(self.ends.wpe.dim(0)?)
    }

    /// Number of blocks.
    pub fn rows(&self) -> usize {
        self.blocks.len()
    }

    /// What these are views of: where it begins and ends says where each of them does.
    pub(super) fn storage(&self) -> impl Iterator<Item = &Tensor> {
        self.storage_of_rows.iter().chain([&self.storage_of_ends])
    }
}

/// Copies of parameters in the element type that a net computes in: θ itself stays f32, products take bf16.
pub struct Rounded {
    spec: Spec,
    /// [N, P]
    blocks: Tensor,
    /// [1, E]
    ends: Tensor,
    /// Views of the first rows for a number of blocks and a context, made when first used.
    views: HashMap<[usize; 2], Params>,
}

impl Rounded {
    /// Room for nets of up to `spec.depth` blocks in `spec.dtype`.
    pub fn new(spec: &Spec, device: &Device) -> Result<Rounded> {
        let zeros = |rows, layout: Layout| Tensor::zeros((rows, layout.len()), spec.dtype, device);
        let (blocks, ends) = (zeros(spec.depth, Layout::block(spec))?, zeros(1, Layout::ends(spec))?);
        Ok(Rounded { spec: spec.clone(), blocks, ends, views: HashMap::new() })
    }

    /// `params` rounded, as they are now. They take the place of those that were rounded before.
    pub fn copy_of(&mut self, params: &Params) -> Result<&Params> {
        let Rounded { spec, blocks, ends, views } = self;
        let (rows, context) = (params.rows(), params.context()?);
        let rounded = match views.entry([rows, context]) {
            Entry::Occupied(view) => view.into_mut(),
            Entry::Vacant(empty) => {
                let rows: Vec<usize> = (0..rows).collect();
                empty.insert(Params::view(spec, blocks, &rows, ends, params.h)?.with_context(context)?)
            }
        };
        rounded.h = params.h;
        let mut first = 0;
        for exact in &params.storage_of_rows {
            let count = exact.dim(0)?;
            access::cast(exact, &blocks.narrow(0, first, count)?)?; // =
            first += count;
        }
        access::cast(&params.storage_of_ends, ends)?; // =
        Ok(rounded)
    }

    /// Bytes that [`Rounded::new`] takes.
    pub fn bytes(spec: &Spec) -> u64 {
        let elements = spec.depth * Layout::block(spec).len() + Layout::ends(spec).len();
        (elements * spec.dtype.size_in_bytes()) as u64
    }
}

fn block(layout: &Layout, trajectory: &Tensor, row: usize) -> Result<BlockParams> {
    let mut views =
        segments(layout, trajectory, row).with_context(|| format!("row {row} of the trajectory"))?.into_iter();
    let mut next = || views.next().expect("segments of Layout::block");
    let ln1 = next();
    let qkv = Linear { weight: next(), bias: next() };
    let attn_proj = Linear { weight: next(), bias: next() };
    let ln2 = next();
    let fc = Linear { weight: next(), bias: next() };
    let mlp_proj = Linear { weight: next(), bias: next() };
    Ok(BlockParams { ln1, qkv, attn_proj, ln2, fc, mlp_proj })
}

/// A view of every segment of one row of `tensor` [rows, layout.len()].
fn segments(layout: &Layout, tensor: &Tensor, row: usize) -> Result<Vec<Tensor>> {
    let (rows, len) = tensor.dims2()?;
    ensure!(
        len == layout.len() && row < rows && tensor.is_contiguous(),
        "expected a contiguous tensor [> {row}, {}], got {:?}",
        layout.len(),
        tensor.layout(),
    );
    let flat = tensor.get(row)?;
    let view = |s: &super::Segment| Ok(flat.narrow(0, s.offset, s.len())?.reshape(s.shape.as_slice())?);
    layout.segments.iter().map(view).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};
    use candle_core::DType;

    #[test]
    fn a_view_shares_the_storage_of_its_row() {
        let spec = Spec::small();
        let layout = Layout::block(&spec);
        let trajectory = Tensor::zeros((4, layout.len()), DType::F32, &Device::Cpu).unwrap();
        let ends = Tensor::zeros((1, Layout::ends(&spec).len()), DType::F32, &Device::Cpu).unwrap();
        let params = Params::view(&spec, &trajectory, &[1, 3], &ends, 2.0).unwrap();
        assert_eq!(params.rows(), 2);

        access::fill(&params.blocks[1].fc.weight, 1.0).unwrap();
        let fc = layout.segments.iter().find(|s| s.name == "mlp/fc/weight").unwrap();
        for row in 0..4 {
            let values = trajectory.get(row).unwrap().to_vec1::<f32>().unwrap();
            for (i, value) in values.iter().enumerate() {
                let inside = row == 3 && (fc.offset..fc.offset + fc.len()).contains(&i);
                assert_eq!(*value, if inside { 1.0 } else { 0.0 }, "row {row}, element {i}");
            }
        }
    }

    #[test]
    fn rounded_parameters_are_those_of_the_net() {
        let spec = Spec { dtype: DType::BF16, ..Spec::small() };
        let trajectory = random(&[4, Layout::block(&spec).len()], DType::F32, 1);
        let ends = random(&[1, Layout::ends(&spec).len()], DType::F32, 2);
        let mut rounded = Rounded::new(&spec, &Device::Cpu).unwrap();
        for rows in [&[0, 1, 3][..], &[2], &[0, 2], &[3, 1, 2]] {
            let params = Params::view(&spec, &trajectory, rows, &ends, 0.5).unwrap();
            let copy = rounded.copy_of(&params).unwrap();
            assert_eq!((copy.rows(), copy.h), (rows.len(), 0.5));
            let same = |exact: &Tensor, copy: &Tensor| {
                let exact = exact.to_dtype(DType::BF16).unwrap();
                assert_close(&exact, copy, 0.0);
            };
            for (exact, copy) in params.blocks.iter().zip(&copy.blocks) {
                same(&exact.ln1, &copy.ln1);
                same(&exact.mlp_proj.bias, &copy.mlp_proj.bias);
            }
            same(&params.ends.wte, &copy.ends.wte);
            same(&params.ends.ln_f, &copy.ends.ln_f);
        }
    }

    #[test]
    fn a_wrong_shape_is_an_error() {
        let spec = Spec::small();
        let trajectory = Tensor::zeros((2, Layout::block(&spec).len()), DType::F32, &Device::Cpu).unwrap();
        let ends = Tensor::zeros((1, Layout::ends(&spec).len()), DType::F32, &Device::Cpu).unwrap();
        assert!(Params::view(&spec, &trajectory, &[2], &ends, 1.0).is_err());
        assert!(Params::view(&spec, &ends, &[0], &ends, 1.0).is_err());
        assert!(Params::view(&Spec { tied: false, ..spec }, &trajectory, &[0], &ends, 1.0).is_err());
    }
}
