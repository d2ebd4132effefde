//! Matrix products by cuBLASLt, with all that is added to them in the same pass.
use super::device::stream;
use super::{Address, Operand, Product, length};
use crate::error::{Result, anyhow, bail};
use candle_core::DType;
use candle_core::cuda_backend::cudarc::cublaslt::{result as lt, sys};
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// cuBLASLt for the one stream of a device, as long as the program lives.
struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: *mut c_void,
    plans: HashMap<Key, Plan>,
}

// SAFETY: cuBLASLt lets any thread use these, one at a time.
unsafe impl Send for Library {}

static LIBRARIES: Mutex<Option<HashMap<DeviceId, Library>>> = Mutex::new(None);

/// Bytes; what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// All that the choice of an algorithm follows from.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    shape: [usize; 3],
    /// a, b, c, out
    matrices: [Matrix; 4],
    has_bias: bool,
}

#[derive(PartialEq, Eq, Hash)]
struct Matrix {
    dtype: DType,
    pitch: usize,
    transposed: bool,
    /// Bytes.
    alignment: u32,
}

/// How a product is computed.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// a, b, c, out
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Accumulated in f32, split products too. Row-major matrices are cuBLASLt's column-major transposes: it computes outᵀ = bᵀ aᵀ.
pub fn multiply(device: &CudaDevice, product: &Product) -> Result<()> {
    let stream = stream(device)?;
    with_library(device, |library| library.multiply(product, stream.0.cast())).map_err(|error| {
        let [m, n, k] = product.shape;
        anyhow!("matrix product [{m}, {k}] × [{k}, {n}]: {error}")
    })
}

/// Takes the memory that products work with.
pub fn prepare(device: &CudaDevice) -> Result<()> {
    with_library(device, |_| Ok(()))
}

fn with_library(device: &CudaDevice, work: impl FnOnce(&mut Library) -> Result<()>) -> Result<()> {
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    work(match libraries.get_or_insert_default().entry(device.id()) {
        Entry::Occupied(library) => library.into_mut(),
        Entry::Vacant(empty) => empty.insert(Library::new(device)?),
    })
}

impl Library {
    fn new(device: &CudaDevice) -> Result<Library> {
        let handle = lt::create_handle().map_err(blas_error)?;
        // SAFETY: products write the workspace before they read it. It is never freed.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE)? };
        let begin = workspace.device_ptr(&device.cuda_stream()).0 as usize as *mut c_void;
        workspace.leak();
        Ok(Library { handle, workspace: begin, plans: HashMap::new() })
    }

    fn multiply(&mut self, product: &Product, stream: sys::cudaStream_t) -> Result<()> {
        let &Product { shape, alpha, a, b, beta, c, bias, out } = product;
        let key = Key { shape, matrices: [a, b, c, out].map(Matrix::of), has_bias: bias.is_some() };
        let plan = match self.plans.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(empty) => {
                let plan = Plan::new(self.handle, product, &empty.key().matrices)?;
                empty.insert(plan)
            }
        };
        let (alpha, beta) = (alpha as f32, beta as f32);
        let [a_layout, b_layout, c_layout, out_layout] = plan.layouts;
        // SAFETY: the product describes matrices in the device's memory, the plan is of its shapes.
        unsafe {
            set_bias(plan.operation, bias)?;
            lt::matmul(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b.at.0,
                b_layout,
                a.at.0,
                a_layout,
                c.at.0,
                c_layout,
                out.at.0,
                out_layout,
                &plan.algorithm,
                self.workspace,
                WORKSPACE,
                stream,
            )
        }
        .map_err(blas_error)
    }
}

impl Matrix {
    fn of(operand: Operand) -> Matrix {
        let Operand { at, dtype, pitch, transposed } = operand;
        let alignment = 1 << (at.0 as usize).trailing_zeros().min(8);
        Matrix { dtype, pitch, transposed, alignment }
    }

    /// Of the matrix as it lies in memory, of these rows and columns after transposition.
    fn layout(&self, rows: usize, columns: usize) -> Result<sys::cublasLtMatrixLayout_t> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        let dtype = match self.dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            dtype => bail!("no matrix product of {dtype:?} on a GPU"),
        };
        lt::create_matrix_layout(dtype, columns as u64, rows as u64, self.pitch as i64).map_err(blas_error)
    }

    /// cublasOperation_t
    fn operation(&self) -> i32 {
        let (as_it_is, transposed) = (0, 1);
        if self.transposed { transposed } else { as_it_is }
    }
}

impl Plan {
    /// The algorithm that cuBLASLt thinks the fastest. What is made here lives on with the plan.
    fn new(handle: sys::cublasLtHandle_t, product: &Product, [a, b, c, out]: &[Matrix; 4]) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as Desc;
        use sys::cublasLtMatmulPreferenceAttributes_t as Pref;
        let [m, n, k] = product.shape;
        [m, n, k].iter().try_for_each(|&size| length("matrix product", "dimension", size).map(drop))?;
        let layouts = [a.layout(m, k)?, b.layout(k, n)?, c.layout(m, n)?, out.layout(m, n)?];
        let operation =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
                .map_err(blas_error)?;
        let preference = lt::create_matmul_pref().map_err(blas_error)?;
        let epilogue = match product.bias {
            Some(_) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            None => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        };
        // Parts of a sum over k are never added up in the type of the result, which may be bf16.
        let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        // SAFETY: made above; each attribute has the type that NVIDIA's header names.
        let found = unsafe {
            set_operation(operation, Desc::CUBLASLT_MATMUL_DESC_TRANSA, b.operation())?;
            set_operation(operation, Desc::CUBLASLT_MATMUL_DESC_TRANSB, a.operation())?;
            set_operation(operation, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue as u32)?;
            // The choice heeds its alignment.
            set_bias(operation, product.bias)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE as u64)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions as u32)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b.alignment)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a.alignment)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c.alignment)?;
            set_preference(preference, Pref::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out.alignment)?;
            let [a, b, c, out] = layouts;
            let found = lt::get_matmul_algo_heuristic(handle, operation, b, a, c, out, preference);
            lt::destroy_matmul_pref(preference).map_err(blas_error)?;
            found.map_err(blas_error)?
        };
        Ok(Plan { operation, layouts, algorithm: found.algo })
    }
}

/// # Safety
/// It is read when the product is computed.
unsafe fn set_bias(operation: sys::cublasLtMatmulDesc_t, bias: Option<Address>) -> Result<()> {
    let Some(Address(bias)) = bias else { return Ok(()) };
    // SAFETY: the type that the attribute takes.
    unsafe { set_operation(operation, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias) }
}

/// # Safety
/// `value` has the type that the attribute takes.
unsafe fn set_operation<T>(
    operation: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: read during the call.
    unsafe { lt::set_matmul_desc_attribute(operation, attribute, (&raw const value).cast(), size_of::<T>()) }
        .map_err(blas_error)
}

/// # Safety
/// `value` has the type that the attribute takes.
unsafe fn set_preference<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: sys::cublasLtMatmulPreferenceAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: read during the call.
    unsafe { lt::set_matmul_pref_attribute(preference, attribute, (&raw const value).cast(), size_of::<T>()) }
        .map_err(blas_error)
}

fn blas_error(error: lt::CublasError) -> crate::error::Error {
    anyhow!("cuBLASLt answers {:?}", error.0)
}
