//! Model FLOPs in the PaLM convention.
use super::Spec;

/// Model FLOPs, always as two figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    pub blocks: u64,
    pub total: u64,
}

/// FLOPs of one optimizer step with `rows` blocks over `tokens` tokens: 6 a matmul parameter and token,
/// plus 12·rows·d·T a token for attention; Heun evaluates each block twice; `total` adds the head.
pub fn step_flops(_spec: &Spec, _rows: usize, _tokens: u64) -> Flops {
    todo!()
}
