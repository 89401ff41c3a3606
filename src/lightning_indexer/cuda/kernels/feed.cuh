// How keys get from their pages into the registers of the warps that score them.
//
// A tile is kHalves times 64 entries, for one warpgroup: of each half a warp takes sixteen, a lane its share of two
// (keys.cuh). Both feeds have room for several tiles in shared memory and offer the same:
//     make_barriers(rings, watchers)     called by one thread first; watchers: warps beside the producers that go along
//                            from part to part (`next_part`)
//     await_copied, announce_part, announce_loaded(rings)     around the writing of a part, and behind its queries
//     begin(part, rings)     called by all that score, once the part is known
//     has_tile()             whether this warpgroup has a tile left
//     next()                 wait for the next one; returns where the run of eight entries begins of which the lane finishes
//                            one: the first of the warp's first sixteen, for lanes with an odd place in their quad the
//                            second. Of listed entries it is their place (`Lists`), or far behind where there is none
//     read(half, rows)       the lane's share of a half of it
//     release()              once those registers have been used: their place in shared memory may be written again
//     reclaim()              all that wrote to the rings between parts, before the next one
#pragma once

#include "keys.cuh"
#include "work.cuh"

namespace lightning_indexer {

// The pages of a call.
struct Pages {
  const uint8_t* storage;
  const int32_t* block_table;
  int64_t table_row_stride;  // in entries of the table
  uint32_t block_stride;     // in bytes
  uint32_t table_stride;     // in bytes, from column to column
  uint32_t num_blocks;

  __device__ __forceinline__ uint32_t clamp(int32_t block) const {
    return min(static_cast<uint32_t>(max(block, 0)), num_blocks - 1);
  }
};

// The pages of one sequence up to a length: the table is not read behind the block that holds the last entry.
template <class Block>
struct Sequence {
  const uint8_t* row;  // of the block table
  uint32_t last_block;

  __device__ __forceinline__ Sequence(const Pages& pages, const Group& group)
      : row(reinterpret_cast<const uint8_t*>(pages.block_table + group.seq * pages.table_row_stride)),
        last_block(static_cast<uint32_t>(max(group.longest - 1, 0)) / Block::kEntries) {}

  // The block that holds an entry, as the table has it: clamp it where it is used, so as not to wait here.
  __device__ __forceinline__ int32_t find(const Pages& pages, uint32_t entry) const {
    const uint64_t offset = static_cast<uint64_t>(min(entry / Block::kEntries, last_block)) * pages.table_stride;
    return *reinterpret_cast<const int32_t*>(row + offset);
  }
};

// The lane's pieces of one entry, `stride` bytes apart.
template <class Keys>
__device__ __forceinline__ void read_pieces(uint32_t address, uint32_t stride, typename Keys::Row& row) {
#pragma unroll
  for (int p = 0; p < Keys::kPieces; ++p) {
    load_shared<Keys::kPieceBytes>(address + p * stride, row.words + p * (Keys::kPieceBytes / 4));
  }
}

// --- by the lanes themselves (sm_80 and newer) ------------------------------------------------------------------------

// Every lane copies its own share some tiles ahead and reads it back itself, so nobody waits for anybody. kIsListed: a
// tile's entries are those of the next eight runs of a query's list (`Lists`), each wherever it lies.
template <class Keys, class Block, int kGroups, int kStages, int kHalves, bool kIsListed_ = false>
struct LaneFeed {
  static constexpr bool kIsListed = kIsListed_;
  static constexpr int kProducerThreads = 0;
  static constexpr int kTile = kHalves * kHalfEntries, kRows = 2 * kHalves;  // of a lane
  static constexpr int kPieceStride = kWarpThreads * Keys::kPieceBytes, kRowStride = Keys::kPieces * kPieceStride;
  static constexpr int kStageBytes = kRows * (kRowStride + 4 * kWarpThreads * Keys::kScaleWords);
  static constexpr int kControlBytes = 0, kBytes = kGroups * 4 * kStages * kStageBytes;
  static constexpr int kStretches = kIsListed ? 2 : 1;  // that a warp's sixteen entries lie in
  // Behind every length, and at the start of a run in every page.
  static constexpr uint32_t kNoEntry = 0x7FFFFFF8u;
  static_assert((kStages & (kStages - 1)) == 0, "stages are taken in turn");
  static_assert(!kIsListed || kHalves == 1, "the halves of a tile are 64 entries apart");

  const Pages& pages;
  const Lists& lists;
  const int32_t* list;          // the query's
  int listed, visible, length;  // ids in it to look at; blocks and entries that the query sees
  uint32_t lane, warp;          // of the warpgroup's four
  uint32_t pieces, words;       // shared addresses: of the lane's first piece, and of its first scale word
  Sequence<Block> sequence;
  Walk walk;
  uint32_t to_fetch, to_score, stage;
  int32_t next_blocks[kHalves * kStretches];  // of the tile to fetch
  uint32_t next_entries[kStretches];          // where its stretches begin, if they are listed
  uint32_t entries[kStages];                  // what `next` returns for each tile under way, oldest first

  __device__ __forceinline__ LaneFeed(const Pages& pages, const Rows& rows)
      : pages(pages), lists(rows.lists), sequence(pages, {}), walk(0, 1) {}

  __device__ static __forceinline__ void take_registers() {}
  __device__ static __forceinline__ void make_barriers(uint8_t*, int) {}
  __device__ static __forceinline__ void await_copied(uint8_t*) {}
  __device__ static __forceinline__ void announce_part(uint8_t*) {}
  __device__ static __forceinline__ void announce_loaded(uint8_t*) {}

  __device__ __forceinline__ void begin(const Part& part, uint8_t* rings) {  // an equal stretch for each warpgroup
    const uint32_t thread = this_thread();
    lane = thread % kWarpThreads, warp = thread / kWarpThreads % 4;
    const uint32_t ring = shared_address(rings) + thread / kWarpThreads * (kStages * kStageBytes);
    pieces = ring + lane * Keys::kPieceBytes;
    words = ring + kRows * kRowStride + 4 * lane;
    const uint32_t group = thread / 128, all = part.end - part.begin, from = all * group / kGroups;
    to_fetch = to_score = all * (group + 1) / kGroups - from;
    if constexpr (kIsListed) {
      list = lists.of(part.group.row), length = part.group.longest;
      visible = lists.visible(length), listed = lists.listed(length);
      walk = Walk(part.begin + from, tiles_of<kTile>(listed * lists.block_entries()));
    } else {
      walk = Walk(part.begin + from, part.group.template tiles<kTile>());
    }
    sequence = Sequence<Block>(pages, part.group);
    find_next();
    stage = 0;
#pragma unroll
    for (int i = 1; i < kStages; ++i) fetch(i - 1), shift();
  }

  __device__ __forceinline__ bool has_tile() const { return to_score != 0; }
  __device__ __forceinline__ uint32_t turn() const { return to_score; }

  __device__ __forceinline__ uint32_t next() {
    fetch((stage + kStages - 1) & (kStages - 1));
    copy_wait<kStages - 1>();
    --to_score;
    const uint32_t first = entries[0];
    shift();
    return first;
  }

  __device__ __forceinline__ void read(int half, typename Keys::Row (&rows)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t offset = stage * kStageBytes, row = 2 * half + i;
      read_pieces<Keys>(pieces + offset + row * kRowStride, kPieceStride, rows[i]);
      if constexpr (Keys::kScaleWords) load_shared<4>(words + offset + 4 * row * kWarpThreads, &rows[i].scale);
    }
  }

  __device__ __forceinline__ void release() { stage = (stage + 1) & (kStages - 1); }
  __device__ static __forceinline__ void reclaim() {}

 private:
  // Of the warp's share of the tile to fetch; where entries are listed, its place.
  __device__ __forceinline__ uint32_t first_entry() const { return walk.tile * kTile + warp * 16; }

  // What `next` will return for that tile.
  __device__ __forceinline__ uint32_t finished_run() const {
    const uint32_t run = first_entry() + 8 * (lane & 1);
    if constexpr (!kIsListed) return run;
    const uint32_t entry = (lane & 1 ? next_entries[1] : next_entries[0]) + lane / 4;
    return entry < static_cast<uint32_t>(length) ? run : kNoEntry;
  }

  // The first entry of a run of the query's list.
  __device__ __forceinline__ uint32_t listed_entry(uint32_t run) const {
    const int i = static_cast<int>(run >> lists.shift);
    const int block = i < listed ? list[i] : -1;
    if (block < 0 || block >= visible) return kNoEntry;
    return ((static_cast<uint32_t>(block) << lists.shift) + run % (1u << lists.shift)) * Lists::kRunEntries;
  }

  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int i = 1; i < kStages; ++i) entries[i - 1] = entries[i];
  }

  __device__ __forceinline__ void find_next() {
    if constexpr (kIsListed) {
#pragma unroll
      for (int i = 0; i < kStretches; ++i) {
        next_entries[i] = to_fetch ? listed_entry(first_entry() / Lists::kRunEntries + i) : kNoEntry;
        next_blocks[i] = to_fetch ? sequence.find(pages, next_entries[i]) : 0;
      }
    } else {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        next_blocks[half] = to_fetch ? sequence.find(pages, first_entry() + half * kHalfEntries) : 0;
      }
    }
  }

  __device__ __forceinline__ void fetch(uint32_t target) {
    entries[kStages - 1] = finished_run();
    if (to_fetch) {
      const uint32_t place = target * kStageBytes, c = lane % 4;
#pragma unroll
      for (int stretch = 0; stretch < kHalves * kStretches; ++stretch) {
        const uint32_t first = kIsListed ? next_entries[stretch % kStretches] : first_entry() + stretch * kHalfEntries;
        const uint32_t row = first % Block::kEntries + lane / 4;
        const uint8_t* block =
            pages.storage + static_cast<uint64_t>(pages.clamp(next_blocks[stretch])) * pages.block_stride;
        const uint8_t* source = block + row * Block::kDataBytes + c * Keys::kPieceBytes;
        const uint8_t* scales = block + Block::kScaleOffset + row * Block::kScaleBytes + 4 * Keys::scale_word(c);
        constexpr int kEach = 2 / kStretches;  // of the lane's two rows of a half
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const uint32_t kept = kEach * stretch + i;
#pragma unroll
          for (int p = 0; p < Keys::kPieces; ++p) {
            copy_async<Keys::kPieceBytes>(pieces + place + kept * kRowStride + p * kPieceStride,
                                          source + 8 * i * Block::kDataBytes + 4 * p * Keys::kPieceBytes);
          }
          if constexpr (Keys::kScaleWords) {
            copy_async<4>(words + place + 4 * kept * kWarpThreads, scales + 8 * i * Block::kScaleBytes);
          }
        }
      }
      walk.advance();
      --to_fetch;
      find_next();
    }
    copy_commit();
  }
};

// --- by the copy engine (Hopper) --------------------------------------------------------------------------------------

// For each warpgroup, a warp of its own has whole tiles copied, as they lie in their pages, into the warpgroup's slots. The
// tiles of a block are numbered throughout: tile t goes to slot t % kSlots, to warpgroup t % kGroups, by producer
// t % kGroups. (A producer for several would wait for one that has met its block to cut lists back, while the block waits
// for another that gets no tiles. And a warp waits for a tile to arrive before it asks for the next.) Producers need few
// registers and give the others what they have too many.
template <class Keys, class Block, int kGroups, int kStages, int kHalves>
struct BulkFeed {
  static constexpr bool kIsListed = false;
  static constexpr int kTile = kHalves * kHalfEntries;
  static constexpr int kProducerThreads = kGroups <= 4 ? 128 : 256;  // registers change hands by warpgroups
  // Registers of a thread come in eights; together no more than the block was launched with, or it waits for ever.
  static constexpr int kThreads = kGroups * 128 + kProducerThreads, kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kScorerRegisters =
      (kLaunchRegisters * kThreads - kProducerRegisters * kProducerThreads) / (kGroups * 128) / 8 * 8;
  static_assert(kScorerRegisters <= 256, "setmaxnreg gives no more");
  static constexpr int kSlots = kGroups * kStages;
  // A tile comes in runs whose data rows lie side by side in a page, and so do their scale rows; both, if a page is one run.
  static constexpr int kRun = Block::kEntries % 64 == 0 ? 64 : Block::kEntries % 32 == 0 ? 32 : 16;
  static constexpr int kDataBytes = kRun * Block::kDataBytes, kScaleBytes = kRun * Block::kScaleBytes;
  static constexpr int kCopies = kTile / kRun;  // of a tile, each by a lane
  static constexpr int kRunBytes = kDataBytes + kScaleBytes, kSlotBytes = kCopies * kRunBytes;
  static constexpr bool kIsPage = Block::kEntries == kRun && Block::kScaleOffset == kDataBytes;

  struct Control {
    uint64_t full[kSlots], empty[kSlots];
    uint32_t tiles[kSlots];  // which one lies in a slot
    uint32_t parts;          // announced so far
    uint64_t known, loaded, copied;  // a part is, its queries are, its tiles are
  };
  // (Between the two kinds of warps there are no named barriers: compute-sanitizer follows one only where all that meet at it
  // do so at the same instruction.)
  static constexpr int kParts = 20 * kSlots;
  static constexpr int kKnown = 16 * kSlots + (4 * kSlots + 11) / 8 * 8, kLoaded = kKnown + 8, kCopied = kKnown + 16;
  static_assert(sizeof(Control) == kCopied + 8, "as addressed");
  static constexpr int kControlBytes = (sizeof(Control) + 127) / 128 * 128;
  static constexpr int kBytes = kControlBytes + kSlots * kSlotBytes;

  static_assert((kStages & (kStages - 1)) == 0, "stages are taken in turn");

  // Tiles of a part that go to warpgroup `group`: every kGroups-th from the `first` on.
  struct Share {
    uint32_t first, count;
    __device__ __forceinline__ Share(const Part& part, uint32_t group) {
      const uint32_t all = part.end - part.begin, last = part.number % kGroups;
      first = group + (group < last ? kGroups : 0) - last;
      count = first < all ? (all - first + kGroups - 1) / kGroups : 0;
    }
  };

  uint32_t group;
  uint32_t full;           // shared addresses of the warpgroup's first slot: its barrier,
  uint32_t pieces, words;  // the lane's first piece and scale word
  uint32_t step, left;     // tiles taken so far; left of this part

  __device__ __forceinline__ BulkFeed(const Pages&, const Rows&) : step(0) {}

  __device__ static __forceinline__ void give_registers() { release_registers<kProducerRegisters>(); }
  __device__ static __forceinline__ void take_registers() { acquire_registers<kScorerRegisters>(); }

  // Before all threads meet and anybody waits. (Several threads or warps take longer.)
  __device__ static __forceinline__ void make_barriers(uint8_t* rings, int watchers) {
    const uint32_t control = shared_address(rings);
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(control + 8 * i, kCopies);
      mbarrier_init(control + 8 * (kSlots + i), 4);  // the warps of a warpgroup
    }
    mbarrier_init(control + kKnown, 1);
    mbarrier_init(control + kLoaded, 4 * kGroups);
    mbarrier_init(control + kCopied, kGroups + watchers);
    store_shared(control + kParts, 0);
    mbarrier_publish();
  }

  // One warp, around the writing of a part.
  __device__ static __forceinline__ void await_copied(uint8_t* rings) {
    uint32_t parts;
    load_shared<4>(shared_address(rings) + kParts, &parts);
    mbarrier_wait(shared_address(rings) + kCopied, (parts & 1) ^ 1);  // the first time round it counts as copied
  }
  __device__ static __forceinline__ void announce_part(uint8_t* rings) {
    __syncwarp();
    if (threadIdx.x % kWarpThreads != 0) return;
    const uint32_t control = shared_address(rings);
    uint32_t parts;
    load_shared<4>(control + kParts, &parts);
    store_shared(control + kParts, parts + 1);
    mbarrier_arrive(control + kKnown);
  }
  // A thread of each warp that scores, once it has loaded its share of the part's queries.
  __device__ static __forceinline__ void announce_loaded(uint8_t* rings) {
    mbarrier_arrive(shared_address(rings) + kLoaded);
  }

  __device__ __forceinline__ void begin(const Part& part, uint8_t* rings) {
    const uint32_t thread = this_thread(), lane = thread % kWarpThreads, c = lane % 4;
    const uint32_t row = thread / kWarpThreads % 4 * 16 + lane / 4;
    group = thread / 128;
    full = shared_address(rings) + 8 * group;
    const uint32_t slot = shared_address(rings) + kControlBytes + group * kSlotBytes;
    pieces = slot + row / kRun * kRunBytes + row % kRun * Block::kDataBytes + c * Keys::kPieceBytes;
    words = slot + row / kRun * kRunBytes + kDataBytes + row % kRun * Block::kScaleBytes + 4 * Keys::scale_word(c);
    left = Share(part, group).count;
  }
  __device__ __forceinline__ bool has_tile() const { return left != 0; }
  __device__ __forceinline__ uint32_t turn() const { return step; }

  __device__ __forceinline__ uint32_t next() {
    const uint32_t slot = step % kStages * kGroups, barrier = full + 8 * slot;
    mbarrier_wait(barrier, step / kStages & 1);
    uint32_t tile;
    load_shared<4>(barrier + 16 * kSlots - 4 * (slot + group), &tile);
    return tile * kTile + threadIdx.x / kWarpThreads % 4 * 16 + threadIdx.x % 2 * 8;
  }

  __device__ __forceinline__ void read(int half, typename Keys::Row (&rows)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t offset = step % kStages * (kGroups * kSlotBytes) + half * (kHalfEntries / kRun * kRunBytes);
      read_pieces<Keys>(pieces + offset + 8 * i * Block::kDataBytes, 4 * Keys::kPieceBytes, rows[i]);
      if constexpr (Keys::kScaleWords) load_shared<4>(words + offset + 8 * i * Block::kScaleBytes, &rows[i].scale);
    }
  }

  // Once a product that needs them is issued: an arrival may overtake loads that are still under way, and the copy engine
  // would write over what they are to read. A warp issues a product as one, so all its lanes have read.
  __device__ __forceinline__ void release() {
    if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(full + 8 * (step % kStages * kGroups + kSlots));
    ++step, --left;
  }

  // The copy engine writes behind ordinary accesses' back.
  __device__ static __forceinline__ void reclaim() { wgmma_publish(); }

  // A warp beside those that score: wait for the next part, after `parts`; false if there is none. Then let it be overwritten,
  // and find out whether it was the last: those that wait no more let the block end sooner.
  __device__ static __forceinline__ bool next_part(uint8_t* rings, const Part& part, uint32_t parts) {
    mbarrier_wait(shared_address(rings) + kKnown, parts & 1);
    return !part.is_none;
  }
  __device__ static __forceinline__ bool leave_part(uint8_t* rings, const Part& part) {
    const bool is_final = part.is_final;
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(shared_address(rings) + kCopied);
    return is_final;
  }

  // The producer of warpgroup `group`.
  struct Producer {
    uint32_t group, step;  // tiles copied so far

    __device__ __forceinline__ explicit Producer(uint32_t group) : group(group), step(0) {}

    // All lanes, part after part until there is none. `part` is written anew once this has arrived at `copied`.
    __device__ __forceinline__ void run(const Pages& pages, uint8_t* rings, const Part& part) {
      for (uint32_t parts = 0; next_part(rings, part, parts); ++parts) {
        produce(pages, rings, part);
        if (leave_part(rings, part)) return;
      }
    }

   private:
    // Of the barriers, for the part announced last.
    __device__ __forceinline__ static uint32_t parity(uint32_t control) {
      uint32_t parts;
      load_shared<4>(control + kParts, &parts);
      return (parts & 1) ^ 1;
    }

    // A lane looks up and copies one run. Behind the first tile it waits until the part's queries are loaded: they would come
    // last if they had to queue behind all keys that the slots of all blocks hold. And it has one tile under way at a time,
    // which keeps memory busy: whatever else a block reads, such as instructions, would queue behind more.
    __device__ __forceinline__ void produce(const Pages& pages, uint8_t* rings, const Part& part) {
      constexpr uint32_t kTilesAtOnce = kWarpThreads / kCopies;
      const uint32_t lane = threadIdx.x % kWarpThreads, run = lane % kCopies;
      const uint32_t control = shared_address(rings);
      const Sequence<Block> sequence(pages, part.group);
      const Share share(part, group);
#pragma unroll 1
      for (uint32_t done = 0; done < share.count; done += kTilesAtOnce) {
        // A look-up for every lane at once; the slots that are full meanwhile hide its latency.
        const uint32_t mine = min(done + lane / kCopies, share.count - 1);
        const uint32_t tile = Walk(part.begin + share.first + kGroups * mine, part.group.template tiles<kTile>()).tile;
        const uint32_t entry = tile * kTile + run * kRun, row = entry % Block::kEntries;
        const int32_t block = sequence.find(pages, entry);
        const uint8_t* source = pages.storage + static_cast<uint64_t>(pages.clamp(block)) * pages.block_stride;
        const uint32_t count = min(share.count - done, kTilesAtOnce);
#pragma unroll 1
        for (uint32_t i = 0; i < count; ++i, ++step) {
          if (done + i == 1) mbarrier_wait(control + kLoaded, parity(control));
          const uint32_t slot = step % kStages * kGroups + group;
          const uint32_t full = control + 8 * slot, target = control + kControlBytes + slot * kSlotBytes;
          mbarrier_wait(full + 8 * kSlots, (step / kStages & 1) ^ 1);  // the first time round it counts as released
          if (step > 0) {  // the last tile has arrived
            const uint32_t last = step - 1;
            mbarrier_wait(control + 8 * (last % kStages * kGroups + group), last / kStages & 1);
          }
          if (lane / kCopies == i) {
            if (run == 0) store_shared(control + 16 * kSlots + 4 * slot, tile);
            mbarrier_expect(full, kRunBytes);
            const uint32_t place = target + run * kRunBytes;
            copy_bulk(place, source + row * Block::kDataBytes, kIsPage ? kRunBytes : kDataBytes, full);
            if constexpr (!kIsPage && kScaleBytes > 0) {
              copy_bulk(place + kDataBytes, source + Block::kScaleOffset + row * Block::kScaleBytes, kScaleBytes, full);
            }
          }
          __syncwarp();
        }
      }
      if (share.count < 2) mbarrier_wait(control + kLoaded, parity(control));  // each part is waited for
    }
  };
};

}  // namespace lightning_indexer
