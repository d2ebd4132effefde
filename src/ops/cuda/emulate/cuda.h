// A host's stand-in for CUDA: as much of it as the kernels in this folder use, to run and test them without a GPU.
//
// Blocks run one after the other. The threads of a block are fibers of one host thread: each runs until it waits at
// a barrier (a warp's shuffle is one), then the next runs. Shared memory begins as NaN and ends in a canary. A
// barrier that not all of its threads reach ends the process with a message. With the order reversed, threads and blocks run
// last to first: a result that depends on the order shows a race.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaMemcpyDeviceToDevice = 3 };
inline const char* cudaGetErrorString(int code) { return code ? "invalid value" : "no error"; }
// bfloat16: the upper half of a float, rounded to nearest, ties to even; NaN stays NaN.
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// Rounded, whatever it is added to.
inline float __fmul_rn(float x, float y) {
    volatile float product = x * y;
    return product;
}

namespace emulate {

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;
};

constexpr int WARP = 32;

// What the lanes of a warp exchange. Two sets of slots in turn: a lane may come to the next exchange before another has
// read this one, but never to the one after that.
struct Warp {
    Barrier barrier;
    alignas(16) unsigned char slots[2][WARP][64];
};

// A copy to shared memory that the thread has not waited for.
struct Copy {
    void* to;
    const void* from;
    bool zero;
};

struct Fiber {
    std::vector<Copy> copies;
    ucontext_t start;
    jmp_buf state;
    bool started = false, done = true;
    dim3 thread;
    unsigned index = 0;
    const Barrier* barrier = nullptr;
    unsigned generation = 0;
};

// All that one host thread emulates with.
struct Machine {
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    Barrier block_barrier;
    Fiber* current = nullptr;
    jmp_buf scheduler;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    dim3 block, block_size, grid_size;
};
// Never freed, and no dynamic initialisation that each access would look after: most of what the emulation does is to look here.
inline constinit thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;
// Set by the tests.
inline constinit thread_local bool reversed __attribute__((tls_model("initial-exec"))) = false;

// Does the work, now or later, after what the stream was given before: whoever runs the emulation decides.
int submit(cudaStream_t stream, std::function<void()> work);

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
}

__attribute__((noinline)) inline void yield() {
    if (_setjmp(machine->current->state) == 0) _longjmp(machine->scheduler, 1);
}

// A fiber lives as long as its host thread and runs a CUDA thread of one block after the other.
inline void fiber_main() {
    for (;;) {
        machine->body(machine->arguments);
        if (!machine->current->copies.empty()) fail("a copy that its thread does not wait for");
        machine->current->done = true;
        yield();
    }
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
    machine->current = fiber;
    if (_setjmp(machine->scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->state, 1);
    fiber->started = true;
    setcontext(&fiber->start);
}

inline Fiber* new_fiber() {
    constexpr size_t STACK = 256 << 10;
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a thread's stack");
    Fiber* fiber = new Fiber;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stack;
    fiber->start.uc_stack.ss_size = STACK;
    makecontext(&fiber->start, fiber_main, 0);
    return fiber;
}

inline void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    machine->current->barrier = &barrier;
    machine->current->generation = barrier.generation;
    yield();
    machine->current->barrier = nullptr;
}

// Every lane's `value`, once all lanes of the warp have given theirs.
template <class T>
struct Exchange {
    const unsigned char (*slots)[64];
    explicit Exchange(const T& value) {
        static_assert(sizeof(T) <= 64);
        unsigned index = machine->current->index;
        Warp& warp = machine->warps[index / WARP];
        if (warp.barrier.expected != WARP) fail("a warp's exchange in a block that is no multiple of 32 threads");
        slots = warp.slots[warp.barrier.generation & 1];
        std::memcpy(const_cast<unsigned char*>(slots[index % WARP]), &value, sizeof(T));
        wait(warp.barrier);
    }
    T operator[](unsigned lane) const {
        T value;
        std::memcpy(&value, slots[lane], sizeof(T));
        return value;
    }
};

inline unsigned lane() { return machine->current->index % WARP; }

// ldmatrix.x4, see mma.cuh.
template <bool TRANSPOSED>
inline void load_matrices(__nv_bfloat16 (&x)[8], const __nv_bfloat16* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a row of a matrix that is not aligned");
    Exchange<const __nv_bfloat16*> rows(row);
    unsigned g = lane() / 4, t = lane() % 4;
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned k = 0; k < 2; ++k) x[2 * i + k] = TRANSPOSED ? rows[8 * i + 2 * t + k][g] : rows[8 * i + g][2 * t + k];
}

inline void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) machine->fibers[i]->done = false;
    for (unsigned unfinished = threads; unfinished > 0;) {
        bool progress = false;
        for (unsigned k = 0; k < threads; ++k) {
            Fiber* fiber = machine->fibers[reversed ? threads - 1 - k : k];
            bool waits = fiber->barrier && fiber->barrier->generation == fiber->generation;
            if (fiber->done || waits) continue;
            resume(fiber);
            progress = true;
            unfinished -= fiber->done;
        }
        if (!progress) fail("threads wait at a barrier that the others do not reach");
    }
}

constexpr size_t CANARY = 64;

inline unsigned char* shared_begin() {
    uintptr_t address = reinterpret_cast<uintptr_t>(machine->shared.data());
    return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

// body(arguments) on each thread.
inline void run_grid(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* arguments) {
    if (!machine) machine = new Machine;
    unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024 || shared > (227u << 10)) fail("a block larger than a GPU runs");
    machine->body = body;
    machine->arguments = arguments;
    machine->grid_size = grid;
    machine->block_size = block;
    machine->block_barrier = {threads, 0, 0};
    machine->warps.resize((threads + WARP - 1) / WARP);
    for (unsigned w = 0; w < machine->warps.size(); ++w)
        machine->warps[w].barrier = {threads - w * WARP < WARP ? threads - w * WARP : WARP, 0, 0};
    while (machine->fibers.size() < threads) machine->fibers.push_back(new_fiber());
    for (unsigned i = 0; i < threads; ++i) {
        machine->fibers[i]->index = i;
        machine->fibers[i]->thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    }
    machine->shared.resize(shared + CANARY + 16);
    size_t blocks = size_t(grid.x) * grid.y * grid.z;
    for (size_t k = 0; k < blocks; ++k) {
        size_t b = reversed ? blocks - 1 - k : k;
        machine->block = dim3(b % grid.x, b / grid.x % grid.y, b / (size_t(grid.x) * grid.y));
        std::memset(machine->shared.data(), 0xff, machine->shared.size());
        run_block(threads);
        for (size_t i = 0; i < CANARY; ++i)
            if (shared_begin()[shared + i] != 0xff) fail("a write beyond shared memory");
    }
}

} // namespace emulate

#define threadIdx (emulate::machine->current->thread)
#define blockIdx (emulate::machine->block)
#define blockDim (emulate::machine->block_size)
#define gridDim (emulate::machine->grid_size)

// As late as it may be.
inline void start_copy(void* to, const void* from, bool zero) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) emulate::fail("a copy that is not aligned");
    emulate::machine->current->copies.push_back({to, from, zero});
}
inline void wait_for_copies() {
    for (const emulate::Copy& copy : emulate::machine->current->copies)
        copy.zero ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
    emulate::machine->current->copies.clear();
}
inline float fast_exp2(float x) { return exp2f(x); }

inline void __syncthreads() { emulate::wait(emulate::machine->block_barrier); }
inline void __syncwarp() { emulate::Exchange<int> all(0); }
inline float __shfl_sync(unsigned, float value, unsigned lane) { return emulate::Exchange<float>(value)[lane % 32]; }
inline float __shfl_xor_sync(unsigned, float value, unsigned mask) {
    return emulate::Exchange<float>(value)[emulate::lane() ^ mask];
}
inline double __shfl_xor_sync(unsigned, double value, unsigned mask) {
    return emulate::Exchange<double>(value)[emulate::lane() ^ mask];
}

// This block's shared memory.
template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulate::shared_begin());
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
    return emulate::submit(stream, [=] {
        auto body = [&] { kernel(Parameters(arguments)...); };
        emulate::run_grid(grid, block, shared, [](void* pointer) { (*static_cast<decltype(body)*>(pointer))(); }, &body);
    });
}

inline int cudaMemcpyAsync(void* out, const void* source, size_t bytes, int, cudaStream_t stream) {
    return emulate::submit(stream, [=] { std::memcpy(out, source, bytes); });
}
