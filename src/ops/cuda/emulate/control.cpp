// What the tests steer the emulation by.
#include "cuda.h"

namespace {
using Graph = std::vector<std::function<void()>>;
// The graph that is captured, or null.
thread_local Graph* graph = nullptr;
} // namespace

// Now, or when the graph is launched that is captured.
int emulate::submit(cudaStream_t, std::function<void()> work) {
    if (graph) graph->push_back(std::move(work));
    else work();
    return cudaSuccess;
}

// Threads and blocks run last to first.
extern "C" void vcycle_emulate_reversed(int on) { emulate::reversed = on; }

// From now on launches of this thread are kept in a new graph, until the end of the capture.
extern "C" Graph* vcycle_emulate_capture() { return graph = new Graph; }

extern "C" void vcycle_emulate_end_capture() { graph = nullptr; }

// Launches that it keeps.
extern "C" size_t vcycle_emulate_length(const Graph* graph) { return graph->size(); }

// Those from begin on, before end.
extern "C" void vcycle_emulate_launch(const Graph* graph, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) (*graph)[i]();
}

extern "C" void vcycle_emulate_free(Graph* graph) { delete graph; }
