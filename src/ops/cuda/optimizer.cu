// Update rules in one pass over the elements of rows, optim/: each of θ, gradient and moments is read and written once. All float.
//
// Shards of a row begin anywhere, and have the bits of the whole row: each rule says which product is rounded (__fmul_rn) and which is
// fused with a sum (fmaf), for the compiler may choose another way for vectors than for single elements.
#include "common.cuh"

// Elements begin … end-1 of a row, and the factor on θ: 1 - η λ or 1. As in kernels.rs.
extern "C" {
struct Stretch {
    size_t begin, end;
    float keep;
};
struct Stretches {
    Stretch of[16];
    int count;
};
// `length` elements of each of `count` rows are updated; from a row to the next, θ and the gradient go on by `pitch` elements, moments by
// `pitch_of_moments`. As in kernels.rs.
struct Rows {
    size_t count, length, pitch, pitch_of_moments;
};
}

namespace {

// The keep of the stretch that holds element i, or a negative number where the rule does not apply.
__device__ inline float keep_at(const Stretches& stretches, size_t i) {
    for (int s = 0; s < stretches.count; ++s)
        if (i >= stretches.of[s].begin && i < stretches.of[s].end) return stretches.of[s].keep;
    return -1.0f;
}

// m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   θ ← keep θ − step_size m / (√v root_correction + ε),   g = scale · gradient
struct AdamW {
    float scale, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
};

template <int W>
struct AdamWPass {
    AdamW rule;
    Stretches stretches;
    Rows rows;
    const float* grad;
    float *theta, *m, *v;
    __device__ void operator()(size_t row, size_t i) const {
        float keep = keep_at(stretches, i);
        if (keep < 0.0f) return;
        size_t j = row * rows.pitch_of_moments + i;
        i += row * rows.pitch;
        Floats<W> g = load<W>(grad + i), x = load<W>(theta + i), first = load<W>(m + j), second = load<W>(v + j);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float gk = __fmul_rn(rule.scale, g[k]);
            first[k] = fmaf(rule.one_minus_beta1, gk - first[k], first[k]);
            second[k] = fmaf(rule.beta2, second[k], __fmul_rn(rule.one_minus_beta2, __fmul_rn(gk, gk)));
            float root = fmaf(sqrtf(second[k]), rule.root_correction, rule.eps);
            x[k] = fmaf(keep, x[k], -(__fmul_rn(rule.step_size, first[k]) / root));
        }
        store(m + j, first);
        store(v + j, second);
        store(theta + i, x);
    }
};

// B ← μ B + g,   U = g + μ B (Nesterov) or B,   g = scale · gradient
struct Momentum {
    float scale, mu;
    int nesterov;
    __device__ float operator()(float gradient, float& b) const {
        float g = __fmul_rn(scale, gradient);
        b = fmaf(mu, b, g);
        return nesterov ? fmaf(mu, b, g) : b;
    }
};

// θ ← keep θ − η U
template <int W>
struct SgdPass {
    Momentum rule;
    float lr;
    Stretches stretches;
    Rows rows;
    const float* grad;
    float *theta, *b;
    __device__ void operator()(size_t row, size_t i) const {
        float keep = keep_at(stretches, i);
        if (keep < 0.0f) return;
        size_t j = row * rows.pitch_of_moments + i;
        i += row * rows.pitch;
        Floats<W> g = load<W>(grad + i), x = load<W>(theta + i), momentum = load<W>(b + j);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = fmaf(-lr, rule(g[k], momentum[k]), __fmul_rn(keep, x[k]));
        store(b + j, momentum);
        store(theta + i, x);
    }
};

// u = U, and B
template <int W>
struct MomentumPass {
    Momentum rule;
    const float* grad;
    float *b, *u;
    __device__ void operator()(size_t i) const {
        i *= W;
        Floats<W> g = load<W>(grad + i), momentum = load<W>(b + i);
#pragma unroll
        for (int k = 0; k < W; ++k) g[k] = rule(g[k], momentum[k]);
        store(b + i, momentum);
        store(u + i, g);
    }
};

// x ← x / max(√square, smallest)
template <int W>
struct Normalize {
    float* x;
    const double* square;
    double smallest;
    __device__ void operator()(size_t i) const {
        double norm = sqrt(*square);
        float factor = float(1.0 / (norm < smallest ? smallest : norm));
        Floats<W> v = load<W>(x + i * W);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] *= factor;
        store(x + i * W, v);
    }
};

struct AddDiagonal {
    float* x;
    float value;
    size_t order;
    __device__ void operator()(size_t i) const { x[i * (order + 1)] += value; }
};

// f(row, i) for the first elements i of a row's vectors of W.
template <int W, class F>
__global__ void __launch_bounds__(THREADS) for_each_of_rows_kernel(size_t vectors, F f) {
    size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i < vectors) f(blockIdx.y, i * W);
}

// run<W>() with vectors of W = 4 elements where rows, stretches and pointers begin and end at multiples of that, else with 1.
template <class F, class... Pointers>
int with_stretches(const Rows& rows, const Stretches& stretches, F run, Pointers... pointers) {
    constexpr size_t WIDTH = WIDE<float>;
    bool whole = rows.length % WIDTH == 0 && all_aligned(pointers...);
    if (rows.count > 1) whole = whole && rows.pitch % WIDTH == 0 && rows.pitch_of_moments % WIDTH == 0;
    for (int s = 0; s < stretches.count; ++s) whole = whole && stretches.of[s].begin % WIDTH == 0 && stretches.of[s].end % WIDTH == 0;
    return whole ? run.template operator()<WIDTH>() : run.template operator()<1>();
}

template <int W, class F>
int for_each_of_rows(const Rows& rows, cudaStream_t stream, F f) {
    size_t vectors = rows.length / W;
    if (vectors == 0 || rows.count == 0) return cudaSuccess;
    return launch(for_each_of_rows_kernel<W, F>, dim3(ceil_div(vectors, THREADS), rows.count), THREADS, 0, stream, vectors, f);
}

} // namespace

// `rule` as in optim/adamw.rs.
extern "C" int vcycle_adamw(AdamW rule, const Stretches* stretches, const float* grad, float* theta, float* m, float* v, Rows rows,
                            cudaStream_t stream) {
    auto run = [&]<int W>() {
        return for_each_of_rows<W>(rows, stream, AdamWPass<W>{rule, *stretches, rows, grad, theta, m, v});
    };
    return with_stretches(rows, *stretches, run, grad, theta, m, v);
}

// As in optim/sgd.rs.
extern "C" int vcycle_sgd(float scale, float mu, int nesterov, float lr, const Stretches* stretches, const float* grad,
                          float* theta, float* b, Rows rows, cudaStream_t stream) {
    auto run = [&]<int W>() {
        return for_each_of_rows<W>(rows, stream, SgdPass<W>{{scale, mu, nesterov}, lr, *stretches, rows, grad, theta, b});
    };
    return with_stretches(rows, *stretches, run, grad, theta, b);
}

// The momentum of Muon, optim/muon.rs: B and u = U of n elements.
extern "C" int vcycle_momentum(float scale, float mu, int nesterov, const float* grad, float* b, float* u, size_t n,
                               cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n / W, stream, MomentumPass<W>{{scale, mu, nesterov}, grad, b, u});
    };
    return with_width<float>(n, run, grad, b, u);
}

// x [n] ← x / max(√*square, smallest)
extern "C" int vcycle_normalize(float* x, const double* square, double smallest, size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() { return for_each(n / W, stream, Normalize<W>{x, square, smallest}); };
    return with_width<float>(n, run, x);
}

// x [order, order] += value · 1
extern "C" int vcycle_add_diagonal(float* x, float value, size_t order, cudaStream_t stream) {
    return for_each(order, stream, AddDiagonal{x, value, order});
}
