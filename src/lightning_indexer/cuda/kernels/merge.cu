// The second half of score_topk: make one selection of the parts of each split group (work.cuh).
//
// Block (b, q) of the grid merges query q of the group whose first part ended unfinished in block b of score.cu, if
// there is one. Every part has at least the top k of its entries, the best of them in front (`Front`). The k-th best of what
// lies in front is a threshold that the k-th best of all reaches; only a part whose front lies above it whole, which parts
// that are alike (`Walk`) hardly ever have, is read further.
//
// This kernel starts before score.cu has ended, where there is room. Its first blocks then rehearse with keys of their own:
// that brings the code near, which otherwise takes longer to come from memory than to run.
#include "select.cuh"
#include "work.cuh"

namespace lightning_indexer {

constexpr int kMergeThreads = 512;
constexpr int kMaxParts = 256;  // score_topk.py starts no more blocks

// kCapacity: Front::merge_room. kMaxTopK: the largest top_k with that room.
template <int kCapacity>
struct MergeShared {
  static constexpr int kMaxTopK = kCapacity == 4096 ? 512 : kCapacity / 4;
  uint64_t keys[kCapacity];
  uint64_t ordered[kMaxTopK];
  PartList lists[kMaxParts];
  uint32_t total, count;
  Team<kMergeThreads>::Scratch team_scratch;
};

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
    const int32_t* __restrict__ candidates,
    int32_t num_candidates,
    int32_t candidate_shift,
    int32_t early_blocks,
    uint8_t* workspace) {  // not __restrict__: it may still be written when this kernel starts
  using HeldKeys = Selection<SharedKeys<kCapacity, kMergeThreads>>;

  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  MergeShared<kCapacity>& shared = *reinterpret_cast<MergeShared<kCapacity>*>(dynamic_shared);

  const Workspace space = {workspace, queries, capacity, top_k};
  const int first_block = static_cast<int>(blockIdx.x), query = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  const Team<kMergeThreads> team = {thread, 0, shared.team_scratch};
  for (bool rehearses = first_block < early_blocks && query == 0;; rehearses = false) {
    SplitGroup group = {0, 1, first_block};
    if (!rehearses) {
      wait_for_last_kernel();
      group = space.split_group(first_block);
      if (query >= group.size) return;
    }
    const int parts = group.last_block - first_block + 1;
    const Front front(top_k, parts);
    // Those of part 0 lie with its block's candidates, the others with later parts, a block further each.
    const uint64_t* const first_keys = space.candidates(first_block, query);
    const uint64_t* const later_keys = space.later_part(first_block, query);
    const uint32_t stride = static_cast<uint32_t>(queries * space.later_capacity());
    const auto part_keys = [&](uint32_t part) { return part ? later_keys + part * stride : first_keys; };

    // --- what lies in front -------------------------------------------------------------------------------------------
    if (thread == 0) shared.total = 0;
    int places = parts * front.most, wanted = top_k;
    uint32_t mine = 0;
    if (rehearses) {
      places = kMergeThreads, wanted = min(kWarpThreads, top_k);
      shared.keys[thread] = key_of(static_cast<float>(thread % 100), thread);
      shared.lists[0] = {kNoCandidate, 0, 0};
      mine = 1;
    } else {
      for (int i = thread; i < parts; i += kMergeThreads) {
        const PartList& list = i ? space.later_list(first_block + i, query) : space.first_list(first_block, query);
        copy_async<16>(shared_address(&shared.lists[i]), reinterpret_cast<const uint8_t*>(&list));
      }
#pragma unroll 1
      for (int i = thread; i < places; i += kMergeThreads) {
        const uint64_t* const key = part_keys(i / front.most) + i % front.most;
        copy_async<8>(shared_address(&shared.keys[i]), reinterpret_cast<const uint8_t*>(key));
      }
      copy_commit();
      copy_wait<0>();
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < places && !rehearses; i += kMergeThreads) {
      if (i % front.most < shared.lists[i / front.most].front) {
        ++mine;
      } else {
        shared.keys[i] = kNoCandidate;
      }
    }
    mine = __reduce_add_sync(kFullWarp, mine);
    if (lane == 0) atomicAdd(&shared.total, mine);
    HeldKeys held(team, shared.keys, places);
    const auto top_of = [&](uint32_t count) {
      return static_cast<int>(count) > wanted ? held.threshold(team, wanted, 0) : kAnyCandidate;
    };
    uint64_t threshold = top_of(shared.total);

    // --- what lies behind, where it is wanted -------------------------------------------------------------------------
    bool is_wanted = false;
    for (int i = thread; i < parts; i += kMergeThreads) is_wanted |= shared.lists[i].bound > threshold;
    if (__syncthreads_or(is_wanted)) {
      int count = held.collect(team, threshold, kNoCandidate, shared.ordered);
      for (int i = 0; i < parts; ++i) {
        const PartList& behind = shared.lists[i];
        for (int from = behind.front; from < behind.count && behind.bound > threshold; from += kCapacity - top_k) {
          for (int j = thread; j < count; j += kMergeThreads) shared.keys[j] = shared.ordered[j];
          if (thread == 0) shared.count = static_cast<uint32_t>(count);
          __syncthreads();
          const int to = min(behind.count, from + kCapacity - top_k);
          for (int j = from + thread; j < to; j += kMergeThreads) {
            const uint64_t key = part_keys(i)[j];
            if (key >= threshold) shared.keys[atomicAdd(&shared.count, 1u)] = key;
          }
          __syncthreads();
          held = HeldKeys(team, shared.keys, static_cast<int>(shared.count));
          threshold = top_of(shared.count);
          count = held.collect(team, threshold, kNoCandidate, shared.ordered);
        }
      }
    }

    // --- the top k ----------------------------------------------------------------------------------------------------
    const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                             top_k, by_score};
    const int64_t row = group.row + query;
    const Lists lists = {candidates, num_candidates, candidate_shift};
    const int64_t seq = clamped_seq({seq_ids, seq_ids_are_int64}, row, num_seqs);
    const auto slot_of = [&](uint32_t entry) {
      const int first = static_cast<int>(candidates ? lists.entry(row, entry) : entry);
      if (!as_slots) return first;
      const int64_t column = first / Block::kEntries;
      const int32_t block = block_table[seq * table_row_stride + column * table_column_stride];
      return clamped_block(block, num_blocks) * Block::kEntries + first % Block::kEntries;
    };
    const int kept = held.emit_in_order(
        team, threshold, shared.ordered, [&](uint64_t key) { return results.sortable(key); },
        [&](int place, uint64_t value) {
          if (!rehearses) results.write(row, place, value, slot_of);
        });
    if (!rehearses) return results.fill(team, row, kept);
    __syncthreads();
  }
}

}  // namespace lightning_indexer
