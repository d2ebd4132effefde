// Token and position embedding, ops/embedding.rs:
//
//   out[i] = wte[tokens[i]] + wpe[i mod T],   dwte[tokens[i]] += dx[i],   dwpe[i mod T] += dx[i]
//
// Each row of dwte is summed in a fixed order: positions are sorted by token, stably, and a block sums the positions of one
// token. A token that is not in the vocabulary gives NaN forward and nothing backward.
#include "common.cuh"

namespace {

template <class T, int W>
struct Forward {
    const uint32_t* tokens;
    const T *wte, *wpe;
    T* out;
    uint32_t vocab, context, vectors; // vectors of a row
    __device__ void operator()(size_t i) const {
        size_t row = i / vectors, c = i % vectors * W;
        uint32_t token = tokens[row];
        bool known = token < vocab;
        Floats<W> v = load<W>(wte + (known ? token : 0) * size_t(vectors) * W + c);
        Floats<W> position = load<W>(wpe + row % context * vectors * W + c);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = known ? v[k] + position[k] : NAN;
        store(out + i * W, v);
    }
};

// dwpe[t] += Σ_b dx[b T + t]
template <class T, int W>
struct BackwardPositions {
    const T* dx;
    float* dwpe;
    size_t n, context, vectors;
    __device__ void operator()(size_t i) const {
        size_t t = i / vectors, c = i % vectors * W;
        Floats<W> sum = load<W>(dwpe + i * W);
        for (size_t row = t; row < n; row += context) {
            Floats<W> v = load<W>(dx + row * vectors * W + c);
#pragma unroll
            for (int k = 0; k < W; ++k) sum[k] += v[k];
        }
        store(dwpe + i * W, sum);
    }
};

// The sort: a stable counting sort by each group of BITS bits of the token, lowest first. A thread has RUN neighbouring positions,
// so that its own order is the stable one; counts[digit][thread] becomes the first place for the thread's tokens of that digit.
constexpr int BITS = 4, DIGITS = 1 << BITS, RUN = 16, SORT_THREADS = 128, SCAN_THREADS = 1024;

struct Pairs {
    uint32_t *tokens, *positions;
};

// Counts the digits in the thread's run, or moves its pairs to their places.
template <bool MOVE>
__global__ void __launch_bounds__(SORT_THREADS)
    sort_pass(Pairs from, Pairs to, uint32_t* counts, size_t n, size_t runs, uint32_t vocab, int shift) {
    uint32_t(*own)[SORT_THREADS] = shared_memory<uint32_t[SORT_THREADS]>();
    size_t run = size_t(blockIdx.x) * SORT_THREADS + threadIdx.x;
    if (run >= runs) return;
    for (int digit = 0; digit < DIGITS; ++digit) own[digit][threadIdx.x] = MOVE ? counts[digit * runs + run] : 0;
    for (size_t i = run * RUN; i < (run + 1) * RUN && i < n; ++i) {
        uint32_t token = from.tokens[i] < vocab ? from.tokens[i] : vocab; // one value for all that are unknown
        uint32_t place = own[token >> shift & (DIGITS - 1)][threadIdx.x]++;
        if constexpr (MOVE) {
            to.tokens[place] = token;
            to.positions[place] = shift == 0 ? uint32_t(i) : from.positions[i];
        }
    }
    if constexpr (!MOVE)
        for (int digit = 0; digit < DIGITS; ++digit) counts[digit * runs + run] = own[digit][threadIdx.x];
}

// counts = Σ of those before, by one block, each thread with a stretch of them.
__global__ void __launch_bounds__(SCAN_THREADS) scan(uint32_t* counts, size_t n) {
    uint32_t* sums = shared_memory<uint32_t>();
    size_t stretch = ceil_div(n, SCAN_THREADS), begin = threadIdx.x * stretch;
    size_t end = begin + stretch < n ? begin + stretch : n;
    uint32_t sum = 0;
    for (size_t i = begin; i < end; ++i) sum += counts[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int distance = 1; distance < SCAN_THREADS; distance *= 2) {
        uint32_t before = int(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
        __syncthreads();
    }
    uint32_t place = sums[threadIdx.x] - sum;
    for (size_t i = begin; i < end; ++i) {
        uint32_t count = counts[i];
        counts[i] = place;
        place += count;
    }
}

// dwte[token] += Σ dx over the token's positions: the block of the first of them in sorted order does it, every
// SUM_ROWS-th position a thread.
constexpr int SUM_ROWS = 8;
template <class T, int W>
__global__ void __launch_bounds__(WARP_SIZE * SUM_ROWS)
    sum_tokens(Pairs sorted, const T* dx, float* dwte, size_t n, uint32_t vocab, int d) {
    float* shared = shared_memory<float>();
    size_t begin = blockIdx.x;
    uint32_t token = sorted.tokens[begin];
    bool first = begin == 0 || sorted.tokens[begin - 1] != token;
    if (!first || token >= vocab) return;
    size_t end = begin + 1; // by bisection of the sorted tokens
    for (size_t after = n; end < after;) {
        size_t middle = (end + after) / 2;
        if (sorted.tokens[middle] == token) end = middle + 1;
        else after = middle;
    }
    for (int strip = 0; strip < d; strip += WARP_SIZE * W) {
        int c = strip + threadIdx.x * W;
        Floats<W> sum{};
        if (c < d) {
            for (size_t i = begin + threadIdx.y; i < end; i += SUM_ROWS) {
                Floats<W> v = load<W>(dx + size_t(sorted.positions[i]) * d + c);
#pragma unroll
                for (int k = 0; k < W; ++k) sum[k] += v[k];
            }
        }
#pragma unroll
        for (int k = 0; k < W; ++k) shared[(threadIdx.y * W + k) * WARP_SIZE + threadIdx.x] = sum[k];
        __syncthreads();
        if (threadIdx.y == 0 && c < d) {
            Floats<W> total = load<W>(dwte + size_t(token) * d + c);
            for (int y = 0; y < SUM_ROWS; ++y)
#pragma unroll
                for (int k = 0; k < W; ++k) total[k] += shared[(y * W + k) * WARP_SIZE + threadIdx.x];
            store(dwte + size_t(token) * d + c, total);
        }
        __syncthreads();
    }
}

// Pairs sorted by token, in one of the two buffers of `scratch`.
int sort(const uint32_t* tokens, size_t n, uint32_t vocab, uint32_t* scratch, cudaStream_t stream, Pairs& sorted) {
    Pairs buffers[2] = {{scratch, scratch + n}, {scratch + 2 * n, scratch + 3 * n}};
    uint32_t* counts = scratch + 4 * n;
    size_t runs = ceil_div(n, RUN), blocks = ceil_div(runs, SORT_THREADS);
    size_t shared = DIGITS * SORT_THREADS * sizeof(uint32_t);
    Pairs from{const_cast<uint32_t*>(tokens), nullptr};
    for (int shift = 0; shift < 32 && vocab >> shift != 0; shift += BITS) {
        Pairs to = buffers[shift / BITS % 2];
        int error = launch(sort_pass<false>, blocks, SORT_THREADS, shared, stream, from, to, counts, n, runs, vocab, shift);
        if (error != cudaSuccess) return error;
        error = launch(scan, 1, SCAN_THREADS, SCAN_THREADS * sizeof(uint32_t), stream, counts, DIGITS * runs);
        if (error != cudaSuccess) return error;
        error = launch(sort_pass<true>, blocks, SORT_THREADS, shared, stream, from, to, counts, n, runs, vocab, shift);
        if (error != cudaSuccess) return error;
        from = to;
    }
    sorted = from;
    return cudaSuccess;
}

} // namespace

// out [n, d] = wte[tokens] + wpe; tokens [n], wte [vocab, d], wpe [context, d].
extern "C" int vcycle_embedding_forward(int dtype, const uint32_t* tokens, const void* wte, const void* wpe, void* out,
                                        size_t n, uint32_t vocab, uint32_t context, int d, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        Forward<T, W> f{tokens, (const T*)wte, (const T*)wpe, (T*)out, vocab, context, uint32_t(d / W)};
        return for_each(n * d / W, stream, f);
    };
    return with_vectors(dtype, d, run, wte, wpe, out);
}

extern "C" size_t vcycle_embedding_backward_scratch(size_t n) {
    return (4 * n + DIGITS * ceil_div(n, RUN)) * sizeof(uint32_t);
}

// dwte [vocab, d], dwpe [context, d] (float) += the sums of dx [n, d].
extern "C" int vcycle_embedding_backward(int dtype, const uint32_t* tokens, const void* dx, float* dwte, float* dwpe, size_t n,
                                         uint32_t vocab, uint32_t context, int d, void* scratch, cudaStream_t stream) {
    Pairs sorted;
    int error = sort(tokens, n, vocab, (uint32_t*)scratch, stream, sorted);
    if (error != cudaSuccess) return error;
    auto run = [&]<class T, int W>() {
        size_t shared = WARP_SIZE * SUM_ROWS * W * sizeof(float);
        int error = launch(sum_tokens<T, W>, n, dim3(WARP_SIZE, SUM_ROWS), shared, stream, sorted, (const T*)dx, dwte, n,
                           vocab, d);
        if (error != cudaSuccess) return error;
        BackwardPositions<T, W> f{(const T*)dx, dwpe, n, context, size_t(d / W)};
        return for_each(size_t(context) * d / W, stream, f);
    };
    return with_vectors(dtype, d, run, dx, dwte, dwpe);
}
