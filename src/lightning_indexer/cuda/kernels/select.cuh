// Selection: candidates as 64-bit keys, a threshold for new ones, the exact top k, and its order.
//
// A candidate's key is (order-preserving score bits, 2^32 - 1 - index), as in selection.py: a larger key is a better
// candidate, equal scores go to the smaller index, and no two keys are equal.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace lightning_indexer {

constexpr uint64_t kNoCandidate = 0;      // below every candidate
constexpr uint64_t kAnyCandidate = 1;     // a threshold that all pass
constexpr uint64_t kPadding = ~0ull;      // sorts behind every candidate
constexpr uint32_t kNanRank = 0x007FFFFEu;  // just below -inf
constexpr uint32_t kZeroRank = 0x80000000u;

// Rank of a score: +inf, numbers (+0 equals -0), -inf, NaN.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 + 0 is +0
  const uint32_t rank = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return score == score ? rank : kNanRank;
}

__device__ __forceinline__ float score_of(uint32_t rank) {  // NaN is reported as -inf
  if (rank <= kNanRank) return __uint_as_float(kNegativeInfBits);
  return __uint_as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
}

__device__ __forceinline__ uint64_t key_of(float score, uint32_t entry) {
  return static_cast<uint64_t>(rank_of(score)) << 32 | (0xFFFFFFFFu - entry);
}

__device__ __forceinline__ uint32_t rank_of_key(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

__device__ __forceinline__ uint32_t entry_of_key(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

// A score below this float cannot have a key above `threshold`; a NaN, or a score that is not below, may.
__device__ __forceinline__ float score_threshold(uint64_t threshold) { return score_of(rank_of_key(threshold)); }

// 256 equal stretches of scores that a range of ranks lies in. Their ends are multiples of a power of two, so that it is exact
// which one a score is in, and which rank one starts with.
struct Ruler {
  static constexpr int kStretches = 256;
  int exponent;  // of the larger end
  int bits;      // of a side's stretches
  int offset;    // of the first stretch from zero on

  __device__ __forceinline__ Ruler(uint32_t low, uint32_t high) {
    const uint32_t first = __float_as_uint(score_of(low)) << 1, last = __float_as_uint(score_of(high)) << 1;
    exponent = static_cast<int>(::max(first, last) >> 24) - 127;
    bits = low < kZeroRank && high >= kZeroRank ? 7 : 8;
    offset = low >= kZeroRank ? 0 : 1 << bits;
  }

  // Whether it is worth while, and all is within fp32's range.
  __device__ __forceinline__ bool suits(uint32_t span) const {
    constexpr uint32_t kBinades = 4 << 23;
    return span > kBinades && exponent >= -100 && exponent <= 100;
  }
  __device__ __forceinline__ int stretch_of(uint32_t rank) const {
    constexpr float kUnits = 0x1.8p23f;  // a sum with it is rounded to integers
    const float score = __uint_as_float(rank >= kZeroRank ? rank ^ kZeroRank : ~rank) * power_of_two(bits - 1 - exponent);
    const int floor = __float_as_int(__fadd_rd(score, kUnits)) - __float_as_int(kUnits);
    return offset + (rank >= kZeroRank ? floor : ::min(floor, -1));
  }
  __device__ __forceinline__ uint32_t start_of(int stretch) const {
    return rank_of(static_cast<float>(stretch - offset) * power_of_two(exponent + 1 - bits));
  }
};

// Bins that spread values by their upper words, from `low` to `high`.
struct Order {
  static constexpr int kBins = 512;
  uint32_t low, shift;

  __device__ __forceinline__ Order(uint32_t low, uint32_t high) : low(low) {
    const uint32_t width = 32 - __clz(static_cast<int>(high - low));
    static_assert(kBins == 1 << 9, "bins for the upper nine bits");
    shift = width > 9 ? width - 9 : 0;
  }
  __device__ __forceinline__ uint32_t bin_of(uint64_t value) const {
    return (static_cast<uint32_t>(value >> 32) - low) >> shift;
  }
};

// --- teams ----------------------------------------------------------------------------------------------------------

// Threads of a block that work on one query: kThreads consecutive ones, with a barrier and some shared memory of their
// own. Every member calls every function.
template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / kWarpThreads;
  static_assert(kThreads % kWarpThreads == 0 && kWarps <= 32, "whole warps, one lane for each");

  static constexpr int kBins = Ruler::kStretches;
  static_assert(Order::kBins >= 2 * kBins, "a search counts in two sets of bins, in turn");

  struct Scratch {
    alignas(16) uint32_t bins[Order::kBins];  // two times kBins, or for order
    struct {
      int32_t bin;  // that holds the wanted key; -1: it lies below all bins
      uint32_t beyond, reached;  // keys behind it, and with it
    } found;
    uint32_t low, high;  // a range
    uint32_t total;
    uint32_t crowd;  // keys in the fullest bin
  };

  int rank;     // of this thread
  int barrier;  // 0 is the whole block's
  Scratch& scratch;

  __device__ __forceinline__ void sync() const { barrier_sync<kThreads>(barrier); }

  // Set `values` [kCount], without the first kApart threads. (A loop that might run more than once takes more code.)
  template <int kCount, int kApart = 0, class T>
  __device__ __forceinline__ void fill(T* values, T value) const {
    if (rank < kApart) return;
#pragma unroll
    for (int first = -kApart; first < kCount; first += kThreads - kApart) {
      if (kCount - first >= kThreads || first + rank < kCount) values[first + rank] = value;
    }
  }
};

// --- order ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ constexpr int power_of_two_at_least(int n) {
  int size = 1;
  while (size < n) size *= 2;
  return size;
}

// One value per lane: the exchanges of `run` at all distances below 32. `i`: the value's place.
__device__ __forceinline__ uint64_t merge_within_warp(uint64_t value, int i, int run) {
#pragma unroll 1
  for (int distance = ::min(run, kWarpThreads) / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, value, distance);
    const bool keeps_smaller = ((i & distance) == 0) == ((i & run) == 0);
    value = (other < value) == keeps_smaller ? other : value;
  }
  return value;
}

// Sort `values` [at least 32, and power_of_two_at_least(count)] ascending (bitonic); those from `count` on are set to
// padding first.
template <int kThreads>
__device__ __forceinline__ void sort_ascending(const Team<kThreads>& team, uint64_t* values, int count) {
  const int size = ::max(power_of_two_at_least(count), kWarpThreads);
  for (int i = team.rank; i < size; i += kThreads) {
    uint64_t value = i < count ? values[i] : kPadding;
#pragma unroll 1
    for (int run = 2; run <= kWarpThreads; run *= 2) value = merge_within_warp(value, i, run);
    values[i] = value;
  }
  team.sync();
  for (int run = 2 * kWarpThreads; run <= size; run *= 2) {
    for (int distance = run / 2; distance >= kWarpThreads; distance /= 2) {
      for (int i = team.rank; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = values[low], b = values[high];
        if ((a > b) == ((low & run) == 0)) values[low] = b, values[high] = a;
      }
      team.sync();
    }
    for (int i = team.rank; i < size; i += kThreads) values[i] = merge_within_warp(values[i], i, run);
    team.sync();
  }
}

// --- over a warp ----------------------------------------------------------------------------------------------------

// One warp: which of Ruler::kStretches bins of keys holds the `wanted`-th largest, if `above` keys lie beyond them all? One
// lane calls found(bin, beyond, reached): the keys beyond that bin, and with it. bin -1: it lies below all.
template <class Found>
__device__ __forceinline__ void find_bin(
    const uint32_t* bins, int lane, uint32_t above, uint32_t wanted, const Found& found) {
  constexpr int kPerLane = Ruler::kStretches / kWarpThreads;  // lane l has bins of the l-th stretch from the top
  const uint4* const mine = reinterpret_cast<const uint4*>(bins + (kWarpThreads - 1 - lane) * kPerLane);
  const uint4 lower = mine[0], upper = mine[1];
  const uint32_t counts[kPerLane] = {upper.w, upper.z, upper.y, upper.x, lower.w, lower.z, lower.y, lower.x};
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += counts[i];
  const uint32_t reach = above + sum_up_to(lane, sum);  // keys in this lane's bins and those above
  const uint32_t lanes = __ballot_sync(kFullWarp, reach >= wanted);
  if (lane != (lanes ? __ffs(static_cast<int>(lanes)) - 1 : kWarpThreads - 1)) return;
  int bin = (kWarpThreads - lane) * kPerLane;
  uint32_t beyond = 0, reached = reach - sum;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (reached < wanted) beyond = reached, reached += counts[i], --bin;
  }
  found(lanes ? bin : -1, beyond, reached);
}

// --- keys of a team -------------------------------------------------------------------------------------------------

// Up to kCapacity_ keys, spread over a team in registers.
template <int kCapacity_, int kThreads_>
struct RegisterKeys {
  static constexpr int kCapacity = kCapacity_, kThreads = kThreads_;
  static constexpr int kPerThread = (kCapacity + kThreads - 1) / kThreads, kUnrolled = kPerThread;
  uint64_t keys[kPerThread];

  __device__ __forceinline__ RegisterKeys(const Team<kThreads>& team, const uint64_t* buffer, int count) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int place = i * kThreads + team.rank;
      keys[i] = place < count ? buffer[place] : kNoCandidate;
    }
  }
  __device__ __forceinline__ constexpr int rounds() const { return kPerThread; }
  __device__ __forceinline__ uint64_t& key(const Team<kThreads>&, int i) { return keys[i]; }
};

// Keys in shared memory, which loops go through that stay short. Code that runs once in a launch is best short: fetching it
// from memory takes longer than running it. There is room for whole rounds.
template <int kCapacity_, int kThreads_>
struct SharedKeys {
  static constexpr int kCapacity = kCapacity_, kThreads = kThreads_, kUnrolled = 1;
  uint64_t* keys;
  int count;

  __device__ __forceinline__ SharedKeys(const Team<kThreads>& team, uint64_t* keys, int count) : keys(keys), count(count) {
    if (team.rank < rounds() * kThreads - count) keys[count + team.rank] = kNoCandidate;
    team.sync();
  }
  __device__ __forceinline__ SharedKeys(uint64_t* keys, int count) : keys(keys), count(count) {}  // padded already
  __device__ __forceinline__ int rounds() const { return (count + kThreads - 1) / kThreads; }
  __device__ __forceinline__ uint64_t& key(const Team<kThreads>& team, int i) { return keys[i * kThreads + team.rank]; }
};

// What a team does with its keys.
template <class Keys>
struct Selection : Keys {
  static constexpr int kCapacity = Keys::kCapacity, kThreads = Keys::kThreads, kUnrolled = Keys::kUnrolled;
  // Whether keys take so many registers that those of `Ruler` would be spilled.
  static constexpr bool kIsCrowded = kUnrolled > 32;
  using Members = Team<kThreads>;
  using Keys::Keys;

  // Call visit(batch) for this thread's keys, kUnrolled at a time: they are all read before what is done with the first.
  template <class Visit>
  __device__ __forceinline__ void visit_batches(const Members& team, const Visit& visit) {
#pragma unroll 1
    for (int first = 0; first < this->rounds(); first += kUnrolled) {
      uint64_t batch[kUnrolled];
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) batch[i] = this->key(team, first + i);
      visit(batch);
    }
  }

  // The largest threshold that at least `wanted` keys reach; or any that `wanted` to `wanted + slack` do. `wanted` must
  // not exceed the number of keys. Members may return while others still read the team's memory, whose total is 0 then.
  // kByRanks: look among scores of the best one's last three binades first, and never divide scores: quicker if that is where
  // the threshold is, and with fewer registers.
  template <bool kByRanks = false>
  __device__ __forceinline__ uint64_t threshold(const Members& team, uint32_t wanted, uint32_t slack) {
    uint32_t top = 0, bottom = ~0u;
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) extend(bottom, top, this->key(team, i));
    top = __reduce_max_sync(kFullWarp, top);
    if (!kByRanks) bottom = __reduce_min_sync(kFullWarp, bottom);
    team.template fill<Members::kBins>(team.scratch.bins, 0u);
    if (team.rank == 0) team.scratch.high = 0, team.scratch.low = ~0u;
    team.sync();
    if (team.rank % kWarpThreads == 0) {
      atomicMax(&team.scratch.high, top);
      if (!kByRanks) atomicMin(&team.scratch.low, bottom);
    }
    if (team.rank == 0) team.scratch.total = 0;
    team.sync();
    constexpr uint32_t kBinades = 3 << 23;
    top = team.scratch.high, bottom = kByRanks ? top - ::min(top, kBinades) : team.scratch.low;
    return threshold_from<kByRanks>(team, wanted, slack, bottom, top);
  }

  // Make a range of ranks hold a key's, if there is one.
  __device__ __forceinline__ static void extend(uint32_t& bottom, uint32_t& top, uint64_t key) {
    if (key == kNoCandidate) return;
    bottom = ::min(bottom, rank_of_key(key)), top = ::max(top, rank_of_key(key));
  }

  // The same where no key has a higher rank than `top`, and the wanted ones are likely to have the rank `bottom` at the least.
  // The team's first bins are 0.
  //
  // Each round counts the keys of kBins equal stretches of what is left of the range, and goes on with the stretch that
  // holds the wanted one: one round where there is slack, two or three where there is none. Stretches are of scores while the
  // range spans many binades, as it does where signs differ, then of ranks, and of entries only where too many keys share the
  // wanted one's rank. kByRanks: never of scores.
  template <bool kByRanks = false>
  __device__ __forceinline__ uint64_t threshold_from(
      const Members& team, uint32_t wanted, uint32_t slack, uint32_t bottom, uint32_t top) {
    constexpr int kBins = Members::kBins;
    typename Members::Scratch& scratch = team.scratch;
    const int lane = team.rank % kWarpThreads;
    uint32_t low = ::max(bottom, 1u), high = top;  // of the lower words if the upper one is known, otherwise of the upper ones
    uint32_t upper = 0;
    bool is_upper_known = false;
    uint32_t above = 0;  // keys beyond `high`
    for (int round = 0;; ++round) {  // fewer than `wanted` lie beyond `high`
      const uint32_t span = high - low;
      const int shift = ::max(24 - __clz(static_cast<int>(span)), 0);
      const Ruler ruler(low, high);
      const bool by_score = !kByRanks && !is_upper_known && ruler.suits(span);
      uint32_t* const bins = scratch.bins + (round & 1) * kBins;
      visit_batches(team, [&](const uint64_t(&batch)[kUnrolled]) {
#pragma unroll
        for (const uint64_t key : batch) {
          const uint32_t place = (is_upper_known ? static_cast<uint32_t>(key) : rank_of_key(key)) - low;
          if (place > span || (is_upper_known && rank_of_key(key) != upper)) continue;
          atomicAdd(&bins[by_score ? ruler.stretch_of(rank_of_key(key)) : place >> shift], 1u);
        }
      });
      team.sync();
      uint32_t* const next = scratch.bins + (~round & 1) * kBins;
      if (team.rank >= kWarpThreads) {
        team.template fill<kBins, kWarpThreads>(next, 0u);
      } else {
        find_bin(bins, lane, above, wanted, [&](int bin, uint32_t beyond, uint32_t reached) {
          scratch.found = {bin, beyond, reached};
        });
      }
      team.sync();
      const auto [bin, beyond, reached] = scratch.found;
      if (bin < 0) {  // too few reach `low`: the rest of the range is next
        above = reached, high = low - 1, low = 1;
        continue;
      }
      above = beyond;
      if (by_score) {
        low = ::max(low, ruler.start_of(bin)), high = ::min(high, ruler.start_of(bin + 1) - 1);
      } else {
        low += static_cast<uint32_t>(bin) << shift;
        if (high - low >> shift) high = low + ((1u << shift) - 1);  // a sum that does not run over
      }
      if (reached <= wanted + slack || (is_upper_known && low == high)) {
        return static_cast<uint64_t>(is_upper_known ? upper : low) << 32 | (is_upper_known ? low : 0);
      }
      if (low == high) upper = low, low = 0, high = ~0u, is_upper_known = true;
    }
  }

  // Write the keys from `threshold` (at least kAnyCandidate) on to `target`, where none of them lies, in any order, and
  // return how many there are. The team's total is 0.
  __device__ __forceinline__ int gather(const Members& team, uint64_t threshold, uint64_t* target) {
    gather_as(team, threshold, target, [](uint64_t key) { return key; });
    team.sync();
    return static_cast<int>(team.scratch.total);
  }

  // The same for `emit_values`, which wants values transform(key) in shared memory, counted in `bins`, which are 0.
  template <class Transform>
  __device__ __forceinline__ int gather_to_emit(const Members& team, uint64_t threshold, uint64_t* target, uint32_t* bins,
                                                const Order& order, const Transform& transform) {
    gather_as(team, threshold, target, [&](uint64_t key) {
      const uint64_t value = transform(key);
      atomicAdd(&bins[order.bin_of(value)], 1u);
      return value;
    });
    team.sync();
    return static_cast<int>(team.scratch.total);
  }

  // What `gather` does, right after `threshold`; `target` may be the buffer that keys in registers came from. A warp counts
  // its keys first, so that it waits for its places once; its lanes then write to consecutive ones.
  __device__ __forceinline__ int compact(const Members& team, uint64_t threshold, uint64_t* target) {
    const int lane = team.rank % kWarpThreads;
    uint32_t count = 0;
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      count += __popc(__ballot_sync(kFullWarp, this->key(team, i) >= threshold));
    }
    uint32_t place = 0;
    if (lane == 0) place = atomicAdd(&team.scratch.total, count);
    place = __shfl_sync(kFullWarp, place, 0);
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      const uint64_t key = this->key(team, i);
      const uint32_t peers = __ballot_sync(kFullWarp, key >= threshold);
      if (key >= threshold) target[place + __popc(peers & ((1u << lane) - 1))] = key;
      place += __popc(peers);
    }
    team.sync();
    return static_cast<int>(team.scratch.total);
  }

  // Write keys from `threshold` (at least kAnyCandidate) on to `target`, in any order but that those from `bound` on come
  // first, and return how many these are; with no bound (kNoCandidate) they are all. Synchronises before writing, so
  // `target` may be the buffer that keys in registers came from.
  __device__ __forceinline__ int collect(
      const Members& team, uint64_t threshold, uint64_t bound, uint64_t* target) {
    static_assert(kCapacity < 1 << 16, "two counts share a word");
    uint32_t mine = 0;  // those in front in the low half, the others in the high half
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      const uint64_t key = this->key(team, i);
      if (key >= threshold) mine += key >= bound ? 1u : 1u << 16;
    }
    const int lane = team.rank % kWarpThreads;
    const uint32_t before = sum_up_to(lane, mine);
    if (team.rank == 0) team.scratch.total = 0;
    team.sync();
    uint32_t base = 0;
    if (lane == kWarpThreads - 1) base = atomicAdd(&team.scratch.total, before);
    const uint32_t places = __shfl_sync(kFullWarp, base, kWarpThreads - 1) + before - mine;
    team.sync();
    const uint32_t in_front = team.scratch.total & 0xFFFFu;
    uint32_t place = places & 0xFFFFu, place_behind = in_front + (places >> 16);
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      const uint64_t key = this->key(team, i);
      if (key >= threshold) target[key >= bound ? place++ : place_behind++] = key;
    }
    team.sync();
    return static_cast<int>(in_front);
  }

  // Call emit(place, transform(key)) for the keys from `threshold` on, place 0 for the smallest transformed value, and
  // return how many there are. Nobody reads the team's memory any more. `space` [at least 32, and
  // power_of_two_at_least(that many)], shared memory. Values take the place of the keys.
  template <class Transform, class Emit>
  __device__ __forceinline__ int emit_in_order(
      const Members& team, uint64_t threshold, uint64_t* space, const Transform& transform, const Emit& emit) {
    typename Members::Scratch& scratch = team.scratch;
    team.template fill<Order::kBins>(scratch.bins, 0u);
    if (team.rank == 0) scratch.low = ~0u, scratch.high = 0;
    uint32_t top = 0, bottom = ~0u;
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      uint64_t& value = this->key(team, i);
      value = value >= threshold ? transform(value) : kPadding;
      if (value != kPadding) top = ::max(top, upper_word(value));
      bottom = ::min(bottom, upper_word(value));
    }
    top = __reduce_max_sync(kFullWarp, top), bottom = __reduce_min_sync(kFullWarp, bottom);
    team.sync();
    if (team.rank % kWarpThreads == 0) atomicMin(&scratch.low, bottom), atomicMax(&scratch.high, top);
    team.sync();
    const Order order(scratch.low, scratch.high);
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      const uint64_t value = this->key(team, i);
      if (value != kPadding) atomicAdd(&scratch.bins[order.bin_of(value)], 1u);
    }
    team.sync();
    return emit_values(team, scratch.bins, order, space, emit);
  }

  // Call emit(place, value) for values, place 0 for the smallest, and return how many there are. `bins` count them. Padding is
  // left out.
  //
  // They are spread over bins by their upper words and ranked within their bin; where they crowd in few bins they are sorted.
  template <class Emit>
  __device__ __forceinline__ int emit_values(
      const Members& team, uint32_t* bins, const Order& order, uint64_t* space, const Emit& emit) {
    constexpr int kPerLane = Order::kBins / kWarpThreads, kAtOnce = 4;
    constexpr uint32_t kCrowd = 32;
    typename Members::Scratch& scratch = team.scratch;
    const int lane = team.rank % kWarpThreads;
    if (team.rank < kWarpThreads) {  // counts to the places where bins begin
      uint4* const mine = reinterpret_cast<uint4*>(bins + lane * kPerLane);
      uint32_t sum = 0, most = 0;
#pragma unroll
      for (int i = 0; i < kPerLane / 4; ++i) {
        const uint4 counts = mine[i];
        sum += counts.x + counts.y + counts.z + counts.w;
        most = ::max(::max(most, ::max(counts.x, counts.y)), ::max(counts.z, counts.w));
      }
      uint32_t next = sum_up_to(lane, sum);
      most = __reduce_max_sync(kFullWarp, most);
      if (lane == kWarpThreads - 1) scratch.total = next, scratch.crowd = most;
      next -= sum;
#pragma unroll
      for (int i = 0; i < kPerLane / 4; ++i) {
        const uint4 counts = mine[i];
        mine[i] = {next, next + counts.x, next + counts.x + counts.y, next + counts.x + counts.y + counts.z};
        next += counts.x + counts.y + counts.z + counts.w;
      }
    }
    team.sync();
#pragma unroll kUnrolled
    for (int i = 0; i < this->rounds(); ++i) {
      const uint64_t value = this->key(team, i);
      if (value != kPadding) space[atomicAdd(&bins[order.bin_of(value)], 1u)] = value;  // which leaves where bins end
    }
    team.sync();
    const int count = static_cast<int>(scratch.total);
    if (scratch.crowd > kCrowd) sort_ascending(team, space, count);
    const bool is_sorted = scratch.crowd > kCrowd;
#pragma unroll 1
    for (int i = team.rank; i < count; i += kThreads) {
      const uint64_t value = space[i];
      int place = i;
      if (!is_sorted) {
        const uint32_t bin = order.bin_of(value), end = bins[bin];
        uint32_t begin = bin ? bins[bin - 1] : 0;
        place = static_cast<int>(begin);
#pragma unroll 1
        for (; begin < end; begin += kAtOnce) {
#pragma unroll
          for (uint32_t j = begin; j < begin + kAtOnce; ++j) place += j < end && space[j] < value;
        }
      }
      emit(place, value);
    }
    return count;
  }

 private:
  __device__ __forceinline__ static uint32_t upper_word(uint64_t value) { return static_cast<uint32_t>(value >> 32); }

  // Write as(key) for the keys from `threshold` on.
  template <class As>
  __device__ __forceinline__ void gather_as(const Members& team, uint64_t threshold, uint64_t* target, const As& as) {
    const int lane = team.rank % kWarpThreads;
    visit_batches(team, [&](const uint64_t(&batch)[kUnrolled]) {
#pragma unroll
      for (const uint64_t key : batch) {
        const uint32_t peers = __ballot_sync(kFullWarp, key >= threshold);
        uint32_t place = 0;
        if (lane == 0) place = atomicAdd(&team.scratch.total, static_cast<uint32_t>(__popc(peers)));
        place = __shfl_sync(kFullWarp, place, 0);
        if (key >= threshold) target[place + __popc(peers & ((1u << lane) - 1))] = as(key);
      }
    });
  }
};

// --- results --------------------------------------------------------------------------------------------------------

// Where the results of a call go; strides in elements.
struct Results {
  int32_t* __restrict__ indices;
  int64_t row_stride, column_stride;
  float* __restrict__ scores;  // may be null
  int64_t scores_row_stride, scores_column_stride;
  int32_t top_k;
  int32_t by_score;

  // A candidate as it is sorted, ascending: best first, or by entry.
  __device__ __forceinline__ uint64_t sortable(uint64_t key) const {
    return by_score ? ~key : static_cast<uint64_t>(entry_of_key(key)) << 32 | rank_of_key(key);
  }

  // Place `place` of row `row`: a sortable value. slot_of(entry): what is written for an entry.
  template <class SlotOf>
  __device__ __forceinline__ void write(int64_t row, int place, uint64_t value, const SlotOf& slot_of) const {
    const uint32_t entry = by_score ? entry_of_key(~value) : static_cast<uint32_t>(value >> 32);
    indices[row * row_stride + place * column_stride] = slot_of(entry);
    const uint32_t rank = by_score ? rank_of_key(~value) : static_cast<uint32_t>(value);
    if (scores) scores[row * scores_row_stride + place * scores_column_stride] = score_of(rank);
  }

  // The places from `count` on.
  template <int kThreads>
  __device__ __forceinline__ void fill(const Team<kThreads>& team, int64_t row, int count) const {
#pragma unroll 1
    for (int place = count + team.rank; place < top_k; place += kThreads) {
      indices[row * row_stride + place * column_stride] = -1;
      if (scores) scores[row * scores_row_stride + place * scores_column_stride] = score_of(0);
    }
  }
};

}  // namespace lightning_indexer
