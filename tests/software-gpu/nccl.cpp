// NCCL, non-blocking, between threads or processes of one machine: ranks meet in files of shared memory.
//
// Every collective waits for all of its ranks, also where NCCL lets some go on, and is done when the stream comes to it.
#include "gpu.h"
#include <filesystem>
#include <random>
#include <sys/stat.h>
#include <unistd.h>

using namespace gpu;

namespace {

enum Result { OK = 0, INVALID = 4, MISUSED = 5, IN_PROGRESS = 7 };
constexpr int FLOAT = 7, SUM = 0, NO_COLOR = -1;

using Bytes = std::vector<char>;

struct Comm {
    std::string folder;
    int rank, size;
    uint64_t calls = 0, collectives = 0;
    bool aborted = false;
    // What the host has asked for and is not yet done: all calls but collectives.
    std::function<bool()> pending = nullptr;
};

// One meeting of all ranks: each brings bytes and sees everybody's.
struct Meeting {
    Comm* comm;
    std::string name;
    bool has_come = false;

    std::string file(int rank) const { return comm->folder + "/" + name + "-" + std::to_string(rank); }

    // Comes, if it has not, and looks whether all have.
    bool meet(const Bytes& own) {
        if (!has_come) {
            std::string hidden = file(comm->rank) + ".tmp";
            FILE* out = std::fopen(hidden.c_str(), "w");
            if (!out || std::fwrite(own.data(), 1, own.size(), out) != own.size() || std::fclose(out) != 0) fail("cannot write " + hidden);
            if (std::rename(hidden.c_str(), file(comm->rank).c_str()) != 0) fail("cannot rename " + hidden);
            has_come = true;
        }
        for (int rank = 0; rank < comm->size; ++rank)
            if (access(file(rank).c_str(), R_OK) != 0) return false;
        return true;
    }

    // What all have brought.
    std::vector<Bytes> all() const {
        std::vector<Bytes> all;
        for (int rank = 0; rank < comm->size; ++rank) all.push_back(read(file(rank)));
        return all;
    }

    static Bytes read(const std::string& path) {
        FILE* in = std::fopen(path.c_str(), "r");
        if (!in) fail("cannot read " + path);
        std::fseek(in, 0, SEEK_END);
        Bytes bytes(std::ftell(in));
        std::rewind(in);
        if (std::fread(bytes.data(), 1, bytes.size(), in) != bytes.size()) fail("cannot read " + path);
        std::fclose(in);
        return bytes;
    }
};

// All have read what came before what they now wait for.
void forget(Comm* comm, const char* kind, uint64_t number) {
    Meeting before{comm, kind + std::to_string(number)};
    unlink(before.file(comm->rank).c_str());
}

Comm* comm(void* handle) {
    if (!handle) fail("a call of NCCL without a communicator");
    return static_cast<Comm*>(handle);
}

// A call that all ranks make and the host waits for.
int begin(Comm* comm, Bytes own, std::function<void(std::vector<Bytes>)> then) {
    if (comm->pending || comm->aborted) return MISUSED;
    uint64_t number = comm->calls++;
    auto meeting = std::make_shared<Meeting>(Meeting{comm, "call" + std::to_string(number)});
    comm->pending = [=] {
        if (!meeting->meet(own)) return false;
        if (number > 0) forget(comm, "call", number - 1);
        then(meeting->all());
        return true;
    };
    return IN_PROGRESS;
}

struct Collective {
    Comm* comm;
    const void* from;
    void* to;
    size_t count;
    // The rank that has (broadcast) or gets (reduce) it; -1: all.
    int root;
    bool sums;
};

void submit_collective(const Collective& what, Stream* on) {
    Comm* comm = what.comm;
    uint64_t number = comm->collectives++;
    auto meeting = std::make_shared<Meeting>(Meeting{comm, "sum" + std::to_string(number)});
    submit_uncapturable(on, "an exchange", [=] {
        if (comm->aborted) return true;
        auto from = static_cast<const char*>(what.from);
        size_t bytes = what.count * sizeof(float);
        bool brings = what.sums || what.root == comm->rank, gets = !what.sums || what.root < 0 || what.root == comm->rank;
        if (!meeting->meet(brings && !meeting->has_come ? Bytes(from, from + bytes) : Bytes())) return false;
        std::vector<Bytes> all = meeting->all();
        if (number > 0) forget(comm, "sum", number - 1);
        if (!gets) return true;
        auto to = static_cast<float*>(what.to);
        for (int rank = 0; rank < comm->size; ++rank) {
            if (!what.sums && rank != what.root) continue;
            if (all[rank].size() != bytes) fail("ranks exchange different numbers of values");
            auto values = reinterpret_cast<const float*>(all[rank].data());
            bool first = !what.sums || rank == 0;
            for (size_t i = 0; i < what.count; ++i) to[i] = first ? values[i] : to[i] + values[i];
        }
        return true;
    });
}

struct Group {
    int depth = 0;
    std::vector<std::pair<Collective, Stream*>> calls;
};
thread_local Group group;

int collective(const Collective& what, int type, int operation, void* handle) {
    Comm* comm = what.comm;
    if (type != FLOAT || operation != SUM || what.root >= comm->size) return INVALID;
    if (comm->pending || comm->aborted) return MISUSED;
    if (group.depth > 0) group.calls.push_back({what, stream(handle)});
    else submit_collective(what, stream(handle));
    return IN_PROGRESS;
}

// The part of ncclConfig_t that is looked at.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

bool is_sound(const Config* config) { return config && config->magic == 0xcafebeef && config->blocking == 0; }

std::string folder_of(const std::string& name) {
    std::string folder = "/dev/shm/" + name;
    mkdir(folder.c_str(), 0700);
    return folder;
}

} // namespace

struct ncclUniqueId {
    char internal[128];
};

extern "C" {

int ncclGetVersion(int* version) { return *version = 23000, OK; }
const char* ncclGetErrorString(int code) { return code == OK ? "no error" : code == IN_PROGRESS ? "in progress" : "invalid usage"; }
const char* ncclGetLastError(void*) { return ""; }

int ncclGetUniqueId(ncclUniqueId* id) {
    std::memset(id, 0, sizeof *id);
    std::random_device random;
    std::snprintf(id->internal, sizeof id->internal, "vcycle-nccl-%08x%08x", random(), random());
    return OK;
}

int ncclCommInitRankConfig(void** to, int size, ncclUniqueId id, int rank, const Config* config) {
    if (!is_sound(config) || rank < 0 || rank >= size) return INVALID;
    Comm* comm = new Comm{folder_of(id.internal), rank, size};
    *to = comm;
    return begin(comm, {}, [](std::vector<Bytes>) {});
}

int ncclCommSplit(void* handle, int color, int key, void** to, const Config* config) {
    Comm* parent = comm(handle);
    if (!is_sound(config)) return INVALID;
    *to = nullptr;
    const int own[] = {color, key};
    auto bytes = reinterpret_cast<const char*>(own);
    std::string name = parent->folder.substr(parent->folder.rfind('/') + 1) + "-" + std::to_string(parent->calls) + "-" + std::to_string(color);
    return begin(parent, Bytes(bytes, bytes + sizeof own), [=](std::vector<Bytes> all) {
        if (color == NO_COLOR) return;
        int rank = 0, size = 0;
        for (int other = 0; other < parent->size; ++other) {
            int theirs[2];
            std::memcpy(theirs, all[other].data(), sizeof theirs);
            if (theirs[0] != color) continue;
            ++size;
            rank += std::pair(theirs[1], other) < std::pair(key, parent->rank);
        }
        *to = new Comm{folder_of(name), rank, size};
    });
}

int ncclCommGetAsyncError(void* handle, int* state) {
    Comm* of = comm(handle);
    if (of->aborted) return MISUSED;
    if (of->pending && of->pending()) of->pending = nullptr;
    return *state = of->pending ? IN_PROGRESS : OK, OK;
}

int ncclCommFinalize(void* handle) { return begin(comm(handle), {}, [](std::vector<Bytes>) {}); }

int ncclCommDestroy(void* handle) {
    Comm* of = comm(handle);
    if (of->pending || of->aborted) return MISUSED;
    // Work of a stream may still name it.
    of->aborted = true;
    // Who sees that all have left takes the files away.
    Meeting last{of, "left"};
    std::error_code error;
    if (last.meet({})) std::filesystem::remove_all(of->folder, error);
    return OK;
}

int ncclCommAbort(void* handle) { return comm(handle)->aborted = true, OK; }

int ncclGroupStart() { return ++group.depth, OK; }
int ncclGroupEnd() {
    if (group.depth == 0) return MISUSED;
    if (--group.depth > 0) return OK;
    for (auto& [what, on] : group.calls) submit_collective(what, on);
    group.calls.clear();
    return IN_PROGRESS;
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* handle, void* stream) {
    return collective({comm(handle), from, to, count, -1, true}, type, operation, stream);
}
int ncclReduce(const void* from, void* to, size_t count, int type, int operation, int root, void* handle, void* stream) {
    return collective({comm(handle), from, to, count, root, true}, type, operation, stream);
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* handle, void* stream) {
    return collective({comm(handle), from, to, count, root, false}, type, SUM, stream);
}

} // extern "C"
