// Softmax cross-entropy of rows of logits, ops/classifier.rs; the products with w are cuBLASLt's:
//
//   L_i = log Σ_v exp z_iv - z_i,t(i),   dz_iv = scale (softmax(z_i)_v - [v = t(i)])
//
// A block has a row: one pass finds its maximum and the sum of exponentials together, a second turns z into dz in place. The
// loss of a target that is not in the vocabulary is NaN.
#include "common.cuh"

namespace {

constexpr int BLOCK = 512, WARPS = BLOCK / WARP_SIZE;

// max = maximum, sum = Σ exp (z - max) of some logits. NaN passes through the sum.
struct Softmax {
    float max, sum;
    __device__ void add(float z) {
        if (z > max) {
            sum *= expf(max - z);
            max = z;
        }
        sum += expf(z - max);
    }
    __device__ void add(Softmax other) {
        float larger = fmaxf(max, other.max);
        // An empty part has max -∞ and sum 0: exp (-∞ - -∞) is NaN.
        float own = sum == 0.0f ? 0.0f : sum * expf(max - larger);
        sum = own + (other.sum == 0.0f ? 0.0f : other.sum * expf(other.max - larger));
        max = larger;
    }
};

// z - max of an infinite z that is the maximum is NaN, which is as it should be.
template <bool GRADIENT, class T, int W>
__global__ void __launch_bounds__(BLOCK)
    softmax(T* z, const uint32_t* targets, float scale, float* losses, uint32_t vocab) {
    Softmax* shared = shared_memory<Softmax>();
    z += size_t(blockIdx.x) * vocab;
    Softmax own{-INFINITY, 0.0f};
    for (uint32_t c = threadIdx.x * W; c < vocab; c += BLOCK * W) {
        Floats<W> v = load<W>(z + c);
#pragma unroll
        for (int k = 0; k < W; ++k) own.add(v[k]);
    }
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        float max = __shfl_xor_sync(ALL_LANES, own.max, distance), sum = __shfl_xor_sync(ALL_LANES, own.sum, distance);
        own.add({max, sum});
    }
    if (threadIdx.x % WARP_SIZE == 0) shared[threadIdx.x / WARP_SIZE] = own;
    __syncthreads();
    Softmax whole = shared[0];
    for (int warp = 1; warp < WARPS; ++warp) whole.add(shared[warp]);

    uint32_t target = targets[blockIdx.x];
    if (threadIdx.x == 0) losses[blockIdx.x] = target < vocab ? whole.max + logf(whole.sum) - to_float(z[target]) : NAN;
    if (!GRADIENT) return;
    __syncthreads(); // z[target] is read before it is written
    float factor = scale / whole.sum;
    for (uint32_t c = threadIdx.x * W; c < vocab; c += BLOCK * W) {
        Floats<W> v = load<W>(z + c);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = factor * expf(v[k] - whole.max) - (c + k == target ? scale : 0.0f);
        store(z + c, v);
    }
}

template <bool GRADIENT>
int run_softmax(int dtype, void* logits, const uint32_t* targets, float scale, float* losses, size_t rows, uint32_t vocab,
                cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return launch(softmax<GRADIENT, T, W>, rows, BLOCK, WARPS * sizeof(Softmax), stream, (T*)logits, targets, scale,
                      losses, vocab);
    };
    return with_vectors(dtype, vocab, run, logits);
}

} // namespace

// losses [rows] (float) from logits [rows, vocab] and targets [rows].
extern "C" int vcycle_softmax_loss(int dtype, const void* logits, const uint32_t* targets, float* losses, size_t rows,
                                   uint32_t vocab, cudaStream_t stream) {
    return run_softmax<false>(dtype, const_cast<void*>(logits), targets, 0.0f, losses, rows, vocab, stream);
}

// As above, and logits = dz.
extern "C" int vcycle_softmax_loss_and_gradient(int dtype, void* logits, const uint32_t* targets, float scale, float* losses,
                                                size_t rows, uint32_t vocab, cudaStream_t stream) {
    return run_softmax<true>(dtype, logits, targets, scale, losses, rows, vocab, stream);
}
