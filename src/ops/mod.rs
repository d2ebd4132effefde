//! The operations a step is made of: one op a file, with its formula, forward and backward.
//!
//! Every op takes contiguous candle tensors on one device (f32, or f64 in verification) and writes into tensors its
//! caller allocated; nothing is allocated inside a step. A function says for each output whether it is overwritten
//! (`=`) or accumulated into (`+=`). Token and target tensors are U32. The CPU code is the reference for every other
//! device.

pub mod access;
pub mod attention;
pub mod classifier;
pub mod embedding;
pub mod gelu;
pub mod layer_norm;
pub mod linear;
pub mod norm;
pub mod residual;
