//! The ODE Transformer: parameters of a row, block field, integrators, net and its discrete adjoint.

mod flops;
mod layout;
mod net;

pub use flops::{Flops, step_flops};
pub use layout::{Init, Layout, Segment};
pub use net::{Net, Params, Ready, Spec, initialize};
