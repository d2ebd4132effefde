//! Work that repeats: what a GPU has launched kernel by kernel before is launched as one CUDA graph.
//!
//! The kernels of a small net end sooner than the host launches the next ones. A graph of them takes one launch.
#[cfg(any(feature = "cuda", test))]
use super::{
    cuda::{Gpu, Kept},
    profile,
};
use crate::error::Result;
use candle_core::Tensor;
#[cfg(any(feature = "cuda", test))]
use std::collections::HashMap;

/// Graphs, kept under all that their launches follow from.
#[derive(Default)]
pub struct Replay {
    #[cfg(any(feature = "cuda", test))]
    kept: HashMap<Vec<u64>, Vec<Kept>>,
}

/// The stretches of one pass. On a CPU, and while ops are timed one by one, a stretch is what it does and no more.
pub struct Pass<'a> {
    #[cfg(any(feature = "cuda", test))]
    gpu: Option<OnGpu<'a>>,
    #[cfg(not(any(feature = "cuda", test)))]
    cpu: std::marker::PhantomData<&'a ()>,
}

#[cfg(any(feature = "cuda", test))]
struct OnGpu<'a> {
    gpu: Gpu,
    kept: &'a mut Vec<Kept>,
    /// Stretches done.
    done: usize,
}

/// Passes that are kept. A run has a few for each level; where tensors move about, they must not pile up.
#[cfg(any(feature = "cuda", test))]
const MOST: usize = 1 << 10;

#[cfg(any(feature = "cuda", test))]
impl Replay {
    /// A pass whose launches follow from these numbers, from where these tensors begin and end, and from nothing else that may change while
    /// this [`Replay`] lives.
    pub fn pass<'a>(&mut self, numbers: &[u64], tensors: impl Iterator<Item = &'a Tensor>) -> Result<Pass<'_>> {
        let mut tensors = tensors.peekable();
        let gpu = tensors.peek().and_then(|tensor| Gpu::of(tensor)).filter(|_| !profile::is_on() && is_wanted());
        let Some(gpu) = gpu else { return Ok(Pass { gpu: None }) };
        let mut key = numbers.to_vec();
        // An op that needs more scratch memory moves it.
        let [scratch] = gpu.scratch([1])?;
        key.push(scratch.0 as u64);
        for tensor in tensors {
            key.extend([gpu.at(tensor)?.0 as u64, tensor.elem_count() as u64]);
        }
        if self.kept.len() >= MOST {
            self.kept.clear();
        }
        Ok(Pass { gpu: Some(OnGpu { gpu, kept: self.kept.entry(key).or_default(), done: 0 }) })
    }
}

#[cfg(not(any(feature = "cuda", test)))]
impl Replay {
    /// There is no GPU.
    pub fn pass<'a>(&mut self, _numbers: &[u64], _tensors: impl Iterator<Item = &'a Tensor>) -> Result<Pass<'_>> {
        Ok(Pass { cpu: std::marker::PhantomData })
    }
}

impl Pass<'_> {
    /// What `work` does, which launches and waits for nothing, as the next stretch of the pass.
    pub fn stretch(&mut self, work: &dyn Fn() -> Result<()>) -> Result<()> {
        #[cfg(any(feature = "cuda", test))]
        if let Some(OnGpu { gpu, kept, done }) = &mut self.gpu {
            if kept.len() == *done {
                kept.push(Kept::default());
            }
            *done += 1;
            return gpu.replay(&mut kept[*done - 1], work);
        }
        work()
    }
}

/// Unless VCYCLE_CUDA_GRAPHS=0.
#[cfg(any(feature = "cuda", test))]
fn is_wanted() -> bool {
    static WANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *WANTED.get_or_init(|| std::env::var_os("VCYCLE_CUDA_GRAPHS").is_none_or(|value| value != "0"))
}
