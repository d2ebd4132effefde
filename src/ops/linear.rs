use crate::error::Result;
use candle_core::Tensor;
/// out = beta * out + alpha * (x wᵀ + b).  x [n, i], w [o, i], b [o], out [n, o]. beta = 0 never reads out.
pub fn forward(_x: &Tensor, _w: &Tensor, _b: Option<&Tensor>, _alpha: f64, _beta: f64, _out: &Tensor) -> Result<()> {
    todo!()
}
/// dx = beta * dx + alpha * dy w.
pub fn backward_input(_dy: &Tensor, _w: &Tensor, _alpha: f64, _beta: f64, _dx: &Tensor) -> Result<()> {
    todo!()
}
/// dw += alpha * dyᵀ x;  db += alpha * column sums of dy. dw and db may be views of one storage.
pub fn backward_weight(_dy: &Tensor, _x: &Tensor, _alpha: f64, _dw: &Tensor, _db: Option<&Tensor>) -> Result<()> {
    todo!()
}
