#include "candle.h"
#include "gpu.h"
#include <cmath>

namespace {

using Launch = std::function<void()>;
using Make = Launch (*)(void**);

template <class T>
T argument(void** arguments, int i) {
    T value;
    std::memcpy(&value, arguments[i], sizeof value);
    return value;
}

float from(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
T from(T x) {
    return x;
}
template <class T, class V>
T to(V value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(float(value));
    else return T(value);
}

// Where element i of a tensor lies: `info` holds dimensions, then strides of one or two tensors; null where elements follow each other.
size_t index(size_t i, size_t rank, const size_t* info, size_t which = 0) {
    if (!info) return i;
    const size_t *dims = info, *strides = info + (which + 1) * rank;
    size_t at = 0;
    for (size_t d = rank; d-- > 0; i /= dims[d]) at += i % dims[d] * strides[d];
    return at;
}

// (n, rank, info, x, out, factor, term): out = factor x + term
template <class T>
Launch affine(void** a) {
    auto n = argument<size_t>(a, 0), rank = argument<size_t>(a, 1);
    auto info = argument<const size_t*>(a, 2);
    auto x = argument<const T*>(a, 3);
    auto out = argument<T*>(a, 4);
    auto factor = argument<T>(a, 5), term = argument<T>(a, 6);
    return [=] {
        for (size_t i = 0; i < n; ++i) out[i] = to<T>(from(x ? x[index(i, rank, info)] : out[i]) * from(factor) + from(term));
    };
}

// (n, rank, info, x, out): out = f(x)
template <class T, class U, auto F>
Launch unary(void** a) {
    auto n = argument<size_t>(a, 0), rank = argument<size_t>(a, 1);
    auto info = argument<const size_t*>(a, 2);
    auto x = argument<const T*>(a, 3);
    auto out = argument<U*>(a, 4);
    return [=] {
        for (size_t i = 0; i < n; ++i) out[i] = to<U>(F(from(x ? x[index(i, rank, info)] : reinterpret_cast<T*>(out)[i])));
    };
}

// (n, rank, info, x, y, out): out = f(x, y)
template <class T, auto F>
Launch binary(void** a) {
    auto n = argument<size_t>(a, 0), rank = argument<size_t>(a, 1);
    auto info = argument<const size_t*>(a, 2);
    auto x = argument<const T*>(a, 3), y = argument<const T*>(a, 4);
    auto out = argument<T*>(a, 5);
    return [=] {
        for (size_t i = 0; i < n; ++i) out[i] = to<T>(F(from(x[index(i, rank, info, 0)]), from(y[index(i, rank, info, 1)])));
    };
}

// (x, value, n): x = value
template <class T>
Launch fill(void** a) {
    auto x = argument<T*>(a, 0);
    auto value = argument<T>(a, 1);
    auto n = argument<size_t>(a, 2);
    return [=] { std::fill_n(x, n, value); };
}

// (n, rank, info, value, x): x = value
template <class T>
Launch set(void** a) {
    auto n = argument<size_t>(a, 0), rank = argument<size_t>(a, 1);
    auto info = argument<const size_t*>(a, 2);
    auto value = argument<T>(a, 3);
    auto x = argument<T*>(a, 4);
    return [=] {
        for (size_t i = 0; i < n; ++i) x[index(i, rank, info)] = value;
    };
}

// (x, out, rows, columns, pitch of x, pitch of out)
template <class T>
Launch copy_rows(void** a) {
    auto x = argument<const T*>(a, 0);
    auto out = argument<T*>(a, 1);
    auto rows = argument<uint32_t>(a, 2), columns = argument<uint32_t>(a, 3), from = argument<uint32_t>(a, 4), to = argument<uint32_t>(a, 5);
    return [=] {
        for (uint32_t i = 0; i < rows; ++i)
            for (uint32_t j = 0; j < columns; ++j) out[size_t(i) * to + j] = x[size_t(i) * from + j];
    };
}

// (n, length, rank, info, x, out): out[i] = Σ or max of `length` elements of x, in the order of `info`. n counts x, or out.
template <class T, auto F, bool COUNTS_OUT = false>
Launch reduce(void** a) {
    auto length = argument<size_t>(a, 1), n = argument<size_t>(a, 0) / (COUNTS_OUT ? 1 : length), rank = argument<size_t>(a, 2);
    auto info = argument<const size_t*>(a, 3);
    auto x = argument<const T*>(a, 4);
    auto out = argument<T*>(a, 5);
    return [=] {
        for (size_t i = 0; i < n; ++i) {
            auto all = from(x[index(i * length, rank, info)]);
            for (size_t k = 1; k < length; ++k) all = F(all, from(x[index(i * length + k, rank, info)]));
            out[i] = to<T>(all);
        }
    };
}

constexpr auto copy = [](auto x) { return x; };
constexpr auto square = [](auto x) { return x * x; };
constexpr auto root = [](auto x) { return std::sqrt(x); };
constexpr auto absolute = [](auto x) { return std::fabs(x); };
constexpr auto plus = [](auto x, auto y) { return x + y; };
constexpr auto minus = [](auto x, auto y) { return x - y; };
constexpr auto times = [](auto x, auto y) { return x * y; };
constexpr auto over = [](auto x, auto y) { return x / y; };
constexpr auto most = [](auto x, auto y) { return x > y ? x : y; };

template <class T>
void add(std::map<std::string, Make>& all, const std::string& type) {
    all["affine_" + type] = affine<T>;
    all["ucopy_" + type] = unary<T, T, copy>;
    all["badd_" + type] = binary<T, plus>;
    all["bsub_" + type] = binary<T, minus>;
    all["bmul_" + type] = binary<T, times>;
    all["bdiv_" + type] = binary<T, over>;
    all["fill_" + type] = fill<T>;
    all["const_set_" + type] = set<T>;
    all["copy2d_" + type] = copy_rows<T>;
    all["fast_sum_" + type] = reduce<T, plus>;
    all["fast_sum_small_" + type] = reduce<T, plus, true>;
    all["fast_max_" + type] = reduce<T, most>;
    all["cast_" + type + "_f32"] = unary<T, float, copy>;
    all["cast_" + type + "_f64"] = unary<T, double, copy>;
    all["cast_" + type + "_bf16"] = unary<T, __nv_bfloat16, copy>;
    all["cast_" + type + "_u32"] = unary<T, uint32_t, copy>;
}

template <class T>
void add_real(std::map<std::string, Make>& all, const std::string& type) {
    add<T>(all, type);
    all["usqr_" + type] = unary<T, T, square>;
    all["usqrt_" + type] = unary<T, T, root>;
    all["uabs_" + type] = unary<T, T, absolute>;
}

const std::map<std::string, Make> kernels = [] {
    std::map<std::string, Make> all;
    add_real<float>(all, "f32");
    add_real<double>(all, "f64");
    add_real<__nv_bfloat16>(all, "bf16");
    add<uint32_t>(all, "u32");
    return all;
}();

} // namespace

Launch candle_kernel(const std::string& name, void** arguments) {
    auto found = kernels.find(name);
    if (found == kernels.end()) gpu::fail("candle's kernel " + name + " is not known here: tests/software-gpu/candle.cpp");
    return found->second(arguments);
}
