// What units for GPUs need of CUDA, on a CPU: to test their logic without a device. A CUDA block's
// threads are fibers that take turns at every __syncwarp(), forwards in one block and backwards in
// the next, so that what is read before it was written shows.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct float4 { float x, y, z, w; };

namespace emulated {
struct Dim { unsigned x; };
inline Dim thread, block, threads, blocks;

struct Fiber {
    ucontext_t here;
    std::vector<char> stack;
    bool done;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline void (*run)(void *);
inline void *argument;

inline void begin() {
    run(argument);
    fibers[thread.x].done = true;
}

inline void sync() {
    const unsigned me = thread.x;
    swapcontext(&fibers[me].here, &scheduler);
}

// One CUDA block; false if its threads did not meet at the same number of syncs.
inline bool run_block(bool backwards) {
    const unsigned n = threads.x;
    if (fibers.size() < n) fibers.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Fiber &f = fibers[i];
        f.done = false;
        f.stack.resize(1 << 18);
        getcontext(&f.here);
        f.here.uc_stack.ss_sp = f.stack.data();
        f.here.uc_stack.ss_size = f.stack.size();
        f.here.uc_link = &scheduler;
        makecontext(&f.here, begin, 0);
    }
    for (unsigned finished = 0; !finished;) {
        for (unsigned i = 0; i < n; i++) {
            thread.x = backwards ? n - 1 - i : i;
            swapcontext(&scheduler, &fibers[thread.x].here);
            finished += fibers[thread.x].done;
        }
        if (finished && finished != n) return false;
    }
    return true;
}
}  // namespace emulated

using cudaStream_t = void *;
inline int status(int rc) { return rc; }
inline int cudaMallocAsync(void **p, size_t n, cudaStream_t) { return (*p = malloc(n)) ? 0 : 4; }  // QF_ENOMEM
inline void cudaFreeAsync(void *p, cudaStream_t) { free(p); }

// What the thread `mask` away (exclusive or) has as `mine`.
inline int __shfl_xor_sync(unsigned, int mine, int mask) {
    static int all[1024];
    emulated::sync();  // everybody has read what was here before
    all[emulated::thread.x] = mine;
    emulated::sync();
    return all[emulated::thread.x ^ (unsigned)mask];
}

// What thread `lane` of this one's `width` neighbours has as `mine`.
inline float __shfl_sync(unsigned, float mine, int lane, int width) {
    static float all[1024];
    emulated::sync();
    all[emulated::thread.x] = mine;
    emulated::sync();
    return all[emulated::thread.x / (unsigned)width * (unsigned)width + (unsigned)lane];
}

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::threads
#define gridDim emulated::blocks
#define __syncwarp emulated::sync

template <class Kernel>
int emulate(unsigned blocks, unsigned threads, Kernel kernel) {  // QF_LAUNCH
    emulated::blocks.x = blocks;
    emulated::threads.x = threads;
    emulated::run = [](void *k) { (*(Kernel *)k)(); };
    emulated::argument = &kernel;
    for (unsigned b = 0; b < blocks; b++) {
        emulated::block.x = b;
        if (!emulated::run_block(b & 1)) return 5;  // QF_EDEVICE
    }
    return 0;
}
