// Causal softmax attention, ops/attention.rs, in tiles, with nothing of size T × T in memory:
//
//   S = q kᵀ / √head_dim (keys up to the query),   lse = log Σ exp S,   P = exp(S - lse),   out = P v
//   dv = Pᵀ dout,   D = rowsum(dout · out),   dS = P (dout vᵀ - D) / √head_dim,   dq = dS k,   dk = dSᵀ q
//
// A block has M rows (queries, or keys in the gradients of k and v), 16 R a warp, and meets the rows of the other kind in tiles
// of N; the next tile comes while it works on one. S and P stay in registers, in the layout that the next product takes (Dao,
// FlashAttention-2, arXiv 2307.08691). The backward pass computes S twice, for dk and dv and again for dq, so that each sum is
// one block's, in a fixed order.
#include "mma.cuh"

namespace {

constexpr int WARPS = 4, BLOCK = WARPS * WARP_SIZE;
constexpr float LOG2E = 1.4426950408889634f;

// qkv [B T, 3 d], others [B T, d], d = heads head_dim; lse, D [B, heads, T]. `wide`: rows of a head begin at multiples of 16 bytes.
struct Shape {
    int sequences, context, heads, head_dim;
    bool wide;
    int tasks() const { return sequences * heads; }
    __host__ __device__ int d() const { return heads * head_dim; }
    __host__ __device__ int tiles(int rows) const { return ceil_div(context, rows); }
};

// HD: head_dim rounded up; the columns beyond are 0. With R > 1 a warp loads a fragment of the other kind once for 16 R rows.
template <class T, int HD, int R_>
struct Tiling {
    static constexpr int R = R_, M = WARPS * 16 * R, N = sizeof(T) == 2 && HD <= 64 ? 64 : 32;
    // Rows begin at multiples of 16 bytes, those of a fragment in different banks.
    static constexpr int PITCH = HD + 16 / sizeof(T);
};
template <class T, int HD>
using Forward = Tiling<T, HD, sizeof(T) == 2 ? 2 : 1>;
template <class T, int HD>
using Backward = Tiling<T, HD, 1>;

// A head of a sequence in a tensor with `pitch` elements a row.
template <class T>
struct Head {
    T* rows;
    size_t pitch;
};

// The block's task: its sequence and head, and its tile, the last one first where `last_first` (it has the most work).
struct Task {
    int index, first_row;
    __device__ Task(const Shape& shape, int rows, bool last_first) {
        int tasks = shape.sequences * shape.heads, tile = blockIdx.x / tasks;
        index = blockIdx.x % tasks;
        first_row = (last_first ? shape.tiles(rows) - 1 - tile : tile) * rows;
    }
    // Columns of part 0, 1, 2 (q, k, v) of `parts` in a row.
    template <class T>
    __device__ Head<T> head(const Shape& shape, T* tensor, int part, int parts) const {
        size_t pitch = size_t(parts) * shape.d(), row = size_t(index / shape.heads) * shape.context;
        return {tensor + row * pitch + part * shape.d() + index % shape.heads * shape.head_dim, pitch};
    }
};

// tile = rows first … first+ROWS-1 of the head, 0 where there are none, once the copies are waited for.
template <int ROWS, int HD, int PITCH, class T>
__device__ inline void load_tile(T* tile, Head<const T> head, int first, const Shape& shape) {
    constexpr int W = WIDE<T>, VECTORS = HD / W;
    for (int i = threadIdx.x; i < ROWS * VECTORS; i += BLOCK) {
        int row = i / VECTORS, column = i % VECTORS * W;
        const T* from = head.rows + (first + row) * head.pitch + column;
        T* to = tile + row * PITCH + column;
        bool inside = first + row < shape.context;
        if (shape.wide) {
            bool zero = !inside || column >= shape.head_dim;
            start_copy(to, zero ? head.rows : from, zero);
        } else {
#pragma unroll
            for (int k = 0; k < W; ++k) to[k] = inside && column + k < shape.head_dim ? from[k] : from_float<T>(0.0f);
        }
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

// s [16 R × N] += rows row … row+16 R-1 of `m` times nᵀ
template <int HD, int PITCH, class T, int R, int TILES>
__device__ inline void multiply_rows(float (&s)[R][TILES][4], const T* m, int row, const T* n) {
#pragma unroll
    for (int k = 0; k < HD; k += 16) {
        FragmentA<T> a[R];
#pragma unroll
        for (int r = 0; r < R; ++r) a[r] = load_a(m, PITCH, row + 16 * r, k);
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            FragmentsB<T> b = load_b_transposed(n, PITCH, j * 8, k);
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) multiply_add(s[i / 2][j + i % 2], a[i / 2], b[i % 2]);
        }
    }
}

// sums [16 R × HD] += s [16 R × N] n
template <int HD, int PITCH, class T, int R, int TILES>
__device__ inline void add_product(float (&sums)[R][HD / 8][4], const float (&s)[R][TILES][4], const T* n) {
#pragma unroll
    for (int k = 0; k < TILES; k += 2) {
        FragmentA<T> a[R];
#pragma unroll
        for (int r = 0; r < R; ++r) a[r] = as_a<T>(s[r][k], s[r][k + 1]);
#pragma unroll
        for (int j = 0; j < HD / 8; j += 2) {
            FragmentsB<T> b = load_b(n, PITCH, k * 8, j * 8);
#pragma unroll
            for (int i = 0; i < 2 * R; ++i) multiply_add(sums[i / 2][j + i % 2], a[i / 2], b[i % 2]);
        }
    }
}

// s = -∞ where a key comes after the query. Rows are queries from `row` on and columns keys from `column` on, or with KEYS rows are
// keys and columns queries.
template <bool KEYS, int R, int TILES>
__device__ inline void hide_later_keys(float (&s)[R][TILES][4], int row, int column) {
#pragma unroll
    for (int i = 0; i < R * TILES * 4; ++i) {
        int r = i / (TILES * 4), j = i / 4 % TILES, e = i % 4;
        int from_row = 16 * r + lane_row() + e / 2 * 8, from_column = j * 8 + lane_column() + e % 2;
        int later = row + from_row - column - from_column; // of the row
        if (KEYS ? later > 0 : later < 0) s[r][j][e] = -INFINITY;
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

template <class T, class Tile>
struct ForwardTiles {
    T q[Tile::M * Tile::PITCH], k[2][Tile::N * Tile::PITCH], v[2][Tile::N * Tile::PITCH];
};

// One step of the softmax over a row, of which a lane has the elements e and e+1 of each s[j]: the row's sums so far are corrected
// to its new maximum, and s becomes P but for the last factor.
template <int HD, int TILES>
__device__ inline void softmax_step(float (&s)[TILES][4], int e, float scale, float& max, float& sum,
                                    float (&sums)[HD / 8][4]) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < TILES; ++j) largest = fmaxf(largest, fmaxf(s[j][e], s[j][e + 1]));
    // Finite from the first tile on: each query sees key 0.
    float new_max = fmaxf(max, row_max(largest)), correction = fast_exp2((max - new_max) * scale);
    max = new_max;
    sum *= correction;
#pragma unroll
    for (int j = 0; j < HD / 8; ++j) {
        sums[j][e] *= correction;
        sums[j][e + 1] *= correction;
    }
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int i = e; i < e + 2; ++i) {
            s[j][i] = fast_exp2(s[j][i] * scale - max * scale);
            sum += s[j][i];
        }
}

template <class T, int HD>
__global__ void __launch_bounds__(BLOCK) forward(const T* qkv, T* out, float* lse, Shape shape) {
    using Tile = Forward<T, HD>;
    constexpr int R = Tile::R, M = Tile::M, N = Tile::N, PITCH = Tile::PITCH;
    ForwardTiles<T, Tile>& tiles = *shared_memory<ForwardTiles<T, Tile>>();
    Task task(shape, M, true);
    Head<const T> k = task.head(shape, qkv, 1, 3), v = task.head(shape, qkv, 2, 3);
    int warp_row = threadIdx.x / WARP_SIZE * 16 * R, first = task.first_row + warp_row;
    float root = 1.0f / sqrtf(float(shape.head_dim)), scale = LOG2E * root;
    float sums[R][HD / 8][4] = {}, max[R][2], sum[R][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) max[i / 2][i % 2] = -INFINITY;
    load_tile<M, HD, PITCH>(tiles.q, task.head(shape, qkv, 0, 3), task.first_row, shape);
    load_tile<N, HD, PITCH>(tiles.k[0], k, 0, shape);
    load_tile<N, HD, PITCH>(tiles.v[0], v, 0, shape);
    int end = task.first_row + M < shape.context ? task.first_row + M : shape.context;
    for (int key = 0, now = 0; key < end; key += N, now ^= 1) {
        wait_for_copies();
        __syncthreads(); // these tiles are there, and nobody reads the others any more
        if (key + N < end) {
            load_tile<N, HD, PITCH>(tiles.k[now ^ 1], k, key + N, shape);
            load_tile<N, HD, PITCH>(tiles.v[now ^ 1], v, key + N, shape);
        }
        if (key >= first + 16 * R) continue; // no query of the warp sees them
        float s[R][N / 8][4] = {};
        multiply_rows<HD, PITCH>(s, tiles.q, warp_row, tiles.k[now]);
        if (key + N > first + 1) hide_later_keys<false>(s, first, key);
#pragma unroll
        for (int i = 0; i < 2 * R; ++i)
            softmax_step<HD>(s[i / 2], i % 2 * 2, scale, max[i / 2][i % 2], sum[i / 2][i % 2], sums[i / 2]);
        add_product<HD, PITCH>(sums, s, tiles.v[now]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float all = row_sum(sum[r][half]);
            factors[half] = 1.0f / all;
            int query = first + 16 * r + lane_row() + 8 * half;
            if (lane_column() == 0 && query < shape.context)
                lse[size_t(task.index) * shape.context + query] = max[r][half] * root + logf(all);
        }
        store_rows<HD>(sums[r], factors, task.head(shape, out, 0, 1), first + 16 * r, shape);
    }
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

template <class T, class Tile>
struct BackwardTiles {
    T m1[Tile::M * Tile::PITCH], m2[Tile::M * Tile::PITCH];
    T n1[2][Tile::N * Tile::PITCH], n2[2][Tile::N * Tile::PITCH];
    Query queries[2][Tile::M > Tile::N ? Tile::M : Tile::N];
};

// KEYS: rows are keys, m = k, v and n = q, dout: s = Sᵀ, dp = (dout vᵀ)ᵀ, dv += Pᵀ dout, dk += dSᵀ q.
// Else: rows are queries, m = q, dout and n = k, v: s = S, dp = dout vᵀ, dq += dS k.
template <bool KEYS, class T, int HD>
__global__ void __launch_bounds__(BLOCK)
    backward(const T* qkv, const T* dout, const float* lse, const float* products, T* dqkv, Shape shape) {
    using Tile = Backward<T, HD>;
    constexpr int R = Tile::R, M = Tile::M, N = Tile::N, PITCH = Tile::PITCH;
    BackwardTiles<T, Tile>& tiles = *shared_memory<BackwardTiles<T, Tile>>();
    Task task(shape, M, !KEYS);
    int warp_row = threadIdx.x / WARP_SIZE * 16 * R, first = task.first_row + warp_row;
    float root = 1.0f / sqrtf(float(shape.head_dim)), scale = LOG2E * root;
    Head<const T> q = task.head(shape, qkv, 0, 3), k = task.head(shape, qkv, 1, 3), v = task.head(shape, qkv, 2, 3);
    Head<const T> g = task.head(shape, dout, 0, 1);
    auto load_others = [&](int buffer, int other) {
        load_tile<N, HD, PITCH>(tiles.n1[buffer], KEYS ? q : k, other, shape);
        load_tile<N, HD, PITCH>(tiles.n2[buffer], KEYS ? g : v, other, shape);
        if (KEYS && threadIdx.x < N)
            tiles.queries[buffer][threadIdx.x] = query_at(lse, products, task, other + threadIdx.x, shape);
    };
    int begin = KEYS ? task.first_row : 0;
    int end = KEYS || task.first_row + M > shape.context ? shape.context : task.first_row + M;
    load_tile<M, HD, PITCH>(tiles.m1, KEYS ? k : q, task.first_row, shape);
    load_tile<M, HD, PITCH>(tiles.m2, KEYS ? v : g, task.first_row, shape);
    if (!KEYS && threadIdx.x < M)
        tiles.queries[0][threadIdx.x] = query_at(lse, products, task, task.first_row + threadIdx.x, shape);
    load_others(0, begin);

    float sums1[R][HD / 8][4] = {}, sums2[R][HD / 8][4] = {};
    for (int other = begin, now = 0; other < end; other += N, now ^= 1) {
        wait_for_copies();
        __syncthreads(); // these tiles are there, and nobody reads the others any more
        if (other + N < end) load_others(now ^ 1, other + N);
        if (KEYS ? other + N <= first : other >= first + 16 * R) continue; // no query sees a key
        float p[R][N / 8][4] = {}, ds[R][N / 8][4] = {};
        multiply_rows<HD, PITCH>(p, tiles.m1, warp_row, tiles.n1[now]);
        multiply_rows<HD, PITCH>(ds, tiles.m2, warp_row, tiles.n2[now]);
        if (KEYS ? first + 16 * R > other + 1 : other + N > first + 1) hide_later_keys<KEYS>(p, first, other);
#pragma unroll
        for (int i = 0; i < R * N / 2; ++i) {
            int r = i / (N / 2), j = i / 4 % (N / 8), e = i % 4;
            int row = 16 * r + lane_row() + e / 2 * 8, column = j * 8 + lane_column() + e % 2;
            Query at = KEYS ? tiles.queries[now][column] : tiles.queries[0][warp_row + row];
            p[r][j][e] = fast_exp2(p[r][j][e] * scale - at.lse);
            ds[r][j][e] = p[r][j][e] * (ds[r][j][e] - at.product);
        }
        add_product<HD, PITCH>(sums1, ds, tiles.n1[now]);
        if (KEYS) add_product<HD, PITCH>(sums2, p, tiles.n2[now]);
    }
    const float roots[2] = {root, root}, ones[2] = {1.0f, 1.0f};
#pragma unroll
    for (int r = 0; r < R; ++r) {
        store_rows<HD>(sums1[r], roots, task.head(shape, dqkv, KEYS ? 1 : 0, 3), first + 16 * r, shape);
        if (KEYS) store_rows<HD>(sums2[r], ones, task.head(shape, dqkv, 2, 3), first + 16 * r, shape);
    }
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
        using Tile = Forward<T, HD>;
        return launch(forward<T, HD>, shape.tiles(Tile::M) * shape.tasks(), BLOCK, sizeof(ForwardTiles<T, Tile>), stream,
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
        using Tile = Backward<T, HD>;
        size_t rows = size_t(sequences) * context * heads, shared = sizeof(BackwardTiles<T, Tile>);
        int blocks = shape.tiles(Tile::M) * shape.tasks();
        int error = launch(row_products<T>, ceil_div(rows, WARPS), BLOCK, 0, stream, (const T*)out, (const T*)dout, products,
                           shape);
        if (error != cudaSuccess) return error;
        error = launch(backward<true, T, HD>, blocks, BLOCK, shared, stream, x, (const T*)dout, lse, products, (T*)dqkv, shape);
        if (error != cudaSuccess) return error;
        return launch(backward<false, T, HD>, blocks, BLOCK, shared, stream, x, (const T*)dout, lse, products, (T*)dqkv, shape);
    });
}
