// Matrix products of a tile of keys with the queries, on tensor cores: wgmma (Hopper) and mma.sync (sm_80 and newer).
//
// Both take the keys as the A operand in registers and the queries as the B operand in shared memory, and both spread A
// and the result over a warp in the same way, so that everything around them is the same code. A warp owns sixteen
// entries; its lane with row = lane / 4, c = lane % 4 holds, of entries `row` and `row + 8`,
//
//     a[step][0], a[step][1]   entry row, entry row + 8: a register of consecutive elements of K
//     a[step][2], a[step][3]   the same two entries, the second half of the step
//     acc[0], acc[1]           entry row:      columns 8 * n + 2 * c and the next one
//     acc[2], acc[3]           entry row + 8:  the same
//
// The order of K is free as long as both operands agree. Lane c of every quad holds a quarter of an entry in an order
// that suits its format (`Keys::dim_of`), and the queries are stored to match: the register (step, half, c) of column n
// lies at `word_offset(n, step, half, c)`.
#pragma once

#include "ptx.cuh"
#include "types.cuh"
#include "wgmma.cuh"

namespace lightning_indexer {

// --- wgmma ----------------------------------------------------------------------------------------------------------

// Queries: rows of 128 bytes of K, 128-byte swizzle, one panel per 128 bytes. kTerms: queries that are a sum of bf16.
template <class Element_, int kColumns_, int kSteps, int kTerms>
struct Wgmma {
  using Element = Element_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kPanelBytes = kColumns * 128;
  static constexpr int kTermBytes = (kSteps + 3) / 4 * kPanelBytes;
  static constexpr int kBytes = kTerms * kTermBytes;
  static constexpr int kAlignment = 1024;
  static_assert(kPanelBytes % kAlignment == 0, "panels keep the swizzle's alignment");

  __device__ static __forceinline__ int word_offset(int column, int step, int half, int c) {
    const int inside = (step % 4 * 32 + half * 16 + c * 4) ^ (column % 8 * 16);
    return step / 4 * kPanelBytes + column * 128 + inside;
  }

  // Every thread that stored queries calls it before the block meets: wgmma reads behind the back of ordinary accesses.
  __device__ static __forceinline__ void publish() { wgmma_publish(); }

  // For each half of a tile: calls before(half), which may make a[half] ready, then use(half, n, acc) for every eight
  // columns n, in order, then after(half). `base`: the queries in shared memory.
  template <int kHalves, class Before, class Use, class After>
  __device__ static __forceinline__ void multiply(
      const uint32_t (&a)[kHalves][kSteps][4], const uint8_t* base, const Before& before, const Use& use,
      const After& after) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      before(half);
      float acc[kColumns / 2];
      wgmma_begin();
      const uint64_t first = descriptor(base);
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int offset = term * kTermBytes + step / 4 * kPanelBytes + step % 4 * 32;
          WgmmaInstruction<Element, kColumns>::issue(acc, a[half][step], first + offset / 16, term + step != 0);
        }
      }
      wgmma_finish();
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) wgmma_pin(acc + 4 * n);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) use(half, n, acc + 4 * n);
      after(half);
    }
  }

  // K-major, eight rows of 128 bytes to a swizzle atom.
  __device__ static __forceinline__ uint64_t descriptor(const uint8_t* base) {
    return static_cast<uint64_t>((shared_address(base) & 0x3FFFFu) >> 4) | 1ull << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
           1ull << 62;
  }
};

// --- mma.sync -------------------------------------------------------------------------------------------------------

// Queries: what a lane needs for eight columns and two steps is 16 consecutive bytes, lane after lane.
template <class Element_, int kColumns_, int kSteps, int kTerms>
struct MmaSync {
  using Element = Element_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kTermBytes = kColumns * kSteps * 32;
  static constexpr int kBytes = kTerms * kTermBytes;
  static_assert(kSteps % 2 == 0, "steps are loaded in pairs");

  __device__ static __forceinline__ int word_offset(int column, int step, int half, int c) {
    const int lane = column % 8 * 4 + c;
    return ((column / 8 * (kSteps / 2) + step / 2) * kWarpThreads + lane) * 16 + step % 2 * 8 + half * 4;
  }

  __device__ static __forceinline__ void publish() {}

  template <int kHalves, class Before, class Use, class After>
  __device__ static __forceinline__ void multiply(
      const uint32_t (&a)[kHalves][kSteps][4], const uint8_t* base, const Before& before, const Use& use,
      const After& after) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) before(half);
    const uint8_t* mine = base + threadIdx.x % kWarpThreads * 16;
#pragma unroll 2  // more, and the compiler loads more than it has registers for
    for (int n = 0; n < kColumns / 8; ++n) {
      float acc[kHalves][4] = {};
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
#pragma unroll
        for (int pair = 0; pair < kSteps / 2; ++pair) {
          const int place = (n * (kSteps / 2) + pair) * kWarpThreads * 16 + term * kTermBytes;
          const uint4 b = *reinterpret_cast<const uint4*>(mine + place);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            mma_sync(Element{}, acc[half], a[half][2 * pair], b.x, b.y);
            mma_sync(Element{}, acc[half], a[half][2 * pair + 1], b.z, b.w);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) use(half, n, acc[half]);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) after(half);
  }
};

}  // namespace lightning_indexer
