// merge_topk: the best of several shards' candidates (context parallel).
//
// Before the exchange a candidate becomes a key, after it block t of the grid merges the keys of query t. Between the
// two, keys are int64 as selection.py has them: those of select.cuh with the sign bit the other way.
#include "select.cuh"

namespace lightning_indexer {

constexpr uint64_t kSignBit = 1ull << 63;

// keys [rows, width]; a thread makes one.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) pack_candidates(
    const int32_t* __restrict__ indices,
    int64_t index_row_stride,
    int64_t index_column_stride,
    const float* __restrict__ scores,
    int64_t score_row_stride,
    int64_t score_column_stride,
    int64_t* __restrict__ keys,
    int64_t count,
    int32_t width) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / width, column = i % width;
  const int32_t index = indices[row * index_row_stride + column * index_column_stride];
  const float score = scores[row * score_row_stride + column * score_column_stride];
  const uint64_t key = index < 0 ? kNoCandidate : key_of(score, static_cast<uint32_t>(index));
  keys[i] = static_cast<int64_t>(key ^ kSignBit);
}

template <int kCapacity, int kThreads>
struct CandidateShared {
  uint64_t keys[kCapacity];
  uint64_t kept[kCapacity];
  uint32_t total;
  typename Team<kThreads>::Scratch team_scratch;
};

// keys [shards, rows, width]. They pass through shared memory, as many at a time as there is room for beside the best
// so far. top_k is at most kMaxTopK; a power of two, since what is kept is sorted in `kept`.
template <int kCapacity, int kMaxTopK, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) merge_candidates(
    const int64_t* __restrict__ keys,
    int32_t shards,
    int32_t rows,
    int32_t width,
    int32_t top_k,
    int32_t* __restrict__ out,
    int64_t out_row_stride,
    int64_t out_column_stride,
    float* __restrict__ scores_out,
    int64_t scores_row_stride,
    int64_t scores_column_stride) {
  static_assert(kMaxTopK < kCapacity && (kMaxTopK & (kMaxTopK - 1)) == 0, "room for more; sorting fills a power of two");
  using HeldKeys = Selection<SharedKeys<kCapacity, kThreads>>;

  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  CandidateShared<kCapacity, kThreads>& shared = *reinterpret_cast<CandidateShared<kCapacity, kThreads>*>(dynamic_shared);

  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const Team<kThreads> team = {thread, 0, shared.team_scratch};
  const int64_t total = static_cast<int64_t>(shards) * width;
  int count = 0;  // the best so far, in shared.keys
  for (int64_t from = 0; from < total;) {
    const int more = static_cast<int>(::min(total - from, static_cast<int64_t>(kCapacity - count)));
    if (thread == 0) shared.total = 0;
    team.sync();
    uint32_t mine = 0;
    for (int i = thread; i < more; i += kThreads) {
      const int64_t place = from + i, shard = place / width;
      const uint64_t key = static_cast<uint64_t>(keys[(shard * rows + row) * width + place % width]) ^ kSignBit;
      shared.keys[count + i] = key;
      mine += key != kNoCandidate;
    }
    from += more;
    mine = __reduce_add_sync(kFullWarp, mine);
    if (lane == 0) atomicAdd(&shared.total, mine);
    HeldKeys held(team, shared.keys, count + more);
    const bool is_full = count + static_cast<int>(shared.total) > top_k;
    const uint64_t threshold = is_full ? held.threshold(team, top_k, 0) : kAnyCandidate;
    // A candidate that comes twice may be kept twice, but never more than top_k in all: those above the threshold first.
    held.collect(team, threshold, threshold + 1, shared.kept);
    const uint32_t kept = team.scratch.total;
    count = ::min(static_cast<int>((kept & 0xFFFFu) + (kept >> 16)), top_k);
    for (int i = thread; i < count; i += kThreads) shared.keys[i] = shared.kept[i];
  }
  const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                           top_k, 1};
  results.fill(team, row, 0);  // before the results, not behind them: those of a candidate that comes twice leave a gap
  HeldKeys held(team, shared.keys, count);
  held.emit_in_order(
      team, kAnyCandidate, shared.kept, [&](uint64_t key) { return results.sortable(key); },
      [&](int place, uint64_t value) {
        results.write(row, place, value, [](uint32_t entry) { return static_cast<int>(entry); });
      });
}

}  // namespace lightning_indexer
