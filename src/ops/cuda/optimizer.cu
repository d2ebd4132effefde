// Update rules in one pass over the elements of a row, optim/: each of θ, gradient and moments is read and written once. All float.
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
    const float* grad;
    float *theta, *m, *v;
    __device__ void operator()(size_t i) const {
        i *= W;
        float keep = keep_at(stretches, i);
        if (keep < 0.0f) return;
        Floats<W> g = load<W>(grad + i), x = load<W>(theta + i), first = load<W>(m + i), second = load<W>(v + i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float gk = __fmul_rn(rule.scale, g[k]);
            first[k] = fmaf(rule.one_minus_beta1, gk - first[k], first[k]);
            second[k] = fmaf(rule.beta2, second[k], __fmul_rn(rule.one_minus_beta2, __fmul_rn(gk, gk)));
            float root = fmaf(sqrtf(second[k]), rule.root_correction, rule.eps);
            x[k] = fmaf(keep, x[k], -(__fmul_rn(rule.step_size, first[k]) / root));
        }
        store(m + i, first);
        store(v + i, second);
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
    const float* grad;
    float *theta, *b;
    __device__ void operator()(size_t i) const {
        i *= W;
        float keep = keep_at(stretches, i);
        if (keep < 0.0f) return;
        Floats<W> g = load<W>(grad + i), x = load<W>(theta + i), momentum = load<W>(b + i);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = fmaf(-lr, rule(g[k], momentum[k]), __fmul_rn(keep, x[k]));
        store(b + i, momentum);
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

// All stretches begin and end at multiples of 4.
bool whole_vectors(const Stretches& stretches) {
    bool whole = true;
    for (int s = 0; s < stretches.count; ++s) whole = whole && stretches.of[s].begin % 4 == 0 && stretches.of[s].end % 4 == 0;
    return whole;
}

// f<float, W> with vectors where `row` elements, `stretches` and pointers allow it.
template <class F, class... Pointers>
int with_stretches(size_t row, const Stretches& stretches, F f, Pointers... pointers) {
    return whole_vectors(stretches) ? with_width<float>(row, f, pointers...) : f.template operator()<float, 1>();
}

} // namespace

// One row of n elements; `rule` as in optim/adamw.rs.
extern "C" int vcycle_adamw(AdamW rule, const Stretches* stretches, const float* grad, float* theta, float* m, float* v,
                            size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n / W, stream, AdamWPass<W>{rule, *stretches, grad, theta, m, v});
    };
    return with_stretches(n, *stretches, run, grad, theta, m, v);
}

// One row of n elements; as in optim/sgd.rs.
extern "C" int vcycle_sgd(float scale, float mu, int nesterov, float lr, const Stretches* stretches, const float* grad,
                          float* theta, float* b, size_t n, cudaStream_t stream) {
    auto run = [&]<class T, int W>() {
        return for_each(n / W, stream, SgdPass<W>{{scale, mu, nesterov}, lr, *stretches, grad, theta, b});
    };
    return with_stretches(n, *stretches, run, grad, theta, b);
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
