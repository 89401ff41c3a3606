// score_topk and index_scores: score the visible entries of every query and keep the best, or write all scores out.
//
//     score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)
//
//   query_data, query_scale   [num_tokens, num_heads, ...] in `query_format` (query.cuh)
//   weights                   fp32 [num_tokens, num_heads]
//   storage, block_table      the paged keys, `block_stride` bytes from block to block
//   valid_lens, seq_ids       int32 [num_tokens]; int32 or int64 [num_tokens], null: query t uses row t of block_table
//   out, scores_out           int32 and fp32 [num_tokens, top_k]; scores_out may be null. Strides in elements.
//   workspace                 see work.cuh
//
// A block holds a group of queries in shared memory and streams its part of their sequence's keys past them (work.cuh,
// feed.cuh). Each of its warpgroups takes its share of the tiles of 64 entries; a warp turns sixteen of them into an operand
// of the product (keys.cuh, mma.cuh) and sums the weighted ReLU of its columns: (a + |a|) * (w / 2) is one addition and one
// fused product on the FMA pipe, where a maximum would compete with dequantisation. Two exchanges within a quad of lanes
// finish a score, always in the same order, so its bits depend on the query and the entry alone. No score leaves the
// registers but the few that pass their query's threshold; they become candidates (select.cuh).
// When a list of candidates runs full, the block meets, cuts the lists back to about the top k, and raises the
// thresholds. At the end of a group the block selects exactly, or leaves its part to merge.cu.
//
// What was measured for these choices is in docs/decisions.md.
#include "feed.cuh"
#include "query.cuh"
#include "select.cuh"
#include "work.cuh"

namespace lightning_indexer {

// The shape of a block, chosen in cuda/score_topk.py.
//   kQueries   queries in shared memory      kPerMma    of them in one product
//   kGroups    warpgroups                    kCapacity  candidates in a query's list
//   kTeams     queries cut back at the same time, each by an equal part of the threads; one at a time is left to kLoneTeam
//              threads, since more would wait longer for one another than they save
//   kStages    tiles that a warpgroup has under way
//   kOffset    where the operands begin in shared memory, after `Shared`
template <int kHeads_, int kQueries_, int kPerMma_, int kGroups_, int kCapacity_, int kTeams_, int kStages_, int kOffset_>
struct Shape {
  static constexpr int kHeads = kHeads_, kQueries = kQueries_, kPerMma = kPerMma_, kGroups = kGroups_;
  static constexpr int kCapacity = kCapacity_, kTeams = kTeams_, kStages = kStages_, kOffset = kOffset_;
  static constexpr int kThreads = kGroups * 128;
  static constexpr int kLoneTeam = kGroups >= 4 ? 512 : kGroups >= 2 ? 256 : 128;
  static constexpr int kTeamThreads = kTeams == 1 ? kLoneTeam : kThreads / kTeams;
  static constexpr int kTilesPerLook = kQueries == 1 ? 2 : 1;  // that a warpgroup scores before it looks at the lists
  static constexpr int kMaxTopK = kCapacity == 2048 ? 512 : kCapacity / 2;
  // A list that holds this many is cut back; beyond is room for what is under way in each warpgroup.
  static constexpr int kFull = kCapacity - kGroups * kTilesPerLook * kTileEntries;
  static_assert(kQueries % kPerMma == 0, "products are full");
  static_assert(kGroups % kTeams == 0, "a team is some warpgroups");
};

template <class Shape, class Mma>
struct Shared {
  using Teams = Team<Shape::kTeamThreads>;
  using Plan = Planner<Shape::kQueries, Shape::kPerMma, Shape::kGroups>;
  Range range;
  double factor;
  Part part;
  double folded[Shape::kQueries * Shape::kHeads];
  float2 row_scales[Shape::kQueries];  // what a score is still to be multiplied by: powers of two, mostly 1
  uint64_t thresholds[Shape::kQueries];  // keys from here on are kept
  alignas(16) float weights[Shape::kQueries * Weights<Shape::kHeads>::kPerQuery];
  float score_thresholds[Shape::kQueries];
  int32_t lens[Shape::kQueries];
  uint32_t counts[Shape::kQueries];
  typename Teams::Scratch team_scratch[Shape::kTeams];
};

// Named barriers of a block: 0 for all that score, one per warpgroup, one per team; all threads are done with a part, and
// the next is known.
constexpr int kFirstGroupBarrier = 1, kFirstTeamBarrier = 8, kDoneBarrier = 14, kPartBarrier = 15;

template <class Keys, class Mma, class Feed, class Block, class Shape, int kTerms, bool kDense>
__global__ void __launch_bounds__(Shape::kThreads + Feed::kProducerThreads, 1) score_topk(
    const uint8_t* __restrict__ query_data,
    const uint8_t* __restrict__ query_scale,
    int32_t query_format,
    float query_global_scale,
    const float* __restrict__ weights,
    int32_t num_tokens,
    int32_t num_heads,
    const uint8_t* __restrict__ storage,
    int32_t block_stride,
    int32_t num_blocks,
    float global_scale,
    const int32_t* __restrict__ block_table,
    int64_t table_row_stride,
    int32_t table_column_stride,
    int64_t num_seqs,
    int64_t max_entries,
    const int32_t* __restrict__ valid_lens,
    const void* __restrict__ seq_ids,
    int32_t seq_ids_are_int64,
    int32_t top_k,
    int32_t by_score,
    int32_t as_slots,
    int32_t* __restrict__ out,
    int64_t out_row_stride,
    int64_t out_column_stride,
    float* __restrict__ scores_out,
    int64_t scores_row_stride,
    int64_t scores_column_stride,
    uint8_t* __restrict__ workspace) {
  constexpr int kHeads = Shape::kHeads, kPerMma = Shape::kPerMma, kGroups = Shape::kGroups;
  constexpr int kThreads = Shape::kThreads, kTeamThreads = Shape::kTeamThreads;
  using SharedData = Shared<Shape, Mma>;
  using HeldKeys = Held<Shape::kCapacity, kTeamThreads>;
  constexpr int kOperandBytes = Shape::kQueries / kPerMma * Mma::kBytes;
  constexpr int kSortBytes = Shape::kTeams * Shape::kMaxTopK * 8;
  static_assert(sizeof(SharedData) <= Shape::kOffset && Shape::kOffset % 1024 == 0, "room before the operands");
  static_assert(Mma::kColumns == kPerMma * kHeads, "a product has a column per query and head");

  extern __shared__ __align__(1024) uint8_t dynamic_shared[];  // the swizzle of wgmma's operand counts on it
  SharedData& shared = *reinterpret_cast<SharedData*>(dynamic_shared);
  uint8_t* const operands = dynamic_shared + Shape::kOffset;
  uint8_t* const rings = operands + (kOperandBytes > kSortBytes ? kOperandBytes : kSortBytes);
  const uint32_t thread = threadIdx.x, lane = thread % kWarpThreads, c = lane % 4;
  const uint32_t group_index = thread / 128;
  const Queries queries = {query_data, query_scale, weights, static_cast<QueryFormat>(query_format), num_heads,
                           &shared.factor};
  const Rows rows = {valid_lens, {seq_ids, seq_ids_are_int64}, num_tokens, num_seqs, max_entries};
  const Workspace space = {workspace, Shape::kQueries, Shape::kCapacity, top_k};
  const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                           top_k, by_score};
  const Pages pages = {storage, block_table, table_row_stride, static_cast<uint32_t>(block_stride),
                       4 * static_cast<uint32_t>(table_column_stride), static_cast<uint32_t>(num_blocks)};
  constexpr int kAllThreads = kThreads + Feed::kProducerThreads;
  if constexpr (Feed::kProducerThreads > 0) {
    if (thread >= kThreads) {
      Feed::give_registers();
      for (typename Feed::Producer producer((thread - kThreads) / kWarpThreads);;) {
        barrier_arrive<kAllThreads>(kDoneBarrier);
        barrier_sync<kAllThreads>(kPartBarrier);
        if (shared.part.is_none) return;
        if (thread < kThreads + kGroups * kWarpThreads) producer.produce(pages, rings, shared.part);
      }
    }
  }
  Feed::take_registers();
  Feed feed(pages);
  Feed::prepare(rings, thread);
  if (thread == 0) shared.factor = static_cast<double>(query_global_scale) * global_scale * Keys::kUnit;
  const typename SharedData::Plan plan = {rows};
  if (thread < kWarpThreads) plan.find_range(shared.range);
  if (!kDense && thread == 0) space.split_group(this_block()) = {0, 0, 0};

  for (;;) {
    barrier_sync<kAllThreads>(kDoneBarrier);  // nobody reads the last part any more, nor its group's sorted lists
    if (thread < kWarpThreads) plan.next(shared.range, shared.part);
    barrier_sync<kAllThreads>(kPartBarrier);
    if (shared.part.is_none) break;
    const Part& part = shared.part;
    const uint32_t size = part.group.size;

    // --- load -------------------------------------------------------------------------------------------------------
    if (thread < Shape::kQueries) {
      shared.thresholds[thread] = kAnyCandidate;
      shared.score_thresholds[thread] = score_threshold(kAnyCandidate);
      shared.lens[thread] = thread < size ? rows.len(part.group.row + thread) : 0;
      shared.counts[thread] = 0;
      shared.row_scales[thread] = {1, 1};
    }
    load_queries<Keys, Mma, kHeads, kPerMma, kTerms, kThreads>(
        queries, part.group.row, size, operands, shared.weights, shared.folded, shared.row_scales);
    Mma::publish();
    sync_scorers<kThreads>();

    // --- score ------------------------------------------------------------------------------------------------------
    feed.begin(part, rings);
    const auto score_tile = [&]() {
      typename Keys::Row raw[2];
      const uint32_t first_entry = feed.next(raw);
      uint32_t a[Keys::kSteps][4];
      float factor[2];
      Keys::convert(raw, c, a, factor);
      const int entry = static_cast<int>(first_entry + lane / 4 + 8 * (c & 1));

      constexpr bool kIsOneProduct = Shape::kQueries == kPerMma;
#pragma unroll 1
      for (uint32_t q = 0; q < (kIsOneProduct ? 1 : size); q += kPerMma) {
        // Sums over this lane's columns, of both its entries, even and odd columns apart.
        float sums[kPerMma][2][2] = {};
        const float* lane_weights = shared.weights + q * Weights<kHeads>::kPerQuery + c * Weights<kHeads>::kPerLane;
        float4 w;
        Mma::multiply(a, operands + q / kPerMma * Mma::kBytes, [&](int n, const float* acc) {
          constexpr int kColumnGroups = kHeads / 8;
          const int query = kPerMma == 1 ? 0 : n / kColumnGroups, column = n % kColumnGroups;
          const float* place = lane_weights + query * Weights<kHeads>::kPerQuery + 2 * column;
          if (column % 2 == 0) w = *reinterpret_cast<const float4*>(place);  // of two groups of columns
          const float even = column % 2 == 0 ? w.x : w.z, odd = column % 2 == 0 ? w.y : w.w;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sums[query][i][0] = fmaf(acc[2 * i] + fabsf(acc[2 * i]), even, sums[query][i][0]);
            sums[query][i][1] = fmaf(acc[2 * i + 1] + fabsf(acc[2 * i + 1]), odd, sums[query][i][1]);
          }
        });
        if (q == 0) feed.release();
        // Over the quad: lanes with an even c finish entry `row`, the others `row + 8`; the halves of the quad share the
        // queries.
        float score[kPerMma];
#pragma unroll
        for (int i = 0; i < kPerMma; ++i) {
          const float upper = sums[i][0][0] + sums[i][0][1], lower = sums[i][1][0] + sums[i][1][1];
          score[i] = c & 1 ? lower : upper;
          score[i] += __shfl_xor_sync(kFullWarp, c & 1 ? upper : lower, 1);
        }
        constexpr int kKept = kPerMma == 1 ? 1 : kPerMma / 2;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          if constexpr (kPerMma == 1) {
            score[0] += __shfl_xor_sync(kFullWarp, score[0], 2);
          } else {
            const float mine = c & 2 ? score[i + kKept] : score[i], theirs = c & 2 ? score[i] : score[i + kKept];
            score[i] = mine + __shfl_xor_sync(kFullWarp, theirs, 2);
          }
        }
        const uint32_t query = q + (kPerMma > 1 && c & 2 ? kKept : 0);
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          // The factors go together first: where they leave the range, all but the smallest scores do.
          const float2 row_scale = shared.row_scales[query + i];
          const float key_scale = Keys::kScaled ? (c & 1 ? factor[1] : factor[0]) : 1.0f;
          const float value = score[i] * (key_scale * row_scale.x * row_scale.y);
          const bool is_mine = kPerMma > 1 || c < 2;
          if constexpr (kDense) {
            if (is_mine && query + i < size && entry < shared.lens[query + i]) {
              const int64_t row = part.group.row + query + i;
              scores_out[row * scores_row_stride + entry * scores_column_stride] = value + 0.0f;
            }
          } else {
            const bool passes = is_mine && !(value < shared.score_thresholds[query + i]);
            if (__any_sync(kFullWarp, passes)) {
              uint64_t key = kNoCandidate;
              if (passes && entry < shared.lens[query + i]) key = key_of(value, static_cast<uint32_t>(entry));
              const bool is_candidate = key >= shared.thresholds[query + i];
              uint32_t place = 0;
              if constexpr (kPerMma == 1) {  // all lanes have the same query: they take their places together
                const uint32_t peers = __ballot_sync(kFullWarp, is_candidate);
                if (lane == 0) place = atomicAdd(&shared.counts[query + i], static_cast<uint32_t>(__popc(peers)));
                place = __shfl_sync(kFullWarp, place, 0) + __popc(peers & ((1u << lane) - 1));
              } else if (is_candidate) {
                place = atomicAdd(&shared.counts[query + i], 1u);
              }
              if (is_candidate) space.candidates(this_block(), query + i)[place] = key;
            }
          }
        }
      }
    };

    if constexpr (kDense) {
      while (feed.has_tile()) score_tile();
      continue;
    }

    // --- select -----------------------------------------------------------------------------------------------------
    for (;;) {
      while (feed.has_tile()) {
        const volatile uint32_t* counts = shared.counts;
        const bool looks = feed.turn() % Shape::kTilesPerLook == 0;
        if (looks && barrier_any<128>(kFirstGroupBarrier + group_index, lane < size && counts[lane] >= Shape::kFull)) break;
        score_tile();
      }
      if (barrier_all<kThreads>(0, !feed.has_tile())) break;
      const uint32_t self = this_thread(), team_index = self / kTeamThreads;
      const Team<kTeamThreads> team = {static_cast<int>(self % kTeamThreads),
                                       static_cast<int>(kFirstTeamBarrier + team_index),
                                       shared.team_scratch[min(team_index, Shape::kTeams - 1u)]};
      for (uint32_t q = team_index; team_index < Shape::kTeams && q < size; q += Shape::kTeams) {
        const int count = static_cast<int>(shared.counts[q]);
        const int room = Shape::kFull - top_k;
        if (count < top_k + room / 4) continue;
        uint64_t* const list = space.candidates(this_block(), q);
        const HeldKeys held(team, list, count);
        const uint64_t threshold = held.threshold(team, top_k, room / 8);
        const int left = held.collect(team, threshold, list, [](uint64_t key) { return key; });
        if (team.rank == 0) {
          shared.thresholds[q] = threshold;
          shared.score_thresholds[q] = score_threshold(threshold);
          shared.counts[q] = left;
        }
      }
      sync_scorers<kThreads>();
    }

    // --- finish -----------------------------------------------------------------------------------------------------
    const uint32_t self = this_thread(), team_index = self / kTeamThreads;
    const Team<kTeamThreads> team = {static_cast<int>(self % kTeamThreads),
                                     static_cast<int>(kFirstTeamBarrier + team_index),
                                     shared.team_scratch[min(team_index, Shape::kTeams - 1u)]};
    const Sequence<Block> sequence(pages, part.group);
    const bool is_split = !(part.is_first && part.is_last);
    // The operands give way to what is sorted.
    uint64_t* const sorted =
        reinterpret_cast<uint64_t*>(operands) + team_index * max(power_of_two_at_least(top_k), kWarpThreads);
    for (uint32_t q = team_index; team_index < Shape::kTeams && q < size; q += Shape::kTeams) {
      const int count = static_cast<int>(shared.counts[q]);
      const HeldKeys held(team, space.candidates(this_block(), q), count);
      const uint64_t threshold = count > top_k ? held.threshold(team, top_k, 0) : kAnyCandidate;
      const int kept = held.collect(team, threshold, sorted, [&](uint64_t key) {
        return is_split ? ~key : results.sortable(key);
      });
      sort_ascending(team, sorted, kept);
      if (!is_split) {
        results.write(team, part.group.row + q, sorted, kept, [&](uint32_t entry) {
          if (!as_slots) return static_cast<int32_t>(entry);
          const uint32_t block = pages.clamp(sequence.find(pages, entry));
          return static_cast<int32_t>(block * Block::kEntries + entry % Block::kEntries);
        });
      } else {
        uint64_t* const list = part.is_first ? space.candidates(this_block(), q) : space.later_part(this_block(), q);
        for (int i = team.rank; i < kept; i += kTeamThreads) list[i] = ~sorted[i];
        if (team.rank == 0) {
          (part.is_first ? space.first_count(this_block(), q) : space.later_count(this_block(), q)) = kept;
        }
      }
      team.sync();
    }
    if (is_split && part.is_first && thread == 0) {
      space.split_group(this_block()) = {part.group.row, static_cast<int32_t>(size), part.last_block};
    }
  }
}

}  // namespace lightning_indexer
