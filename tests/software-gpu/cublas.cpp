// cuBLASLt, which this project calls, and what candle calls of cuBLAS: products in f32 of factors in f32 or bf16.
#include "gpu.h"
#include <algorithm>
#include <cstring>

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

float read(const void* at, int type, size_t i) {
    return type == F32 ? static_cast<const float*>(at)[i] : __bfloat162float(static_cast<const __nv_bfloat16*>(at)[i]);
}

void write(void* at, int type, size_t i, float value) {
    if (type == F32)
        static_cast<float*>(at)[i] = value;
    else
        static_cast<__nv_bfloat16*>(at)[i] = __float2bfloat16_rn(value);
}

struct Matrix {
    const void* at;
    int type, operation;
    size_t pitch;
    float operator()(size_t row, size_t column) const {
        size_t i = operation == N ? column * pitch + row : row * pitch + column;
        return read(at, type, i);
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

// By columns, all of one type.
struct Sum {
    const void* c;
    size_t pitch_c;
    const void* bias; // nullptr: none
    void* d;
    size_t pitch_d;
    int type;
};

// d = alpha a b + beta c + bias, all by columns: a [m, k], b [k, n], bias [m].
void multiply(size_t m, size_t n, size_t k, float alpha, Matrix a, Matrix b, float beta, Sum sum) {
    std::vector<float> a_rows(k * m), b_rows(n * k), result(n * m);
    for (size_t p = 0; p < k; ++p)
        for (size_t i = 0; i < m; ++i) a_rows[p * m + i] = a(i, p);
    for (size_t j = 0; j < n; ++j)
        for (size_t p = 0; p < k; ++p) b_rows[j * k + p] = b(p, j);
    multiply_rows(m, n, k, a_rows.data(), b_rows.data(), result.data());
    for (size_t j = 0; j < n; ++j)
        for (size_t i = 0; i < m; ++i) {
            float value = alpha * result[j * m + i];
            if (beta != 0) value += beta * read(sum.c, sum.type, j * sum.pitch_c + i);
            if (sum.bias) value += read(sum.bias, sum.type, i);
            write(sum.d, sum.type, j * sum.pitch_d + i, value);
        }
}

// What measures a GPU's speed is not computed.
bool only_measures(size_t m, size_t n, size_t k) { return m >= 8192 && n >= 8192 && k >= 8192; }

// Of cuBLASLt: the attributes that are set.
enum { TRANSA = 3, TRANSB = 4, EPILOGUE = 7, BIAS_POINTER = 8 };
enum { MAX_WORKSPACE = 1, REDUCTIONS = 3, ALIGNMENT_A = 5, ALIGNMENT_D = 8 };
enum { PLAIN = 1, BIAS = 4 };
enum { IN_COMPUTE_TYPE = 2 };

struct Operation {
    int compute, scale, operation_a = N, operation_b = N;
    uint32_t epilogue = PLAIN;
    const void* bias = nullptr;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t pitch;
    bool operator==(const Layout&) const = default;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = 7, alignment[4] = {256, 256, 256, 256};
};

// What an algorithm is for. It is told by an address in the 64 bytes that the caller keeps, and lives as long as the program.
struct Algorithm {
    int operation_a, operation_b;
    uint32_t epilogue, alignment[4], bias_alignment;
    Layout layouts[4];
    uint64_t workspace;
};

struct Found {
    const Algorithm* algorithm;
    uint64_t rest[7];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

uint32_t alignment_of(const void* at) {
    uintptr_t address = reinterpret_cast<uintptr_t>(at);
    uint32_t alignment = 1;
    while (alignment < 256 && address % (2 * alignment) == 0) alignment *= 2;
    return alignment;
}

// Kernels that add a bias are for tensor cores: sizes are multiples of 8, all is aligned to 16 bytes. cuBLASLt has others for some
// shapes, but does not say for which.
bool is_supported(const Operation& on, const Layout& a, const Layout& b, const Layout& c, const Layout& d, const Preference& wanted) {
    bool types = a.type == b.type && (a.type == F32 || a.type == BF16) && c.type == d.type && (d.type == F32 || d.type == a.type);
    uint64_t sizes = a.rows | a.columns | b.rows | b.columns | d.rows | d.columns;
    uint32_t aligned = *std::min_element(wanted.alignment, wanted.alignment + 4);
    bool bias = on.epilogue == PLAIN || (on.epilogue == BIAS && on.bias && alignment_of(on.bias) >= 16 && sizes % 8 == 0 && aligned >= 16);
    return types && bias && on.compute == COMPUTE_F32 && on.scale == F32 && (wanted.reductions & IN_COMPUTE_TYPE);
}

bool fits(const Operation& on, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
    auto rows = [](const Layout& x, int operation) { return operation == N ? x.rows : x.columns; };
    auto columns = [](const Layout& x, int operation) { return operation == N ? x.columns : x.rows; };
    for (const Layout* x : {&a, &b, &c, &d})
        if (x->rows == 0 || x->columns == 0 || x->pitch < int64_t(x->rows)) return false;
    return rows(a, on.operation_a) == d.rows && columns(b, on.operation_b) == d.columns && columns(a, on.operation_a) == rows(b, on.operation_b) &&
           c.rows == d.rows && c.columns == d.columns;
}

template <class T>
int set(T& to, const void* from, size_t bytes) {
    if (bytes != sizeof(T)) return INVALID;
    std::memcpy(&to, from, bytes);
    return OK;
}

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
            char* to = static_cast<char*>(c) + i * stride_c * size(type_c);
            multiply(m, n, k, factor, left, right, keep, {to, size_t(pitch_c), nullptr, to, size_t(pitch_c), type_c});
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

int cublasLtCreate(void** to) { return *to = new int, OK; }

int cublasLtMatmulDescCreate(void** to, int compute, int scale) { return *to = new Operation{compute, scale}, OK; }
int cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* from, size_t bytes) {
    Operation* on = static_cast<Operation*>(operation);
    switch (attribute) {
        case TRANSA: return set(on->operation_a, from, bytes);
        case TRANSB: return set(on->operation_b, from, bytes);
        case EPILOGUE: return set(on->epilogue, from, bytes);
        case BIAS_POINTER: return set(on->bias, from, bytes);
    }
    return INVALID;
}

int cublasLtMatrixLayoutCreate(void** to, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    return *to = new Layout{type, rows, columns, pitch}, OK;
}

int cublasLtMatmulPreferenceCreate(void** to) { return *to = new Preference, OK; }
int cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<Preference*>(preference), OK; }
int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* from, size_t bytes) {
    Preference* wanted = static_cast<Preference*>(preference);
    if (attribute == MAX_WORKSPACE) return set(wanted->workspace, from, bytes);
    if (attribute == REDUCTIONS) return set(wanted->reductions, from, bytes);
    if (attribute >= ALIGNMENT_A && attribute <= ALIGNMENT_D) return set(wanted->alignment[attribute - ALIGNMENT_A], from, bytes);
    return INVALID;
}

int cublasLtMatmulAlgoGetHeuristic(void*, void* operation, void* a, void* b, void* c, void* d, void* preference, int wanted, void* results, int* count) {
    const Operation& on = *static_cast<Operation*>(operation);
    Layout layouts[4] = {*static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(c), *static_cast<Layout*>(d)};
    const Preference& p = *static_cast<Preference*>(preference);
    *count = 0;
    if (wanted < 1 || !fits(on, layouts[0], layouts[1], layouts[2], layouts[3])) return INVALID;
    if (!is_supported(on, layouts[0], layouts[1], layouts[2], layouts[3], p)) return UNSUPPORTED;
    Algorithm* algorithm = new Algorithm{on.operation_a, on.operation_b, on.epilogue, {}, on.bias ? alignment_of(on.bias) : 1, {}, p.workspace};
    std::copy_n(p.alignment, 4, algorithm->alignment);
    std::copy_n(layouts, 4, algorithm->layouts);
    *static_cast<Found*>(results) = {algorithm, {}, p.workspace, OK, 1.0f, {}};
    *count = 1;
    return OK;
}

int cublasLtMatmul(void*, void* operation, const void* alpha, const void* a, void* layout_a, const void* b, void* layout_b, const void* beta, const void* c,
                   void* layout_c, void* d, void* layout_d, const void* algorithm, void* workspace, size_t workspace_bytes, void* on_stream) {
    const Operation& on = *static_cast<Operation*>(operation);
    Layout la = *static_cast<Layout*>(layout_a), lb = *static_cast<Layout*>(layout_b), lc = *static_cast<Layout*>(layout_c), ld = *static_cast<Layout*>(layout_d);
    const Algorithm& chosen = **static_cast<const Algorithm* const*>(algorithm);
    bool is_for = chosen.operation_a == on.operation_a && chosen.operation_b == on.operation_b && chosen.epilogue == on.epilogue && chosen.layouts[0] == la &&
                  chosen.layouts[1] == lb && chosen.layouts[2] == lc && chosen.layouts[3] == ld && workspace_bytes >= chosen.workspace;
    if (!is_for || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return INVALID;
    const void* places[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
        if (alignment_of(places[i]) < chosen.alignment[i]) fail("a matrix of a product is less aligned than the choice of the algorithm was told");
    if (on.epilogue == BIAS && alignment_of(on.bias) < std::min(16u, chosen.bias_alignment)) fail("a bias is less aligned than when the algorithm was chosen");
    float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    size_t m = ld.rows, n = ld.columns, k = on.operation_a == N ? la.columns : la.rows;
    Matrix left{a, la.type, on.operation_a, size_t(la.pitch)}, right{b, lb.type, on.operation_b, size_t(lb.pitch)};
    Sum sum{c, size_t(lc.pitch), on.epilogue == BIAS ? on.bias : nullptr, d, size_t(ld.pitch), ld.type};
    submit(stream(on_stream), once([=] {
        if (!only_measures(m, n, k)) multiply(m, n, k, factor, left, right, keep, sum);
    }));
    return OK;
}

} // extern "C"
