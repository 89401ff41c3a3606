// Runs a kernel of src/lightning_indexer/cuda/kernels on the host, thread by thread, so that its arithmetic, its addressing
// and its synchronisation can be checked without a GPU.
//
// Each thread of a block is a fibre, which runs until it has to wait: for the other lanes of its warp, for a barrier, for a
// copy. Which warp goes on is drawn at random, some sleep for long, and asynchronous copies land late, so that what is
// only ordered by luck comes out wrong sooner or later. Where no fibre can go on, or there is no end to it, the block is at
// a deadlock, and says so.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n)

using std::max;
using std::min;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Dim { unsigned x, y; };
inline Dim threadIdx, blockIdx, blockDim, gridDim;

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline double __hiloint2double(int high, int low) {
  return bits_as<double>(static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(bits_as<unsigned long long>(x) >> 32); }
inline float __fadd_rd(float a, float b) {
  const double sum = static_cast<double>(a) + b;
  const float rounded = static_cast<float>(sum);
  return rounded > sum ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __popc(int x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T atomicAdd(T* place, T value) { return std::exchange(*place, *place + value); }
template <class T>
T atomicMin(T* place, T value) { return std::exchange(*place, std::min(*place, value)); }
template <class T>
T atomicMax(T* place, T value) { return std::exchange(*place, std::max(*place, value)); }

constexpr int kHostSharedBytes = 256 << 10;
namespace lightning_indexer {
alignas(1024) unsigned char dynamic_shared[kHostSharedBytes];
}

namespace host_cuda {

constexpr int kStackBytes = 1 << 17, kSharedStart = 1024;  // as on Hopper, not at 0
constexpr unsigned kMostRounds = 1'000'000;  // of a block; it takes up to 50,000. Threads that poll hide a deadlock
inline auto& shared = lightning_indexer::dynamic_shared;

struct Fibre {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  jmp_buf state;
  bool started = false, done = false;
};

struct Warp {
  unsigned count[32];  // collective operations that each lane has entered
  alignas(16) char values[2][32][16];
  unsigned sleep;
};

struct Barrier {
  unsigned arrived, generation;
  bool any[2];
};

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  unsigned bytes, barrier, delay;
};

struct MemoryBarrier {
  int expected, pending, bytes;
  unsigned phase;
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline std::vector<Copy> copies;
inline std::map<unsigned, MemoryBarrier> memory_barriers;
inline Barrier barriers[16];
inline jmp_buf scheduler;
inline std::mt19937 random(1);
inline void (*body)(const void*);
inline const void* body_argument;
inline bool progress;  // since the scheduler looked last

inline unsigned draw(unsigned n) { return random() % n; }

// Let others run; back when the scheduler says so.
inline void yield() {
  const unsigned thread = threadIdx.x;
  if (!_setjmp(fibres[thread].state)) _longjmp(scheduler, 1);
}

template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) yield();
  progress = true;
}

// Every lane of the warp gives a value and gets to see all.
template <class T>
const T* collect(T value) {
  static_assert(sizeof(T) <= 16, "fits a place");
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32, turn = warp.count[lane]++;
  std::memcpy(warp.values[turn & 1][lane], &value, sizeof(T));
  wait_until([&] {
    for (unsigned other : warp.count) {
      if (other <= turn) return false;
    }
    return true;
  });
  static T seen[32];
  for (int i = 0; i < 32; ++i) std::memcpy(&seen[i], warp.values[turn & 1][i], sizeof(T));
  return seen;
}

inline bool meet(int id, unsigned threads, bool value) {
  Barrier& barrier = barriers[id];
  const unsigned generation = barrier.generation;
  bool& any = barrier.any[generation & 1];
  any |= value;
  progress = true;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.any[++barrier.generation & 1] = false;
  } else {
    wait_until([&] { return barrier.generation != generation; });
  }
  return any;
}

inline void complete(MemoryBarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.expected, ++barrier.phase;
}

inline void land_copies() {
  for (std::size_t i = 0; i < copies.size();) {
    Copy& copy = copies[i];
    if (copy.delay-- > 0) {
      progress = true;
      ++i;
      continue;
    }
    std::memcpy(copy.target, copy.source, copy.bytes);
    MemoryBarrier& barrier = memory_barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    complete(barrier);
    progress = true;
    copies.erase(copies.begin() + i);
  }
}

inline void start() {
  body(body_argument);
  fibres[threadIdx.x].done = true;
  warps[threadIdx.x / 32].count[threadIdx.x % 32] = ~0u;  // nobody waits for it
  progress = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  Fibre& fibre = fibres[thread];
  if (fibre.done) return;
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.state, 1);
  fibre.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.data();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, start, 0);
  setcontext(&context);
}

inline void run_block(unsigned threads) {
  if (fibres.size() < threads) fibres.resize(threads);
  for (unsigned i = 0; i < threads; ++i) fibres[i].started = fibres[i].done = false;
  warps.assign((threads + 31) / 32, Warp{});
  for (unsigned i = threads; i % 32; ++i) warps.back().count[i % 32] = ~0u;  // lanes that are not there
  for (unsigned char& byte : shared) byte = static_cast<unsigned char>(random());
  std::memset(barriers, 0, sizeof(barriers));
  memory_barriers.clear();
  copies.clear();
  std::vector<unsigned> order(warps.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (unsigned left = threads, idle = 0, rounds = 0; left; ++rounds) {
    progress = false;
    land_copies();
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned index : order) {
      Warp& warp = warps[index];
      if (warp.sleep) {
        --warp.sleep;
        progress = true;
        continue;
      }
      if (draw(50) == 0) warp.sleep = draw(4) ? draw(20) : draw(400);
      for (unsigned i = 0; i < 32; ++i) {
        const unsigned thread = index * 32 + (i + index) % 32;
        if (thread < threads) resume(thread);
      }
    }
    left = 0;
    for (unsigned i = 0; i < threads; ++i) left += !fibres[i].done;
    idle = progress ? 0 : idle + 1;
    if (idle > 2 || rounds > kMostRounds) {
      const char* name = idle > 2 ? "deadlock" : "no end";
      std::fprintf(stderr, "%s in block %u: %u of %u threads wait\n", name, blockIdx.x, left, threads);
      std::abort();
    }
  }
}

// arguments: the array of addresses that cuLaunchKernel takes.
template <class... Args>
void launch(void (*kernel)(Args...), unsigned x, unsigned y, unsigned threads, void** arguments) {
  auto call = [=]<std::size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Args*>(arguments[I])...); };
  auto bound = [&] { call(std::index_sequence_for<Args...>{}); };
  body_argument = &bound;
  body = [](const void* f) { (*static_cast<const decltype(bound)*>(f))(); };
  gridDim = {x, y}, blockDim = {threads, 1};
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(threads);
  }
}

}  // namespace host_cuda

template <class T>
T __shfl_sync(unsigned, T value, int source) { return host_cuda::collect(value)[source & 31]; }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return host_cuda::collect(value)[threadIdx.x % 32 ^ mask]; }
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return host_cuda::collect(value)[lane < distance ? lane : lane - distance];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const int* all = host_cuda::collect(predicate);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (all[i] != 0) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline void __syncwarp(unsigned mask = ~0u) {
  if (mask == ~0u) host_cuda::collect(0);  // of some lanes only: nothing here depends on their order
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  const T* all = host_cuda::collect(value);
  return *std::max_element(all, all + 32);
}
template <class T>
T __reduce_min_sync(unsigned, T value) {
  const T* all = host_cuda::collect(value);
  return *std::min_element(all, all + 32);
}
template <class T>
T __reduce_add_sync(unsigned, T value) {
  const T* all = host_cuda::collect(value);
  T sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i];
  return sum;
}
inline void __syncthreads() { host_cuda::meet(0, blockDim.x, false); }
inline bool __syncthreads_or(bool mine) { return host_cuda::meet(0, blockDim.x, mine); }
