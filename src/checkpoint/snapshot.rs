//! A copy of a state in host memory, laid out as the datasets of a checkpoint.

use super::{Part, State, Visitor};
use crate::error::{Context, Result, bail, ensure};
use crate::model::{Layout, Segment};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use serde_json::{Map, Value};

/// The datasets and values of one state. Taken again of a state of the same shape, it reuses its buffers: no page of
/// them is new to the process.
#[derive(Default, Debug, PartialEq)]
pub struct Snapshot {
    pub datasets: Vec<Dataset>,
    pub values: Map<String, Value>,
}

/// One dataset, [R, ..shape] in memory order.
#[derive(Debug, PartialEq)]
pub struct Dataset {
    pub part: Part,
    /// Path in the file: `blocks/attn/qkv/weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Data,
}

#[derive(Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Data {
    fn new(dtype: DType, capacity: usize) -> Result<Data> {
        match dtype {
            DType::F32 => Ok(Data::F32(Vec::with_capacity(capacity))),
            DType::F64 => Ok(Data::F64(Vec::with_capacity(capacity))),
            other => bail!("dtype is {}; a checkpoint holds f32 and f64", other.as_str()),
        }
    }

    fn dtype(&self) -> DType {
        match self {
            Data::F32(_) => DType::F32,
            Data::F64(_) => DType::F64,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Data::F32(data) => size_of_val(data.as_slice()),
            Data::F64(data) => size_of_val(data.as_slice()),
        }
    }
}

impl Snapshot {
    /// Copies `state`. After an error the snapshot is incomplete, but may be taken again.
    pub fn take(&mut self, state: &mut dyn State) -> Result<()> {
        self.values.clear();
        let mut visitor = Take { snapshot: self, visited: 0 };
        state.visit(&mut visitor)?;
        let visited = visitor.visited;
        self.datasets.truncate(visited);
        Ok(())
    }

    /// Bytes of all datasets.
    pub fn bytes(&self) -> u64 {
        self.datasets.iter().map(|dataset| dataset.data.bytes() as u64).sum()
    }
}

/// The visit that copies: the first `visited` datasets are of this visit, the others of the one before.
struct Take<'a> {
    snapshot: &'a mut Snapshot,
    visited: usize,
}

impl Visitor for Take<'_> {
    fn rows(&mut self, part: Part, group: &str, layout: &Layout, tensor: &Tensor) -> Result<()> {
        let rows = row_count(group, layout, tensor)?;
        // On the CPU this is the tensor itself.
        let host = tensor.to_device(&Device::Cpu)?;
        let (storage, position) = host.storage_and_layout();
        let (start, end) = position.contiguous_offsets().with_context(|| format!("/{group} is not contiguous"))?;
        for segment in &layout.segments {
            let name = format!("{group}/{}", segment.name);
            let row = layout.len();
            match (&*storage, self.next(part, name, shape(rows, segment), tensor.dtype())?) {
                (Storage::Cpu(CpuStorage::F32(from)), Data::F32(to)) => gather(&from[start..end], row, segment, to),
                (Storage::Cpu(CpuStorage::F64(from)), Data::F64(to)) => gather(&from[start..end], row, segment, to),
                _ => unreachable!("a tensor's storage has its dtype, and this one is on the CPU"),
            }
        }
        Ok(())
    }

    fn value(&mut self, name: &str, value: &mut Value) -> Result<()> {
        let before = self.snapshot.values.insert(name.to_owned(), value.clone());
        ensure!(before.is_none(), "the state visits the value `{name}` twice");
        Ok(())
    }
}

impl Take<'_> {
    /// The buffer of the next dataset: the one that the visit before left, or a new one.
    fn next(&mut self, part: Part, name: String, shape: Vec<usize>, dtype: DType) -> Result<&mut Data> {
        let datasets = &mut self.snapshot.datasets;
        let (visited, left) = datasets.split_at(self.visited);
        let twice = visited.iter().any(|d| d.part == part && d.name == name);
        ensure!(!twice, "the state visits the dataset /{name} of {} twice", part.file());
        let same = |d: &Dataset| d.part == part && d.name == name && d.shape == shape && d.data.dtype() == dtype;
        match left.iter().position(same) {
            Some(gone) => drop(datasets.drain(self.visited..self.visited + gone)),
            None => {
                let data = Data::new(dtype, shape.iter().product()).with_context(|| format!("/{name}"))?;
                datasets.insert(self.visited, Dataset { part, name, shape, data });
            }
        }
        self.visited += 1;
        Ok(&mut datasets[self.visited - 1].data)
    }
}

/// out [R, ..segment.shape] = the columns of `segment` in rows [R, P].
fn gather<T: Copy>(rows: &[T], row: usize, segment: &Segment, out: &mut Vec<T>) {
    out.clear();
    for row in rows.chunks_exact(row) {
        out.extend_from_slice(&row[segment.offset..segment.offset + segment.len()]);
    }
}

/// R of a tensor [R, P] of rows of `layout`.
pub(super) fn row_count(group: &str, layout: &Layout, tensor: &Tensor) -> Result<usize> {
    match tensor.dims() {
        &[rows, width] if width == layout.len() => Ok(rows),
        dims => bail!("the tensor of /{group} has shape {dims:?}; its layout asks for [rows, {}]", layout.len()),
    }
}

/// [R, ..segment.shape]
pub(super) fn shape(rows: usize, segment: &Segment) -> Vec<usize> {
    std::iter::once(rows).chain(segment.shape.iter().copied()).collect()
}
