// A lone query's threshold, raised while its entries are scored by warps that have nothing else to do.
//
// Candidates are collected in shared memory, where places hold kNoCandidate until a key lands. The warps count them into
// stretches of scores as they come, and raise the threshold to the start of the stretch that holds the top_k-th: at least
// so many reach it, whatever is overlooked. So fewer candidates come, the list seldom runs full, and nobody waits. Where it
// does run full the block cuts it back, and counting starts anew.
#pragma once

#include "select.cuh"

namespace lightning_indexer {

// kWarps: that raise. kBarrier: theirs.
template <int kWarps, int kBarrier>
struct Raiser {
  static constexpr int kThreads = kWarps * kWarpThreads, kBins = Ruler::kStretches;
  static constexpr int kAtOnce = 4;         // candidates that a thread reads at once
  static constexpr uint32_t kChunk = 128;   // that come between two looks, and beyond top_k before the first
  static constexpr uint32_t kSample = 256;  // of the first, whose range is divided
  static_assert(kSample <= kAtOnce * kThreads, "one reading");

  // How the list is. cuts: beginnings and ends of cuts; odd while it is cut. is_over: the part has been scored.
  struct View {
    uint32_t cuts, is_over, end;
  };
  alignas(16) uint32_t bins[kBins];
  View now, last;
  uint32_t low, high;  // ranks of the first candidates

  // One thread that scores, before a part is announced.
  __device__ __forceinline__ void start_part() { now = {0, 0, 0}; }
  // All that score, around a cut; its beginning is known before the block meets again.
  __device__ __forceinline__ void count_cut(uint32_t thread) {
    if (thread == 0) atomicAdd(&now.cuts, 1u);
  }
  __device__ __forceinline__ void finish_part(uint32_t thread) {
    if (thread == 0) volatile_now().is_over = 1;
  }

  // The warps.
  //   next_part()     wait for a part; whether there is one
  //   is_short()      whether it has hardly as many entries as the list would need
  //   leave_part()    it is not looked at any more; whether it was the last
  //   list_end        where the next candidate goes
  // Where `rehearses`, they go through the motions first, which brings their code near: it takes longer to come from memory
  // than to run.
  template <class Next, class IsShort, class Leave>
  __device__ __forceinline__ void run(
      const Next& next_part, const IsShort& is_short, const Leave& leave_part, const uint64_t* list,
      const uint32_t* list_end, uint32_t top_k, uint64_t* threshold, float* least_score, bool rehearses) {
    const uint32_t thread = this_thread() % kThreads;  // in some order
    uint32_t known_cuts = 0, counted = 0;
    bool is_in_part = false;
    for (;;) {
      if (counted == 0) {
        if (thread == 0) low = ~0u, high = 0;
      }
      View view = {0, 0, kSample};
      if (!rehearses) {
        if (!is_in_part && !next_part()) return;
        is_in_part = true;
        if (is_short()) {
          if (leave_part()) return;
          is_in_part = false;
          continue;
        }
        if (thread == 0) {
          last = {volatile_now().cuts, volatile_now().is_over, *static_cast<const volatile uint32_t*>(list_end)};
        }
        barrier_sync<kThreads>(kBarrier);
        view = last;
      }
      barrier_sync<kThreads>(kBarrier);
      if (view.is_over) {
        if (leave_part()) return;
        is_in_part = false, known_cuts = counted = 0;
        continue;
      }
      if (view.cuts != known_cuts) {
        known_cuts = view.cuts, counted = 0;
        continue;
      }
      const uint32_t least = rehearses ? kSample : max(max(counted, top_k) + kChunk, kSample);
      const uint32_t until = counted ? view.end : least;
      if (known_cuts % 2 != 0 || view.end < least) {
        pause(100);
        continue;
      }
      // Ranks of keys from `first` on, all on their way before the first is used: memory is busy.
      const auto read = [&](uint32_t first, uint32_t end, uint32_t(&ranks)[kAtOnce]) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const uint32_t place = min(first + i * kThreads, end - 1);
          ranks[i] = rehearses ? kZeroRank + (place << 20) : rank_at(list + place);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (ranks[i] == 0) ranks[i] = landed(list + min(first + i * kThreads, end - 1), known_cuts);
        }
      };
      uint32_t ranks[kAtOnce];
      if (counted == 0) {
        uint32_t bottom = ~0u, top = 0;
        read(thread, kSample, ranks);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) bottom = min(bottom, ranks[i]), top = max(top, ranks[i]);
#pragma unroll 1
        for (uint32_t i = thread; i < kBins; i += kThreads) bins[i] = 0;
        bottom = __reduce_min_sync(kFullWarp, bottom), top = __reduce_max_sync(kFullWarp, top);
        if (thread % kWarpThreads == 0) atomicMin(&low, bottom), atomicMax(&high, top);
      }
      bool is_over = barrier_any<kThreads>(kBarrier, volatile_now().is_over);
      const Ruler ruler(low, high);
      const bool can_count = ruler.suits(~0u) && !is_over;  // where scores are out of range all is left to cuts
#pragma unroll 1
      for (uint32_t first = counted + thread; can_count && first < until; first += kAtOnce * kThreads) {
        read(first, until, ranks);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int stretch = ruler.stretch_of(min(max(ranks[i], low), high));
          if (first + i * kThreads < until) atomicAdd(&bins[stretch], 1u);
        }
      }
      counted = until;
      is_over = barrier_any<kThreads>(kBarrier, volatile_now().is_over);
      if (thread < kWarpThreads && can_count && !is_over) {
        find_bin(bins, static_cast<int>(thread), 0, rehearses ? 1 : top_k, [&](int bin, uint32_t, uint32_t) {
          if (bin <= ruler.stretch_of(low)) return;  // what lies below the range is counted with its lowest stretch
          const uint64_t raised = static_cast<uint64_t>(ruler.start_of(bin)) << 32;
          volatile uint64_t& current = *threshold;
          // A cut may begin, or the part end, behind this look: no harm. What made it valid stays in the list, either of the
          // two stores is right without the other, and the next part waits for leave_part().
          if (!rehearses && raised > current && volatile_now().cuts == known_cuts && !volatile_now().is_over) {
            current = raised;
            *static_cast<volatile float*>(least_score) = score_threshold(raised);
          }
        });
      }
      if (rehearses) rehearses = false, counted = 0;
    }
  }

 private:
  __device__ __forceinline__ volatile View& volatile_now() { return now; }

  // The rank of a key, 0 before it has landed.
  __device__ __forceinline__ static uint32_t rank_at(const uint64_t* place) {
    return *(reinterpret_cast<const volatile uint32_t*>(place) + 1);
  }
  // The same once it has landed; of none, where the list has been cut or given up meanwhile.
  __device__ __forceinline__ uint32_t landed(const uint64_t* place, uint32_t known_cuts) {
    uint32_t rank;
    while ((rank = rank_at(place)) == 0) {
      if (volatile_now().cuts != known_cuts || volatile_now().is_over) break;
      spin();
    }
    return rank;
  }
};

}  // namespace lightning_indexer
