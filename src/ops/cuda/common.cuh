// What the kernels share: element types, vector access, reductions in a fixed order, launching.
//
// Kernels compute in float; T is how elements are stored, float or bf16. Statistics, partial sums and the gradients of
// parameters are float for either T. Nothing depends on the order in which threads run: there are no float atomics, and
// partial sums are cut by shape alone, so every GPU gives the same bits each time.
//
// A function `vcycle_*` launches on a stream and returns a cudaError_t. Tensors are contiguous; n counts elements or rows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef VCYCLE_EMULATE
#include "emulate/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>

// Copies 16 bytes from global to shared memory, both aligned, or sets them to 0; done after `wait_for_copies`.
__device__ inline void start_copy(void* to, const void* from, bool zero) {
    unsigned at = unsigned(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(zero ? 0 : 16) : "memory");
}
// This thread's copies have been made.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2ˣ to about 2 units in the last place; 0 for what is smaller than a normal number.
__device__ inline float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// This block's shared memory.
template <class T>
__device__ inline T* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    return reinterpret_cast<T*>(shared_bytes);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
    constexpr size_t ALWAYS_ALLOWED = 48 << 10;
    if (shared > ALWAYS_ALLOWED) {
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared, stream>>>(Parameters(arguments)...);
    return cudaGetLastError();
}
#endif

using bf16 = __nv_bfloat16;

constexpr int WARP_SIZE = 32;
constexpr unsigned ALL_LANES = 0xffffffff;
// Threads of a block where nothing else decides.
constexpr int THREADS = 256;

__host__ __device__ constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return __float2bfloat16_rn(x);
}

// Elements of T that make 16 bytes, the widest access.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

// W elements in memory; more than 16 bytes are several accesses.
template <class T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Packed {
    T x[W];
};

template <int W>
struct Floats {
    float x[W];
    __device__ float& operator[](int i) { return x[i]; }
    __device__ float operator[](int i) const { return x[i]; }
};

template <int W, class T>
__device__ inline Floats<W> load(const T* from) {
    Packed<T, W> packed = *reinterpret_cast<const Packed<T, W>*>(from);
    Floats<W> values;
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = to_float(packed.x[i]);
    return values;
}

template <int W, class T>
__device__ inline void store(T* to, const Floats<W>& values) {
    Packed<T, W> packed;
#pragma unroll
    for (int i = 0; i < W; ++i) packed.x[i] = from_float<T>(values[i]);
    *reinterpret_cast<Packed<T, W>*>(to) = packed;
}

// Every lane gets the sum over its warp, the same bits.
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// f(i) for i = 0 … n-1.
template <class F>
__global__ void __launch_bounds__(THREADS) for_each_kernel(size_t n, F f) {
    size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) f(i);
}

template <class F>
int for_each(size_t n, cudaStream_t stream, F f) {
    if (n == 0) return cudaSuccess;
    return launch(for_each_kernel<F>, ceil_div(n, THREADS), THREADS, 0, stream, n, f);
}

inline bool all_aligned() { return true; }
template <class... Rest>
bool all_aligned(const void* pointer, Rest... rest) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && all_aligned(rest...);
}

template <class T, class F, class... Pointers>
int with_width(size_t row, F f, Pointers... pointers) {
    bool wide = row % WIDE<T> == 0 && all_aligned(pointers...);
    return wide ? f.template operator()<T, WIDE<T>>() : f.template operator()<T, 1>();
}

// f<T>() for the element type that `dtype` names: 0 float, 1 bf16.
template <class F>
int with_element(int dtype, F f) {
    switch (dtype) {
        case 0: return f.template operator()<float>();
        case 1: return f.template operator()<bf16>();
        default: return cudaErrorInvalidValue;
    }
}

// f<T, W>(): as above, and with vectors of W elements: 16 bytes where rows of `row` elements and all `pointers` begin at multiples
// of that, else one element.
template <class F, class... Pointers>
int with_vectors(int dtype, size_t row, F f, Pointers... pointers) {
    return with_element(dtype, [&]<class T>() { return with_width<T>(row, f, pointers...); });
}
