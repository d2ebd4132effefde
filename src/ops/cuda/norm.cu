// Sums of a whole tensor in double, ops/norm.rs: of pieces of fixed size, then of the pieces in order.
#include "common.cuh"

namespace {

// Elements that one block sums.
constexpr size_t PIECE = 1 << 15;

// The sum over a block of THREADS, valid in thread 0.
__device__ inline double block_sum(double x, double* shared) {
    x = warp_sum(x);
    if (threadIdx.x % WARP_SIZE == 0) shared[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    double sum = 0.0;
    for (int warp = 0; warp < THREADS / WARP_SIZE; ++warp) sum += shared[warp];
    return sum;
}

template <bool SQUARE, class T, int W>
__global__ void __launch_bounds__(THREADS) sum_pieces(const T* x, size_t n, double* partials) {
    size_t begin = size_t(blockIdx.x) * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
    double sum = 0.0;
    for (size_t i = begin + threadIdx.x * W; i < end; i += THREADS * W) {
        Floats<W> v = load<W>(x + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += SQUARE ? double(v[k]) * v[k] : double(v[k]);
    }
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) sum_partials(const double* partials, size_t n, double* out) {
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < n; i += THREADS) sum += partials[i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) *out = sum;
}

template <bool SQUARE>
int sum(int dtype, const void* x, double* out, size_t n, void* scratch, cudaStream_t stream) {
    size_t pieces = ceil_div(n, PIECE), shared = THREADS / WARP_SIZE * sizeof(double);
    auto run = [&]<class T, int W>() -> int {
        if (pieces == 0) return cudaSuccess;
        return launch(sum_pieces<SQUARE, T, W>, pieces, THREADS, shared, stream, (const T*)x, n, (double*)scratch);
    };
    int error = with_vectors(dtype, n, run, x);
    if (error != cudaSuccess) return error;
    return launch(sum_partials, 1, THREADS, shared, stream, (const double*)scratch, pieces, out);
}

} // namespace

extern "C" size_t vcycle_sum_scratch(size_t n) { return ceil_div(n, PIECE) * sizeof(double); }

// *out = Σ x, x [n]
extern "C" int vcycle_sum(int dtype, const void* x, double* out, size_t n, void* scratch, cudaStream_t stream) {
    return sum<false>(dtype, x, out, n, scratch, stream);
}

// *out = Σ x², x [n]
extern "C" int vcycle_sum_of_squares(int dtype, const void* x, double* out, size_t n, void* scratch, cudaStream_t stream) {
    return sum<true>(dtype, x, out, n, scratch, stream);
}
