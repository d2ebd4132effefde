//! Every op on a GPU against its CPU twin, on shapes that are no multiples of any tile.
use crate::ops::matrix::Factors;
use crate::ops::testing::{assert_gpu_equals_cpu, on_gpu, random, random_indices, values};
use crate::ops::{access, attention, classifier, embedding, gelu, layer_norm, linear, norm, residual};
use candle_core::{DType, Device, Tensor};

fn inputs(shape: &[usize], seed: u64) -> Tensor {
    random(shape, DType::F64, seed)
}

#[test]
fn elementwise() {
    for n in [1, 31, 4096, 5003] {
        let [x, y] = [(inputs(&[n], 1) * 4.0).unwrap(), inputs(&[n], 2)];
        assert_gpu_equals_cpu(&format!("fill, copy, sums of states [{n}]"), [1e-6, 1e-2], |place| {
            let [x, y] = [place.input(&x), place.input(&y)];
            let [filled, copied, combined] = [place.unset(&[n]), place.unset(&[n]), place.unset(&[n])];
            access::fill(&filled, 0.75).unwrap();
            access::copy(&x, &copied).unwrap();
            residual::combine(2.0, &x, -0.5, &y, &combined).unwrap();
            residual::scale_add(0.25, &y, 3.0, &x).unwrap();
            vec![filled, copied, combined, y]
        });
    }
}

#[test]
fn gelu_of_rows() {
    for shape @ [_, w] in [[1, 1], [3, 31], [130, 4096], [7, 5003]] {
        let [x, b, dy] = [(inputs(&shape, 1) * 4.0).unwrap(), inputs(&[w], 2), inputs(&shape, 3)];
        assert_gpu_equals_cpu(&format!("gelu {shape:?}"), [1e-6, 1e-2], |place| {
            let [x, b, d, out] = [place.input(&x), place.input(&b), place.input(&dy), place.unset(&shape)];
            gelu::forward(&x, &b, &out).unwrap();
            gelu::backward(&x, &b, &d).unwrap();
            vec![out, d, x]
        });
    }
}

#[test]
fn gelu_far_out_and_nan() {
    let x = Tensor::new(&[[-1e30, -50.0, 0.0, 50.0, 1e9, f64::NAN]], &Device::Cpu).unwrap();
    assert_gpu_equals_cpu("gelu far out", [1e-6, 1e-2], |place| {
        let [x, d, b, out] = [place.input(&x), place.unset(&[1, 6]), place.unset(&[6]), place.unset(&[1, 6])];
        access::fill(&d, 1.0).unwrap();
        access::fill(&b, 0.0).unwrap();
        gelu::forward(&x, &b, &out).unwrap();
        let from_2 = |tensor: &Tensor| tensor.flatten_all().unwrap().narrow(0, 2, 4).unwrap().reshape((1, 4)).unwrap();
        gelu::backward(&from_2(&x), &b.narrow(0, 2, 4).unwrap(), &from_2(&d)).unwrap();
        vec![out, d]
    });
}

#[test]
fn layer_norm_of_rows() {
    for [n, d] in [[1, 2], [5, 3], [7, 65], [300, 40], [3, 768], [130, 264]] {
        let [x, ln, dy] = [(inputs(&[n, d], 1) + 3.0).unwrap(), inputs(&[2, d], 2), inputs(&[n, d], 3)];
        let old = inputs(&[n, d], 4);
        assert_gpu_equals_cpu(&format!("layer_norm [{n}, {d}]"), [1e-5, 1e-2], |place| {
            let [x, ln, dy, dx] = [&x, &ln, &dy, &old].map(|x| place.input(x));
            let [out, again, stats] = [place.unset(&[n, d]), place.unset(&[n, d]), place.unset_sums(&[n, 2])];
            let dln = place.sums_of(2.0, &[2, d]);
            layer_norm::forward(&x, &ln, &out, &stats).unwrap();
            layer_norm::normalize(&x, &ln, &stats, &again).unwrap();
            layer_norm::backward(&dy, &x, &ln, &stats, &dx, &dln).unwrap();
            vec![out, stats, again, dx, dln]
        });
    }
}

#[test]
fn linear_maps() {
    // Where all are multiples of 8 the product takes the bias.
    for [n, i, o] in [[1, 1, 1], [3, 5, 2], [65, 33, 17], [130, 24, 72], [64, 24, 72], [8, 8, 8], [300, 16, 257]] {
        let [x, w, b, dy] = [inputs(&[n, i], 1), inputs(&[o, i], 2), inputs(&[o], 3), inputs(&[n, o], 4)];
        assert_gpu_equals_cpu(&format!("linear [{n}, {i}] → {o}"), [1e-5, 1e-2], |place| {
            let [x, w, b, dy, old] = [&x, &w, &b, &dy, &dy].map(|x| place.input(x));
            let [out, onto, dx] = [place.unset(&[n, o]), place.unset(&[n, o]), place.unset(&[n, i])];
            let [dw, db] = [place.sums_of(2.0, &[o, i]), place.sums_of(-1.0, &[o])];
            linear::forward(Factors::Exact, &x, &w, Some(&b), 1.0, None, &out).unwrap();
            linear::forward(Factors::Exact, &x, &w, Some(&b), 0.5, Some(&old), &old).unwrap();
            linear::forward(Factors::Exact, &x, &w, Some(&b), 1.0, Some(&dy), &onto).unwrap();
            linear::backward_input(Factors::Exact, &dy, &w, 0.25, 0.0, &dx).unwrap();
            linear::backward_weight(Factors::Exact, &dy, &x, 0.5, &dw, Some(&db)).unwrap();
            linear::backward_weight(Factors::Exact, &dy, &x, -1.0, &dw, None).unwrap();
            vec![out, old, onto, dx, dw, db]
        });
    }
}

/// Sequences, context, vocabulary, width.
#[test]
fn embeddings() {
    for [b, t, v, d] in [[1, 1, 1, 1], [2, 3, 5, 7], [3, 40, 257, 64], [1, 300, 17, 72], [5, 9, 70_000, 8]] {
        let [wte, wpe, dx] = [inputs(&[v, d], 1), inputs(&[t, d], 2), inputs(&[b * t, d], 3)];
        let tokens = random_indices(b * t, v, 4);
        assert_gpu_equals_cpu(&format!("embedding [{b} · {t}, {d}] of {v}"), [1e-5, 1e-2], |place| {
            let [wte, wpe, dx, tokens] =
                [place.input(&wte), place.input(&wpe), place.input(&dx), place.indices(&tokens)];
            let [out, dwte, dwpe] =
                [place.unset(&[b * t, d]), place.sums_of(2.0, &[v, d]), place.sums_of(1.0, &[t, d])];
            embedding::forward(&tokens, &wte, &wpe, &out).unwrap();
            embedding::backward(&tokens, &dx, &dwte, &dwpe).unwrap();
            vec![out, dwte, dwpe]
        });
    }
}

/// Sequences, context, heads, head_dim.
#[test]
fn causal_attention() {
    for [b, t, h, k] in [
        [1, 1, 1, 1],
        [2, 1, 3, 4],
        [1, 7, 1, 5],
        [2, 65, 2, 8],
        [1, 130, 1, 33],
        [1, 64, 1, 64],
        [1, 100, 2, 64],
        [1, 70, 1, 128],
        [1, 33, 1, 72],
        [1, 150, 2, 32],
        [1, 200, 1, 64],
        [2, 140, 1, 128],
    ] {
        let [qkv, dout] = [(inputs(&[b * t, 3 * h * k], 1) * 2.0).unwrap(), inputs(&[b * t, h * k], 2)];
        assert_gpu_equals_cpu(&format!("attention [{b}, {t}, {h} · {k}]"), [1e-5, 1.5e-2], |place| {
            let [qkv, dout] = [place.input(&qkv), place.input(&dout)];
            let [out, dqkv] = [place.unset(dout.dims()), place.unset(qkv.dims())];
            let lse = place.unset_sums(&[b, h, t]);
            attention::forward(Factors::Exact, &qkv, t, h, &out, &lse).unwrap();
            attention::backward(Factors::Exact, &qkv, &out, &lse, &dout, t, h, &dqkv).unwrap();
            vec![out, lse, dqkv]
        });
    }
}

#[test]
fn a_head_that_no_tile_holds_is_refused() {
    let refused = on_gpu(|device| {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device).unwrap();
        let [qkv, out, lse] = [zeros(&[2, 3 * 136]), zeros(&[2, 136]), zeros(&[1, 1, 2])];
        attention::forward(Factors::Exact, &qkv, 2, 1, &out, &lse).unwrap_err().to_string()
    });
    assert!(refused.is_none_or(|error| error.contains("at most 128 elements, these have 136")));
}

/// Rows, width, vocabulary, rows of a chunk.
#[test]
fn classifier_in_chunks() {
    for [n, d, v, chunk] in [[1, 1, 1, 1], [5, 3, 7, 2], [6, 9, 257, 3], [20, 16, 1304, 64], [9, 8, 5003, 4]] {
        let [x, w] = [inputs(&[n, d], 1), (inputs(&[v, d], 2) * 2.0).unwrap()];
        let targets = random_indices(n, v, 3);
        assert_gpu_equals_cpu(&format!("classifier [{n}, {d}] → {v}"), [1e-5, 1e-2], |place| {
            let [x, w, targets] = [place.input(&x), place.input(&w), place.indices(&targets)];
            let [logits, dx, dw] = [place.unset(&[chunk, v]), place.unset(&[n, d]), place.sums_of(2.0, &[v, d])];
            let total = Tensor::zeros(1, DType::F64, &place.device).unwrap();
            let loss = classifier::loss(Factors::Exact, &x, &w, &targets, &logits).unwrap();
            classifier::loss_and_gradient(Factors::Exact, &x, &w, &targets, 0.5, &logits, &total, &dx, &dw).unwrap();
            assert_eq!(loss, values(&total)[0]);
            vec![dx, dw, total]
        });
    }
}

#[test]
fn sums_of_squares() {
    for n in [0, 1, 33, 70_003, 65_536] {
        let x = inputs(&[n], 1);
        assert_gpu_equals_cpu(&format!("sum of squares [{n}]"), [1e-7, 1e-7], |place| {
            vec![Tensor::new(norm::sum_of_squares(&[place.input(&x)]).unwrap(), &Device::Cpu).unwrap()]
        });
    }
    // More than one launch takes.
    let parts: Vec<Tensor> = [3, 70_003, 1].into_iter().chain(1..100).map(|n| inputs(&[n], n as u64)).collect();
    assert_gpu_equals_cpu("sum of squares of several", [1e-7, 1e-7], |place| {
        let parts: Vec<Tensor> = parts.iter().map(|x| place.input(x)).collect();
        vec![Tensor::new(norm::sum_of_squares(&parts).unwrap(), &Device::Cpu).unwrap()]
    });
}

#[test]
fn casts_are_the_cpus() {
    for n in [1, 64, 1003] {
        let x = (inputs(&[n], 1) * 1e3).unwrap().to_dtype(DType::F32).unwrap();
        let cast = |device: &Device| {
            let x = x.to_device(device).unwrap();
            let rounded = Tensor::zeros(n, DType::BF16, device).unwrap();
            let back = Tensor::zeros(n, DType::F32, device).unwrap();
            access::cast(&x, &rounded).unwrap();
            access::cast(&rounded, &back).unwrap();
            assert_eq!(values(&rounded), values(&back));
            values(&back)
        };
        let expected = cast(&Device::Cpu);
        assert!(expected.iter().zip(values(&x)).all(|(b, x)| (b - x).abs() <= x.abs() / 256.0));
        assert!(on_gpu(cast).is_none_or(|values| values == expected));
    }
}

#[test]
fn indices_out_of_range_give_nan_and_leave_the_rest_alone() {
    let outputs = on_gpu(|device| {
        let place = |shape: &[usize]| Tensor::ones(shape, DType::F32, device).unwrap();
        let (tokens, out) = (Tensor::new(&[1u32, 9, 0], device).unwrap(), place(&[3, 2]));
        embedding::forward(&tokens, &place(&[2, 2]), &place(&[3, 2]), &out).unwrap();
        let [dwte, dwpe] = [place(&[2, 2]), place(&[3, 2])];
        embedding::backward(&tokens, &place(&[3, 2]), &dwte, &dwpe).unwrap();
        let loss = classifier::loss(
            Factors::Exact,
            &out.narrow(0, 0, 1).unwrap(),
            &place(&[2, 2]),
            &Tensor::new(&[7u32], device).unwrap(),
            &place(&[1, 2]),
        );
        [values(&out), values(&dwte), vec![loss.unwrap()]].map(|x| x.iter().map(|x| x.to_string()).collect::<Vec<_>>())
    });
    let expected = [vec!["2", "2", "NaN", "NaN", "2", "2"], vec!["2"; 4], vec!["NaN"]];
    assert!(outputs.is_none_or(|outputs| outputs == expected));
}
