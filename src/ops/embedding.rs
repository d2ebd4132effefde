use crate::error::Result;
use candle_core::Tensor;
/// out[i] = wte[tokens[i]] + wpe[i mod T]   (=).  tokens U32 [n], wte [V, d], wpe [T, d], out [n, d].
pub fn forward(_tokens: &Tensor, _wte: &Tensor, _wpe: &Tensor, _out: &Tensor) -> Result<()> {
    todo!()
}
/// dwte[tokens[i]] += dx[i];  dwpe[i mod T] += dx[i]. dwte, dwpe may be views of one storage. Deterministic for any number of threads.
pub fn backward(_tokens: &Tensor, _dx: &Tensor, _dwte: &Tensor, _dwpe: &Tensor) -> Result<()> {
    todo!()
}
