//! A real GPU: choosing it, its addresses, scratch memory, graphs.
use super::{Address, Stream, product};
use crate::error::{Context, Result, bail, ensure};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaGraph, CudaSlice, DevicePtr, DeviceRepr, result, sys,
};
use candle_core::{CudaDevice, Device, Storage, Tensor};
use std::cell::RefCell;
use std::ffi::c_void;

/// The oldest GPUs that the kernels are compiled for: A100.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// The GPU of a rank.
pub struct Selected {
    pub device: Device,
    pub ordinal: usize,
    pub name: String,
}

/// How many GPUs this process sees; 0 where there is no driver.
pub fn visible() -> usize {
    CudaContext::device_count().map_or(0, |count| count as usize)
}

/// Tells a GPU from all others, also where processes see different ones under the same number.
pub fn uuid(device: &CudaDevice) -> Result<[u8; 16]> {
    let uuid = device.cuda_stream().context().uuid().map_err(driver_error)?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

/// The GPU of the rank that is the `local_rank`-th of its node: the only one where one is visible (the launcher has bound each
/// rank to its own), else the one of that number.
pub fn select(local_rank: usize) -> Result<Selected> {
    let visible = CudaContext::device_count().map_err(driver_error)? as usize;
    ensure!(
        visible > 0,
        "no GPU is visible to this process: look at CUDA_VISIBLE_DEVICES and at what `nvidia-smi` lists"
    );
    let ordinal = if visible == 1 { 0 } else { local_rank };
    ensure!(
        ordinal < visible,
        "rank {local_rank} of this node finds only {visible} GPUs: start at most {visible} ranks a node \
         (--ntasks-per-node={visible} --gpus-per-node={visible})"
    );
    let context = CudaContext::new(ordinal).map_err(driver_error)?;
    let name = context.name().map_err(driver_error)?;
    let capability = context.compute_capability().map_err(driver_error)?;
    ensure!(
        capability >= LEAST_CAPABILITY,
        "GPU {ordinal} ({name}) has compute capability {}.{}; {}.{} or newer is needed (A100, H100, ...)",
        capability.0,
        capability.1,
        LEAST_CAPABILITY.0,
        LEAST_CAPABILITY.1
    );
    let device = CudaDevice::new_with_stream(ordinal).with_context(|| format!("cannot use GPU {ordinal} ({name})"))?;
    keep_memory(&device)?;
    // SAFETY: all work of this process is on the device's one stream, but for exchanges between GPUs, which order themselves.
    unsafe { device.disable_event_tracking() };
    product::prepare(&device)?;
    Ok(Selected { device: Device::Cuda(device), ordinal, name })
}

/// Freed memory stays in the process's pool: by default it would go back to the driver at each synchronisation.
fn keep_memory(device: &CudaDevice) -> Result<()> {
    set(pool(device)?, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

/// Bytes of the GPU's memory that this process has for tensors: now, and the most at once.
pub fn memory(device: &CudaDevice) -> Result<[u64; 2]> {
    let pool = pool(device)?;
    let read = |attribute| -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: these attributes are 64-bit numbers, written during the call.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut bytes).cast()) }.map_err(driver_error)?;
        Ok(bytes)
    };
    Ok([
        read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        read(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
    ])
}

/// The peak of [`memory`] counts from now on, and what is freed goes back to the driver.
pub fn forget_peak_memory(device: &CudaDevice) -> Result<()> {
    device.cuda_stream().synchronize().map_err(driver_error)?;
    let pool = pool(device)?;
    // 0 resets it.
    set(pool, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
    // SAFETY: nothing that is freed is in use after the wait above.
    unsafe { result::mem_pool::trim_to(pool, 0) }.map_err(driver_error)
}

/// Sets an attribute that is a number of bytes.
fn set(pool: sys::CUmemoryPool, attribute: sys::CUmemPool_attribute, mut bytes: u64) -> Result<()> {
    // SAFETY: a 64-bit number, read during the call.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast()) }.map_err(driver_error)
}

/// What the device's tensors are taken from.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let context = device.cuda_stream().context().clone();
    context.bind_to_thread().map_err(driver_error)?;
    // SAFETY: the context keeps its device.
    unsafe { result::device::get_default_mem_pool(context.cu_device()) }.map_err(driver_error)
}

fn driver_error(error: result::DriverError) -> crate::error::Error {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    crate::error::anyhow!(
        "the NVIDIA driver answers: {} ({:?}); `nvidia-smi` shows whether it works",
        text.unwrap_or_else(|_| "no text".into()),
        error.0
    )
}

/// The device's stream; its context is this thread's from now on, as launches take the one that is current.
pub fn stream(device: &CudaDevice) -> Result<Stream> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(driver_error)?;
    Ok(Stream(stream.cu_stream().cast()))
}

/// A CUDA graph.
pub struct Graph(CudaGraph);

// SAFETY: CUDA lets any thread use a graph, one at a time; a `Graph` is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    pub fn launch(&self) -> Result<()> {
        self.0.launch().map_err(driver_error)
    }
}

/// The launches of `work`, none of them done.
pub fn capture(device: &CudaDevice, work: &dyn Fn() -> Result<()>) -> Result<Graph> {
    const WITHOUT: &str = "cannot make a CUDA graph; VCYCLE_CUDA_GRAPHS=0 does without";
    let stream = device.cuda_stream();
    // This thread alone must keep from what cannot be captured.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(driver_error).context(WITHOUT)?;
    let launched = work();
    // Ends also where `work` failed: the stream would launch nothing more.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(driver_error);
    launched.context(WITHOUT)?;
    graph.and_then(|graph| graph.context("it is empty")).map(Graph).context(WITHOUT)
}

/// Where a contiguous tensor begins.
pub fn address(device: &CudaDevice, tensor: &Tensor) -> Result<Address> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("expected a tensor on the GPU, it is on {:?}", tensor.device().location())
    };
    let (begin, size) = match &storage.slice {
        CudaStorageSlice::U32(slice) => begin(slice, device),
        CudaStorageSlice::F32(slice) => begin(slice, device),
        CudaStorageSlice::F64(slice) => begin(slice, device),
        CudaStorageSlice::BF16(slice) => begin(slice, device),
        _ => bail!("no GPU kernel takes elements of {:?}", tensor.dtype()),
    };
    Ok(Address((begin as usize as *mut c_void).wrapping_byte_add(layout.start_offset() * size)))
}

fn begin<T: DeviceRepr>(slice: &CudaSlice<T>, device: &CudaDevice) -> (sys::CUdeviceptr, usize) {
    (slice.device_ptr(&device.cuda_stream()).0, size_of::<T>())
}

thread_local! {
    /// This thread's scratch memory and the GPU that it is on; grows to what the largest op takes.
    static SCRATCH: RefCell<Option<(candle_core::cuda_backend::DeviceId, CudaSlice<u8>)>> = const { RefCell::new(None) };
}

pub fn scratch(device: &CudaDevice, bytes: usize) -> Result<Address> {
    SCRATCH.with_borrow_mut(|scratch| {
        let fits = |kept: &(_, CudaSlice<u8>)| kept.0 == device.id() && kept.1.num_bytes() >= bytes;
        if !scratch.as_ref().is_some_and(fits) {
            // SAFETY: ops write scratch before they read it.
            *scratch = Some((device.id(), unsafe { device.alloc::<u8>(bytes)? }));
        }
        let kept = scratch.as_ref().map(|(_, slice)| slice.device_ptr(&device.cuda_stream()).0);
        Ok(Address(kept.unwrap_or_default() as usize as *mut c_void))
    })
}

pub fn read_f64s(device: &CudaDevice, address: Address, count: usize) -> Result<Vec<f64>> {
    let mut values = vec![0f64; count];
    let stream = device.cuda_stream();
    // SAFETY: the caller has had numbers written there; `values` lives until the stream is done.
    unsafe { result::memcpy_dtoh_async(&mut values, address.0 as usize as u64, stream.cu_stream()) }
        .map_err(driver_error)?;
    stream.synchronize().map_err(driver_error)?;
    Ok(values)
}

/// The source may change after the call: it is pageable memory, which the driver copies before it returns.
pub fn upload_u32(device: &CudaDevice, source: &[u32], out: Address) -> Result<()> {
    let stream = device.cuda_stream();
    // SAFETY: the caller has compared the lengths.
    unsafe { result::memcpy_htod_async(out.0 as usize as u64, source, stream.cu_stream()) }.map_err(driver_error)
}
