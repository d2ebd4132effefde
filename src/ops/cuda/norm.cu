// Sums of whole tensors in double, ops/norm.rs: of pieces of fixed size, then of the pieces in order; many tensors in one launch.
#include "common.cuh"

// Tensors x_k of n_k elements. As in kernels.rs.
extern "C" {
struct Batch {
    const void* x[64];
    size_t n[64];
    int count;
};
}

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
__global__ void __launch_bounds__(THREADS) sum_pieces(Batch batch, double* partials) {
    const T* x = static_cast<const T*>(batch.x[blockIdx.y]);
    size_t n = batch.n[blockIdx.y], begin = size_t(blockIdx.x) * PIECE, end = begin + PIECE < n ? begin + PIECE : n;
    if (begin >= n) return;
    double sum = 0.0;
    for (size_t i = begin + threadIdx.x * W; i < end; i += THREADS * W) {
        Floats<W> v = load<W>(x + i);
#pragma unroll
        for (int k = 0; k < W; ++k) sum += SQUARE ? double(v[k]) * v[k] : double(v[k]);
    }
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) partials[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// `most` pieces have room in a tensor's partials.
__global__ void __launch_bounds__(THREADS) sum_partials(Batch batch, const double* partials, size_t most, double* out) {
    size_t pieces = ceil_div(batch.n[blockIdx.x], PIECE);
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < pieces; i += THREADS) sum += partials[blockIdx.x * most + i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

size_t most_pieces(const Batch& batch) {
    size_t most = 0;
    for (int k = 0; k < batch.count; ++k) most = batch.n[k] > most ? batch.n[k] : most;
    return ceil_div(most, PIECE);
}

// With vectors where all tensors have whole ones.
template <bool SQUARE>
int sum(int dtype, const Batch& batch, double* out, void* scratch, cudaStream_t stream) {
    size_t most = most_pieces(batch), shared = THREADS / WARP_SIZE * sizeof(double);
    if (batch.count == 0) return cudaSuccess;
    auto run = [&]<class T>() -> int {
        bool wide = true;
        for (int k = 0; k < batch.count; ++k) wide = wide && batch.n[k] % WIDE<T> == 0 && all_aligned(batch.x[k]);
        if (most == 0) return cudaSuccess;
        dim3 grid(most, batch.count);
        return wide ? launch(sum_pieces<SQUARE, T, WIDE<T>>, grid, THREADS, shared, stream, batch, (double*)scratch)
                    : launch(sum_pieces<SQUARE, T, 1>, grid, THREADS, shared, stream, batch, (double*)scratch);
    };
    int error = with_element(dtype, run);
    if (error != cudaSuccess) return error;
    return launch(sum_partials, batch.count, THREADS, shared, stream, batch, (const double*)scratch, most, out);
}

} // namespace

// Of `count` tensors, the longest of n elements.
extern "C" size_t vcycle_sum_scratch(size_t count, size_t n) { return count * ceil_div(n, PIECE) * sizeof(double); }

// out[k] = Σ x_k, of each tensor of the batch
extern "C" int vcycle_sum(int dtype, const Batch* batch, double* out, void* scratch, cudaStream_t stream) {
    return sum<false>(dtype, *batch, out, scratch, stream);
}

// out[k] = Σ x_k²
extern "C" int vcycle_sum_of_squares(int dtype, const Batch* batch, double* out, void* scratch, cudaStream_t stream) {
    return sum<true>(dtype, *batch, out, scratch, stream);
}
