// The second half of score_topk: make one selection of the parts of each split group (work.cuh).
//
// Block (b, q) of the grid merges query q of the group whose first part ended unfinished in block b of score.cu, if
// there is one. Every part is the sorted top k of its entries. With P parts, the ceil(k / P)-th best of every part is
// reached by at least k candidates, so the least of those is a threshold that the k-th best of all reaches; parts are
// read from their best candidate on, and only as far as it. Parts are alike (`Walk`), so little is read in vain.
#include "select.cuh"
#include "work.cuh"

namespace lightning_indexer {

constexpr int kMergeThreads = 512;

template <int kCapacity>
struct MergeShared {
  uint64_t list[kCapacity];
  uint64_t threshold;  // keys from here on are kept
  uint32_t count;
  Team<kMergeThreads>::Scratch team_scratch;
};

// kCapacity: candidates in shared memory, at least twice top_k.
template <class Block, int kCapacity>
__global__ void __launch_bounds__(kMergeThreads, 1) merge_topk(
    int32_t queries,
    int32_t capacity,
    int32_t top_k,
    int32_t by_score,
    int32_t as_slots,
    int32_t num_blocks,
    const int32_t* __restrict__ block_table,
    int64_t table_row_stride,
    int32_t table_column_stride,
    int64_t num_seqs,
    const void* __restrict__ seq_ids,
    int32_t seq_ids_are_int64,
    int32_t* __restrict__ out,
    int64_t out_row_stride,
    int64_t out_column_stride,
    float* __restrict__ scores_out,
    int64_t scores_row_stride,
    int64_t scores_column_stride,
    uint8_t* __restrict__ workspace) {
  constexpr int kWarps = kMergeThreads / kWarpThreads;
  constexpr int kAtOnce = 4;  // pieces of 32 candidates that a warp reads before the block meets
  constexpr int kFull = kCapacity - kMergeThreads * kAtOnce;  // beyond, room for what is read at once
  using HeldKeys = Held<kCapacity, kMergeThreads>;

  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  MergeShared<kCapacity>& shared = *reinterpret_cast<MergeShared<kCapacity>*>(dynamic_shared);
  uint64_t* const list = shared.list;

  const Workspace space = {workspace, queries, capacity, top_k};
  const int first_block = static_cast<int>(blockIdx.x), query = static_cast<int>(blockIdx.y);
  const SplitGroup group = space.split_group(first_block);
  if (query >= group.size) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads, warp = thread / kWarpThreads;
  const Team<kMergeThreads> team = {thread, 0, shared.team_scratch};
  const int parts = group.last_block - first_block + 1;
  const auto part_keys = [&](int part) -> const uint64_t* {
    return part == 0 ? space.candidates(first_block, query) : space.later_part(first_block + part, query);
  };
  const auto part_count = [&](int part) {
    return part == 0 ? space.first_count(first_block, query) : space.later_count(first_block + part, query);
  };

  // --- a first threshold ----------------------------------------------------------------------------------------------
  if (thread == 0) shared.threshold = kPadding, shared.count = 0;
  __syncthreads();
  const int reach = (top_k + parts - 1) / parts;
  for (int part = thread; part < parts; part += kMergeThreads) {
    const uint64_t key = part_keys(part)[reach - 1];  // both loads at once: what lies behind a part's end is not used
    atomicMin(&shared.threshold, part_count(part) >= reach ? key : kAnyCandidate);
  }
  __syncthreads();

  // --- candidates -----------------------------------------------------------------------------------------------------
  // A warp reads kAtOnce parts side by side, 32 candidates of each at a time.
  int parts_at[kAtOnce], offsets[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) parts_at[i] = warp * kAtOnce + i, offsets[i] = 0;
  for (;;) {
    uint64_t keys[kAtOnce];
    bool is_done = true;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int place = offsets[i] + lane;
      const bool is_there = parts_at[i] < parts && place < top_k;
      const uint64_t key = is_there ? part_keys(parts_at[i])[place] : kNoCandidate;
      keys[i] = is_there && place < part_count(parts_at[i]) ? key : kNoCandidate;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool keeps = keys[i] >= shared.threshold;
      const uint32_t kept = __ballot_sync(kFullWarp, keeps);
      uint32_t base = 0;
      if (lane == 0 && kept) base = atomicAdd(&shared.count, static_cast<uint32_t>(__popc(static_cast<int>(kept))));
      base = __shfl_sync(kFullWarp, base, 0);
      if (keeps) list[base + __popc(static_cast<int>(kept & ((1u << lane) - 1)))] = keys[i];
      offsets[i] += kWarpThreads;
      if (kept != kFullWarp) parts_at[i] += kWarps * kAtOnce, offsets[i] = 0;  // sorted: the rest is below the threshold
      is_done &= parts_at[i] >= parts;
    }
    if (__syncthreads_and(is_done)) break;
    if (shared.count >= kFull) {
      const HeldKeys held(team, list, static_cast<int>(shared.count));
      const uint64_t raised = held.threshold(team, top_k, (kFull - top_k) / 8);
      const int left = held.collect(team, raised, list, [](uint64_t key) { return key; });
      if (thread == 0) shared.threshold = raised, shared.count = static_cast<uint32_t>(left);
    }
    __syncthreads();
  }

  // --- the top k ------------------------------------------------------------------------------------------------------
  const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                           top_k, by_score};
  const HeldKeys held(team, list, static_cast<int>(shared.count));
  const uint64_t last = static_cast<int>(shared.count) > top_k ? held.threshold(team, top_k, 0) : kAnyCandidate;
  const int kept = held.collect(team, last, list, [&](uint64_t key) { return results.sortable(key); });
  sort_ascending(team, list, kept);
  const int64_t row = group.row + query;
  const int64_t seq = clamped_seq({seq_ids, seq_ids_are_int64}, row, num_seqs);
  results.write(team, row, list, kept, [&](uint32_t entry) {
    const int first = static_cast<int>(entry);
    if (!as_slots) return first;
    const int64_t column = first / Block::kEntries;
    const int32_t block = block_table[seq * table_row_stride + column * table_column_stride];
    return (block < 0 ? 0 : block < num_blocks ? block : num_blocks - 1) * Block::kEntries + first % Block::kEntries;
  });
}

}  // namespace lightning_indexer
