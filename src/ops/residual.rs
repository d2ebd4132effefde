use crate::error::Result;
use candle_core::Tensor;
/// out = a x + b y (=). `out` may be neither x nor y.
pub fn combine(_a: f64, _x: &Tensor, _b: f64, _y: &Tensor, _out: &Tensor) -> Result<()> {
    todo!()
}
/// out = a out + b x, in place.
pub fn scale_add(_a: f64, _out: &Tensor, _b: f64, _x: &Tensor) -> Result<()> {
    todo!()
}
