// Runs a kernel of src/lightning_indexer/cuda/kernels on the host, thread by thread, so that its arithmetic and its
// addressing can be checked without a GPU. Each thread of a block is a fibre; a shuffle hands control to the next one,
// so all threads of a warp reach it before any goes on. For correctness only: no caches, no races, no shared memory.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Dim { unsigned x; };
inline Dim threadIdx, blockIdx;

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace host_cuda {

constexpr int kStackBytes = 1 << 16;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline std::vector<long long> exchanged;
inline void (*body)(const void*);
inline const void* body_argument;

inline void yield() {
  const unsigned thread = threadIdx.x;
  swapcontext(&fibres[thread].context, &scheduler);
  threadIdx.x = thread;
}

inline void start() {
  const unsigned thread = threadIdx.x;
  body(body_argument);
  fibres[thread].done = true;
}

template <class T>
T exchange(T value, unsigned source) {
  std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
  yield();
  T result;
  std::memcpy(&result, &exchanged[threadIdx.x / 32 * 32 + source], sizeof(T));
  yield();
  return result;
}

inline void run_block(unsigned threads) {
  if (fibres.size() < threads) fibres.resize(threads);
  exchanged.assign((threads + 31) / 32 * 32, 0);
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = &scheduler;
    fibre.done = false;
    makecontext(&fibre.context, start, 0);
  }
  for (unsigned running = threads; running;) {
    running = 0;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibres[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibres[i].context);
      running += !fibres[i].done;
    }
  }
}

// arguments: the array of addresses that cuLaunchKernel takes.
template <class... Args>
void launch(void (*kernel)(Args...), unsigned blocks, unsigned threads, void** arguments) {
  auto call = [=]<std::size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Args*>(arguments[I])...); };
  auto bound = [&] { call(std::index_sequence_for<Args...>{}); };
  body_argument = &bound;
  body = [](const void* f) { (*static_cast<const decltype(bound)*>(f))(); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
}

}  // namespace host_cuda

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::exchange(value, (threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::exchange(value, source);
}
