// Causal softmax attention, ops/attention.rs, in tiles, with nothing of size T × T in memory:
//
//   S = q kᵀ / √head_dim (keys up to the query),   lse = log Σ exp S,   P = exp(S - lse),   out = P v
//   dv = Pᵀ dout,   D = rowsum(dout · out),   dS = P (dout vᵀ - D) / √head_dim,   dq = dS k,   dk = dSᵀ q
//
// A block has M rows (queries, or keys in the gradients of k and v), 16 a warp, and meets the rows of the other kind in tiles
// of N. S and P stay in registers, in the layout that the next product takes (Dao, FlashAttention-2, arXiv 2307.08691). The
// backward pass computes S twice, for dk and dv and again for dq, so that each sum is one block's, in a fixed order.
#include "mma.cuh"

namespace {

constexpr int WARPS = 4, BLOCK = WARPS * WARP_SIZE, M = WARPS * 16;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// qkv [B T, 3 d], others [B T, d], d = heads head_dim; lse, D [B, heads, T]. `wide`: rows of a head begin at multiples of 16 bytes.
struct Shape {
    int sequences, context, heads, head_dim;
    bool wide;
    int tasks() const { return sequences * heads; }
    __host__ __device__ int d() const { return heads * head_dim; }
    __host__ __device__ int tiles() const { return ceil_div(context, M); }
};

// HD: head_dim rounded up; the columns beyond are 0.
template <class T, int HD>
struct Tile {
    static constexpr int N = sizeof(T) == 2 && HD <= 64 ? 64 : 32;
    // The rows of a fragment lie in different banks.
    static constexpr int PITCH = HD + 16 / sizeof(T);
};

// A head of a sequence in a tensor with `pitch` elements a row.
template <class T>
struct Head {
    T* rows;
    size_t pitch;
};

// The block's task: its sequence and head, and its tile, the last one first where `last_first` (it has the most work).
struct Task {
    int index, first_row;
    __device__ Task(const Shape& shape, bool last_first) {
        int tasks = shape.sequences * shape.heads, tile = blockIdx.x / tasks;
        index = blockIdx.x % tasks;
        first_row = (last_first ? shape.tiles() - 1 - tile : tile) * M;
    }
    // Columns of part 0, 1, 2 (q, k, v) of `parts` in a row.
    template <class T>
    __device__ Head<T> head(const Shape& shape, T* tensor, int part, int parts) const {
        size_t pitch = size_t(parts) * shape.d(), row = size_t(index / shape.heads) * shape.context;
        return {tensor + row * pitch + part * shape.d() + index % shape.heads * shape.head_dim, pitch};
    }
};

// tile = rows first … first+ROWS-1 of the head, 0 where there are none.
template <int ROWS, int HD, class T>
__device__ inline void load_tile(T* tile, Head<const T> head, int first, const Shape& shape) {
    constexpr int W = WIDE<T>, VECTORS = HD / W;
    for (int i = threadIdx.x; i < ROWS * VECTORS; i += BLOCK) {
        int row = i / VECTORS, column = i % VECTORS * W;
        const T* from = head.rows + (first + row) * head.pitch + column;
        bool inside = first + row < shape.context;
        Packed<T, W> packed;
        if (shape.wide && inside && column < shape.head_dim) {
            packed = *reinterpret_cast<const Packed<T, W>*>(from);
        } else {
#pragma unroll
            for (int k = 0; k < W; ++k)
                packed.x[k] = inside && column + k < shape.head_dim ? from[k] : from_float<T>(0.0f);
        }
        *reinterpret_cast<Packed<T, W>*>(tile + row * Tile<T, HD>::PITCH + column) = packed;
    }
}

// sums [16 × HD] of the warp, times `factors` of its rows g and g+8, to the rows first + g and first + g + 8 of the head.
template <int HD, class T>
__device__ inline void store_rows(const float (&sums)[HD / 8][4], const float (&factors)[2], Head<T> head, int first,
                                  const Shape& shape) {
#pragma unroll
    for (int j = 0; j < HD / 8; ++j) {
        int column = j * 8 + lane_column();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = first + lane_row() + 8 * half;
            if (row >= shape.context || column >= shape.head_dim) continue;
            T* to = head.rows + row * head.pitch + column;
            Floats<2> pair{{sums[j][2 * half] * factors[half], sums[j][2 * half + 1] * factors[half]}};
            if (shape.wide) {
                store(to, pair);
            } else {
                to[0] = from_float<T>(pair[0]);
                if (column + 1 < shape.head_dim) to[1] = from_float<T>(pair[1]);
            }
        }
    }
}

// s [16 × N] = rows row … row+15 of `m` times nᵀ
template <int HD, class T, int TILES>
__device__ inline void multiply_rows(float (&s)[TILES][4], const T* m, int row, const T* n) {
    constexpr int PITCH = Tile<T, HD>::PITCH;
#pragma unroll
    for (int k = 0; k < HD; k += 16) {
        FragmentA<T> a = load_a(m, PITCH, row, k);
#pragma unroll
        for (int j = 0; j < TILES; ++j) multiply_add(s[j], a, load_b_transposed(n, PITCH, j * 8, k));
    }
}

// sums [16 × HD] += s [16 × N] n
template <int HD, class T, int TILES>
__device__ inline void add_product(float (&sums)[HD / 8][4], const float (&s)[TILES][4], const T* n) {
#pragma unroll
    for (int k = 0; k < TILES; k += 2) {
        FragmentA<T> a = as_a<T>(s[k], s[k + 1]);
#pragma unroll
        for (int j = 0; j < HD / 8; ++j) multiply_add(sums[j], a, load_b(n, Tile<T, HD>::PITCH, k * 8, j * 8));
    }
}

// Over the four lanes that share a row.
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

template <class T, int HD>
struct ForwardTiles {
    T q[M * Tile<T, HD>::PITCH], k[Tile<T, HD>::N * Tile<T, HD>::PITCH], v[Tile<T, HD>::N * Tile<T, HD>::PITCH];
};

template <class T, int HD>
__global__ void __launch_bounds__(BLOCK) forward(const T* qkv, T* out, float* lse, Shape shape) {
    constexpr int N = Tile<T, HD>::N;
    ForwardTiles<T, HD>& tiles = *shared_memory<ForwardTiles<T, HD>>();
    Task task(shape, true);
    int warp_row = threadIdx.x / WARP_SIZE * 16, first = task.first_row + warp_row;
    float scale = LOG2E / sqrtf(float(shape.head_dim)); // S in units of log 2
    float sums[HD / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    load_tile<M, HD>(tiles.q, task.head(shape, qkv, 0, 3), task.first_row, shape);
    int end = task.first_row + M < shape.context ? task.first_row + M : shape.context;
    for (int key = 0; key < end; key += N) {
        __syncthreads();
        load_tile<N, HD>(tiles.k, task.head(shape, qkv, 1, 3), key, shape);
        load_tile<N, HD>(tiles.v, task.head(shape, qkv, 2, 3), key, shape);
        __syncthreads();
        float s[N / 8][4] = {};
        multiply_rows<HD>(s, tiles.q, warp_row, tiles.k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int query = first + lane_row() + 8 * half;
            float largest = -INFINITY;
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    bool visible = key + j * 8 + lane_column() + e % 2 <= query;
                    s[j][e] = visible ? s[j][e] * scale : -INFINITY;
                    largest = fmaxf(largest, s[j][e]);
                }
            // Finite from the first tile on: each query sees key 0.
            float new_max = fmaxf(max[half], row_max(largest));
            float correction = exp2f(max[half] - new_max);
            max[half] = new_max;
            sum[half] *= correction;
#pragma unroll
            for (int j = 0; j < HD / 8; ++j) {
                sums[j][2 * half] *= correction;
                sums[j][2 * half + 1] *= correction;
            }
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    s[j][e] = exp2f(s[j][e] - new_max);
                    sum[half] += s[j][e];
                }
        }
        add_product<HD>(sums, s, tiles.v);
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] = row_sum(sum[half]);
        factors[half] = 1.0f / sum[half];
        int query = first + lane_row() + 8 * half;
        if (lane_column() == 0 && query < shape.context)
            lse[size_t(task.index) * shape.context + query] = max[half] * LN2 + logf(sum[half]);
    }
    store_rows<HD>(sums, factors, task.head(shape, out, 0, 1), first, shape);
}

// D [B, heads, T], a warp for each.
template <class T>
__global__ void __launch_bounds__(BLOCK) row_products(const T* out, const T* dout, float* products, Shape shape) {
    size_t row = size_t(blockIdx.x) * WARPS + threadIdx.x / WARP_SIZE; // of [B T, heads]
    if (row >= size_t(shape.sequences) * shape.context * shape.heads) return;
    float sum = 0.0f;
    for (int c = threadIdx.x % WARP_SIZE; c < shape.head_dim; c += WARP_SIZE)
        sum += to_float(out[row * shape.head_dim + c]) * to_float(dout[row * shape.head_dim + c]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP_SIZE != 0) return;
    size_t position = row / shape.heads, head = row % shape.heads;
    size_t sequence = position / shape.context, t = position % shape.context;
    products[(sequence * shape.heads + head) * shape.context + t] = sum;
}

// A query's lse in units of log 2 and D. Where there is no query P = exp(S - ∞) = 0.
struct Query {
    float lse, product;
};
__device__ inline Query query_at(const float* lse, const float* products, const Task& task, int query, const Shape& shape) {
    if (query >= shape.context) return {INFINITY, 0.0f};
    size_t i = size_t(task.index) * shape.context + query;
    return {lse[i] * LOG2E, products[i]};
}

template <class T, int HD>
struct BackwardTiles {
    T m1[M * Tile<T, HD>::PITCH], m2[M * Tile<T, HD>::PITCH];
    T n1[Tile<T, HD>::N * Tile<T, HD>::PITCH], n2[Tile<T, HD>::N * Tile<T, HD>::PITCH];
    Query queries[M];
};

// KEYS: rows are keys, m = k, v and n = q, dout: s = Sᵀ, dp = (dout vᵀ)ᵀ, dv += Pᵀ dout, dk += dSᵀ q.
// Else: rows are queries, m = q, dout and n = k, v: s = S, dp = dout vᵀ, dq += dS k.
template <bool KEYS, class T, int HD>
__global__ void __launch_bounds__(BLOCK)
    backward(const T* qkv, const T* dout, const float* lse, const float* products, T* dqkv, Shape shape) {
    constexpr int N = Tile<T, HD>::N;
    BackwardTiles<T, HD>& tiles = *shared_memory<BackwardTiles<T, HD>>();
    Task task(shape, !KEYS);
    int warp_row = threadIdx.x / WARP_SIZE * 16, first = task.first_row + warp_row;
    float scale = 1.0f / sqrtf(float(shape.head_dim));
    Head<const T> q = task.head(shape, qkv, 0, 3), k = task.head(shape, qkv, 1, 3), v = task.head(shape, qkv, 2, 3);
    Head<const T> g = task.head(shape, dout, 0, 1);
    load_tile<M, HD>(tiles.m1, KEYS ? k : q, task.first_row, shape);
    load_tile<M, HD>(tiles.m2, KEYS ? v : g, task.first_row, shape);
    if (!KEYS && threadIdx.x < M)
        tiles.queries[threadIdx.x] = query_at(lse, products, task, task.first_row + threadIdx.x, shape);

    float sums1[HD / 8][4] = {}, sums2[HD / 8][4] = {};
    int begin = KEYS ? task.first_row : 0;
    int end = KEYS || task.first_row + M > shape.context ? shape.context : task.first_row + M;
    for (int other = begin; other < end; other += N) {
        __syncthreads();
        load_tile<N, HD>(tiles.n1, KEYS ? q : k, other, shape);
        load_tile<N, HD>(tiles.n2, KEYS ? g : v, other, shape);
        if (KEYS && threadIdx.x < N)
            tiles.queries[threadIdx.x] = query_at(lse, products, task, other + threadIdx.x, shape);
        __syncthreads();
        float p[N / 8][4] = {}, ds[N / 8][4] = {};
        multiply_rows<HD>(p, tiles.m1, warp_row, tiles.n1);
        multiply_rows<HD>(ds, tiles.m2, warp_row, tiles.n2);
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int row = lane_row() + e / 2 * 8, column = j * 8 + lane_column() + e % 2;
                int query = KEYS ? other + column : first + row, key = KEYS ? first + row : other + column;
                Query at = tiles.queries[KEYS ? column : warp_row + row];
                p[j][e] = key <= query ? exp2f(p[j][e] * scale * LOG2E - at.lse) : 0.0f;
                ds[j][e] = p[j][e] * (ds[j][e] - at.product) * scale;
            }
        add_product<HD>(sums1, ds, tiles.n1);
        if (KEYS) add_product<HD>(sums2, p, tiles.n2);
    }
    const float ones[2] = {1.0f, 1.0f};
    store_rows<HD>(sums1, ones, task.head(shape, dqkv, KEYS ? 1 : 0, 3), first, shape);
    if (KEYS) store_rows<HD>(sums2, ones, task.head(shape, dqkv, 2, 3), first, shape);
}

// f<T, HD>()
template <class F>
int with_head(int dtype, int head_dim, F f) {
    return with_element(dtype, [&]<class T>() -> int {
        if (head_dim <= 32) return f.template operator()<T, 32>();
        if (head_dim <= 64) return f.template operator()<T, 64>();
        if (head_dim <= 128) return f.template operator()<T, 128>();
        return cudaErrorInvalidValue;
    });
}

bool is_wide(int dtype, int head_dim) { return head_dim % (dtype == 0 ? WIDE<float> : WIDE<bf16>) == 0; }

} // namespace

// out [B T, d], lse [B, heads, T] (float) = from qkv [B T, 3 d]; head_dim ≤ 128.
extern "C" int vcycle_attention_forward(int dtype, const void* qkv, void* out, float* lse, int sequences, int context,
                                        int heads, int head_dim, cudaStream_t stream) {
    Shape shape{sequences, context, heads, head_dim, is_wide(dtype, head_dim) && all_aligned(qkv, out)};
    return with_head(dtype, head_dim, [&]<class T, int HD>() {
        return launch(forward<T, HD>, shape.tiles() * shape.tasks(), BLOCK, sizeof(ForwardTiles<T, HD>), stream,
                      (const T*)qkv, (T*)out, lse, shape);
    });
}

extern "C" size_t vcycle_attention_backward_scratch(int sequences, int context, int heads) {
    return size_t(sequences) * context * heads * sizeof(float);
}

// dqkv [B T, 3 d] = from dout [B T, d] and what the forward pass left.
extern "C" int vcycle_attention_backward(int dtype, const void* qkv, const void* out, const float* lse, const void* dout,
                                         void* dqkv, int sequences, int context, int heads, int head_dim, void* scratch,
                                         cudaStream_t stream) {
    Shape shape{sequences, context, heads, head_dim, is_wide(dtype, head_dim) && all_aligned(qkv, dout, dqkv)};
    return with_head(dtype, head_dim, [&]<class T, int HD>() {
        const T* x = (const T*)qkv;
        float* products = (float*)scratch;
        size_t rows = size_t(sequences) * context * heads, shared = sizeof(BackwardTiles<T, HD>);
        int blocks = shape.tiles() * shape.tasks();
        int error = launch(row_products<T>, ceil_div(rows, WARPS), BLOCK, 0, stream, (const T*)out, (const T*)dout, products,
                           shape);
        if (error != cudaSuccess) return error;
        error = launch(backward<true, T, HD>, blocks, BLOCK, shared, stream, x, (const T*)dout, lse, products, (T*)dqkv, shape);
        if (error != cudaSuccess) return error;
        return launch(backward<false, T, HD>, blocks, BLOCK, shared, stream, x, (const T*)dout, lse, products, (T*)dqkv, shape);
    });
}
