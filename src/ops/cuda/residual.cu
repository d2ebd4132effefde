// Sums of states and plain moves of elements, ops/residual.rs and ops/access.rs.
#include "common.cuh"

namespace {

// out = a x + b y; x or y may be out.
template <class T, int W>
struct Combine {
    float a;
    const T* x;
    float b;
    const T* y;
    T* out;
    __device__ void operator()(size_t i) const {
        Floats<W> u = load<W>(x + i * W), v = load<W>(y + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) u[k] = a * u[k] + b * v[k];
        store(out + i * W, u);
    }
};

// x = value
template <class T, int W>
struct Fill {
    T* x;
    float value;
    __device__ void operator()(size_t i) const {
        Floats<W> v;
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = value;
        store(x + i * W, v);
    }
};

// out = source, rounded to the nearest element of the other type.
template <class From, class To, int W>
struct Cast {
    const From* source;
    To* out;
    __device__ void operator()(size_t i) const { store(out + i * W, load<W>(source + i * W)); }
};

} // namespace

// out = a x + b y, all [n]; x or y may be out.
extern "C" int vcycle_combine(int dtype, float a, const void* x, float b, const void* y, void* out, size_t n,
                              cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n / W, stream, Combine<T, W>{a, (const T*)x, b, (const T*)y, (T*)out});
    };
    return with_vectors(dtype, n, run, x, y, out);
}

// x [n] = value
extern "C" int vcycle_fill(int dtype, void* x, float value, size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() { return for_each(n / W, stream, Fill<T, W>{(T*)x, value}); };
    return with_vectors(dtype, n, run, x);
}

// out = source, as bytes; nowhere overlapping.
extern "C" int vcycle_copy(const void* source, void* out, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(out, source, bytes, cudaMemcpyDeviceToDevice, stream);
}

// out [n] of `to` = source [n] of `from`.
extern "C" int vcycle_cast(int from, int to, const void* source, void* out, size_t n, cudaStream_t stream) {
    auto run = [&]<class From>() {
        return with_element(to, [&]<class To>() {
            constexpr int W = 8;
            bool wide = n % W == 0 && all_aligned(source, out);
            if (wide) return for_each(n / W, stream, Cast<From, To, W>{(const From*)source, (To*)out});
            return for_each(n, stream, Cast<From, To, 1>{(const From*)source, (To*)out});
        });
    };
    return with_element(from, run);
}

extern "C" const char* vcycle_error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }
