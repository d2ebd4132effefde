// What the tests steer the emulation by.
#include "cuda.h"

using emulate::Graph;

// Threads and blocks run last to first.
extern "C" void vcycle_emulate_reversed(int on) { emulate::reversed = on; }

// From now on launches of this thread are kept in a new graph, until the end of the capture.
extern "C" Graph* vcycle_emulate_capture() { return emulate::graph = new Graph; }

extern "C" void vcycle_emulate_end_capture() { emulate::graph = nullptr; }

// Launches that it keeps.
extern "C" size_t vcycle_emulate_length(const Graph* graph) { return graph->size(); }

// Those from begin on, before end.
extern "C" void vcycle_emulate_launch(const Graph* graph, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) (*graph)[i]();
}

extern "C" void vcycle_emulate_free(Graph* graph) { delete graph; }
