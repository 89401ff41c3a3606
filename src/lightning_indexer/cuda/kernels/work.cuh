// Who scores what: the work of a call, laid out in a line and cut into equal ranges, one per block of threads.
//
// Consecutive queries of one sequence form groups of up to kQueries, which share a pass over the sequence's keys. A
// group's pass is a number of tiles of kTile entries; a tile costs one unit for reading the keys and one for each product.
// Every block finds its own range from seq_ids and valid_lens alone, so nothing is planned on the host and a captured graph
// follows its inputs. Where a range ends inside a group, the group is split: each of its blocks keeps the top k of its part
// in the workspace, and merge.cu makes one of them.
//
// A group's tiles are visited in an order that spreads any stretch of them over the whole sequence (`Walk`), so that
// thresholds rise early however the scores are arranged.
#pragma once

#include "memory.cuh"
#include "ptx.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace lightning_indexer {

// A barrier of the first kThreads threads of a block: those that score. (Others may feed them, see feed.cuh.)
template <int kThreads>
__device__ __forceinline__ void sync_scorers() {
  barrier_sync<kThreads>(0);
}

constexpr int kHalfEntries = 64;  // that a warpgroup multiplies at once; a tile has one such half or two

// The sequence of query `row`: that row itself where there are no seq_ids.
__device__ __forceinline__ int64_t clamped_seq(const Indices& seq_ids, int64_t row, int64_t num_seqs) {
  const int64_t seq = seq_ids.values ? seq_ids[row] : row;
  return seq < 0 ? 0 : seq < num_seqs ? seq : num_seqs - 1;
}

// The blocks of entries that each query may choose from, if it may not choose from all: int32 [num_tokens, count] ids,
// ascending, -1 behind the last. A block is 2^shift runs of kRunEntries entries; a run never crosses a page.
//
// Until a result is written an entry goes by its place, `i * block_entries() + offset` in the i-th block of a list. Places
// have the order of entries, and they are distinct whatever a list holds: selection counts on that.
struct Lists {
  static constexpr int kRunEntries = 8;
  const int32_t* __restrict__ blocks;
  int32_t count, shift;

  __device__ __forceinline__ int block_entries() const { return kRunEntries << shift; }
  // Blocks of which a query that sees `length` entries sees any.
  __device__ __forceinline__ int visible(int length) const {
    return (length >> shift) / kRunEntries + (length % block_entries() != 0);
  }
  // Ids to look at. Those that ascend are no smaller than their places, so what is visible comes first.
  __device__ __forceinline__ int listed(int length) const { return min(visible(length), count); }

  __device__ __forceinline__ const int32_t* of(int64_t row) const { return blocks + row * count; }

  // The entry at a place that a visible block of query `row` holds.
  __device__ __forceinline__ uint32_t entry(int64_t row, uint32_t place) const {
    const uint32_t offset = place % static_cast<uint32_t>(block_entries());
    return static_cast<uint32_t>(of(row)[(place >> shift) / kRunEntries] << shift) * kRunEntries + offset;
  }
};

// The queries of a call: which sequence, how many entries. What lies outside is clamped.
struct Rows {
  const int32_t* __restrict__ valid_lens;
  Indices seq_ids;  // values null: row t is sequence t
  int32_t count;
  int64_t num_seqs;
  int64_t max_entries;
  Lists lists;

  __device__ __forceinline__ int64_t seq(int row) const {
    return clamped_seq(seq_ids, row, num_seqs);
  }
  __device__ __forceinline__ int len(int row) const {
    const int most = static_cast<int>(min(max_entries, static_cast<int64_t>(0x7FFFFFFF)));
    return min(max(valid_lens[row], 0), most);
  }
};

template <int kTile>
__device__ __forceinline__ int tiles_of(int entries) {  // at least one, so that some block writes the results
  return static_cast<int>(max((static_cast<uint32_t>(entries) + kTile - 1) / kTile, 1u));
}

// Queries `row` .. `row + size - 1`, all of sequence `seq`; `longest` of their lengths.
struct Group {
  int row, size;
  int64_t seq;
  int longest;

  template <int kTile>
  __device__ __forceinline__ int tiles() const {
    return tiles_of<kTile>(longest);
  }
};

// The order of visits: kStreams walks, each through its own stretch of the tiles, taken in turn.
struct Walk {
  static constexpr uint32_t kStreams = 31;
  uint32_t tile;

  // From `position` in that order.
  __device__ __forceinline__ Walk(uint32_t position, uint32_t tiles)
      : length_(tiles / kStreams), longer_(tiles % kStreams), stream_(position % kStreams), step_(position / kStreams) {
    tile = stream_ * length_ + min(stream_, longer_) + step_;
  }

  __device__ __forceinline__ void advance() {
    tile += length_ + (stream_ < longer_ ? 1 : 0);
    if (++stream_ == kStreams) stream_ = 0, tile = ++step_;
  }

 private:
  uint32_t length_, longer_;  // tiles of a stretch; how many stretches have one more
  uint32_t stream_, step_;
};

// A block's part of a group: tiles `begin` .. `end - 1` in the order of visits; a feed shares them out to warpgroups.
struct Part {
  Group group;
  int begin, end;
  bool is_first, is_last;  // of the group's parts
  bool is_none;            // there is no further part
  bool is_final;           // there will be none behind this one
  int last_block, parts;   // the last block that has a part of the group, and how many have
  uint32_t number;         // tiles of the block's earlier parts
};

// A block's range of the work, kept in shared memory: what it costs in registers is wanted elsewhere.
struct Range {
  int64_t share;       // units of a block
  int64_t begin, end;  // this block's
  int64_t start;       // where the next group starts
  int row;             // and its first query
  uint32_t number;     // tiles of the parts so far
  bool is_wide;        // units need 64 bits
};

template <int kQueries, int kPerMma, int kMinTiles, int kTile, bool kIsListed>
struct Planner {
  static_assert(!kIsListed || kQueries == 1, "each query has a list of its own");
  const Rows& rows;

  // Find this block's range. One warp calls this and `next`; both take as long as their instructions, one after the other, so
  // units have 32 bits where that is enough. Where it is not, `next` does all, apart, so that what is seldom called need not
  // be fetched.
  __device__ __forceinline__ void find_range(Range& range) const {
    // No group has more units than twice the tiles of its queries.
    const uint64_t most_entries = static_cast<uint64_t>(rows.max_entries) + (kIsListed ? rows.lists.block_entries() : 0);
    const uint64_t most_units = 2 * static_cast<uint64_t>(rows.count) * (most_entries / kTile + 1);
    if (most_units >> 31 == 0) {
      find_range_in<uint32_t>(range);
    } else {
      if (threadIdx.x % kWarpThreads == 0) range.share = 0, range.is_wide = true;
      __syncwarp();
    }
  }

  // The next part of this block.
  __device__ __forceinline__ void next(Range& range, Part& part) const {
    const Range now = range;  // read at once
    if (!now.is_wide) {
      next_in<uint32_t>(now, range, part);
    } else {
      next_wide(rows, range, part);
    }
  }

 private:
  __device__ __noinline__ static void next_wide(Rows rows, Range& range, Part& part) {
    const Planner planner = {rows};
    if (range.share == 0) planner.template find_range_in<int64_t>(range);
    const Range now = range;
    planner.template next_in<int64_t>(now, range, part);
  }

  // now: `range` as it is.
  template <class Units>
  __device__ __forceinline__ void next_in(const Range& now, Range& range, Part& part) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const Units begin = static_cast<Units>(now.begin), end = static_cast<Units>(now.end);
    const Units start = static_cast<Units>(now.start);
    if (start >= end) {
      if (lane == 0) part.is_none = true;
      return;
    }
    Group group = group_at(now.row, lane);
    have_now(group.seq);  // under way with the length, not behind the division
    const Units each = unit(group.size), stop = start + static_cast<Units>(cost(group));
    // Four quotients at once, one per lane: where the part begins and ends, the first and the last block of the group.
    const Units from = begin > start ? begin - start + each - 1 : 0;
    const Units to = (end < stop ? end : stop) - start + each - 1;
    const Units dividend = lane == 0 ? from : lane == 1 ? to : lane == 2 ? start : stop - 1;
    const int quotient = static_cast<int>(dividend / (lane < 2 ? each : static_cast<Units>(now.share)));
    const int part_end = __shfl_sync(kFullWarp, quotient, 1);
    const int first_block = __shfl_sync(kFullWarp, quotient, 2), last_block = __shfl_sync(kFullWarp, quotient, 3);
    if (lane != 0) return;
    part = {group, quotient, part_end, begin <= start, stop <= end, /*is_none=*/false, /*is_final=*/stop >= end,
            last_block, last_block - first_block + 1, now.number};
    range.number = now.number + (part_end - quotient);
    range.row = now.row + group.size;
    range.start = stop;
  }

  // The group that begins at a row, which all lanes look at together.
  __device__ __forceinline__ Group group_at(int first, int lane) const {
    if constexpr (kQueries == 1) return {first, 1, rows.seq(first), rows.len(first)};
    const int row = first + lane;
    const bool is_row = lane < kQueries && row < rows.count;
    const int64_t seq = rows.seq(is_row ? row : first);
    const int64_t first_seq = __shfl_sync(kFullWarp, seq, 0);
    const bool differs = !is_row || seq != first_seq;
    const int size = __ffs(static_cast<int>(__ballot_sync(kFullWarp, differs))) - 1;
    return {first, size, first_seq, static_cast<int>(__reduce_max_sync(kFullWarp, lane < size ? rows.len(row) : 0))};
  }

  // A lane walks its share of the rows.
  template <class Units>
  __device__ __forceinline__ void find_range_in(Range& range) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int each = static_cast<int>((static_cast<uint32_t>(rows.count) + kWarpThreads - 1) / kWarpThreads);
    const int from = min(lane * each, rows.count), to = min(from + each, rows.count);

    int run = -1;  // where the run of equal seq_ids that row `from` continues began
    if (kQueries > 1) {
      for (int i = from; i < to; ++i) {
        if (i == 0 || rows.seq(i) != rows.seq(i - 1)) run = i;
      }
      run = greatest_before(lane, run);
    }
    Units mine = 0;
    uint32_t largest = 0, groups = 0;
    walk(from, to, run, [&](int i) {
      const Units more = static_cast<Units>(cost(one_group(i)));
      mine += more, largest = max(largest, static_cast<uint32_t>(more)), ++groups;
    });
    const Units reach = sum_up_to(lane, mine);  // of this lane's groups and those before
    const Units before = reach - mine, total = __shfl_sync(kFullWarp, reach, kWarpThreads - 1);
    largest = __reduce_max_sync(kFullWarp, largest);
    groups = kQueries == 1 ? rows.count : __reduce_add_sync(kFullWarp, groups);
    const Units share = fair_share<Units>(total, largest, groups, lane);
    const uint64_t skipped = static_cast<uint64_t>(this_block()) * static_cast<uint64_t>(share);
    const Units begin = skipped < static_cast<uint64_t>(total) ? static_cast<Units>(skipped) : total;
    const Units end = begin + min(share, total - begin);
    if (lane == 0) range = {share, begin, end, end, 0, 0, sizeof(Units) > 4};  // nothing to do, unless a group is found
    __syncwarp();
    if (begin >= before && begin < reach) {
      Units at = before;
      int row = from;
      if constexpr (kQueries == 1) {
        for (; row + 1 < to; ++row) {  // a lane has one row, mostly
          const Units next = at + static_cast<Units>(cost(one_group(row)));
          if (begin < next) break;
          at = next;
        }
        range.start = at, range.row = row;
      } else {
        walk(from, to, run, [&](int i) {
          const Units next = at + static_cast<Units>(cost(one_group(i)));
          if (begin >= at && begin < next) range.start = at, range.row = i;
          at = next;
        });
      }
    }
    __syncwarp();
  }

  // Units of a block: an equal part, but no less than occupies its warpgroups. Where there are no more groups than
  // blocks, each is cut into as many equal parts as there are blocks for it, or stays whole if that is no later: a cut
  // costs as much as kCutTiles (measured: merging, and a second start, on an H100).
  template <class Units>
  __device__ __forceinline__ static Units fair_share(Units total, Units largest, Units groups, int lane) {
    constexpr Units kCutTiles = 36 * 64 / kTile;
    const Units blocks = all_blocks(), least = kMinTiles * unit(kQueries);
    // Two quotients at once: an equal part, and the blocks that there are for a group.
    const Units quotient = (lane == 0 ? total + blocks - 1 : blocks) / (lane == 0 ? blocks : groups);
    Units share = __shfl_sync(kFullWarp, quotient, 0);
    const Units each = __shfl_sync(kFullWarp, quotient, 1);
    if (groups <= blocks) {
      if (largest <= share + kCutTiles * unit(kQueries)) {
        share = largest;
      } else {
        const Units cut = (largest + each - 1) / each;
        if (cut >= share && cut <= share + share / 8) share = cut;
      }
    }
    return share < least ? least : share;
  }

  __device__ __forceinline__ static int unit(int size) {
    return kQueries == 1 ? 1 : 1 + (size + kPerMma - 1) / kPerMma;
  }

  __device__ __forceinline__ int64_t cost(const Group& group) const {
    if constexpr (kIsListed) return tiles_of<kTile>(rows.lists.listed(group.longest) * rows.lists.block_entries());
    return static_cast<int64_t>(unit(group.size)) * group.template tiles<kTile>();
  }

  // Calls visit(i) for every group that begins in rows `from` .. `to - 1`, in a run of equal seq_ids that began at `run`.
  template <class Visit>
  __device__ __forceinline__ void walk(int from, int to, int run, const Visit& visit) const {
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      if (kQueries > 1 && (i == 0 || rows.seq(i) != rows.seq(i - 1))) run = i;
      if (kQueries == 1 || (i - run) % kQueries == 0) visit(i);
    }
  }

  __device__ __forceinline__ Group one_group(int first) const {
    Group group = {first, 1, 0, rows.len(first)};
    while (group.size < kQueries && first + group.size < rows.count &&
           rows.seq(first + group.size) == rows.seq(first)) {
      group.longest = max(group.longest, rows.len(first + group.size));
      ++group.size;
    }
    return group;
  }
};

// --- workspace ------------------------------------------------------------------------------------------------------

// How many of a part's best candidates the merge reads at once: `least` to `most`. The share of each part in the top k and
// four times its deviation: parts are alike (`Walk`), so what lies behind is wanted by a call in a hundred. Or a lone query's
// whole list, if the parts are few and it is no longer than `whole`.
struct Front {
  int least, most, whole;

  __device__ __forceinline__ Front() {}
  __device__ __forceinline__ Front(int top_k, int parts) {
    const int room = merge_room(top_k) / parts;
    const float share = static_cast<float>(top_k) / static_cast<float>(parts);
    least = static_cast<int>(share + 4 * sqrtf(share)) + 1;
    most = min(min(least + max(6, least / 4), room), top_k);
    least = min(least, most - most / 4);
    whole = parts <= 4 ? room : 0;
  }

  // Candidates that a merging block holds: four times top_k and more, or what every GPU has memory for. score_topk.py has the
  // same.
  __device__ __forceinline__ static int merge_room(int top_k) {
    return top_k <= 512 ? 4096 : top_k <= 2048 ? 8192 : 7168;
  }
};

// What the blocks leave behind for the merge. Of block b: the candidates of the group it is at, `kQueries` lists of
// `capacity` keys, where the first part of a split group stays; as many for a later part, of top_k keys where there are
// several; a lone query's fronts; what is in them, and what to merge. cuda/score_topk.py computes the size.
struct SplitGroup {
  int32_t row, last_block;
  int32_t size : 8, front : 24;  // size 0: no group's first part ended here unfinished. `Front::most`
  int32_t entries;               // below which all its candidates' entries lie, or their places (`Lists`)
};

// A part's best, at least the top k: `count` keys, those from `bound` on in front. Places in front that are left over hold
// further keys or kNoCandidate. A whole list is where `Workspace` has candidates of a part. The top k have the rank `floor` at
// the least.
struct PartList {
  uint64_t bound;  // kNoCandidate: all are in front
  int32_t count : 31;
  bool is_whole : 1;
  uint32_t floor;
};
static_assert(sizeof(PartList) == 16 && sizeof(SplitGroup) == 16, "as score_topk.py counts them");

struct Workspace {
  uint8_t* base;
  int32_t queries, capacity, top_k;

  // A lone query's lists stay where they are collected, and what lies in front is written apart.
  __device__ __forceinline__ bool is_apart() const { return queries == 1; }
  // Of a later part's list.
  __device__ __forceinline__ int later_capacity() const { return is_apart() ? capacity : top_k; }

  __device__ __forceinline__ uint64_t* keys() const { return reinterpret_cast<uint64_t*>(base); }
  __device__ __forceinline__ uint64_t* candidates(int block, int query) const {
    return keys() + (static_cast<int64_t>(block) * queries + query) * capacity;
  }
  __device__ __forceinline__ uint64_t* later_part(int block, int query) const {
    return keys() + static_cast<int64_t>(all_blocks()) * queries * capacity +
           (static_cast<int64_t>(block) * queries + query) * later_capacity();
  }
  // Where a part's candidates are collected, in keys.
  __device__ __forceinline__ uint32_t collected_at(int block, int query, bool is_first) const {
    return static_cast<uint32_t>((is_apart() && !is_first ? later_part(block, query) : candidates(block, query)) - keys());
  }
  // The front of a part, and how far it is from there to that of the next block's later part.
  __device__ __forceinline__ uint64_t* front(int block, int query, bool is_first) const {
    if (is_apart()) return fronts() + (2 * block + !is_first) * top_k;
    return is_first ? candidates(block, query) : later_part(block, query);
  }
  __device__ __forceinline__ int front_stride() const { return is_apart() ? 2 * top_k : queries * later_capacity(); }
  __device__ __forceinline__ PartList& first_list(int block, int query) const {
    return part_lists()[block * queries + query];
  }
  __device__ __forceinline__ PartList& later_list(int block, int query) const {
    return part_lists()[(all_blocks() + block) * queries + query];
  }
  __device__ __forceinline__ SplitGroup& split_group(int block) const {
    return reinterpret_cast<SplitGroup*>(part_lists() + 2 * all_blocks() * queries)[block];
  }

 private:
  __device__ __forceinline__ PartList* part_lists() const {
    return reinterpret_cast<PartList*>(fronts() + (is_apart() ? all_blocks() * 2 * top_k : 0));
  }
  __device__ __forceinline__ uint64_t* fronts() const {
    return keys() + static_cast<int64_t>(all_blocks()) * queries * (capacity + later_capacity());
  }
};

}  // namespace lightning_indexer
