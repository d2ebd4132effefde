// GELU in GPT-2's tanh form, ops/gelu.rs:
//
//   gelu(x)  = x/2 (1 + tanh u) = x σ(2u),   u = √(2/π) (x + 0.044715 x³),   σ(z) = 1 / (1 + e^{-z})
//   gelu'(x) = σ + x σ (1 - σ) 2u',          u' = √(2/π) (1 + 3 · 0.044715 x²)
#include "common.cuh"

namespace {

constexpr float SCALE = 1.5957691216057309f; // 2 √(2/π)
constexpr float CUBIC = 0.044715f;

// σ(2u) and 1 - σ(2u), without cancellation.
struct Gate {
    float open, rest;
    __device__ explicit Gate(float x) {
        float z = x * SCALE * (1.0f + CUBIC * x * x);
        // Kept finite, as is its inverse: gelu'(x) is 0, not 0 · ∞, far to the left. NaN passes.
        float e = expf(-z > 87.0f ? 87.0f : -z);
        open = 1.0f / (1.0f + e);
        rest = e * open;
    }
};

// out = gelu(x)
template <class T, int W>
struct Forward {
    const T* x;
    T* out;
    __device__ void operator()(size_t i) const {
        Floats<W> v = load<W>(x + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] *= Gate(v[k]).open;
        store(out + i * W, v);
    }
};

// d = d gelu'(x)
template <class T, int W>
struct Backward {
    const T* x;
    T* d;
    __device__ void operator()(size_t i) const {
        Floats<W> v = load<W>(x + i * W), g = load<W>(d + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            Gate gate(v[k]);
            float slope = SCALE + 3.0f * CUBIC * SCALE * v[k] * v[k];
            g[k] *= gate.open * (1.0f + v[k] * gate.rest * slope);
        }
        store(d + i * W, g);
    }
};

} // namespace

// x, out [n]
extern "C" int vcycle_gelu_forward(int dtype, const void* x, void* out, size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() { return for_each(n / W, stream, Forward<T, W>{(const T*)x, (T*)out}); };
    return with_vectors(dtype, n, run, x, out);
}

// x, d [n]
extern "C" int vcycle_gelu_backward(int dtype, const void* x, void* d, size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() { return for_each(n / W, stream, Backward<T, W>{(const T*)x, (T*)d}); };
    return with_vectors(dtype, n, run, x, d);
}
