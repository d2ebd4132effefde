// What an affine map needs beside its matrix products, which are cuBLASLt's: ops/linear.rs.
#include "column_sums.cuh"

namespace {

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

extern "C" size_t vcycle_add_column_sums_scratch(size_t n, int d) { return row_chunks(n) * d * sizeof(float); }

// sums [d] (float) += alpha Σ_rows x [n, d]
extern "C" int vcycle_add_column_sums(int dtype, const void* x, float alpha, float* sums, size_t n, int d, void* scratch,
                                      cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return add_column_sums<1, W>(Elements<T, W>{(const T*)x, d}, n, d, alpha, (float*)scratch, sums, stream);
    };
    return with_vectors(dtype, d, run, x);
}
