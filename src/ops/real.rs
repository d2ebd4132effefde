//! The element types of the kernels, and what kernels share: vectorisation, scratch memory, the size of a piece of work.
use super::bf16;
use super::matrix::{Mat, MatMut};
use super::packed::Product;
use candle_core::{CpuStorage, WithDType};
use std::cell::RefCell;
use std::ops::{Neg, Range};
use std::thread::LocalKey;

/// f32, and f64 for verification.
pub trait Real: WithDType + Neg<Output = Self> {
    const NEG_INFINITY: Self;
    /// The nearest element to `value`.
    #[inline(always)]
    fn of(value: f64) -> Self {
        Self::from_f64(value)
    }
    /// self * a + b, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    /// e^self; NaN stays NaN. f64: exact; f32: [`exp_f32`].
    fn exp(self) -> Self;
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// Idle scratch buffers of this thread, for [`with_scratch`].
    fn scratch_pool() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>>;
    /// c = beta c + alpha a b with factors rounded to bf16; the shapes fit.
    fn multiply_bf16(alpha: f64, a: Mat<Self>, b: Mat<Self>, beta: f64, c: MatMut<Self>);
    /// By the widest vector instructions of this CPU.
    fn multiply_packed(product: Product<Self>);

    /// The larger of both; self if `other` is NaN.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }
}

macro_rules! real {
    ($t:ident, $dtype:ident, $exp:expr, $multiply_bf16:expr) => {
        impl Real for $t {
            const NEG_INFINITY: $t = $t::NEG_INFINITY;
            #[inline(always)]
            fn mul_add(self, a: $t, b: $t) -> $t {
                $t::mul_add(self, a, b)
            }
            #[inline(always)]
            fn sqrt(self) -> $t {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn exp(self) -> $t {
                $exp(self)
            }
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [$t]> {
                match storage {
                    CpuStorage::$dtype(data) => Some(data),
                    _ => None,
                }
            }
            fn scratch_pool() -> &'static LocalKey<RefCell<Vec<Vec<$t>>>> {
                thread_local!(static POOL: RefCell<Vec<Vec<$t>>> = const { RefCell::new(Vec::new()) });
                &POOL
            }
            fn multiply_bf16(alpha: f64, a: Mat<$t>, b: Mat<$t>, beta: f64, c: MatMut<$t>) {
                $multiply_bf16(alpha, a, b, beta, c)
            }
            fn multiply_packed(product: Product<$t>) {
                pulp::Arch::new().dispatch(product)
            }
        }
    };
}

real!(f32, F32, exp_f32, bf16::multiply);
real!(f64, F64, f64::exp, bf16::multiply_rounded);

/// e^x = 2^n e^r, n = round(x / ln 2), |r| ≤ ln 2 / 2, with the polynomial of Cephes' `expf`; branch-free, so that it
/// vectorises. Relative error below 2e-7; x is clamped to ±87.3, where neither it nor its inverse leaves
/// the normal range.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, left in the low bits of the sum
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // written so that NaN passes both
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 87.3 { 87.3 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let exp_r = p.mul_add(r * r, r) + 1.0;
    let two_to_n = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    exp_r * two_to_n
}

/// Elements an element-wise kernel gives to one task: too few and starting the task costs more than it saves. An input
/// of one piece never enters the thread pool.
pub const PIECE: usize = 1 << 15;

/// Rows of `width` elements in a piece.
pub fn rows_per_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// Independent partial sums in a vectorised reduction: two vectors of AVX-512, four of AVX2. The same on every
/// machine, so that the order of additions is.
const LANES: usize = 32;

/// Runs `body` compiled for the widest vector instructions of this CPU. What is to be vectorised must be inlined into it.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Reduces f(x[0]), f(x[1]), ... with `combine`, from `identity`, in a fixed order that vectorises.
#[inline(always)]
pub fn reduce<T: Copy, A: Copy>(x: &[T], identity: A, f: impl Fn(T) -> A, combine: impl Fn(A, A) -> A) -> A {
    let mut lanes = [identity; LANES];
    let (vectors, rest) = x.as_chunks::<LANES>();
    for x in vectors {
        // All of f before any sum: interleaved, conversions to another type would not be vectorised.
        let mut values = [identity; LANES];
        for lane in 0..LANES {
            values[lane] = f(x[lane]);
        }
        for lane in 0..LANES {
            lanes[lane] = combine(lanes[lane], values[lane]);
        }
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane = combine(*lane, f(x)));
    fold(lanes, combine)
}

/// Σ f(x)
#[inline(always)]
pub fn sum<T: Real>(x: &[T], f: impl Fn(T) -> T) -> T {
    reduce(x, T::zero(), f, |a, b| a + b)
}

/// Σ x y, as [`reduce`].
#[inline(always)]
pub fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let len = x.len().min(y.len());
    let ((x, x_rest), (y, y_rest)) = (x[..len].split_at(len / LANES * LANES), y[..len].split_at(len / LANES * LANES));
    let mut lanes = [T::zero(); LANES];
    // indexed: zipping three would keep the compiler from vectorising
    for vector in 0..x.len() / LANES {
        let (x, y) = (&x[vector * LANES..][..LANES], &y[vector * LANES..][..LANES]);
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(y[lane], lanes[lane]);
        }
    }
    lanes.iter_mut().zip(x_rest.iter().zip(y_rest)).for_each(|(lane, (&x, &y))| *lane = x.mul_add(y, *lane));
    fold(lanes, |a, b| a + b)
}

#[inline(always)]
fn fold<A: Copy>(mut lanes: [A; LANES], combine: impl Fn(A, A) -> A) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Lends `f` a buffer of `len` elements of unspecified value, kept by the thread for the next use.
pub fn with_scratch<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let mut buffer = T::scratch_pool().with_borrow_mut(|pool| take_fitting(pool, len));
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
    let result = f(&mut buffer[..len]);
    T::scratch_pool().with_borrow_mut(|pool| pool.push(buffer));
    result
}

/// As [`with_scratch`], several buffers of these lengths.
pub fn with_scratches<T: Real, const N: usize, R>(lens: [usize; N], f: impl FnOnce([&mut [T]; N]) -> R) -> R {
    with_scratch(lens.iter().sum(), |mut scratch: &mut [T]| {
        f(lens.map(|len| {
            let part;
            (part, scratch) = std::mem::take(&mut scratch).split_at_mut(len);
            part
        }))
    })
}

/// The parts of 0..n of `len`, the last one shorter.
pub fn blocks(n: usize, len: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    (0..n.div_ceil(len)).map(move |i| i * len..((i + 1) * len).min(n))
}

/// The shortest buffer of at least `len` elements, else the longest: short requests must not make every buffer long.
fn take_fitting<T>(pool: &mut Vec<Vec<T>>, len: usize) -> Vec<T> {
    let misfit = |buffer: &Vec<T>| match buffer.len() {
        long if long >= len => (false, long - len),
        short => (true, len - short),
    };
    let best = (0..pool.len()).min_by_key(|&i| misfit(&pool[i]));
    best.map_or_else(Vec::new, |i| pool.swap_remove(i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_f32_is_close_everywhere_it_is_normal() {
        let mut worst = 0f64;
        for i in 0..=1_000_000 {
            let x = -87.3 + 174.6 * (i as f32 / 1_000_000.0);
            let exact = (x as f64).exp();
            worst = worst.max((exp_f32(x) as f64 - exact).abs() / exact);
        }
        println!("exp_f32: largest relative error {worst:.3e}");
        assert!(worst < 2e-7, "{worst}");
        assert!(exp_f32(f32::NAN).is_nan());
        assert_eq!(exp_f32(0.0), 1.0);
        assert!(exp_f32(f32::NEG_INFINITY) < 1.3e-38);
    }

    #[test]
    fn reductions_meet_every_element_once() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<usize> = (0..n).collect();
            assert_eq!(reduce(&x, 0, |x| x + 1, |a, b| a + b), n * (n + 1) / 2);
            let x: Vec<f64> = (0..n).map(|i| i as f64).collect();
            assert_eq!(dot(&x, &x), x.iter().map(|x| x * x).sum::<f64>());
        }
    }

    #[test]
    fn scratch_takes_the_buffer_that_fits() {
        let mut pool = [4, 64, 16].map(|len| vec![0u8; len]).to_vec();
        assert_eq!([8, 2, 100].map(|len| take_fitting(&mut pool, len).len()), [16, 4, 64]);
        assert!(take_fitting(&mut pool, 1).is_empty());
    }

    #[test]
    fn scratch_may_be_nested() {
        with_scratch::<f32, _>(4, |a| {
            a.fill(1.0);
            with_scratch::<f32, _>(8, |b| b.fill(2.0));
            assert_eq!(a, [1.0; 4]);
        });
    }
}
