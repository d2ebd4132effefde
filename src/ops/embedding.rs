//! Token and position embedding.
use super::access::{check, check_indices, check_mixed, matrix_shape, on_device, read, write};
#[cfg(any(feature = "cuda", test))]
use super::cuda;
use super::matrix::MatMut;
use super::profile;
use super::real::{Real, rows_per_piece};
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// out[i] = wte[tokens[i]] + wpe[i mod T]   (=).  tokens U32 [n], wte [V, d], wpe [T, d], out [n, d].
pub fn forward(tokens: &Tensor, wte: &Tensor, wpe: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "embedding::forward";
    let _time = profile::time(OP);
    let n = tokens.elem_count();
    let (vocab, d) = matrix_shape(OP, "wte", wte)?;
    let (context, _) = matrix_shape(OP, "wpe", wpe)?;
    check(OP, DType::U32, &[("tokens", tokens, &[n])], &[])?;
    check(OP, wte.dtype(), &[("wte", wte, &[vocab, d]), ("wpe", wpe, &[context, d])], &[("out", out, &[n, d])])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let (element, d) = (gpu.element(OP, out)?, cuda::length(OP, "width", d)?);
        let (tokens, wte, wpe, out) = (gpu.at(tokens)?, gpu.at(wte)?, gpu.at(wpe)?, gpu.at(out)?);
        Ok(unsafe {
            (k.embedding_forward)(element, tokens, wte, wpe, out, n, vocab as u32, context as u32, d, stream)
        })
    }), T => {
        let (tokens, wte, wpe) = (read::<u32>(tokens)?, read::<T>(wte)?, read::<T>(wpe)?);
        check_indices(OP, "token", &tokens, vocab)?;
        write(out, |out: &mut [T]| {
            let rows = out.par_chunks_mut(d).zip(tokens.par_iter()).enumerate();
            rows.with_min_len(rows_per_piece(d)).for_each(|(i, (out, &token))| {
                let (token, position) = (token as usize, i % context);
                let sources = wte[token * d..][..d].iter().zip(&wpe[position * d..][..d]);
                out.iter_mut().zip(sources).for_each(|(out, (&t, &p))| *out = t + p);
            });
            Ok(())
        })
    })
}

/// dwte[tokens[i]] += dx[i];  dwpe[i mod T] += dx[i]. dwte, dwpe may be views of one storage. Deterministic for any
/// number of threads.
pub fn backward(tokens: &Tensor, dx: &Tensor, dwte: &Tensor, dwpe: &Tensor) -> Result<()> {
    const OP: &str = "embedding::backward";
    let _time = profile::time(OP);
    let n = tokens.elem_count();
    let (vocab, d) = matrix_shape(OP, "dwte", dwte)?;
    let (context, _) = matrix_shape(OP, "dwpe", dwpe)?;
    check(OP, DType::U32, &[("tokens", tokens, &[n])], &[])?;
    check_mixed(OP, dx.dtype(), &["dwte"], &[("dx", dx, &[n, d])], &[("dwte", dwte, &[vocab, d])])?;
    check_mixed(OP, dx.dtype(), &["dwpe"], &[("dx", dx, &[n, d])], &[("dwpe", dwpe, &[context, d])])?;
    on_device!(OP, dx, gpu => gpu.launch(OP, |k, stream| {
        let (element, d) = (gpu.element(OP, dx)?, cuda::length(OP, "width", d)?);
        let [scratch] = gpu.scratch([unsafe { (k.embedding_backward_scratch)(n) }])?;
        let (tokens, dx, dwte, dwpe) = (gpu.at(tokens)?, gpu.at(dx)?, gpu.at(dwte)?, gpu.at(dwpe)?);
        let (vocab, context) = (vocab as u32, context as u32);
        Ok(unsafe { (k.embedding_backward)(element, tokens, dx, dwte, dwpe, n, vocab, context, d, scratch, stream) })
    }), T => {
        let (tokens, dx) = (read::<u32>(tokens)?, read::<T>(dx)?);
        check_indices(OP, "token", &tokens, vocab)?;
        write(dwte, |dwte: &mut [T]| {
            add_to_rows(&dx, |i| tokens[i] as usize, MatMut::new(dwte, d));
            Ok(())
        })?;
        write(dwpe, |dwpe: &mut [T]| {
            add_to_rows(&dx, |i| i % context, MatMut::new(dwpe, d));
            Ok(())
        })
    })
}

/// sums[index(i)] += x[i], a task for each strip of columns, so that every sum is taken in the order of i.
fn add_to_rows<T: Real>(x: &[T], index: impl Fn(usize) -> usize + Sync, sums: MatMut<T>) {
    const STRIP: usize = 64;
    let d = sums.cols();
    (0..d.div_ceil(STRIP)).into_par_iter().for_each(|strip| {
        let columns = strip * STRIP..((strip + 1) * STRIP).min(d);
        // SAFETY: strips do not overlap.
        let mut sums = unsafe { sums.disjoint_block(0..sums.rows(), columns.clone()) };
        for (i, x) in x.chunks_exact(d).enumerate() {
            sums.row(index(i)).iter_mut().zip(&x[columns.clone()]).for_each(|(sum, &x)| *sum += x);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    /// Sequences, context, vocabulary, width.
    const SHAPES: [[usize; 4]; 4] = [[1, 1, 1, 1], [2, 3, 5, 7], [3, 4, 50, 65], [2, 300, 300, 130]];

    fn inputs([b, t, v, d]: [usize; 4], dtype: DType) -> (Tensor, [Tensor; 3]) {
        let weights = [random(&[v, d], dtype, 1), random(&[t, d], dtype, 2), random(&[b * t, d], dtype, 3)];
        (random_indices(b * t, v, 4), weights)
    }

    fn embed(tokens: &Tensor, wte: &Tensor, wpe: &Tensor) -> Tensor {
        let out = unset(&[tokens.elem_count(), wte.dims()[1]], wte.dtype());
        forward(tokens, wte, wpe, &out).unwrap();
        out
    }

    fn gradients(tokens: &Tensor, [wte, wpe, dx]: &[Tensor; 3]) -> [Tensor; 2] {
        let [dwte, dwpe] = [constant(2.0, wte.dims(), dx.dtype()), constant(2.0, wpe.dims(), dx.dtype())];
        backward(tokens, dx, &dwte, &dwpe).unwrap();
        [plus(&dwte, -2.0), plus(&dwpe, -2.0)]
    }

    #[test]
    fn forward_selects_and_backward_is_the_gradient() {
        for shape @ [b, ..] in SHAPES {
            let (tokens, weights) = inputs(shape, DType::F64);
            let [wte, wpe, dx] = &weights;
            let positions = Tensor::cat(&vec![wpe; b], 0).unwrap();
            let selected = (wte.index_select(&tokens, 0).unwrap() + positions).unwrap();
            assert_close(&embed(&tokens, wte, wpe), &selected, 0.0);
            let gradients64 = gradients(&tokens, &weights);
            let loss = |inputs: &[Tensor]| inner(&embed(&tokens, &inputs[0], &inputs[1]), dx);
            assert_gradients(loss, &[wte.clone(), wpe.clone()], &gradients64);
            let (tokens, weights) = inputs(shape, DType::F32);
            assert_all_close(&gradients(&tokens, &weights), &gradients64, 1e-5);
        }
    }

    #[test]
    fn gradients_may_share_a_storage_and_do_not_depend_on_threads() {
        let (tokens, [wte, _, dx]) = inputs([2, 5, 9, 200], DType::F32);
        assert_independent_of_threads(|| {
            let ends = constant(0.0, &[14, 200], DType::F32);
            backward(&tokens, &dx, &ends.narrow(0, 0, 9).unwrap(), &ends.narrow(0, 9, 5).unwrap()).unwrap();
            let apart = gradients(&tokens, &[wte.clone(), ends.narrow(0, 9, 5).unwrap(), dx.clone()]);
            assert_close(&ends, &Tensor::cat(&apart, 0).unwrap(), 1e-5);
            vec![ends]
        });
    }

    #[test]
    fn a_token_out_of_range_is_named() {
        let (_, [wte, wpe, out]) = inputs([1, 3, 5, 2], DType::F32);
        let tokens = Tensor::new(&[0u32, 5, 1], &candle_core::Device::Cpu).unwrap();
        let wrong = forward(&tokens, &wte, &wpe, &out).unwrap_err().to_string();
        assert!(wrong.contains("token 5 at position 1 is not below the vocabulary's 5"), "{wrong}");
    }
}
