// The driver: devices, memory, streams, events, graphs, and candle's kernels by name.
#include "gpu.h"
#include "candle.h"
#include <algorithm>
#include <sys/mman.h>
#include <unistd.h>

namespace gpu {
namespace {

constexpr size_t MEMORY = size_t(16) << 30;
constexpr size_t ALIGNMENT = 256;

std::recursive_mutex mutex;
char* memory = nullptr;
// Of the memory's pages: which threads can touch them. -1 where the CPU has no such keys; then all can.
int key = -1;
thread_local int touching = 0;
size_t begun = 0, used = 0, most_used = 0;
std::map<char*, size_t> sizes;

// VCYCLE_SOFTWARE_GPU=crossed.
bool is_crossed() {
    static const bool crossed = [] {
        const char* order = std::getenv("VCYCLE_SOFTWARE_GPU");
        return order && std::string(order) == "crossed";
    }();
    return crossed;
}

void reserve() {
    if (memory) return;
    void* address = mmap(nullptr, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) fail("no room for the device's memory");
    memory = static_cast<char*>(address);
    key = pkey_alloc(0, PKEY_DISABLE_ACCESS);
    if (key >= 0 && pkey_mprotect(memory, MEMORY, PROT_READ | PROT_WRITE, key) != 0) fail("pkey_mprotect");
}

void check(const char* begin, size_t bytes) {
    auto after = sizes.upper_bound(const_cast<char*>(begin));
    bool inside = after != sizes.begin() && (--after, begin + bytes <= after->first + after->second);
    if (bytes > 0 && !inside) fail("a copy that is not inside one piece of the device's memory");
}

} // namespace

void fail(const std::string& what) {
    std::fprintf(stderr, "software GPU: %s\n", what.c_str());
    std::abort();
}

Lock::Lock() { mutex.lock(); }
Lock::~Lock() { mutex.unlock(); }
Access::Access() {
    if (touching++ == 0 && key >= 0) pkey_set(key, 0);
}
Access::~Access() {
    if (--touching == 0 && key >= 0) pkey_set(key, PKEY_DISABLE_ACCESS);
}

Stream* stream(void* handle) {
    static Stream null;
    if (handle == reinterpret_cast<void*>(1) || handle == reinterpret_cast<void*>(2)) fail("the default stream by its special names");
    return handle ? static_cast<Stream*>(handle) : &null;
}

int submit(Stream* stream, Work work) {
    Lock lock;
    if (stream->capture) stream->capture->work.push_back(std::move(work));
    else {
        stream->queue.push_back(std::move(work));
        if (stream->is_eager) progress(stream);
    }
    return SUCCESS;
}

int submit_uncapturable(Stream* stream, const char* what, Work work) {
    Lock lock;
    if (!stream->capture) return submit(stream, std::move(work));
    stream->capture->broken = true;
    std::fprintf(stderr, "software GPU: %s while a graph is captured\n", what);
    return CAPTURE_UNSUPPORTED;
}

bool progress(Stream* stream) {
    Access access;
    while (!stream->queue.empty()) {
        // Work may give its stream more.
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (!work()) {
            stream->queue.push_front(std::move(work));
            return false;
        }
    }
    return true;
}

int synchronize(Stream* stream) {
    if (Lock lock; stream->capture) return submit_uncapturable(stream, "a wait of the host", nullptr);
    while (!progress(stream)) usleep(50);
    return SUCCESS;
}

} // namespace gpu

// Kernels of this project.
int emulate::submit(cudaStream_t handle, std::function<void()> work) { return gpu::submit(gpu::stream(handle), gpu::once(std::move(work))); }

using namespace gpu;

namespace {

struct Event {
    std::shared_ptr<Mark> mark;
};
struct Generator {
    Stream* stream = gpu::stream(nullptr);
};
struct Executable {
    std::vector<Work> work;
};

int devices() {
    const char* count = std::getenv("VCYCLE_SOFTWARE_GPUS");
    return count ? std::atoi(count) : 1;
}

thread_local void* context = nullptr;

bool has_context() {
    if (!context) std::fprintf(stderr, "software GPU: a call on a thread without a context\n");
    return context;
}

} // namespace

extern "C" {

int cuInit(unsigned) { return devices() > 0 ? SUCCESS : 100; }
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuGetErrorString(int code, const char** text) {
    switch (code) {
        case SUCCESS: *text = "no error"; break;
        case INVALID_VALUE: *text = "invalid argument"; break;
        case OUT_OF_MEMORY: *text = "out of memory"; break;
        case 100: *text = "no CUDA-capable device is detected"; break;
        case INVALID_DEVICE: *text = "invalid device ordinal"; break;
        case INVALID_CONTEXT: *text = "invalid device context"; break;
        case NOT_READY: *text = "device not ready"; break;
        case NOT_SUPPORTED: *text = "operation not supported"; break;
        case CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
        case CAPTURE_INVALIDATED: *text = "operation failed due to a previous error during capture"; break;
        default: *text = "another error";
    }
    return SUCCESS;
}
int cuGetErrorName(int code, const char** text) { return cuGetErrorString(code, text); }

int cuDeviceGetCount(int* count) { return *count = devices(), SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal >= 0 && ordinal < devices() ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetName(char* name, int bytes, int) { return std::snprintf(name, bytes, "software GPU"), SUCCESS; }
int cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    std::memset(uuid, 0, 16);
    uuid[0] = 0x5c, uuid[15] = device;
    return SUCCESS;
}
int cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = MEMORY, SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 2; break;          // multiprocessors
        case 75: *value = 9; break;          // compute capability, major
        case 76: *value = 0; break;          // and minor
        case 97: *value = 227 << 10; break;  // shared memory a block can ask for
        case 115: *value = 1; break;         // memory pools
        default: fail("attribute " + std::to_string(attribute) + " of a device is not known");
    }
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** to, int device) {
    Lock lock;
    reserve();
    return *to = reinterpret_cast<void*>(size_t(device) + 1), SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxGetCurrent(void** to) { return *to = context, SUCCESS; }
int cuCtxSetCurrent(void* to) { return context = to, SUCCESS; }

namespace {
std::vector<std::unique_ptr<Stream>> streams;
}

int cuCtxSynchronize() {
    if (!has_context()) return INVALID_CONTEXT;
    std::vector<Stream*> all;
    {
        Lock lock;
        for (auto& stream : streams) all.push_back(stream.get());
    }
    for (Stream* stream : all)
        if (int code = synchronize(stream)) return code;
    return synchronize(stream(nullptr));
}

int cuStreamCreate(void** to, unsigned) {
    if (!has_context()) return INVALID_CONTEXT;
    Lock lock;
    streams.push_back(std::make_unique<Stream>());
    thread_local bool is_first = true;
    streams.back()->is_eager = is_crossed() && !is_first;
    is_first = false;
    return *to = streams.back().get(), SUCCESS;
}
// What it was given is done all the same, some time.
int cuStreamDestroy_v2(void*) { return SUCCESS; }
int cuStreamSynchronize(void* handle) { return synchronize(stream(handle)); }
int cuStreamQuery(void* handle) { return progress(stream(handle)) ? SUCCESS : NOT_READY; }

int cuEventCreate(void** to, unsigned) { return has_context() ? (*to = new Event, SUCCESS) : INVALID_CONTEXT; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), SUCCESS; }
int cuEventRecord(void* event, void* handle) {
    auto mark = std::make_shared<Mark>(Mark{stream(handle)});
    static_cast<Event*>(event)->mark = mark;
    return submit_uncapturable(mark->stream, "an event", once([mark] { mark->done = true; }));
}
int cuEventQuery(void* event) {
    auto mark = static_cast<Event*>(event)->mark;
    if (!mark) return SUCCESS;
    progress(mark->stream);
    return mark->done ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(void* event) {
    while (cuEventQuery(event) == NOT_READY) usleep(50);
    return SUCCESS;
}
int cuStreamWaitEvent(void* handle, void* event, unsigned) {
    auto mark = static_cast<Event*>(event)->mark;
    if (!mark) return SUCCESS;
    return submit_uncapturable(stream(handle), "a wait for an event", [mark] {
        if (!mark->done) progress(mark->stream);
        return mark->done;
    });
}

int cuMemAllocAsync(char** to, size_t bytes, void* handle) {
    if (!has_context()) return INVALID_CONTEXT;
    Lock lock;
    size_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Stream* on = stream(handle);
    auto& freed = on->freed[size];
    if (on->capture) return submit_uncapturable(on, "an allocation", nullptr);
    char* begin;
    if (!freed.empty()) {
        begin = freed.back();
        freed.pop_back();
    } else {
        if (begun + size + ALIGNMENT > MEMORY) return OUT_OF_MEMORY;
        begin = memory + begun;
        // Room between pieces that belongs to none.
        begun += size + ALIGNMENT;
    }
    sizes[begin] = bytes;
    used += bytes;
    most_used = std::max(most_used, used);
    *to = begin;
    return submit(on, once([=] { std::memset(begin, 0xff, size); }));
}
int cuMemFreeAsync(char* begin, void* handle) {
    Lock lock;
    Stream* on = stream(handle);
    if (on->capture) return submit_uncapturable(on, "a freed allocation", nullptr);
    auto piece = sizes.find(begin);
    if (piece == sizes.end()) fail("memory is freed that is not allocated");
    size_t bytes = piece->second, size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    sizes.erase(piece);
    used -= bytes;
    on->freed[size].push_back(begin);
    return submit(on, once([=] { std::memset(begin, 0xff, size); }));
}
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *total = MEMORY, *free = MEMORY - used, SUCCESS; }
int cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &streams, SUCCESS; }
// The threshold of what is kept, or the most that was used, which only 0 can be.
int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    if (pool != &streams || (attribute != 4 && attribute != 8)) return INVALID_VALUE;
    if (attribute == 8 && *static_cast<uint64_t*>(value) != 0) return INVALID_VALUE;
    if (attribute == 8) most_used = used;
    return SUCCESS;
}
int cuMemPoolTrimTo(void* pool, size_t) { return pool == &streams ? SUCCESS : INVALID_VALUE; }
int cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    if (pool != &streams || (attribute != 7 && attribute != 8)) return INVALID_VALUE;
    return *static_cast<uint64_t*>(value) = attribute == 7 ? used : most_used, SUCCESS;
}

int cuMemsetD8Async(char* to, unsigned char value, size_t bytes, void* handle) {
    Lock lock;
    check(to, bytes);
    return submit(stream(handle), once([=] { std::memset(to, value, bytes); }));
}
int cuMemcpyDtoDAsync_v2(char* to, const char* from, size_t bytes, void* handle) {
    Lock lock;
    check(to, bytes);
    check(from, bytes);
    return submit(stream(handle), once([=] { std::memmove(to, from, bytes); }));
}
// Memory of the host is pageable: the driver has read it when the call returns, or written it.
int cuMemcpyHtoDAsync_v2(char* to, const char* from, size_t bytes, void* handle) {
    Lock lock;
    check(to, bytes);
    std::vector<char> staged(from, from + bytes);
    return submit_uncapturable(stream(handle), "an upload", once([to, staged = std::move(staged)] { std::memcpy(to, staged.data(), staged.size()); }));
}
int cuMemcpyDtoHAsync_v2(char* to, const char* from, size_t bytes, void* handle) {
    {
        Lock lock;
        check(from, bytes);
        int code = submit_uncapturable(stream(handle), "a download", once([=] { std::memcpy(to, from, bytes); }));
        if (code != SUCCESS) return code;
    }
    return synchronize(stream(handle));
}

int cuStreamBeginCapture_v2(void* handle, int) {
    Lock lock;
    Stream* on = stream(handle);
    if (!handle || on->capture) return CAPTURE_UNSUPPORTED;
    return on->capture = std::make_unique<Graph>(), SUCCESS;
}
int cuStreamIsCapturing(void* handle, int* status) { return *status = stream(handle)->capture ? 1 : 0, SUCCESS; }
int cuStreamEndCapture(void* handle, void** to) {
    Lock lock;
    Stream* on = stream(handle);
    if (!on->capture) return INVALID_VALUE;
    bool broken = on->capture->broken;
    *to = broken ? nullptr : on->capture.release();
    on->capture.reset();
    return broken ? CAPTURE_INVALIDATED : SUCCESS;
}
int cuGraphInstantiateWithFlags(void** to, void* graph, unsigned long long) {
    return *to = new Executable{static_cast<Graph*>(graph)->work}, SUCCESS;
}
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }
int cuGraphExecDestroy(void* graph) { return delete static_cast<Executable*>(graph), SUCCESS; }
int cuGraphUpload(void*, void*) { return SUCCESS; }
int cuGraphLaunch(void* graph, void* handle) {
    Lock lock;
    for (const Work& work : static_cast<Executable*>(graph)->work) submit(stream(handle), work);
    return SUCCESS;
}

int cuModuleLoadData(void** to, const void*) { return *to = &streams, SUCCESS; }
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** to, void*, const char* name) { return *to = new std::string(name), SUCCESS; }
int cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* handle, void** arguments, void**) {
    if (!has_context()) return INVALID_CONTEXT;
    return submit(stream(handle), once(candle_kernel(*static_cast<std::string*>(function), arguments)));
}

int curandCreateGenerator(void** to, int) { return *to = new Generator, SUCCESS; }
int curandDestroyGenerator(void* generator) { return delete static_cast<Generator*>(generator), SUCCESS; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }
int curandSetStream(void* generator, void* handle) { return static_cast<Generator*>(generator)->stream = stream(handle), SUCCESS; }
// Numbers to measure with, of no quality.
int curandGenerateUniform(void* generator, float* x, size_t n) {
    return submit(static_cast<Generator*>(generator)->stream, once([=] {
        uint32_t state = 1;
        for (size_t i = 0; i < n; ++i) x[i] = float((state = 1664525 * state + 1013904223) >> 8) / (1 << 24);
    }));
}

} // extern "C"
