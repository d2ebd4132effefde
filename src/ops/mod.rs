//! The operations a step is made of: one op a file, with its formula, forward and backward.
//!
//! Every op takes contiguous candle tensors on one device and writes into tensors its caller allocated; nothing is
//! allocated inside a step. The CPU computes in f32, or in f64 in verification, a GPU in f32 or bf16; an op with products is
//! told whether a CPU rounds their factors to bf16 ([`matrix::Factors`]). What is a sum over
//! many elements (statistics of rows, gradients of parameters) has the dtype [`access::sums`] names. A function says for each output whether it is overwritten
//! (`=`) or accumulated into (`+=`). An output lies in another storage than the inputs and the other outputs, unless
//! the function says otherwise; views of a larger storage are welcome. Token and target tensors are U32. The CPU code
//! is the reference for every other device.
//!
//! Results are bit for bit the same for any number of threads: work is cut into pieces whose size does not depend on
//! it, and partial sums are added in the order of the pieces.

pub mod access;
pub mod attention;
pub mod bf16;
pub mod classifier;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
pub mod embedding;
pub mod gelu;
pub mod layer_norm;
pub mod linear;
pub mod matrix;
pub mod norm;
pub mod packed;
pub mod profile;
pub mod real;
pub mod replay;
pub mod residual;

#[cfg(test)]
pub(crate) mod testing;
