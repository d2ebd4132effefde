// What an affine map needs beside its matrix products, which are cuBLASLt's: ops/linear.rs.
#include "column_sums.cuh"

namespace {

// out[row] = start[row] + alpha b for every row; without a start, alpha b.
template <class T, int W>
struct BeginRows {
    float alpha;
    const T *b, *start;
    T* out;
    size_t vectors; // of a row
    __device__ void operator()(size_t i) const {
        Floats<W> v = load<W>(b + i % vectors * W);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] *= alpha;
        if (start) {
            Floats<W> old = load<W>(start + i * W);
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] += old[k];
        }
        store(out + i * W, v);
    }
};

template <class T, int W>
struct Elements {
    const T* x;
    int d;
    __device__ void operator()(size_t row, int c, float* terms) const {
        Floats<W> v = load<W>(x + row * d + c);
#pragma unroll
        for (int k = 0; k < W; ++k) terms[k] = v[k];
    }
};

} // namespace

// out [n, d] = start + alpha b, b [d] added to every row; start may be out, or nullptr for zeros.
extern "C" int vcycle_begin_rows(int dtype, float alpha, const void* b, const void* start, void* out, size_t n, int d, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n * d / W, stream, BeginRows<T, W>{alpha, (const T*)b, (const T*)start, (T*)out, size_t(d / W)});
    };
    return with_vectors(dtype, d, run, b, start, out);
}

extern "C" size_t vcycle_add_column_sums_scratch(size_t n, int d) { return row_chunks(n) * d * sizeof(float); }

// sums [d] (float) += alpha Σ_rows x [n, d]
extern "C" int vcycle_add_column_sums(int dtype, const void* x, float alpha, float* sums, size_t n, int d, void* scratch,
                                      cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return add_column_sums<1, W>(Elements<T, W>{(const T*)x, d}, n, d, alpha, (float*)scratch, sums, stream);
    };
    return with_vectors(dtype, d, run, x);
}
