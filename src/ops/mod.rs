//! The operations a step is made of: one op a file, with its formula, forward and backward.
//!
//! Every op takes contiguous candle tensors on one device (f32, or f64 in verification) and writes into tensors its
//! caller allocated; nothing is allocated inside a step. A function says for each output whether it is overwritten
//! (`=`) or accumulated into (`+=`). An output lies in another storage than the inputs and the other outputs, unless
//! the function says otherwise; views of a larger storage are welcome. Token and target tensors are U32. The CPU code
//! is the reference for every other device.
//!
//! Results are bit for bit the same for any number of threads: work is cut into pieces whose size does not depend on
//! it, and partial sums are added in the order of the pieces.

pub mod access;
pub mod attention;
pub mod classifier;
pub mod embedding;
pub mod gelu;
pub mod layer_norm;
pub mod linear;
pub mod matrix;
pub mod norm;
pub mod profile;
pub mod real;
pub mod residual;

#[cfg(test)]
mod testing;
