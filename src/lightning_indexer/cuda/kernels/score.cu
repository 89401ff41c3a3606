// score_topk and index_scores: score the visible entries of every query and keep the best, or write all scores out.
//
//     score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)
//
//   query_data, query_scale   [num_tokens, num_heads, ...] in `query_format` (query.cuh)
//   weights                   fp32 [num_tokens, num_heads]
//   storage, block_table      the paged keys, `block_stride` bytes from block to block
//   valid_lens, seq_ids       int32 [num_tokens]; int32 or int64 [num_tokens], null: query t uses row t of block_table
//   out, scores_out           int32 and fp32 [num_tokens, top_k]; scores_out may be null. Strides in elements.
//   candidates                int32 [num_tokens, num_candidates] ids of blocks of 8 << candidate_shift entries, the only ones
//                             that may be chosen from, where Shape::kIsListed; otherwise it is not looked at
//   workspace                 see work.cuh
//
// A block holds a group of queries in shared memory and streams its part of their sequence's keys past them (work.cuh,
// feed.cuh). Each of its warpgroups takes its share of the tiles of 64 entries or twice that; a warp turns sixteen at a
// time into an operand of the product (keys.cuh, mma.cuh) and sums the weighted ReLU of its columns: (a + |a|) * (w / 2) is
// one addition and one fused product on the FMA pipe, where a maximum would compete with dequantisation. Two exchanges
// within a quad of lanes finish a score, always in the same order, so its bits depend on the query and the entry alone. No
// score leaves the registers but the few that pass their query's threshold; they become candidates (select.cuh).
// When a list of candidates runs full, the block meets, cuts the lists back to about the top k, and raises the
// thresholds; where warps are left over, they raise a lone query's meanwhile (raise.cuh). At the end of a group the block
// selects exactly, or leaves its part to merge.cu.
//
// What was measured for these choices is in docs/decisions.md.
#include "feed.cuh"
#include "query.cuh"
#include "raise.cuh"
#include "select.cuh"
#include "work.cuh"

namespace lightning_indexer {

// The shape of a block, chosen in cuda/score_topk.py.
//   kQueries   queries in shared memory      kPerMma    of them in one product
//   kGroups    warpgroups                    kCapacity  candidates in a query's list
//   kTeams     queries cut back at the same time, each by an equal part of the threads; one at a time is left to kLoneTeam
//              threads, since more would wait longer for one another than they save, but where its list is in shared memory
//   kStages    tiles that a warpgroup has room for
//   kOffset    where the operands begin in shared memory, after `Shared`
//   kHalves    times 64 entries that a tile has
//   kMaxTopK   the largest top_k it serves
//   kIsListed  whether queries choose from listed blocks only
//   kHoldsList whether a lone query's list is in shared memory, and its threshold raised by warps that are left over
template <int kHeads_, int kQueries_, int kPerMma_, int kGroups_, int kCapacity_, int kTeams_, int kStages_, int kOffset_,
          int kHalves_, int kMaxTopK_, bool kIsListed_ = false, bool kHoldsList_ = false>
struct Shape {
  static constexpr int kHeads = kHeads_, kQueries = kQueries_, kPerMma = kPerMma_, kGroups = kGroups_;
  static constexpr int kCapacity = kCapacity_, kTeams = kTeams_, kStages = kStages_, kOffset = kOffset_;
  static constexpr int kThreads = kGroups * 128;
  static constexpr bool kHoldsList = kHoldsList_;
  // Producers are launched as two warpgroups, eight warps, of which five feed.
  static constexpr int kRaisers = kHoldsList ? 8 - kGroups : 0;
  static_assert(!kHoldsList || (kGroups > 4 && kQueries == 1 && !kIsListed_), "warps are left over, and one list is held");
  static_assert(!kHoldsList || kMaxTopK_ <= 1024, "lists of four parts are merged whole");
  static constexpr int kLoneTeam = kHoldsList ? kThreads : kGroups >= 4 ? 512 : kGroups >= 2 ? 256 : 128;
  static constexpr int kTeamThreads = kTeams == 1 ? kLoneTeam : kThreads / kTeams;
  static constexpr int kHalves = kHalves_, kTile = kHalves * kHalfEntries;
  static constexpr int kMaxTopK = kMaxTopK_;
  static constexpr bool kIsListed = kIsListed_;
  // A list that holds this many is cut back; beyond is room for what is under way in each warpgroup.
  static constexpr int kFull = kCapacity - kGroups * kTile;
  static_assert(kQueries % kPerMma == 0, "products are full");
  static_assert(kGroups % kTeams == 0, "a team is some warpgroups");
};

// Named barriers of a block: 0 for all that score, one per warpgroup, one per team, one for the warps that raise.
constexpr int kFirstGroupBarrier = 1, kFirstTeamBarrier = 8, kRaiserBarrier = 15;

template <class Shape>
struct HeldList {
  alignas(16) uint64_t keys[Shape::kCapacity + Shape::kTeamThreads];  // in whole rounds of the team
  Raiser<Shape::kRaisers, kRaiserBarrier> raiser;
};
struct NoList {
  static constexpr uint64_t* keys = nullptr;
};

template <class Shape>
struct Shared {
  using Teams = Team<Shape::kTeamThreads>;
  using Plan = Planner<Shape::kQueries, Shape::kPerMma, Shape::kGroups, Shape::kTile, Shape::kIsListed>;
  Range range;
  double factor;
  Part part;
  Front front;  // of the part, if its group is split
  bool has_unusual_weights;
  double folded[Shape::kQueries * Shape::kHeads];
  float2 row_scales[Shape::kQueries];  // what a score is still to be multiplied by: powers of two, mostly 1
  uint64_t thresholds[Shape::kQueries];  // keys from here on are kept
  alignas(16) float weights[Shape::kQueries * Weights<Shape::kHeads>::kPerQuery];
  float score_thresholds[Shape::kQueries];
  int32_t lens[Shape::kQueries];
  uint32_t ends[Shape::kQueries];    // where the next candidate goes, in keys of the workspace or of the list held here
  uint32_t limits[Shape::kQueries];  // from there on a list is cut back
  typename Teams::Scratch team_scratch[Shape::kTeams];
  typename Either<Shape::kHoldsList, HeldList<Shape>, NoList>::Type held;
};

// Sum two values over pairs of lanes two apart; the lanes that are upper keep the second sum, the others the first, in `a`.
__device__ __forceinline__ void exchange(bool is_upper, float& a, float b) {
  const float mine = is_upper ? b : a, theirs = is_upper ? a : b;
  a = mine + __shfl_xor_sync(kFullWarp, theirs, 2);
}

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
    const int32_t* __restrict__ candidates,
    int32_t num_candidates,
    int32_t candidate_shift,
    uint8_t* __restrict__ workspace) {
  constexpr int kHeads = Shape::kHeads, kPerMma = Shape::kPerMma, kGroups = Shape::kGroups;
  constexpr int kThreads = Shape::kThreads, kTeamThreads = Shape::kTeamThreads;
  using SharedData = Shared<Shape>;
  using HeldKeys = Selection<RegisterKeys<Shape::kCapacity, kTeamThreads>>;
  constexpr int kHalves = Shape::kHalves;
  constexpr bool kHoldsList = Shape::kHoldsList && !kDense;
  constexpr int kOperandBytes = Shape::kQueries / kPerMma * Mma::kBytes;
  constexpr int kSortBytes = Shape::kTeams * Shape::kMaxTopK * 8;
  // At the end of a part, when no tiles are under way, a lone team has their place in the rings for its candidates and their
  // order, if that is enough.
  constexpr bool kIsRoomy =
      Shape::kTeams == 1 && Feed::kBytes - Feed::kControlBytes >= (Shape::kCapacity + Shape::kMaxTopK) * 8;
  using LastKeys = Selection<typename Either<kIsRoomy, SharedKeys<Shape::kCapacity, kTeamThreads>,
                                             RegisterKeys<Shape::kCapacity, kTeamThreads>>::Type>;
  static_assert(sizeof(SharedData) <= Shape::kOffset && Shape::kOffset % 1024 == 0, "room before the operands");
  static_assert(Mma::kColumns == kPerMma * kHeads, "a product has a column per query and head");
  static_assert(Shape::kIsListed == Feed::kIsListed, "the feed follows the lists");
  static_assert(Shape::kCapacity % kTeamThreads == 0 || !kIsRoomy || Shape::kHoldsList, "whole rounds");
  static_assert(!kHoldsList || kIsRoomy, "a list in shared memory is chosen from there");

  let_next_kernel_start();
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];  // the swizzle of wgmma's operand counts on it
  SharedData& shared = *reinterpret_cast<SharedData*>(dynamic_shared);
  uint8_t* const operands = dynamic_shared + Shape::kOffset;
  uint8_t* const rings = operands + (kOperandBytes > kSortBytes ? kOperandBytes : kSortBytes);
  const uint32_t thread = threadIdx.x, lane = thread % kWarpThreads, c = lane % 4;
  const uint32_t group_index = thread / 128;
  const Queries queries = {query_data, query_scale, weights, static_cast<QueryFormat>(query_format), num_heads,
                           &shared.factor};
  const Rows rows = {valid_lens, {seq_ids, seq_ids_are_int64}, num_tokens, num_seqs, max_entries,
                     {candidates, num_candidates, candidate_shift}};
  const Workspace space = {workspace, Shape::kQueries, Shape::kCapacity, top_k};
  const Results results = {out, out_row_stride, out_column_stride, scores_out, scores_row_stride, scores_column_stride,
                           top_k, by_score};
  const Pages pages = {storage, block_table, table_row_stride, static_cast<uint32_t>(block_stride),
                       4 * static_cast<uint32_t>(table_column_stride), static_cast<uint32_t>(num_blocks)};
  const auto clear_list = [&](uint32_t rank, uint32_t threads) {
#pragma unroll 1
    for (uint32_t i = rank; i < Shape::kCapacity / 2; i += threads) {
      reinterpret_cast<uint4*>(shared.held.keys)[i] = {0, 0, 0, 0};
    }
  };

  // --- prepare: a warp plans, one makes barriers, and the others bring what will be read ------------------------------------
  const typename SharedData::Plan plan = {rows};
  constexpr uint32_t kFirstOther = 2 * kWarpThreads;  // thread
  if (thread < kWarpThreads) {
    plan.find_range(shared.range);
  } else if (thread < kFirstOther) {
    if (thread == kWarpThreads) {
      Feed::make_barriers(rings, kHoldsList ? Shape::kRaisers : 0);
      if constexpr (kHoldsList) shared.held.raiser.start_part();
    }
  } else {
    const uint32_t other = thread - kFirstOther;
    // Instructions of more warps than it takes would hold up the first.
    constexpr uint32_t kBringing = Shape::kQueries == 1 ? kWarpThreads : kThreads - kFirstOther;
    if (other < kBringing) {
      if (other == 0) shared.factor = static_cast<double>(query_global_scale) * global_scale * Keys::kUnit;
      if (!kDense && other == 0) space.split_group(this_block()) = {0, 0, 0, 0, 0};
      if (!kDense && other < Shape::kQueries) {  // the merge looks at more lists than it uses
        space.first_list(this_block(), other) = space.later_list(this_block(), other) = {kNoCandidate, 0, false, 0};
      }
      // What this block will read if sequences are about equally long.
      const int64_t row = static_cast<int64_t>(this_block()) * num_tokens / all_blocks();
      if (other == 0 && seq_ids) prefetch_line(rows.seq_ids.place(row));
      queries.prefetch<Keys::kDim>(row, Shape::kQueries, num_tokens, other, kBringing);
    }
    if constexpr (kHoldsList) clear_list(other, kThreads + Feed::kProducerThreads - kFirstOther);
  }
  if constexpr (Feed::kProducerThreads > 0) {
    __syncthreads();
    if (thread >= kThreads) {
      Feed::give_registers();
      typename Feed::Producer producer((thread - kThreads) / kWarpThreads);
      if (producer.group < kGroups) {
        producer.run(pages, rings, shared.part);
      } else if constexpr (kHoldsList) {
        static_assert(Feed::kProducerThreads == (kGroups + Shape::kRaisers) * kWarpThreads, "warps are left over");
        uint32_t parts = 0;
        // Whether lists may get long enough.
        const bool rehearses = num_tokens * max_entries > 2 * static_cast<int64_t>(all_blocks()) * top_k;
        shared.held.raiser.run(
            [&] { return Feed::next_part(rings, shared.part, parts++); },
            [&] { return (shared.part.end - shared.part.begin) * Shape::kTile < 2 * top_k; },
            [&] { return Feed::leave_part(rings, shared.part); },
            shared.held.keys, shared.ends, top_k, shared.thresholds, shared.score_thresholds, rehearses);
      }
      return;
    }
  }
  Feed::take_registers();
  Feed feed(pages, rows);
  // Where a list is collected, and the first of its places there.
  uint64_t* const collected = kHoldsList ? shared.held.keys : space.keys();
  const auto list_start = [&](uint32_t q, bool is_first) {
    return kHoldsList ? 0 : space.collected_at(this_block(), q, is_first);
  };

  for (;; sync_scorers<kThreads>()) {  // nobody reads the last part any more, nor what lies over its operands
    if (thread < kWarpThreads) {
      Feed::await_copied(rings);
      plan.next(shared.range, shared.part);
      shared.has_unusual_weights = false;
      if constexpr (kHoldsList) {
        if (thread == 0) shared.held.raiser.start_part(), shared.ends[0] = 0;  // looked at once the part is announced
      }
      Feed::announce_part(rings);
    }
    sync_scorers<kThreads>();
    if (shared.part.is_none) break;
    const Part& part = shared.part;
    const uint32_t size = part.group.size;

    // --- load -------------------------------------------------------------------------------------------------------
    if (thread < Shape::kQueries) {
      shared.thresholds[thread] = kAnyCandidate;
      shared.score_thresholds[thread] = score_threshold(kAnyCandidate);
      shared.lens[thread] = thread < size ? rows.len(part.group.row + thread) : 0;
      shared.ends[thread] = list_start(thread, part.is_first);
      shared.limits[thread] = shared.ends[thread] + Shape::kFull;
      shared.row_scales[thread] = {1, 1};
    }
    // By one warp, which has little to load: divisions by all of them would take longer than anything else behind the scores.
    if (!kDense && thread >= kThreads - kWarpThreads) shared.front = Front(top_k, part.parts);
    const Weights<kHeads> put_weights = {shared.weights, shared.folded, &shared.has_unusual_weights};
    load_queries<Keys, Mma, kHeads, kPerMma, kTerms, kThreads>(queries, part.group.row, size, operands, put_weights);
    Mma::publish();
    if (this_thread() % kWarpThreads == 0) Feed::announce_loaded(rings);
    sync_scorers<kThreads>();
    if (shared.has_unusual_weights) {
      scale_weights<kHeads, kThreads>(put_weights, size, shared.row_scales);
      sync_scorers<kThreads>();
    }

    // --- score ------------------------------------------------------------------------------------------------------
    feed.begin(part, rings);
    const auto score_tile = [&]() {
      const int first_entry = static_cast<int>(feed.next() + lane / 4);  // that the lane finishes
      uint32_t a[kHalves][Keys::kSteps][4];
      float factor[kHalves][2];
      const auto make_ready = [&](int half) {
        typename Keys::Row raw[2];
        feed.read(half, raw);
        Keys::convert(raw, c, a[half], factor[half]);
      };
      constexpr bool kIsOneProduct = Shape::kQueries == kPerMma;
      if constexpr (!kIsOneProduct) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) make_ready(half);
      }
#pragma unroll 1
      for (uint32_t q = 0; q < (kIsOneProduct ? 1 : size); q += kPerMma) {
        // Sums over this lane's columns, of both its entries of each half, even and odd columns apart.
        float sums[kHalves][kPerMma][2][2] = {};
        const float* lane_weights = shared.weights + q * Weights<kHeads>::kPerQuery + c * Weights<kHeads>::kPerLane;
        float4 w;
        const auto before = [&](int half) {
          if constexpr (kIsOneProduct) make_ready(half);
        };
        const auto use = [&](int half, int n, const float* acc) {
          constexpr int kColumnGroups = kHeads / 8;
          const int query = kPerMma == 1 ? 0 : n / kColumnGroups, column = n % kColumnGroups;
          const float* place = lane_weights + query * Weights<kHeads>::kPerQuery + 2 * column;
          if (column % 2 == 0) w = *reinterpret_cast<const float4*>(place);  // of two groups of columns
          const float even = column % 2 == 0 ? w.x : w.z, odd = column % 2 == 0 ? w.y : w.w;
          float(&sum)[2][2] = sums[half][query];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[i][0] = fmaf(acc[2 * i] + fabsf(acc[2 * i]), even, sum[i][0]);
            sum[i][1] = fmaf(acc[2 * i + 1] + fabsf(acc[2 * i + 1]), odd, sum[i][1]);
          }
        };
        // Over the quad: lanes with an even c finish entry `row`, the others `row + 8`; the halves of the quad share the
        // queries, or the halves of the tile.
        constexpr int kKept = kPerMma == 1 ? 1 : kPerMma / 2;
        constexpr bool kSharesHalves = kPerMma == 1 && kHalves == 2;
        float score[kHalves][kPerMma];
        const auto after = [&](int half) {
#pragma unroll
          for (int i = 0; i < kPerMma; ++i) {
            const float(&sum)[2][2] = sums[half][i];
            const float upper = sum[0][0] + sum[0][1], lower = sum[1][0] + sum[1][1];
            score[half][i] = (c & 1 ? lower : upper) + __shfl_xor_sync(kFullWarp, c & 1 ? upper : lower, 1);
          }
          if constexpr (kPerMma == 1 && !kSharesHalves) {
            score[half][0] += __shfl_xor_sync(kFullWarp, score[half][0], 2);
          } else if constexpr (kPerMma > 1) {
#pragma unroll
            for (int i = 0; i < kKept; ++i) exchange(c & 2, score[half][i], score[half][i + kKept]);
          }
        };
        Mma::multiply(a, operands + q / kPerMma * Mma::kBytes, before, use, after);
        if (q == 0) feed.release();
        if constexpr (kSharesHalves) exchange(c & 2, score[0][0], score[1][0]);
        const uint32_t query = q + (kPerMma > 1 && c & 2 ? kKept : 0);
#pragma unroll
        for (int j = 0; j < (kSharesHalves ? 1 : kHalves) * kKept; ++j) {
          // The lane's half of the tile: one, or that of its half of the quad.
          const int i = j % kKept, kept = kSharesHalves ? 0 : j / kKept;
          const bool is_second = kSharesHalves ? c & 2 : kept;
          const int entry = first_entry + (is_second ? kHalfEntries : 0);
          // The factors go together first: where they leave the range, all but the smallest scores do.
          const float2 row_scale = shared.row_scales[query + i];
          float key_scale = 1.0f;
          if constexpr (Keys::kScaled) {
            key_scale = c & 1 ? factor[0][1] : factor[0][0];
            if constexpr (kHalves == 2) key_scale = is_second ? (c & 1 ? factor[1][1] : factor[1][0]) : key_scale;
          }
          const float value = score[kept][i] * (key_scale * row_scale.x * row_scale.y);
          const bool is_mine = kPerMma > 1 || kSharesHalves || c < 2;
          if constexpr (kDense) {
            if (is_mine && query + i < size && entry < shared.lens[query + i]) {
              const int64_t row = part.group.row + query + i;
              scores_out[row * scores_row_stride + entry * scores_column_stride] = value + 0.0f;
            }
          } else {
            const bool passes = is_mine && !(value < shared.score_thresholds[query + i]);
            if (__any_sync(kFullWarp, passes)) {
              uint64_t key = key_of(value, static_cast<uint32_t>(entry));
              if (!passes || entry >= shared.lens[query + i]) key = kNoCandidate;
              const bool is_candidate = key >= shared.thresholds[query + i];
              uint32_t place = 0;
              if constexpr (kPerMma == 1) {  // all lanes have the same query: they take their places together
                const uint32_t peers = __ballot_sync(kFullWarp, is_candidate);
                if (lane == 0) place = atomicAdd(&shared.ends[query + i], static_cast<uint32_t>(__popc(peers)));
                place = __shfl_sync(kFullWarp, place, 0) + __popc(peers & ((1u << lane) - 1));
              } else if (is_candidate) {
                place = atomicAdd(&shared.ends[query + i], 1u);
              }
              if (is_candidate) collected[place] = key;
            }
          }
        }
      }
    };

    if constexpr (kDense) {
      while (feed.has_tile()) score_tile();
      if (part.is_final) break;
      continue;
    }

    // --- select -----------------------------------------------------------------------------------------------------
    for (;;) {
      while (feed.has_tile()) {
        const volatile uint32_t* ends = shared.ends;
        if (barrier_any<128>(kFirstGroupBarrier + group_index, lane < size && ends[lane] >= shared.limits[lane])) break;
        score_tile();
      }
      if (barrier_all<kThreads>(0, !feed.has_tile())) break;
      const uint32_t self = this_thread(), team_index = self / kTeamThreads;
      if constexpr (kHoldsList) shared.held.raiser.count_cut(self);
      const Team<kTeamThreads> team = {static_cast<int>(self % kTeamThreads),
                                       static_cast<int>(kFirstTeamBarrier + team_index),
                                       shared.team_scratch[min(team_index, Shape::kTeams - 1u)]};
      for (uint32_t q = team_index; team_index < Shape::kTeams && q < size; q += Shape::kTeams) {
        const uint32_t start = list_start(q, part.is_first);
        const int count = static_cast<int>(shared.ends[q] - start);
        const int room = Shape::kFull - top_k;
        if (4 * (count - top_k) < room) continue;
        uint64_t* const list = collected + start;
        HeldKeys held(team, list, count);
        constexpr bool kByRanks = HeldKeys::kUnrolled > 16;  // what scores tiles holds registers too
        const uint64_t threshold = held.template threshold<kByRanks>(team, top_k, room / 8);
        // Lists of a lone query are few keys to each of many threads: there `collect` was quicker (64 x 8,192: by 0.3 us,
        // when 512 threads cut a list in the workspace).
        const int left = Shape::kQueries == 1 ? held.collect(team, threshold, kNoCandidate, list)
                                              : held.compact(team, threshold, list);
        if (kHoldsList) {
#pragma unroll 1
          for (int i = left + team.rank; i < count; i += kTeamThreads) list[i] = kNoCandidate;
        }
        if (team.rank == 0) {
          // What has been raised meanwhile may be beyond; the list still holds what reaches it.
          const uint64_t now = kHoldsList ? max(threshold, shared.thresholds[q]) : threshold;
          shared.thresholds[q] = now;
          shared.score_thresholds[q] = score_threshold(now);
          shared.ends[q] = start + left;
        }
      }
      sync_scorers<kThreads>();
      if constexpr (kHoldsList) shared.held.raiser.count_cut(self);
    }

    // --- finish -----------------------------------------------------------------------------------------------------
    const uint32_t self = this_thread(), team_index = self / kTeamThreads;
    if constexpr (kHoldsList) shared.held.raiser.finish_part(self);
    const Team<kTeamThreads> team = {static_cast<int>(self % kTeamThreads),
                                     static_cast<int>(kFirstTeamBarrier + team_index),
                                     shared.team_scratch[min(team_index, Shape::kTeams - 1u)]};
    const bool is_split = !(part.is_first && part.is_last);
    uint64_t* const ordered = kIsRoomy ? reinterpret_cast<uint64_t*>(rings + Feed::kControlBytes)
                                       : reinterpret_cast<uint64_t*>(operands) +
                                             team_index * max(power_of_two_at_least(top_k), kWarpThreads);
    for (uint32_t q = team_index; team_index < Shape::kTeams && q < size; q += Shape::kTeams) {
      const uint32_t start = space.collected_at(this_block(), q, part.is_first);
      const int count = static_cast<int>(shared.ends[q] - list_start(q, part.is_first));
      uint64_t* const candidates = space.keys() + start;
      const Front front = shared.front;
      PartList& list = part.is_first ? space.first_list(this_block(), q) : space.later_list(this_block(), q);
      const uint64_t from = shared.thresholds[q];  // that the top k reach. Threads may see it raised, each once
      const uint32_t floor = rank_of_key(from);
      if (!kHoldsList && is_split && space.is_apart() && count <= front.whole) {
        if (team.rank == 0) list = {kNoCandidate, count, true, floor};
        continue;
      }
      LastKeys held = [&] {
        if constexpr (kHoldsList) {
          return LastKeys(team, collected, count);
        } else if constexpr (kIsRoomy) {
          uint64_t* const place = ordered + Shape::kMaxTopK;
#pragma unroll 1
          for (int i = team.rank; i < count; i += kTeamThreads) {
            copy_async<8>(shared_address(place + i), reinterpret_cast<const uint8_t*>(candidates + i));
          }
          copy_commit();
          copy_wait<0>();
          return LastKeys(team, place, count);
        } else {
          return LastKeys(team, candidates, count);
        }
      }();
      const int room = !is_split ? top_k : part.is_first ? Shape::kCapacity : space.later_capacity();
      const bool fits = count <= room || is_split && space.is_apart();
      const uint64_t threshold = fits ? kAnyCandidate : held.template threshold<LastKeys::kIsCrowded>(team, top_k, 0);
      if (!is_split) {
        const int64_t row = part.group.row + q;
        const Sequence<Block> sequence(pages, part.group);
        const auto slot_of = [&](uint32_t entry) {
          if constexpr (Shape::kIsListed) entry = rows.lists.entry(row, entry);
          if (!as_slots) return static_cast<int32_t>(entry);
          const uint32_t block = pages.clamp(sequence.find(pages, entry));
          return static_cast<int32_t>(block * Block::kEntries + entry % Block::kEntries);
        };
        team.sync();
        const int kept = held.emit_in_order(
            team, threshold, ordered, [&](uint64_t key) { return results.sortable(key); },
            [&](int place, uint64_t value) { results.write(row, place, value, slot_of); });
        results.fill(team, row, kept);
      } else {
        int kept = fits ? count : top_k;
        if (space.is_apart() && team.rank == 0) team.scratch.total = 0;
        team.sync();  // all have read what the last threshold left in the team's memory
        if (kHoldsList && front.whole == 0) {  // to where the merge looks behind the front
#pragma unroll 1
          for (int i = team.rank; i < count; i += kTeamThreads) candidates[i] = collected[i];
        } else if (kHoldsList) {
          kept = held.compact(team, from, candidates);
          if (kept > front.whole) {  // the threshold is far behind
            kept = held.compact(team, held.threshold(team, top_k, front.whole - top_k), candidates);
          }
          if (team.rank == 0) list = {kNoCandidate, kept, true, floor};
          continue;
        }
        const uint64_t bound =
            kept > front.most ? held.template threshold<Shape::kQueries == 1>(team, front.least, front.most - front.least)
                              : kNoCandidate;
        uint64_t* const target = space.front(this_block(), q, part.is_first);
        int written = kept;
        if (space.is_apart()) {
          written = held.gather(team, max(bound, kAnyCandidate), target);
        } else {
          held.collect(team, threshold, bound, target);  // the whole list, with the front first
        }
#pragma unroll 1
        for (int i = written + team.rank; i < front.most; i += kTeamThreads) target[i] = kNoCandidate;
        if (team.rank == 0) list = {bound, kept, false, floor};
      }
      team.sync();
    }
    if (is_split && part.is_first && self == 0) {
      const int entries = Shape::kIsListed ? rows.lists.visible(part.group.longest) * rows.lists.block_entries()
                                           : part.group.longest;
      space.split_group(this_block()) = {part.group.row, part.last_block, static_cast<int32_t>(size), shared.front.most,
                                         entries};
    }
    if (part.is_final) break;
    if (kIsRoomy) Feed::reclaim();
    if (kHoldsList) clear_list(self, kThreads);
  }
}

}  // namespace lightning_indexer
