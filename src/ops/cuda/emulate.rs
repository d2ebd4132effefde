//! The kernels on the host: the .cu files compiled by g++ against `emulate/cuda.h`, loaded when first used.
//!
//! Inside [`run`] every op of this thread takes its CPU tensors for tensors on a GPU. Products are not emulated but
//! computed by `ops::matrix` in f32, rounded as cuBLASLt rounds.
use super::{Address, BIAS_ALIGNMENT, Kernels, Operand, Product};
use crate::ops::matrix::{Factors, Mat, MatMut, multiply as multiply_matrices};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor};
use half::bf16;
use sha2::{Digest, Sha256};
use std::cell::{Cell, RefCell};
use std::ffi::{CString, OsStr, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

struct Library {
    kernels: Kernels,
    set_reversed: unsafe extern "C" fn(c_int),
    // Graphs: emulate/control.cpp.
    capture: unsafe extern "C" fn() -> *mut c_void,
    end_capture: unsafe extern "C" fn(),
    length: unsafe extern "C" fn(*const c_void) -> usize,
    launch: unsafe extern "C" fn(*const c_void, usize, usize),
    free: unsafe extern "C" fn(*mut c_void),
}

static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static SCRATCH: RefCell<Vec<u128>> = const { RefCell::new(Vec::new()) };
    static CAPTURED: RefCell<Option<Graph>> = const { RefCell::new(None) };
}

/// What was launched in a [`capture`], not done yet: launches, kept by the library, and products.
pub struct Graph {
    launches: *mut c_void,
    /// Each with the number of launches before it.
    products: Vec<(usize, Product)>,
}

/// As CUDA does: what `work` launches is kept, and none of it done.
pub fn capture(work: &dyn Fn() -> crate::error::Result<()>) -> crate::error::Result<Graph> {
    let library = library();
    // SAFETY: captures what this thread launches, until the end below; the graph frees it when it is dropped.
    let launches = unsafe { (library.capture)() };
    CAPTURED.set(Some(Graph { launches, products: Vec::new() }));
    let launched = work();
    // SAFETY: ends the capture above.
    unsafe { (library.end_capture)() };
    let graph = CAPTURED.take().expect("set above");
    launched.map(|()| graph)
}

impl Graph {
    pub fn launch(&self) {
        let library = library();
        // SAFETY: the library's own graph; its tensors are those of the net that keeps it.
        let launch = |begin, end| unsafe { (library.launch)(self.launches, begin, end) };
        let mut begin = 0;
        for &(end, product) in &self.products {
            launch(begin, end);
            multiply(product);
            begin = end;
        }
        // SAFETY: as above.
        launch(begin, unsafe { (library.length)(self.launches) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by the library, and dropped once.
        unsafe { (library().free)(self.launches) }
    }
}

/// Panics where what comes would wait for the device or copy to it, which a graph cannot.
pub fn assert_not_captured(what: &str) {
    CAPTURED.with_borrow(|captured| assert!(captured.is_none(), "{what} while a graph is captured"));
}

/// Runs `f` with the kernels emulated on this thread, twice: threads and blocks from first to last, then from last to
/// first; the same result bit for bit, or the order shows, which on a GPU is a race. `None` where there is no g++.
pub fn run<R: PartialEq>(f: impl Fn() -> R) -> Option<R> {
    let Some(library) = LIBRARY.get_or_init(load) else {
        eprintln!("skipped: no g++ to compile the CUDA kernels' emulation with");
        return None;
    };
    let ordered = |reversed: bool| {
        // SAFETY: sets a flag of this thread.
        unsafe { (library.set_reversed)(reversed.into()) };
        ON.set(true);
        let result = f();
        ON.set(false);
        result
    };
    let result = ordered(false);
    assert!(result == ordered(true), "the result depends on the order of threads: a race");
    Some(result)
}

fn library() -> &'static Library {
    LIBRARY.get().and_then(Option::as_ref).expect("loaded by `run`")
}

/// The emulated kernels, inside [`run`].
pub fn kernels() -> Option<&'static Kernels> {
    let library = LIBRARY.get()?.as_ref()?;
    ON.get().then_some(&library.kernels)
}

fn load() -> Option<Library> {
    let file = compile()?;
    let name = CString::new(file.to_str().expect("a path in UTF-8")).expect("no NUL in a path");
    // SAFETY: the library has no initialisers that do harm.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{} cannot be loaded", file.display());
    let symbol = |name: &str| {
        let name = CString::new(name).expect("a name");
        // SAFETY: the handle is open.
        let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
        assert!(!address.is_null(), "no kernel defines {name:?}");
        address
    };
    macro_rules! function {
        ($name:literal: $type:ty) => {
            std::mem::transmute::<*mut c_void, $type>(symbol($name))
        };
    }
    // SAFETY: compiled from the sources beside the declarations.
    unsafe {
        Some(Library {
            kernels: Kernels::found(symbol),
            set_reversed: function!("vcycle_emulate_reversed": unsafe extern "C" fn(c_int)),
            capture: function!("vcycle_emulate_capture": unsafe extern "C" fn() -> *mut c_void),
            end_capture: function!("vcycle_emulate_end_capture": unsafe extern "C" fn()),
            length: function!("vcycle_emulate_length": unsafe extern "C" fn(*const c_void) -> usize),
            launch: function!("vcycle_emulate_launch": unsafe extern "C" fn(*const c_void, usize, usize)),
            free: function!("vcycle_emulate_free": unsafe extern "C" fn(*mut c_void)),
        })
    }
}

/// The library, beside the test's binary under a name that changes with the sources. `None` without g++.
fn compile() -> Option<PathBuf> {
    Command::new("g++").arg("--version").output().ok().filter(|output| output.status.success())?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda");
    let sources = [files(&folder), files(&folder.join("emulate"))].concat();
    let mut hash = Sha256::new();
    sources.iter().for_each(|file| hash.update(std::fs::read(file).expect("a source")));
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let library = std::env::current_exe().expect("the test's path").with_file_name(format!("cuda-emulated-{hash}.so"));
    if library.exists() {
        return Some(library);
    }
    let partial = tempfile::Builder::new().tempfile_in(library.parent().expect("a folder")).expect("a file");
    let options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"];
    let output = Command::new("g++")
        .args(options)
        .args(["-DVCYCLE_EMULATE", "-shared", "-fPIC", "-o"])
        .arg(partial.path())
        .args(["-x", "c++"])
        .args(sources.iter().filter(|file| ["cu", "cpp"].map(OsStr::new).map(Some).contains(&file.extension())))
        .output()
        .expect("g++ starts");
    assert!(output.status.success(), "the kernels do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    partial.persist(&library).expect("the library is renamed");
    Some(library)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the kernels' folder");
    let mut files: Vec<_> =
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Where a contiguous CPU tensor begins.
pub fn address(tensor: &Tensor) -> crate::error::Result<Address> {
    struct Begin(Cell<*mut c_void>);
    impl InplaceOp1 for Begin {
        fn name(&self) -> &'static str {
            "address"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let start = layout.start_offset();
            self.0.set(match storage {
                CpuStorage::U32(x) => x[start..].as_mut_ptr().cast(),
                CpuStorage::F32(x) => x[start..].as_mut_ptr().cast(),
                CpuStorage::F64(x) => x[start..].as_mut_ptr().cast(),
                CpuStorage::BF16(x) => x[start..].as_mut_ptr().cast(),
                _ => candle_core::bail!("no kernel takes such elements"),
            });
            Ok(())
        }
    }
    let begin = Begin(Cell::new(std::ptr::null_mut()));
    tensor.inplace_op1(&begin)?;
    Ok(Address(begin.0.get()))
}

/// Room of `bytes` that begins as NaN.
pub fn scratch(bytes: usize) -> Address {
    const WORD: usize = size_of::<u128>();
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        // One alignment more, for an address that is a multiple of it.
        scratch.resize(bytes.div_ceil(WORD) + super::ALIGNMENT / WORD, u128::MAX);
        let begin: *mut c_void = scratch.as_mut_ptr().cast();
        Address(begin.wrapping_byte_add(begin.align_offset(super::ALIGNMENT)))
    })
}

/// The product, now or when the graph is launched.
pub fn multiply(product: Product) {
    let captured = CAPTURED.with_borrow_mut(|captured| {
        let Some(graph) = captured else { return false };
        // SAFETY: the graph that is captured.
        let before = unsafe { (library().length)(graph.launches) };
        graph.products.push((before, product));
        true
    });
    if captured {
        return;
    }
    let Product { shape: [m, n, k], alpha, a, b, beta, c, bias, out } = product;
    let shape = |rows, columns, operand: &Operand| if operand.transposed { (columns, rows) } else { (rows, columns) };
    let ((a_rows, a_columns), (b_rows, b_columns)) = (shape(m, k, &a), shape(k, n, &b));
    let (a_values, b_values) = (values(&a, a_rows, a_columns), values(&b, b_rows, b_columns));
    let (a_matrix, b_matrix) = (Mat::new(&a_values, a_columns), Mat::new(&b_values, b_columns));
    let a_matrix = if a.transposed { a_matrix.t() } else { a_matrix };
    let b_matrix = if b.transposed { b_matrix.t() } else { b_matrix };
    let mut sum = if beta == 0.0 { vec![0.0; m * n] } else { values(&c, m, n) };
    multiply_matrices(Factors::Exact, alpha, a_matrix, b_matrix, beta, MatMut::new(&mut sum, n));
    if let Some(at) = bias {
        assert!(product.takes_bias() && at.is_aligned(BIAS_ALIGNMENT), "a bias that cuBLASLt may not take");
        let bias = values(&Operand { at, transposed: false, ..out }, 1, n);
        sum.chunks_mut(n).for_each(|row| row.iter_mut().zip(&bias).for_each(|(value, bias)| *value += bias));
    }
    for (row, values) in sum.chunks(n).enumerate() {
        for (column, &value) in values.iter().enumerate() {
            let i = row * out.pitch + column;
            // SAFETY: inside the matrix that the caller describes.
            unsafe {
                match out.dtype {
                    DType::F32 => *(out.at.0 as *mut f32).add(i) = value,
                    DType::BF16 => *(out.at.0 as *mut bf16).add(i) = bf16::from_f32(value),
                    dtype => panic!("a product of {dtype:?}"),
                }
            }
        }
    }
}

fn values(operand: &Operand, rows: usize, columns: usize) -> Vec<f32> {
    let element = |i: usize| {
        // SAFETY: inside the matrix that the caller describes.
        unsafe {
            match operand.dtype {
                DType::F32 => *(operand.at.0 as *const f32).add(i),
                DType::BF16 => (*(operand.at.0 as *const bf16).add(i)).to_f32(),
                dtype => panic!("a product of {dtype:?}"),
            }
        }
    };
    (0..rows).flat_map(|row| (0..columns).map(move |column| row * operand.pitch + column)).map(element).collect()
}
