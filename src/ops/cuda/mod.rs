//! The ops on NVIDIA GPUs. The kernels are in the .cu files here; an op's file launches them through [`Gpu`].
//!
//! A GPU computes in f32 or in bf16; sums (statistics, gradients of parameters) are f32 in both. All work of a rank but
//! what it exchanges with others goes to one stream, so that launches wait for each other and for nothing else: an op returns before its work is done, unless
//! it returns a number. Matrix products are cuBLASLt's.
//!
//! In tests of a build without the feature `cuda` the same kernels, compiled for the host, run on CPU tensors: see `emulate`.
//! With the feature they run on a GPU.

#[cfg(feature = "cuda")]
mod device;
#[cfg(all(test, not(feature = "cuda")))]
pub mod emulate;
mod kernels;
#[cfg(feature = "cuda")]
mod product;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
pub use device::{Selected, forget_peak_memory, memory, select, uuid, visible};
pub use kernels::{AdamWRule, Address, Batch, Kernels, Rows, Stream, Stretch, Stretches};

use super::access::no_kernel;
use crate::error::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use std::ffi::{CStr, c_int};

/// The GPU that holds a tensor.
pub struct Gpu {
    machine: Machine,
}

enum Machine {
    #[cfg(feature = "cuda")]
    Device(candle_core::CudaDevice),
    #[cfg(all(test, not(feature = "cuda")))]
    Emulated(&'static Kernels),
}

/// A stretch of launches that repeats.
#[derive(Default)]
pub enum Kept {
    /// It has not been here.
    #[default]
    New,
    /// Launched once: what CUDA and cuBLASLt load when first used is there.
    Seen,
    Graph(Graph),
}

pub enum Graph {
    #[cfg(feature = "cuda")]
    Device(device::Graph),
    #[cfg(all(test, not(feature = "cuda")))]
    Emulated(emulate::Graph),
}

/// A matrix in a product: row-major, its rows `pitch` elements apart.
#[derive(Clone, Copy)]
pub struct Operand {
    pub at: Address,
    pub dtype: DType,
    pub pitch: usize,
    pub transposed: bool,
}

impl Operand {
    /// The transpose.
    pub fn t(self) -> Operand {
        Operand { transposed: !self.transposed, ..self }
    }
}

/// Bytes; of a bias too.
pub const BIAS_ALIGNMENT: usize = 16;

/// out [m, n] = alpha a b + beta c + bias, a [m, k] and b [k, n] as they are after transposition.
#[derive(Clone, Copy)]
pub struct Product {
    /// m, n, k
    pub shape: [usize; 3],
    pub alpha: f64,
    pub a: Operand,
    pub b: Operand,
    /// 0 does not read c.
    pub beta: f64,
    /// Of the type of out, and out itself or elsewhere.
    pub c: Operand,
    /// [n], of the type of out, added to each row of a product that [takes one](Product::takes_bias).
    pub bias: Option<Address>,
    pub out: Operand,
}

impl Product {
    /// out = a b
    pub fn new(shape: [usize; 3], a: Operand, b: Operand, out: Operand) -> Product {
        Product { shape, alpha: 1.0, a, b, beta: 0.0, c: out, bias: None, out }
    }

    /// Whether cuBLASLt is sure to have a kernel that adds a bias: one for tensor cores, all sizes multiples of 8 and all matrices
    /// [aligned](BIAS_ALIGNMENT).
    pub fn takes_bias(&self) -> bool {
        let aligned = |operand: &Operand| operand.at.is_aligned(BIAS_ALIGNMENT);
        self.shape.iter().all(|size| size.is_multiple_of(8)) && [self.a, self.b, self.c, self.out].iter().all(aligned)
    }
}

/// Room in scratch memory is cut at multiples of this, in bytes.
const ALIGNMENT: usize = 256;

impl Gpu {
    /// `None` for a tensor that the CPU works on.
    pub fn of(tensor: &Tensor) -> Option<Gpu> {
        Gpu::on(tensor.device())
    }

    /// `None` where the CPU works.
    pub fn on(device: &Device) -> Option<Gpu> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Some(Gpu { machine: Machine::Device(device.clone()) }),
            #[cfg(all(test, not(feature = "cuda")))]
            Device::Cpu => emulate::kernels().map(|kernels| Gpu { machine: Machine::Emulated(kernels) }),
            _ => None,
        }
    }

    pub fn kernels(&self) -> &'static Kernels {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(_) => &Kernels::LINKED,
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(kernels) => kernels,
        }
    }

    /// Launches what `f` launches on the stream that it is given.
    ///
    /// The calls in `f` are unsafe: they are sound because an op has checked the shapes, dtypes and contiguity of its
    /// tensors, takes its addresses from [`Gpu::at`] and [`Gpu::scratch`], and the stream does one op after the other.
    pub fn launch(&self, op: &str, f: impl FnOnce(&Kernels, Stream) -> Result<c_int>) -> Result<()> {
        let kernels = self.kernels();
        let code = f(kernels, self.stream()?)?;
        // SAFETY: CUDA returns a string that lives as long as the program.
        ensure!(
            code == 0,
            "{op}: CUDA error {code}: {}",
            unsafe { CStr::from_ptr((kernels.error_text)(code)) }.to_string_lossy()
        );
        Ok(())
    }

    /// Does what `work` does, which only launches, and the same whenever it comes with this `kept`: the first time kernel by
    /// kernel, then as a graph.
    pub fn replay(&self, kept: &mut Kept, work: &dyn Fn() -> Result<()>) -> Result<()> {
        match kept {
            Kept::New => {
                work()?;
                *kept = Kept::Seen;
                return Ok(());
            }
            Kept::Seen => *kept = Kept::Graph(self.capture(work)?),
            Kept::Graph(_) => {}
        }
        let Kept::Graph(graph) = kept else { unreachable!("captured above") };
        match graph {
            #[cfg(feature = "cuda")]
            Graph::Device(graph) => graph.launch(),
            #[cfg(all(test, not(feature = "cuda")))]
            Graph::Emulated(graph) => {
                graph.launch();
                Ok(())
            }
        }
    }

    /// The launches of `work`, none of them done.
    fn capture(&self, work: &dyn Fn() -> Result<()>) -> Result<Graph> {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::capture(device, work).map(Graph::Device),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => emulate::capture(work).map(Graph::Emulated),
        }
    }

    fn stream(&self) -> Result<Stream> {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::stream(device),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => Ok(Stream(std::ptr::null_mut())),
        }
    }

    /// The element type as the kernels take it.
    pub fn element(&self, op: &str, tensor: &Tensor) -> Result<c_int> {
        match tensor.dtype() {
            DType::F32 => Ok(0),
            DType::BF16 => Ok(1),
            dtype => Err(no_kernel(op, tensor.device(), dtype)),
        }
    }

    /// Where a contiguous tensor begins.
    pub fn at(&self, tensor: &Tensor) -> Result<Address> {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::address(device, tensor),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => emulate::address(tensor),
        }
    }

    /// A contiguous tensor as a matrix of rows of `columns` elements.
    pub fn matrix(&self, tensor: &Tensor, columns: usize) -> Result<Operand> {
        Ok(Operand { at: self.at(tensor)?, dtype: tensor.dtype(), pitch: columns, transposed: false })
    }

    /// Buffers of these lengths in bytes, aligned, until the next call: each op has its scratch to itself, as the stream
    /// does one after the other.
    pub fn scratch<const N: usize>(&self, bytes: [usize; N]) -> Result<[Address; N]> {
        let lengths = bytes.map(|bytes| bytes.next_multiple_of(ALIGNMENT));
        let total = lengths.iter().sum();
        let mut next = match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::scratch(device, total)?,
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => emulate::scratch(total),
        };
        Ok(lengths.map(|length| {
            let begin = next;
            next = next.offset(length);
            begin
        }))
    }

    pub fn multiply(&self, product: Product) -> Result<()> {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => product::multiply(device, &product),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => {
                emulate::multiply(product);
                Ok(())
            }
        }
    }

    /// The numbers from `address` on, once all work before is done.
    pub fn read_f64s(&self, address: Address, count: usize) -> Result<Vec<f64>> {
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::read_f64s(device, address, count),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => {
                emulate::assert_not_captured("a number is read");
                // SAFETY: what the caller has had written there.
                Ok((0..count).map(|i| unsafe { *(address.0 as *const f64).add(i) }).collect())
            }
        }
    }

    /// out = source.
    pub fn upload_u32(&self, source: &[u32], out: &Tensor) -> Result<()> {
        let out = self.at(out)?;
        match &self.machine {
            #[cfg(feature = "cuda")]
            Machine::Device(device) => device::upload_u32(device, source, out),
            #[cfg(all(test, not(feature = "cuda")))]
            Machine::Emulated(_) => {
                emulate::assert_not_captured("tokens are uploaded");
                // SAFETY: the caller has compared the lengths.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), out.0 as *mut u32, source.len()) };
                Ok(())
            }
        }
    }
}

/// As the kernels take the length of a row.
pub fn length(op: &str, what: &str, n: usize) -> Result<c_int> {
    match c_int::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => crate::error::bail!("{op}: {what} {n} is more than a GPU kernel takes"),
    }
}
