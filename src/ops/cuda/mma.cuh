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

template <class T>
__device__ inline void load_pair(T* to, const T* from) {
    Packed<T, 2> pair = *reinterpret_cast<const Packed<T, 2>*>(from);
    to[0] = pair.x[0];
    to[1] = pair.x[1];
}

// A: rows row … row+15, columns column … column+15 of a tile with `pitch` elements a row.
template <class T>
__device__ inline FragmentA<T> load_a(const T* tile, int pitch, int row, int column) {
    FragmentA<T> a;
    const T* corner = tile + (row + lane_row()) * pitch + column + lane_column();
#pragma unroll
    for (int i = 0; i < 4; ++i) load_pair(a.x + 2 * i, corner + i % 2 * 8 * pitch + i / 2 * 8);
    return a;
}

// B = Nᵀ: its column g is row `row` + g of the tile N, its rows the columns column … column+15 of N.
template <class T>
__device__ inline FragmentB<T> load_b_transposed(const T* tile, int pitch, int row, int column) {
    FragmentB<T> b;
    const T* corner = tile + (row + lane_row()) * pitch + column + lane_column();
    load_pair(b.x, corner);
    load_pair(b.x + 2, corner + 8);
    return b;
}

// B = N: rows row … row+15, columns column … column+7 of the tile.
template <class T>
__device__ inline FragmentB<T> load_b(const T* tile, int pitch, int row, int column) {
    FragmentB<T> b;
    const T* corner = tile + (row + lane_column()) * pitch + column + lane_row();
    b.x[0] = corner[0];
    b.x[1] = corner[pitch];
    b.x[2] = corner[8 * pitch];
    b.x[3] = corner[9 * pitch];
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
