// What the parts of the software GPU share: streams, memory, marks in streams.
//
// Work that a stream is given is done as late as CUDA allows: when the host waits for it or asks for it, never before, and only as
// much as that takes. With VCYCLE_SOFTWARE_GPU=crossed a thread's streams but its first do theirs at once, and that one late. What a
// missing wait or event leaves to chance on a GPU goes wrong here each time, in the one order or the other. Memory of the device begins
// as NaN, is NaN again once freed, is reused at once by its stream, and ends the program with a fault if the host touches it (where the
// CPU has protection keys).
#pragma once
#include "cuda.h"
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace gpu {

// Does a part of a stream's work; false: not yet, to be tried again.
using Work = std::function<bool()>;

struct Graph {
    std::vector<Work> work;
    // It was asked for what cannot be captured.
    bool broken = false;
};

struct Stream {
    std::deque<Work> queue;
    bool is_eager = false;
    std::unique_ptr<Graph> capture;
    // By size: freed on this stream.
    std::map<size_t, std::vector<char*>> freed;
};

// A point in a stream.
struct Mark {
    Stream* stream;
    bool done = false;
};

// Of the driver, as numbers of CUresult.
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_READY = 600, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

// Streams and memory are one thread's at a time.
struct Lock {
    Lock();
    ~Lock();
};
// And the device's memory can be touched.
struct Access {
    Lock lock;
    Access();
    ~Access();
};

// The null stream has an object too.
Stream* stream(void* handle);

// Gives the stream work, or the graph that is captured from it. The second kind cannot be part of a graph.
int submit(Stream* stream, Work work);
int submit_uncapturable(Stream* stream, const char* what, Work work);
// Once: the usual work.
template <class F>
Work once(F work) {
    return [work = std::move(work)]() mutable { return work(), true; };
}

// Does what the stream can do now; true if it has no more.
bool progress(Stream* stream);
int synchronize(Stream* stream);

[[noreturn]] void fail(const std::string& what);

} // namespace gpu
