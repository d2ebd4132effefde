//! The ODE Transformer: parameters of a row, block field, integrators, net and its discrete adjoint.
//!
//! [`Spec`] is the shape, [`Layout`] says where each parameter lies in a row, [`Params`] are views of rows and ends,
//! [`Net`] computes the loss and adds the gradient into views of the same kind. Inside, from the bottom up:
//! `block` is the vector field F and its adjoint, `integrator` one step Φ in the verbs of `block`, `net` the loop
//! over depth, `tape` the memory they write to.

mod block;
mod flops;
mod init;
mod integrator;
mod layout;
mod net;
mod params;
mod shard;
mod spec;
mod tape;

pub use flops::{Flops, step_flops};
pub use init::initialize;
pub use layout::{Init, Layout, Segment};
pub use net::{Net, Ready};
pub use params::{Params, Rounded};
pub use shard::{Division, Shard};
pub use spec::Spec;
