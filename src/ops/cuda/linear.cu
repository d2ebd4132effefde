// What an affine map needs beside its matrix products, which are cuBLAS's: ops/linear.rs.
#include "column_sums.cuh"

namespace {

// out[row] = beta out[row] + alpha b for every row; beta = 0 does not read out.
template <class T, int W>
struct AddBias {
    float alpha, beta;
    const T* b;
    T* out;
    size_t vectors; // of a row
    __device__ void operator()(size_t i) const {
        Floats<W> v = load<W>(b + i % vectors * W);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] *= alpha;
        if (beta != 0.0f) {
            Floats<W> old = load<W>(out + i * W);
#pragma unroll
            for (int k = 0; k < W; ++k) v[k] += beta * old[k];
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

// out [n, d] = beta out + alpha b, b [d] added to every row.
extern "C" int vcycle_add_bias(int dtype, float alpha, const void* b, float beta, void* out, size_t n, int d,
                               cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n * d / W, stream, AddBias<T, W>{alpha, beta, (const T*)b, (T*)out, size_t(d / W)});
    };
    return with_vectors(dtype, d, run, b, out);
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
