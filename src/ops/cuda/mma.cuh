// The matrix product of a warp, c [16 × 8] += A [16 × 16] B [16 × 8], in the tensor cores' layout (PTX, mma.m16n8k16):
// lane 4g + t holds
//
//   A.x: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1), (g, 2t+8), (g, 2t+9), (g+8, 2t+8), (g+8, 2t+9)
//   B.x: (2t, g), (2t+1, g), (2t+8, g), (2t+9, g)
//   c:   (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
//
// bf16 goes to the tensor cores. float, which is there to verify, is exact and slow: lanes hand each other their elements.
#pragma once
#include "common.cuh"

#ifdef VCYCLE_EMULATE
using emulate::load_matrices;
#else
// ldmatrix.x4: lanes 8i … 8i+7 each give the row of an 8 × 8 matrix i, 16 bytes in shared memory; every lane gets of each matrix the
// elements (g, 2t) and (g, 2t+1), or with TRANSPOSED (2t, g) and (2t+1, g).
template <bool TRANSPOSED>
__device__ inline void load_matrices(bf16 (&x)[8], const bf16* row) {
    uint32_t* r = reinterpret_cast<uint32_t*>(x);
    unsigned at = unsigned(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at)
                     : "memory");
}
#endif

template <class T>
struct alignas(16) FragmentA {
    T x[8];
};
template <class T>
struct alignas(8) FragmentB {
    T x[4];
};

__device__ inline int lane_row() { return threadIdx.x % WARP_SIZE / 4; }        // g
__device__ inline int lane_column() { return threadIdx.x % WARP_SIZE % 4 * 2; } // 2t

// The fragments of all lanes, in reach of each.
#ifdef VCYCLE_EMULATE
struct Lanes {
    struct Both {
        FragmentA<float> a;
        FragmentB<float> b;
    };
    emulate::Exchange<Both> all;
    Lanes(const FragmentA<float>& a, const FragmentB<float>& b) : all(Both{a, b}) {}
    FragmentA<float> a(int lane) const { return all[lane].a; }
    FragmentB<float> b(int lane) const { return all[lane].b; }
};
#else
struct Lanes {
    const FragmentA<float>& own_a;
    const FragmentB<float>& own_b;
    __device__ Lanes(const FragmentA<float>& a, const FragmentB<float>& b) : own_a(a), own_b(b) {}
    __device__ FragmentA<float> a(int lane) const {
        FragmentA<float> result;
#pragma unroll
        for (int i = 0; i < 8; ++i) result.x[i] = __shfl_sync(ALL_LANES, own_a.x[i], lane);
        return result;
    }
    __device__ FragmentB<float> b(int lane) const {
        FragmentB<float> result;
#pragma unroll
        for (int i = 0; i < 4; ++i) result.x[i] = __shfl_sync(ALL_LANES, own_b.x[i], lane);
        return result;
    }
};
#endif

__device__ inline void multiply_add(float (&c)[4], const FragmentA<float>& a, const FragmentB<float>& b) {
    int g = lane_row(), column = lane_column();
    Lanes lanes(a, b);
// Not unrolled: there is much of this code, and it need not be fast.
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
        FragmentA<float> row = lanes.a(4 * g + t);
        FragmentB<float> left = lanes.b(4 * column + t), right = lanes.b(4 * (column + 1) + t);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int i = k % 2 + k / 2 * 4; // the k-th of this lane's columns of A, in row g; two further in row g+8
            c[0] += row.x[i] * left.x[k];
            c[1] += row.x[i] * right.x[k];
            c[2] += row.x[i + 2] * left.x[k];
            c[3] += row.x[i + 2] * right.x[k];
        }
    }
}

__device__ inline void multiply_add(float (&c)[4], const FragmentA<bf16>& a, const FragmentB<bf16>& b) {
#ifdef VCYCLE_EMULATE
    FragmentA<float> wide_a;
    FragmentB<float> wide_b;
    for (int i = 0; i < 8; ++i) wide_a.x[i] = to_float(a.x[i]);
    for (int i = 0; i < 4; ++i) wide_b.x[i] = to_float(b.x[i]);
    multiply_add(c, wide_a, wide_b);
#else
    const uint32_t* ra = reinterpret_cast<const uint32_t*>(a.x);
    const uint32_t* rb = reinterpret_cast<const uint32_t*>(b.x);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
#endif
}

// The i-th 8 × 8 quarter of a 16 × 16 piece: they follow each other down the columns, or with ALONG_ROWS along the rows.
template <bool ALONG_ROWS, class T>
__device__ inline const T* quarter(const T* piece, int pitch, int i) {
    int down = ALONG_ROWS ? i / 2 : i % 2, right = ALONG_ROWS ? i % 2 : i / 2;
    return piece + 8 * down * pitch + 8 * right;
}

// The quarters of a piece of a tile in shared memory, whose rows begin at multiples of 16 bytes. From quarter i this lane gets, as
// x[2i] and x[2i+1], the elements (g, 2t) and (g, 2t+1), or with TRANSPOSED (2t, g) and (2t+1, g).
template <bool ALONG_ROWS, bool TRANSPOSED>
__device__ inline void load_quarters(bf16 (&x)[8], const bf16* piece, int pitch) {
    int lane = threadIdx.x % WARP_SIZE;
    load_matrices<TRANSPOSED>(x, quarter<ALONG_ROWS>(piece, pitch, lane / 8) + lane % 8 * pitch);
}
template <bool ALONG_ROWS, bool TRANSPOSED>
__device__ inline void load_quarters(float (&x)[8], const float* piece, int pitch) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int t = lane_column() + i % 2, g = lane_row();
        x[i] = quarter<ALONG_ROWS>(piece, pitch, i / 2)[TRANSPOSED ? t * pitch + g : g * pitch + t];
    }
}

// A: rows row … row+15, columns column … column+15 of a tile with `pitch` elements a row.
template <class T>
__device__ inline FragmentA<T> load_a(const T* tile, int pitch, int row, int column) {
    FragmentA<T> a;
    load_quarters<false, false>(a.x, tile + row * pitch + column, pitch);
    return a;
}

// Two neighbouring B, [16 × 16] together.
template <class T>
struct alignas(16) FragmentsB {
    T x[8];
    __device__ FragmentB<T> operator[](int i) const {
        FragmentB<T> b;
#pragma unroll
        for (int k = 0; k < 4; ++k) b.x[k] = x[4 * i + k];
        return b;
    }
};

// Nᵀ: their columns are rows row … row+15 of the tile N, their rows the columns column … column+15 of N.
template <class T>
__device__ inline FragmentsB<T> load_b_transposed(const T* tile, int pitch, int row, int column) {
    FragmentsB<T> b;
    load_quarters<true, false>(b.x, tile + row * pitch + column, pitch);
    return b;
}

// N: rows row … row+15, columns column … column+15 of the tile.
template <class T>
__device__ inline FragmentsB<T> load_b(const T* tile, int pitch, int row, int column) {
    FragmentsB<T> b;
    load_quarters<false, true>(b.x, tile + row * pitch + column, pitch);
    return b;
}

// Two neighbouring products c as the A of a next one.
template <class T>
__device__ inline FragmentA<T> as_a(const float (&left)[4], const float (&right)[4]) {
    FragmentA<T> a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a.x[i] = from_float<T>(left[i]);
        a.x[4 + i] = from_float<T>(right[i]);
    }
    return a;
}
