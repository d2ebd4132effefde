//! Typed access to the elements of contiguous tensors, on the CPU without copies, and the checks every op makes of its
//! arguments.
//!
//! Reading holds a read lock of the storage, writing its write lock ([`check`] refuses the argument lists that would
//! wait for themselves).
use super::profile;
use super::real::{PIECE, Real};
use crate::error::{Result, anyhow, bail, ensure};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, WithDType};
use half::bf16;
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::{Deref, Range};

/// Evaluates `$body` with `$T` the element type of `$tensor`, on the CPU; another device or type is an error that names the
/// op.
macro_rules! on_cpu {
    ($op:expr, $tensor:expr, $T:ident => $body:expr) => {
        match ($tensor.device(), $tensor.dtype()) {
            (candle_core::Device::Cpu, candle_core::DType::F32) => {
                type $T = f32;
                $body
            }
            (candle_core::Device::Cpu, candle_core::DType::F64) => {
                type $T = f64;
                $body
            }
            (device, dtype) => Err($crate::ops::access::no_kernel($op, device, dtype)),
        }
    };
}
pub(crate) use on_cpu;

/// Dispatches on the device of `$tensor`: `$cuda` with `$gpu` the GPU that holds it, else `$body` as [`on_cpu`] does.
#[cfg(any(feature = "cuda", test))]
macro_rules! on_device {
    ($op:expr, $tensor:expr, $gpu:ident => $cuda:expr, $T:ident => $body:expr) => {
        match $crate::ops::cuda::Gpu::of($tensor) {
            Some($gpu) => $cuda,
            None => $crate::ops::access::on_cpu!($op, $tensor, $T => $body),
        }
    };
}
#[cfg(not(any(feature = "cuda", test)))]
macro_rules! on_device {
    ($op:expr, $tensor:expr, $gpu:ident => $cuda:expr, $T:ident => $body:expr) => {
        $crate::ops::access::on_cpu!($op, $tensor, $T => $body)
    };
}
pub(crate) use on_device;

pub fn no_kernel(op: &str, device: &candle_core::Device, dtype: DType) -> crate::error::Error {
    let location = device.location();
    anyhow!("{op}: no kernel for {dtype:?} on {location:?}; the CPU computes in f32 or f64, a GPU in f32 or bf16")
}

/// Whether the ops on `device` take bf16: those of GPUs do.
pub fn computes_in_bf16(device: &Device) -> bool {
    #[cfg(any(feature = "cuda", test))]
    return super::cuda::Gpu::on(device).is_some();
    #[cfg(not(any(feature = "cuda", test)))]
    return !device.is_cpu();
}

/// The dtype of sums over elements of `dtype`: f32 for bf16, else the same.
pub fn sums(dtype: DType) -> DType {
    if dtype == DType::BF16 { DType::F32 } else { dtype }
}

/// A named argument of an op with the shape it must have.
pub type Argument<'a> = (&'static str, &'a Tensor, &'a [usize]);

/// Every argument has its shape, the dtype, and contiguous elements; no output shares storage with another argument.
pub fn check(op: &str, dtype: DType, inputs: &[Argument], outputs: &[Argument]) -> Result<()> {
    check_mixed(op, dtype, &[], inputs, outputs)
}

/// As [`check`]; the arguments named in `summed` have the dtype of sums.
pub fn check_mixed(op: &str, dtype: DType, summed: &[&str], inputs: &[Argument], outputs: &[Argument]) -> Result<()> {
    for &(name, tensor, shape) in inputs.iter().chain(outputs) {
        let dtype = if summed.contains(&name) { sums(dtype) } else { dtype };
        ensure!(tensor.dims() == shape, "{op}: {name} has shape {:?}, expected {shape:?}", tensor.dims());
        ensure!(tensor.dtype() == dtype, "{op}: {name} is {:?}, expected {dtype:?}", tensor.dtype());
        ensure!(tensor.is_contiguous(), "{op}: {name} is not contiguous (strides {:?})", tensor.stride());
    }
    for (i, (name, output, _)) in outputs.iter().enumerate() {
        for (other, tensor, _) in inputs.iter().chain(&outputs[..i]) {
            ensure!(
                storage_address(output) != storage_address(tensor),
                "{op}: {name} shares its storage with {other}; give it a tensor of its own"
            );
        }
    }
    Ok(())
}

/// Whether they are the same elements of one storage, in the same shape.
pub fn is_same(a: &Tensor, b: &Tensor) -> bool {
    storage_address(a) == storage_address(b)
        && a.dims() == b.dims()
        && a.layout().start_offset() == b.layout().start_offset()
}

fn storage_address(tensor: &Tensor) -> *const Storage {
    &*tensor.storage_and_layout().0
}

/// Rows and columns of a matrix argument, neither 0.
pub fn matrix_shape(op: &str, name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
        ref shape => bail!("{op}: {name} has shape {shape:?}, expected a matrix that is not empty"),
    }
}

/// Every index is below `end`.
pub fn check_indices(op: &str, what: &str, indices: &[u32], end: usize) -> Result<()> {
    match indices.iter().position(|&index| index as usize >= end) {
        Some(i) => bail!("{op}: {what} {} at position {i} is not below the vocabulary's {end}", indices[i]),
        None => Ok(()),
    }
}

enum Elements<G, T> {
    Cpu { storage: G, range: Range<usize>, as_slice: fn(&CpuStorage) -> candle_core::Result<&[T]> },
    Copied(Vec<T>),
}

impl<G: Deref<Target = Storage>, T> Deref for Elements<G, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Elements::Copied(values) => values,
            Elements::Cpu { storage, range, as_slice } => match &**storage {
                Storage::Cpu(storage) => match as_slice(storage) {
                    Ok(data) => &data[range.clone()],
                    Err(_) => unreachable!("`read` has checked the dtype"),
                },
                _ => unreachable!("`read` has checked the device"),
            },
        }
    }
}

/// The elements of a contiguous tensor: on the CPU the tensor's own, read-locked until dropped, from a GPU a copy.
pub fn read<T: WithDType>(tensor: &Tensor) -> Result<impl Deref<Target = [T]>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous_range(layout)?;
    ensure!(tensor.dtype() == T::DTYPE, "expected a tensor of {:?}, it is {:?}", T::DTYPE, tensor.dtype());
    if matches!(&*storage, Storage::Cpu(_)) {
        return Ok(Elements::Cpu { storage, range, as_slice: T::cpu_storage_as_slice });
    }
    drop(storage);
    Ok(Elements::Copied(tensor.flatten_all()?.to_vec1()?))
}

/// Calls `f` with the elements of a contiguous tensor, write-locked meanwhile; those of a GPU are copied here and back.
pub fn write<T: Real, R>(tensor: &Tensor, f: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    write_as(tensor, T::slice_mut, f)
}

fn write_as<T, R>(
    tensor: &Tensor,
    as_slice: fn(&mut CpuStorage) -> Option<&mut [T]>,
    f: impl FnOnce(&mut [T]) -> Result<R>,
) -> Result<R> {
    let range = contiguous_range(tensor.layout())?;
    if !tensor.device().is_cpu() {
        let host = tensor.flatten_all()?.to_device(&candle_core::Device::Cpu)?.force_contiguous()?;
        let result = write_as(&host, as_slice, f)?;
        tensor.flatten_all()?.slice_set(&host.to_device(tensor.device())?, 0, 0)?;
        return Ok(result);
    }
    let result = Cell::new(None);
    let f = Cell::new(Some(f));
    tensor.inplace_op1(&Write(|storage: &mut CpuStorage| {
        if let (Some(data), Some(f)) = (as_slice(storage), f.take()) {
            result.set(Some(f(&mut data[range.clone()])));
        }
    }))?;
    result.into_inner().unwrap_or_else(|| bail!("a kernel cannot write into a tensor of {:?}", tensor.dtype()))
}

/// candle's public way to the mutable storage of a tensor is an in-place op.
struct Write<F>(F);

impl<F: Fn(&mut CpuStorage)> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        (self.0)(storage);
        Ok(())
    }
}

fn contiguous_range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("expected a contiguous tensor, its strides are {:?}", layout.stride()),
    }
}

/// x = value, all elements.
pub fn fill(x: &Tensor, value: f64) -> Result<()> {
    const OP: &str = "fill";
    let _time = profile::time(OP);
    check(OP, x.dtype(), &[], &[("x", x, x.dims())])?;
    on_device!(OP, x, gpu => gpu.launch(OP, |k, stream| {
        let (element, n, x) = (gpu.element(OP, x)?, x.elem_count(), gpu.at(x)?);
        Ok(unsafe { (k.fill)(element, x, value as f32, n, stream) })
    }), T => write(x, |x: &mut [T]| {
        let value = T::of(value);
        x.par_chunks_mut(PIECE).for_each(|piece| piece.fill(value));
        Ok(())
    }))
}

/// out = source, same shape.
pub fn copy(source: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "copy";
    let _time = profile::time(OP);
    check(OP, source.dtype(), &[("source", source, source.dims())], &[("out", out, source.dims())])?;
    on_device!(OP, out, gpu => gpu.launch(OP, |k, stream| {
        let bytes = out.elem_count() * out.dtype().size_in_bytes();
        let (source, out) = (gpu.at(source)?, gpu.at(out)?);
        Ok(unsafe { (k.copy)(source, out, bytes, stream) })
    }), T => {
        let source = read::<T>(source)?;
        write(out, |out: &mut [T]| {
            out.par_chunks_mut(PIECE).zip(source.par_chunks(PIECE)).for_each(|(out, source)| out.copy_from_slice(source));
            Ok(())
        })
    })
}

/// out = source, rounded to the nearest element of its dtype; f32 and bf16.
pub fn cast(source: &Tensor, out: &Tensor) -> Result<()> {
    const OP: &str = "cast";
    let _time = profile::time(OP);
    check(OP, source.dtype(), &[("source", source, source.dims())], &[])?;
    check(OP, out.dtype(), &[], &[("out", out, source.dims())])?;
    #[cfg(any(feature = "cuda", test))]
    if let Some(gpu) = super::cuda::Gpu::of(out) {
        return gpu.launch(OP, |k, stream| {
            let (from, to) = (gpu.element(OP, source)?, gpu.element(OP, out)?);
            let (source, address) = (gpu.at(source)?, gpu.at(out)?);
            Ok(unsafe { (k.cast)(from, to, source, address, out.elem_count(), stream) })
        });
    }
    match (source.dtype(), out.dtype()) {
        (DType::F32, DType::BF16) => cast_slices(&read::<f32>(source)?, out, bf16_slice, bf16::from_f32),
        (DType::BF16, DType::F32) => cast_slices(&read::<bf16>(source)?, out, f32::slice_mut, bf16::to_f32),
        (from, to) => bail!("{OP}: from {from:?} to {to:?} is not between F32 and BF16"),
    }
}

fn cast_slices<S: Copy + Sync, T: Send>(
    source: &[S],
    out: &Tensor,
    as_slice: fn(&mut CpuStorage) -> Option<&mut [T]>,
    convert: impl Fn(S) -> T + Sync,
) -> Result<()> {
    write_as(out, as_slice, |out| {
        let pieces = out.par_chunks_mut(PIECE).zip(source.par_chunks(PIECE));
        pieces.for_each(|(out, source)| out.iter_mut().zip(source).for_each(|(out, &x)| *out = convert(x)));
        Ok(())
    })
}

fn bf16_slice(storage: &mut CpuStorage) -> Option<&mut [bf16]> {
    match storage {
        CpuStorage::BF16(data) => Some(data),
        _ => None,
    }
}

/// out = source, for a U32 tensor of as many elements.
pub fn upload_u32(source: &[u32], out: &Tensor) -> Result<()> {
    ensure!(
        out.elem_count() == source.len() && out.dtype() == DType::U32,
        "upload_u32: out is {:?} {:?}, expected U32 with {} elements",
        out.dtype(),
        out.dims(),
        source.len()
    );
    #[cfg(any(feature = "cuda", test))]
    if let Some(gpu) = super::cuda::Gpu::of(out) {
        return gpu.upload_u32(source, out);
    }
    fn as_slice(storage: &mut CpuStorage) -> Option<&mut [u32]> {
        match storage {
            CpuStorage::U32(data) => Some(data),
            _ => None,
        }
    }
    write_as(out, as_slice, |out: &mut [u32]| {
        out.copy_from_slice(source);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn fill_copy_and_upload_stay_inside_their_view() {
        let storage = Tensor::zeros(10, DType::F32, &candle_core::Device::Cpu).unwrap();
        fill(&storage.narrow(0, 2, 3).unwrap(), 1.5).unwrap();
        assert_eq!(values(&storage), [0.0, 0.0, 1.5, 1.5, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0]);
        copy(&random(&[2], DType::F32, 1), &storage.narrow(0, 4, 2).unwrap()).unwrap();
        assert_eq!(values(&storage)[4..6], values(&random(&[2], DType::F32, 1)));
        assert_eq!(values(&storage)[6..], [0.0; 4]);

        let tokens = Tensor::zeros((2, 2), DType::U32, &candle_core::Device::Cpu).unwrap();
        upload_u32(&[7, 8], &tokens.narrow(0, 1, 1).unwrap()).unwrap();
        assert_eq!(values(&tokens), [0.0, 0.0, 7.0, 8.0]);
        assert!(upload_u32(&[1], &tokens).is_err() && upload_u32(&[1, 2], &storage.narrow(0, 0, 2).unwrap()).is_err());
    }

    #[test]
    fn the_error_of_a_kernel_comes_out() {
        let x = constant(0.0, &[2], DType::F32);
        let wrong = write(&x, |_: &mut [f32]| -> Result<()> { bail!("from the kernel") }).unwrap_err();
        assert_eq!(wrong.to_string(), "from the kernel");
        assert!(write(&x, |_: &mut [f64]| Ok(())).unwrap_err().to_string().contains("F32"));
    }
}
