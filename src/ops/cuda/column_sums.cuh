// Sums over rows, in a fixed order: partial sums of chunks of rows, then the sum of these. The order depends on shapes alone.
#pragma once
#include "common.cuh"

// Rows that one block sums.
constexpr int CHUNK_ROWS = 128;
// Rows that a block's threads sum side by side; 32 threads hold the columns.
constexpr int LANES_Y = 8;

inline size_t row_chunks(size_t n) { return ceil_div(n, CHUNK_ROWS); }

// values[k] of LANES_Y threads of the same column, added in the order of threadIdx.y; valid where threadIdx.y = 0.
template <int N>
__device__ inline void add_over_y(float (&values)[N], float* shared) {
#pragma unroll
    for (int k = 0; k < N; ++k) shared[(threadIdx.y * N + k) * WARP_SIZE + threadIdx.x] = values[k];
    __syncthreads();
    if (threadIdx.y != 0) return;
#pragma unroll
    for (int k = 0; k < N; ++k)
        for (int y = 1; y < LANES_Y; ++y) values[k] += shared[(y * N + k) * WARP_SIZE + threadIdx.x];
}

// partials[chunk][k][c] = Σ f(row, c)[k] over the chunk's rows, k < K, c < d. f gives K W values: k, then columns c … c+W-1.
template <int K, int W, class F>
__global__ void column_partials(F f, size_t n, int d, float* partials) {
    float* shared = shared_memory<float>();
    int c = (blockIdx.x * WARP_SIZE + threadIdx.x) * W;
    float sums[K * W] = {};
    if (c < d) {
        size_t begin = size_t(blockIdx.y) * CHUNK_ROWS;
        size_t end = begin + CHUNK_ROWS < n ? begin + CHUNK_ROWS : n;
        for (size_t row = begin + threadIdx.y; row < end; row += LANES_Y) {
            float terms[K * W];
            f(row, c, terms);
#pragma unroll
            for (int k = 0; k < K * W; ++k) sums[k] += terms[k];
        }
    }
    add_over_y(sums, shared);
    if (threadIdx.y != 0 || c >= d) return;
#pragma unroll
    for (int k = 0; k < K * W; ++k) partials[(size_t(blockIdx.y) * K + k / W) * d + c + k % W] = sums[k];
}

// sums[c] += alpha Σ_chunk partials[chunk][c], c < width.
static __global__ void add_partials(const float* partials, int chunks, int width, float alpha, float* sums) {
    float* shared = shared_memory<float>();
    int c = blockIdx.x * WARP_SIZE + threadIdx.x;
    float sum[1] = {};
    if (c < width)
        for (int chunk = threadIdx.y; chunk < chunks; chunk += LANES_Y) sum[0] += partials[size_t(chunk) * width + c];
    add_over_y(sum, shared);
    if (threadIdx.y == 0 && c < width) sums[c] += alpha * sum[0];
}

// sums[k][c] += alpha Σ_row f(row, c)[k]; partials has room for row_chunks(n) K d floats.
template <int K, int W, class F>
int add_column_sums(F f, size_t n, int d, float alpha, float* partials, float* sums, cudaStream_t stream) {
    dim3 block(WARP_SIZE, LANES_Y);
    size_t chunks = row_chunks(n), lane_bytes = WARP_SIZE * LANES_Y * sizeof(float);
    int error = launch(column_partials<K, W, F>, dim3(ceil_div(d, WARP_SIZE * W), chunks), block, K * W * lane_bytes, stream,
                       f, n, d, partials);
    if (error != cudaSuccess) return error;
    return launch(add_partials, ceil_div(K * d, WARP_SIZE), block, lane_bytes, stream, partials, chunks, K * d, alpha, sums);
}
