// GELU of rows plus a bias, in GPT-2's tanh form, ops/gelu.rs:
//
//   gelu(z)  = z/2 (1 + tanh u) = z σ(2u),   u = √(2/π) (z + 0.044715 z³),   σ(v) = 1 / (1 + e^{-v})
//   gelu'(z) = σ + z σ (1 - σ) 2u',          u' = √(2/π) (1 + 3 · 0.044715 z²)
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

// x + b, b of the row's columns
template <class T, int W>
__device__ inline Floats<W> load_sum(const T* x, const T* b, size_t i, size_t vectors) {
    Floats<W> z = load<W>(x + i * W), bias = load<W>(b + i % vectors * W);
#pragma unroll
    for (int k = 0; k < W; ++k) z[k] += bias[k];
    return z;
}

// out = gelu(x + b)
template <class T, int W>
struct Forward {
    const T *x, *b;
    T* out;
    size_t vectors; // of a row
    __device__ void operator()(size_t i) const {
        Floats<W> z = load_sum<T, W>(x, b, i, vectors);
#pragma unroll
        for (int k = 0; k < W; ++k) z[k] *= Gate(z[k]).open;
        store(out + i * W, z);
    }
};

// d = d gelu'(x + b), x = gelu(x + b)
template <class T, int W>
struct Backward {
    T* x;
    const T* b;
    T* d;
    size_t vectors;
    __device__ void operator()(size_t i) const {
        Floats<W> z = load_sum<T, W>(x, b, i, vectors), g = load<W>(d + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            Gate gate(z[k]);
            float slope = SCALE + 3.0f * CUBIC * SCALE * z[k] * z[k];
            g[k] *= gate.open * (1.0f + z[k] * gate.rest * slope);
            z[k] *= gate.open;
        }
        store(d + i * W, g);
        store(x + i * W, z);
    }
};

} // namespace

// out [n, w] = gelu(x [n, w] + b [w])
extern "C" int vcycle_gelu_forward(int dtype, const void* x, const void* b, void* out, size_t n, int w, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n * w / W, stream, Forward<T, W>{(const T*)x, (const T*)b, (T*)out, size_t(w / W)});
    };
    return with_vectors(dtype, w, run, x, b, out);
}

// With z = x [n, w] + b [w]: d [n, w] = d gelu'(z), x = gelu(z)
extern "C" int vcycle_gelu_backward(int dtype, void* x, const void* b, void* d, size_t n, int w, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n * w / W, stream, Backward<T, W>{(T*)x, (const T*)b, (T*)d, size_t(w / W)});
    };
    return with_vectors(dtype, w, run, x, b, d);
}
