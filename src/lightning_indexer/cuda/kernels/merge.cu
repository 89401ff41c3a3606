// The second half of score_topk: make one selection of the parts of each split group (work.cuh).
//
// Block (b, q) of the grid merges query q of the group whose first part ended unfinished in block b of score.cu, if
// there is one. Every part has at least the top k of its entries, the best of them in front (`Front`), or all of few parts are
// read whole. The k-th best of what lies in front is a threshold that the k-th best of all reaches; only a part whose front
// lies above it whole, which parts that are alike (`Walk`) hardly ever have, is read further.
//
// This kernel starts before score.cu has ended, where there is room. Its first blocks then rehearse with keys of their own:
// that brings the code near, which otherwise takes longer to come from memory than to run.
#include "select.cuh"
#include "work.cuh"

namespace lightning_indexer {

constexpr int kMergeThreads = 512;
constexpr int kMaxParts = 256;  // score_topk.py starts no more blocks
constexpr int kScratchBytes = 8448;  // beside the keys; score_topk.py has the same

// kCapacity: Front::merge_room. kMaxTopK: the largest top_k with that room. kIsLone: whether groups are lone queries.
template <int kCapacity>
struct MergeShared {
  static constexpr int kMaxTopK = kCapacity == 4096 ? 512 : kCapacity == 8192 ? 2048 : 4096;
  uint64_t keys[kCapacity];
  uint64_t ordered[kMaxTopK];
  PartList lists[kMaxParts];
  uint32_t total, bottom, top, width;    // keys that lie in front, their lowest and highest rank, the longest part's
  uint32_t lowest_bound, highest_bound, floor;  // ranks
  uint32_t count;
  Team<kMergeThreads>::Scratch team_scratch;
  alignas(16) uint32_t order_bins[Order::kBins];
};

template <class Block, int kCapacity, bool kIsLone>
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
    const int32_t* __restrict__ candidates,
    int32_t num_candidates,
    int32_t candidate_shift,
    int32_t early_blocks,
    uint8_t* workspace) {  // not __restrict__: it may still be written when this kernel starts
  using HeldKeys = Selection<SharedKeys<kCapacity, kMergeThreads>>;
  static_assert(sizeof(MergeShared<kCapacity>) <= 8 * (kCapacity + MergeShared<kCapacity>::kMaxTopK) + kScratchBytes,
                "room for all");
  static_assert(kCapacity % kMergeThreads == 0 && MergeShared<kCapacity>::kMaxTopK % kMergeThreads == 0, "whole rounds");
  using Chosen = Selection<SharedKeys<MergeShared<kCapacity>::kMaxTopK, kMergeThreads>>;

  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  MergeShared<kCapacity>& shared = *reinterpret_cast<MergeShared<kCapacity>*>(dynamic_shared);

  const Workspace space = {workspace, kIsLone ? 1 : queries, capacity, top_k};
  const int first_block = static_cast<int>(blockIdx.x), query = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const Team<kMergeThreads> team = {thread, 0, shared.team_scratch};
  const auto list_of = [&](int block, bool is_first) {
    return is_first ? space.candidates(block, query) : space.later_part(block, query);
  };
  for (bool rehearses = first_block < early_blocks && query == 0;; rehearses = false) {
    team.template fill<team.kBins>(shared.team_scratch.bins, 0u);
    team.template fill<Order::kBins>(shared.order_bins, 0u);
    team.template fill<MergeShared<kCapacity>::kMaxTopK>(shared.ordered, kPadding);
    if (thread == 0) {
      shared.total = shared.top = shared.width = shared.highest_bound = shared.floor = shared.team_scratch.total = 0;
      shared.lowest_bound = shared.bottom = ~0u;
    }
    __syncthreads();
    const int block = first_block + thread;  // which may have a part of the group
    const PartList* const list_place = thread ? &space.later_list(block, query) : &space.first_list(block, query);
    const SplitGroup* const group_place = &space.split_group(first_block);
    if (!rehearses) wait_for_last_kernel();

    // --- what lies in front -------------------------------------------------------------------------------------------
    SplitGroup group = {0, first_block, 1, 0, kMergeThreads};
    PartList list = {kNoCandidate, kMergeThreads, true, 0};
    if (!rehearses) {
      if (block < all_blocks()) list = *list_place;
      group = *group_place;
      if (query >= group.size) return;
    }
    const int parts = group.last_block - first_block + 1, wanted = rehearses ? min(kWarpThreads, top_k) : top_k;
    if (thread - lane < parts) {
      const uint32_t highest = thread < parts ? rank_of_key(list.bound) : 0, lowest = highest ? highest : ~0u;
      const uint32_t width = thread < parts ? list.is_whole ? list.count : group.front : 0;
      if (thread < parts) shared.lists[thread] = list;
      const uint32_t widest = __reduce_max_sync(kFullWarp, width);
      const uint32_t low = __reduce_min_sync(kFullWarp, lowest), high = __reduce_max_sync(kFullWarp, highest);
      const uint32_t floor = __reduce_max_sync(kFullWarp, thread < parts ? list.floor : 0);
      if (lane == 0) {
        atomicMax(&shared.width, widest), atomicMax(&shared.floor, floor);
        atomicMin(&shared.lowest_bound, low), atomicMax(&shared.highest_bound, high);
      }
    }
    __syncthreads();
    // As many places for each part as the longest takes.
    const uint32_t width = shared.width;
    const float per_place = approximate_reciprocal(static_cast<float>(max(width, 1u)));  // near enough for small quotients
    const int places = parts * static_cast<int>(width);
    if (rehearses) {
      shared.keys[thread] = key_of(static_cast<float>(thread % 100), thread);
    } else {
      const uint64_t* const first_front = space.front(first_block, query, true);
      const uint64_t* const later_front = space.front(first_block, query, false);  // of the part of this block, if any
#pragma unroll 1
      for (int i = thread; i < places; i += kMergeThreads) {
        const uint32_t part = static_cast<uint32_t>((static_cast<float>(i) + 0.5f) * per_place), place = i - part * width;
        const PartList& from = shared.lists[part];
        const uint64_t* keys = part ? later_front + part * space.front_stride() : first_front;
        if (from.is_whole) keys = list_of(first_block + part, part == 0);
        if (place < (from.is_whole ? from.count : group.front)) {
          copy_async<8>(shared_address(&shared.keys[i]), reinterpret_cast<const uint8_t*>(keys + place));
        } else {
          shared.keys[i] = kNoCandidate;
        }
      }
      copy_commit();
      copy_wait<0>();
    }
    {  // of what this thread has brought itself
      uint32_t total = 0, bottom = ~0u, top = 0;
#pragma unroll 1
      for (int i = thread; i < places; i += kMergeThreads) {
        const uint64_t key = shared.keys[i];
        total += key != kNoCandidate, HeldKeys::extend(bottom, top, key);
      }
      total = __reduce_add_sync(kFullWarp, total);
      bottom = __reduce_min_sync(kFullWarp, bottom), top = __reduce_max_sync(kFullWarp, top);
      if (lane == 0) atomicAdd(&shared.total, total), atomicMin(&shared.bottom, bottom), atomicMax(&shared.top, top);
    }
    HeldKeys held(team, shared.keys, places);
    uint64_t threshold = kAnyCandidate;
    if (static_cast<int>(shared.total) > wanted) {
      // Parts that have a bound have more keys from there on than their share of the wanted ones; a part's floor is reached by
      // as many as are wanted.
      const uint32_t bottom = shared.lowest_bound < shared.top ? shared.lowest_bound : max(shared.bottom, shared.floor);
      threshold = held.threshold_from(team, wanted, 0, bottom, shared.top);
    }

    // --- what lies behind, where it is wanted -------------------------------------------------------------------------
    if (__builtin_expect(shared.highest_bound >= rank_of_key(threshold), false)) {
      int count = held.collect(team, threshold, kNoCandidate, shared.ordered);
      for (int i = 0; i < parts; ++i) {
        const PartList& behind = shared.lists[i];
        const uint64_t* const keys = list_of(first_block + i, i == 0);
        int from = space.is_apart() ? 0 : group.front;
        for (; from < behind.count && behind.bound > threshold; from += kCapacity - top_k) {
#pragma unroll 1
          for (int j = thread; j < count; j += kMergeThreads) shared.keys[j] = shared.ordered[j];
          if (thread == 0) shared.count = static_cast<uint32_t>(count);
          __syncthreads();
          const int to = min(behind.count, from + kCapacity - top_k);
#pragma unroll 1
          for (int j = from + thread; j < to; j += kMergeThreads) {
            const uint64_t key = keys[j];
            if (key >= threshold && key < behind.bound) shared.keys[atomicAdd(&shared.count, 1u)] = key;
          }
          __syncthreads();
          held = HeldKeys(team, shared.keys, static_cast<int>(shared.count));
          if (static_cast<int>(shared.count) > wanted) threshold = held.threshold(team, wanted, 0);
          count = held.collect(team, threshold, kNoCandidate, shared.ordered);
        }
      }
#pragma unroll 1
      for (int i = thread; i < count; i += kMergeThreads) shared.keys[i] = shared.ordered[i];
      if (thread == 0) team.scratch.total = 0;
      __syncthreads();
      held = HeldKeys(team, shared.keys, count);
    }

    // --- the top k ----------------------------------------------------------------------------------------------------
    const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                             top_k, by_score};
    const int64_t row = group.row + query;
    const Lists lists = {candidates, num_candidates, candidate_shift};
    const auto slot_of = [&](uint32_t entry) {
      const int first = static_cast<int>(candidates ? lists.entry(row, entry) : entry);
      if (!as_slots) return first;
      const int64_t seq = clamped_seq({seq_ids, seq_ids_are_int64}, row, num_seqs), column = first / Block::kEntries;
      const int32_t block = block_table[seq * table_row_stride + column * table_column_stride];
      return clamped_block(block, num_blocks) * Block::kEntries + first % Block::kEntries;
    };
    // The range of their upper words, by score or by entry, is known.
    const Order order = by_score ? Order(~shared.top, ~rank_of_key(threshold)) : Order(0, group.entries - 1);
    const int count = held.gather_to_emit(team, threshold, shared.ordered, shared.order_bins, order,
                                          [&](uint64_t key) { return results.sortable(key); });
    Chosen chosen(shared.ordered, count);
    const int kept = chosen.emit_values(team, shared.order_bins, order, shared.keys, [&](int place, uint64_t value) {
      if (!rehearses) results.write(row, place, value, slot_of);
    });
    if (!rehearses) return results.fill(team, row, kept);
    __syncthreads();
  }
}

}  // namespace lightning_indexer
