// Layer normalisation of rows of d elements, ops/layer_norm.rs:
//
//   x̂ = (x - mean) rstd,   rstd = 1 / √(var + 1e-5),   y = x̂ weight + bias
//   g = dy weight,   dx = rstd (g - mean(g) - x̂ mean(g x̂)),   dweight = Σ_rows dy x̂,   dbias = Σ_rows dy
//
// A warp has a row: it meets the row's bytes once in memory, and again in its cache.
#include "column_sums.cuh"

namespace {

constexpr float EPS = 1e-5f;
// Rows of a block.
constexpr int ROWS = 4;

// Σ f(c, k) over the row's columns, for every lane.
template <int W, class F>
__device__ inline float row_sum(int d, F f) {
    float sum = 0.0f;
    for (int c = threadIdx.x * W; c < d; c += WARP_SIZE * W) sum += f(c);
    return warp_sum(sum);
}

// out = x̂ weight + bias
template <class T, int W>
__device__ inline void normalize_row(const T* x, const T* ln, float mean, float rstd, T* out, int d) {
    for (int c = threadIdx.x * W; c < d; c += WARP_SIZE * W) {
        Floats<W> v = load<W>(x + c), weight = load<W>(ln + c), bias = load<W>(ln + d + c);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = (v[k] - mean) * rstd * weight[k] + bias[k];
        store(out + c, v);
    }
}

template <class T, int W>
__global__ void __launch_bounds__(WARP_SIZE * ROWS) forward(const T* x, const T* ln, T* out, float* stats, size_t n, int d) {
    size_t row = size_t(blockIdx.x) * ROWS + threadIdx.y;
    if (row >= n) return;
    x += row * d;
    float mean = row_sum<W>(d, [&](int c) {
        Floats<W> v = load<W>(x + c);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) sum += v[k];
        return sum;
    }) / d;
    float variance = row_sum<W>(d, [&](int c) {
        Floats<W> v = load<W>(x + c);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < W; ++k) sum += (v[k] - mean) * (v[k] - mean);
        return sum;
    }) / d;
    float rstd = 1.0f / sqrtf(variance + EPS);
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
    normalize_row<T, W>(x, ln, mean, rstd, out + row * d, d);
}

template <class T, int W>
__global__ void __launch_bounds__(WARP_SIZE * ROWS)
    normalize(const T* x, const T* ln, const float* stats, T* out, size_t n, int d) {
    size_t row = size_t(blockIdx.x) * ROWS + threadIdx.y;
    if (row < n) normalize_row<T, W>(x + row * d, ln, stats[2 * row], stats[2 * row + 1], out + row * d, d);
}

// dx += rstd (g - mean(g) - x̂ mean(g x̂))
template <class T, int W>
__global__ void __launch_bounds__(WARP_SIZE * ROWS)
    backward_input(const T* dy, const T* x, const T* ln, const float* stats, T* dx, size_t n, int d) {
    size_t row = size_t(blockIdx.x) * ROWS + threadIdx.y;
    if (row >= n) return;
    dy += row * d;
    x += row * d;
    dx += row * d;
    float mean = stats[2 * row], rstd = stats[2 * row + 1];
    float sum_g = 0.0f, sum_gx = 0.0f;
    for (int c = threadIdx.x * W; c < d; c += WARP_SIZE * W) {
        Floats<W> v = load<W>(x + c), g = load<W>(dy + c), weight = load<W>(ln + c);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            sum_g += g[k] * weight[k];
            sum_gx += g[k] * weight[k] * (v[k] - mean) * rstd;
        }
    }
    float mean_g = warp_sum(sum_g) / d, mean_gx = warp_sum(sum_gx) / d;
    for (int c = threadIdx.x * W; c < d; c += WARP_SIZE * W) {
        Floats<W> v = load<W>(x + c), g = load<W>(dy + c), weight = load<W>(ln + c), sum = load<W>(dx + c);
#pragma unroll
        for (int k = 0; k < W; ++k) sum[k] += rstd * (g[k] * weight[k] - mean_g - (v[k] - mean) * rstd * mean_gx);
        store(dx + c, sum);
    }
}

// dy x̂ and dy
template <class T, int W>
struct ParameterTerms {
    const T *dy, *x;
    const float* stats;
    int d;
    __device__ void operator()(size_t row, int c, float* terms) const {
        Floats<W> g = load<W>(dy + row * d + c), v = load<W>(x + row * d + c);
        float mean = stats[2 * row], rstd = stats[2 * row + 1];
#pragma unroll
        for (int k = 0; k < W; ++k) {
            terms[k] = g[k] * (v[k] - mean) * rstd;
            terms[W + k] = g[k];
        }
    }
};

dim3 row_blocks(size_t n) { return dim3(ceil_div(n, ROWS)); }
const dim3 ROW_BLOCK(WARP_SIZE, ROWS);

} // namespace

// out = y, stats = (mean, rstd) of each row. x, out [n, d], ln [2, d]: weight, bias; stats [n, 2] (float).
extern "C" int vcycle_layer_norm_forward(int dtype, const void* x, const void* ln, void* out, float* stats, size_t n, int d,
                                         cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return launch(forward<T, W>, row_blocks(n), ROW_BLOCK, 0, stream, (const T*)x, (const T*)ln, (T*)out, stats, n, d);
    };
    return with_vectors(dtype, d, run, x, ln, out);
}

// out = y from kept stats.
extern "C" int vcycle_layer_norm_normalize(int dtype, const void* x, const void* ln, const float* stats, void* out, size_t n,
                                           int d, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return launch(normalize<T, W>, row_blocks(n), ROW_BLOCK, 0, stream, (const T*)x, (const T*)ln, stats, (T*)out, n, d);
    };
    return with_vectors(dtype, d, run, x, ln, out);
}

extern "C" size_t vcycle_layer_norm_backward_scratch(size_t n, int d) { return row_chunks(n) * 2 * d * sizeof(float); }

// dx [n, d] += ∂L/∂x, dln [2, d] (float) += ∂L/∂(weight, bias).
extern "C" int vcycle_layer_norm_backward(int dtype, const void* dy, const void* x, const void* ln, const float* stats,
                                          void* dx, float* dln, size_t n, int d, void* scratch, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        int error = launch(backward_input<T, W>, row_blocks(n), ROW_BLOCK, 0, stream, (const T*)dy, (const T*)x,
                           (const T*)ln, stats, (T*)dx, n, d);
        if (error != cudaSuccess) return error;
        ParameterTerms<T, W> terms{(const T*)dy, (const T*)x, stats, d};
        return add_column_sums<2, W>(terms, n, d, 1.0f, (float*)scratch, dln, stream);
    };
    return with_vectors(dtype, d, run, dy, x, ln, dx);
}
