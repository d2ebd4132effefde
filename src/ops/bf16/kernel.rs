//! The kernels: a block of at most 32 × 32 elements of c from two packed panels.
use super::super::matrix::MatMut;
use super::{PANEL, STEP_PAIRS};
use std::sync::OnceLock;

/// The instructions that multiply bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Intel's matrix unit, Sapphire Rapids and newer
    Amx,
    /// AVX-512's dot products of pairs: Zen 4 and newer. Intel has them from Cooper Lake on, where they are slower than
    /// products in f32.
    Avx512,
}

impl Kernel {
    /// The fastest on this CPU and its operating system, if one is faster than products in f32. Not found by timing: the
    /// same machine must give the same bits.
    pub fn of_this_cpu() -> Option<Kernel> {
        static FOUND: OnceLock<Option<Kernel>> = OnceLock::new();
        *FOUND.get_or_init(|| Kernel::all().find(|&kernel| kernel == Kernel::Amx || !is_intel()))
    }

    /// All that this CPU has.
    pub fn all() -> impl Iterator<Item = Kernel> {
        let found = [(Kernel::Amx, has_amx()), (Kernel::Avx512, has_avx512_bf16())];
        found.into_iter().filter_map(|(kernel, is_there)| is_there.then_some(kernel))
    }

    pub fn name(self) -> &'static str {
        match self {
            Kernel::Amx => "AMX",
            Kernel::Avx512 => "AVX-512 BF16",
        }
    }

    /// Runs `f` with this thread set up for the kernel.
    pub fn session<R>(self, f: impl FnOnce(&Session) -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        if self == Kernel::Amx {
            amx::begin();
        }
        let result = f(&Session { kernel: self });
        #[cfg(target_arch = "x86_64")]
        if self == Kernel::Amx {
            amx::end();
        }
        result
    }
}

pub struct Session {
    kernel: Kernel,
}

impl Session {
    /// c = the product of panels a and b of the same number of steps, added to c if `keep`.
    pub fn multiply(&self, a: &[u32], b: &[u32], keep: bool, mut c: MatMut<f32>) {
        if c.rows() == PANEL && c.cols() == PANEL {
            let stride = c.row_stride();
            // SAFETY: c is a whole block.
            return unsafe { self.run(a, b, keep, c.row(0).as_mut_ptr(), stride) };
        }
        // The same sums as in a whole block, bit for bit.
        let (mut block, cols) = ([0f32; PANEL * PANEL], c.cols());
        if keep {
            let rows = block.chunks_exact_mut(PANEL).take(c.rows()).enumerate();
            rows.for_each(|(i, block)| block[..cols].copy_from_slice(c.row(i)));
        }
        // SAFETY: `block` is a whole one.
        unsafe { self.run(a, b, keep, block.as_mut_ptr(), PANEL) };
        let rows = block.chunks_exact(PANEL).take(c.rows()).enumerate();
        rows.for_each(|(i, block)| c.row(i).copy_from_slice(&block[..cols]));
    }

    /// # Safety
    /// `c` is 32 rows of 32 elements, `stride` elements apart, that may be written.
    unsafe fn run(&self, a: &[u32], b: &[u32], keep: bool, c: *mut f32, stride: usize) {
        assert!(a.len() == b.len() && a.len().is_multiple_of(STEP_PAIRS) && !a.is_empty(), "panels of whole steps");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a kernel is only made where its instructions are; the panels have as many steps as is said.
        unsafe {
            match self.kernel {
                Kernel::Amx => amx::multiply(a.len() / STEP_PAIRS, a.as_ptr(), b.as_ptr(), keep, c, stride),
                Kernel::Avx512 => avx512::multiply(a, b, keep, c, stride),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no kernel is found on this architecture: {:?} {a:?} {b:?} {keep} {c:?} {stride}", self.kernel)
    }
}

#[cfg(target_arch = "x86_64")]
pub fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}
#[cfg(not(target_arch = "x86_64"))]
pub fn has_avx512_bf16() -> bool {
    false
}

fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The registers of a leaf that this CPU has.
#[cfg(target_arch = "x86_64")]
fn cpuid(leaf: u32) -> std::arch::x86_64::CpuidResult {
    // SAFETY: every CPU of this architecture has the instruction. Older compilers want it marked.
    #[allow(unused_unsafe)]
    unsafe {
        std::arch::x86_64::__cpuid_count(leaf, 0)
    }
}

/// AMX is packed for by AVX-512.
fn has_amx() -> bool {
    #[cfg(target_arch = "x86_64")]
    return has_avx512_bf16() && amx::is_there();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::asm;

    /// Palette 1: eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// The CPU has tiles and their products of bf16, and Linux lets this process use them.
    pub fn is_there() -> bool {
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        super::cpuid(0).eax >= 7 && super::cpuid(7).edx & BF16_AND_TILES == BF16_AND_TILES && permitted()
    }

    /// Asks Linux for the state of the tiles, for all threads of this process.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call reads no memory; where it is unknown, it fails.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }

    /// Configures this thread's tiles.
    pub fn begin() {
        // SAFETY: the unit is there, else no session is begun; the configuration is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, preserves_flags)) };
    }

    /// Gives them back: a thread without tiles has less state to be saved.
    pub fn end() {
        // SAFETY: as above; no tile's content is in use.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }

    /// Four tiles of c (tmm0 to 3) from two of a (4, 5) and two of b (6, 7) a step.
    ///
    /// # Safety
    /// Between [`begin`] and [`end`]; the panels hold `steps` ≥ 1 steps; `c` is 32 rows of 32 elements `stride` apart.
    pub unsafe fn multiply(steps: usize, a: *const u32, b: *const u32, keep: bool, c: *mut f32, stride: usize) {
        let (bytes, lower) = (4 * stride, c.wrapping_add(16 * stride));
        unsafe {
            if keep {
                asm!(
                    "tileloadd tmm0, [{c} + {bytes}]",
                    "tileloadd tmm1, [{c} + {bytes} + 64]",
                    "tileloadd tmm2, [{lower} + {bytes}]",
                    "tileloadd tmm3, [{lower} + {bytes} + 64]",
                    c = in(reg) c, lower = in(reg) lower, bytes = in(reg) bytes,
                    options(nostack, preserves_flags)
                );
            } else {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, preserves_flags)
                );
            }
            asm!(
                "2:",
                "tileloadd tmm6, [{b} + {row}]",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm7, [{b} + {row} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a} + {row} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "dec {steps}",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "jnz 2b",
                "tilestored [{c} + {bytes}], tmm0",
                "tilestored [{c} + {bytes} + 64], tmm1",
                "tilestored [{lower} + {bytes}], tmm2",
                "tilestored [{lower} + {bytes} + 64], tmm3",
                a = inout(reg) a => _, b = inout(reg) b => _, steps = inout(reg) steps => _,
                row = in(reg) 64usize, c = in(reg) c, lower = in(reg) lower, bytes = in(reg) bytes,
                options(nostack)
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::super::{PANEL, STEP_PAIRS, TILE};
    use std::arch::x86_64::*;

    /// Rows of c whose sums are held in registers, for two vectors of columns.
    const ROWS: usize = 8;

    /// # Safety
    /// The CPU has the instructions; `c` is 32 rows of 32 elements `stride` apart.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn multiply(a: &[u32], b: &[u32], keep: bool, c: *mut f32, stride: usize) {
        for first in (0..PANEL).step_by(ROWS) {
            let c = |row: usize, half: usize| c.wrapping_add((first + row) * stride + half * TILE);
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            if keep {
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = unsafe { [_mm512_loadu_ps(c(row, 0)), _mm512_loadu_ps(c(row, 1))] };
                }
            }
            for (a, b) in a.chunks_exact(STEP_PAIRS).zip(b.chunks_exact(STEP_PAIRS)) {
                let a = &a[first * TILE..][..ROWS * TILE];
                let (left, right) = b.split_at(STEP_PAIRS / 2);
                for p in 0..TILE {
                    let b = [left, right]
                        .map(|b| unsafe { as_bf16(_mm512_loadu_si512(b[p * TILE..][..TILE].as_ptr().cast())) });
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let a = as_bf16(_mm512_set1_epi32(a[row * TILE + p] as i32));
                        *sums = [_mm512_dpbf16_ps(sums[0], a, b[0]), _mm512_dpbf16_ps(sums[1], a, b[1])];
                    }
                }
            }
            for (row, [left, right]) in sums.into_iter().enumerate() {
                unsafe {
                    _mm512_storeu_ps(c(row, 0), left);
                    _mm512_storeu_ps(c(row, 1), right);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn as_bf16(x: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits without a meaning of their own.
        unsafe { std::mem::transmute(x) }
    }
}
