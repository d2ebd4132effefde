//! The functions of the .cu files, as Rust sees them: linked in, or loaded from the library of their emulation.
use std::ffi::{c_char, c_int, c_void};

/// An address in the device's memory.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Address(pub *mut c_void);

impl Address {
    pub const NONE: Address = Address(std::ptr::null_mut());

    pub fn is_aligned(self, bytes: usize) -> bool {
        (self.0 as usize).is_multiple_of(bytes)
    }

    pub fn offset(self, bytes: usize) -> Address {
        Address(self.0.wrapping_byte_add(bytes))
    }
}

/// A cudaStream_t.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub *mut c_void);

/// The numbers of AdamW's step, as in optimizer.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdamWRule {
    pub scale: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub step_size: f32,
    pub root_correction: f32,
    pub eps: f32,
}

/// Elements begin..end of a row, and the factor on θ: 1 - η λ or 1. As in optimizer.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stretch {
    pub begin: usize,
    pub end: usize,
    pub keep: f32,
}

/// What a rule updates of a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stretches {
    pub of: [Stretch; Stretches::MAX],
    pub count: c_int,
}

impl Stretches {
    pub const MAX: usize = 16;
}

/// Rows that are updated alike, at the same distance from one to the next. As in optimizer.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub count: usize,
    /// Elements of a row that are updated.
    pub length: usize,
    /// Elements from a row to the next, of θ and the gradient.
    pub pitch: usize,
    /// The same of the moments.
    pub pitch_of_moments: usize,
}

/// Tensors that are summed in one launch. As in norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub x: [Address; Batch::MAX],
    /// Elements.
    pub n: [usize; Batch::MAX],
    pub count: c_int,
}

impl Batch {
    pub const MAX: usize = 64;

    /// # Panics
    /// If they are more than [`Batch::MAX`].
    pub fn new(tensors: &[(Address, usize)]) -> Batch {
        let mut batch = Batch { x: [Address::NONE; Batch::MAX], n: [0; Batch::MAX], count: tensors.len() as c_int };
        for (k, &(x, n)) in tensors.iter().enumerate() {
            (batch.x[k], batch.n[k]) = (x, n);
        }
        batch
    }
}

/// Declares the functions once: a table of pointers, and both ways to fill it.
macro_rules! kernels {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        /// Each is described at its definition. Launches are asynchronous and return a cudaError_t.
        pub struct Kernels {
            $(pub $name: unsafe extern "C" fn($($argument: $type),*) -> $result,)*
        }

        #[cfg(feature = "cuda")]
        mod linked {
            use super::*;
            unsafe extern "C" {
                $(#[link_name = concat!("vcycle_", stringify!($name))]
                pub fn $name($($argument: $type),*) -> $result;)*
            }
        }

        impl Kernels {
            #[cfg(feature = "cuda")]
            pub const LINKED: Kernels = Kernels { $($name: linked::$name,)* };

            /// The functions that `symbol` finds by name.
            ///
            /// # Safety
            /// They are those of the .cu files this was compiled with.
            #[cfg(all(test, not(feature = "cuda")))]
            pub unsafe fn found(symbol: impl Fn(&str) -> *mut c_void) -> Kernels {
                type Pointer = *mut c_void;
                $(let $name = symbol(concat!("vcycle_", stringify!($name)));)*
                // SAFETY: the caller promises that they are these functions.
                unsafe { Kernels { $($name: std::mem::transmute::<
                    Pointer,
                    unsafe extern "C" fn($($argument: $type),*) -> $result,
                >($name),)* } }
            }
        }
    };
}

kernels! {
    error_text(code: c_int) -> *const c_char;

    fill(dtype: c_int, x: Address, value: f32, n: usize, stream: Stream) -> c_int;
    copy(source: Address, out: Address, bytes: usize, stream: Stream) -> c_int;
    cast(from: c_int, to: c_int, source: Address, out: Address, n: usize, stream: Stream) -> c_int;
    combine(dtype: c_int, a: f32, x: Address, b: f32, y: Address, out: Address, n: usize, stream: Stream) -> c_int;

    gelu_forward(dtype: c_int, x: Address, b: Address, out: Address, n: usize, w: c_int, stream: Stream) -> c_int;
    gelu_backward(dtype: c_int, x: Address, b: Address, d: Address, n: usize, w: c_int, stream: Stream) -> c_int;

    begin_rows(dtype: c_int, alpha: f32, b: Address, start: Address, out: Address, n: usize, d: c_int, stream: Stream) -> c_int;
    add_column_sums_scratch(n: usize, d: c_int) -> usize;
    add_column_sums(dtype: c_int, x: Address, alpha: f32, sums: Address, n: usize, d: c_int, scratch: Address,
                    stream: Stream) -> c_int;

    layer_norm_forward(dtype: c_int, x: Address, ln: Address, out: Address, stats: Address, n: usize, d: c_int,
                       stream: Stream) -> c_int;
    layer_norm_normalize(dtype: c_int, x: Address, ln: Address, stats: Address, out: Address, n: usize, d: c_int,
                         stream: Stream) -> c_int;
    layer_norm_backward_scratch(n: usize, d: c_int) -> usize;
    layer_norm_backward(dtype: c_int, dy: Address, x: Address, ln: Address, stats: Address, dx: Address, dln: Address,
                        n: usize, d: c_int, scratch: Address, stream: Stream) -> c_int;

    embedding_forward(dtype: c_int, tokens: Address, wte: Address, wpe: Address, out: Address, n: usize, vocab: u32,
                      context: u32, d: c_int, stream: Stream) -> c_int;
    embedding_backward_scratch(n: usize) -> usize;
    embedding_backward(dtype: c_int, tokens: Address, dx: Address, dwte: Address, dwpe: Address, n: usize, vocab: u32,
                       context: u32, d: c_int, scratch: Address, stream: Stream) -> c_int;

    attention_forward(dtype: c_int, qkv: Address, out: Address, lse: Address, sequences: c_int, context: c_int,
                      heads: c_int, head_dim: c_int, stream: Stream) -> c_int;
    attention_backward_scratch(sequences: c_int, context: c_int, heads: c_int) -> usize;
    attention_backward(dtype: c_int, qkv: Address, out: Address, lse: Address, dout: Address, dqkv: Address,
                       sequences: c_int, context: c_int, heads: c_int, head_dim: c_int, scratch: Address,
                       stream: Stream) -> c_int;

    softmax_loss(dtype: c_int, logits: Address, targets: Address, losses: Address, rows: usize, vocab: u32,
                 stream: Stream) -> c_int;
    softmax_loss_and_gradient(dtype: c_int, logits: Address, targets: Address, scale: f32, losses: Address, rows: usize,
                              vocab: u32, stream: Stream) -> c_int;

    sum_scratch(count: usize, longest: usize) -> usize;
    sum(dtype: c_int, batch: *const Batch, out: Address, scratch: Address, stream: Stream) -> c_int;
    sum_of_squares(dtype: c_int, batch: *const Batch, out: Address, scratch: Address, stream: Stream) -> c_int;

    adamw(rule: AdamWRule, stretches: *const Stretches, grad: Address, theta: Address, m: Address, v: Address, rows: Rows,
          stream: Stream) -> c_int;
    sgd(scale: f32, mu: f32, nesterov: c_int, lr: f32, stretches: *const Stretches, grad: Address, theta: Address,
        b: Address, rows: Rows, stream: Stream) -> c_int;
    momentum(scale: f32, mu: f32, nesterov: c_int, grad: Address, b: Address, u: Address, n: usize, stream: Stream) -> c_int;
    normalize(x: Address, square: Address, smallest: f64, n: usize, stream: Stream) -> c_int;
    add_diagonal(x: Address, value: f32, order: usize, stream: Stream) -> c_int;
}
