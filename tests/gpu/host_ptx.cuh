// Takes the place of kernels/ptx.cuh on the host: the same functions without inline PTX.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16 : 0x7FFFu;
}

inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline float bf16_value(uint32_t bits) { return __uint_as_float(bits << 16); }

// Of a sum that a double holds, or whose lost part cannot decide the rounding.
inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  const double sum = static_cast<double>(bf16_value(a)) * bf16_value(b) + bf16_value(c);
  if (!std::isfinite(sum) || sum == 0) return bf16_bits(static_cast<float>(sum));
  const int quantum = max(std::ilogb(sum) - 7, -133);  // of eight significant bits, or of subnormal numbers
  return bf16_bits(static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(sum, -quantum)), quantum)));
}

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return fma_bf16(a, b, c) | fma_bf16(a >> 16, b >> 16, c >> 16) << 16;
}

inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }

inline uint32_t max_or_nan_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(max_or_nan(bf16_value(a), bf16_value(b)), max_or_nan(bf16_value(a >> 16), bf16_value(b >> 16)));
}

inline uint32_t abs_bf16x2(uint32_t x) { return x & 0x7FFF7FFFu; }

inline uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(std::fmin(bf16_value(a), bf16_value(b)), std::fmin(bf16_value(a >> 16), bf16_value(b >> 16)));
}

inline float approximate_reciprocal(float x) { return 1.0f / x; }

inline void have_now(int64_t&) {}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15u, byte = bytes >> (8 * (nibble & 7u)) & 0xFFu;
    result |= (nibble & 8u ? byte & 0x80u ? 0xFFu : 0u : byte) << (8 * i);
  }
  return result;
}

inline uint32_t max_u16x2(uint32_t a, uint32_t b) { return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16; }

inline float e4m3_number(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15u, mantissa = code & 7u;
  const float magnitude = (code & 0x7Fu) == 0x7Fu ? NAN
                          : exponent ? std::ldexp(8.0f + mantissa, static_cast<int>(exponent) - 10)
                                     : std::ldexp(static_cast<float>(mantissa), -9);
  return code & 0x80u ? -magnitude : magnitude;
}

inline uint32_t e4m3_code(float x) {  // by looking for the nearest
  const uint32_t sign = std::signbit(x) ? 0x80u : 0u;
  if (x != x) return 0x7Fu | sign;
  const float magnitude = min(std::fabs(x), 448.0f);
  uint32_t best = 0;
  for (uint32_t code = 1; code < 0x7Fu; ++code) {
    const float nearer = std::fabs(e4m3_number(best) - magnitude), distance = std::fabs(e4m3_number(code) - magnitude);
    if (distance < nearer || (distance == nearer && code % 2 == 0)) best = code;
  }
  return best | sign;
}

inline uint32_t pack_e4m3x2(float low, float high) { return e4m3_code(low) | e4m3_code(high) << 8; }

inline uint32_t this_thread() { return threadIdx.x; }
inline int this_block() { return static_cast<int>(blockIdx.x); }
inline int all_blocks() { return static_cast<int>(gridDim.x); }

inline void let_next_kernel_start() {}
inline void prefetch_line(const uint8_t*) {}
inline void pause(uint32_t) { host_cuda::yield(); }
inline void spin() { host_cuda::yield(); }
inline void wait_for_last_kernel() {}

template <int kThreads>
void barrier_sync(int barrier) { host_cuda::meet(barrier, kThreads, false); }
template <int kThreads>
bool barrier_any(int barrier, bool mine) { return host_cuda::meet(barrier, kThreads, mine); }
template <int kThreads>
bool barrier_all(int barrier, bool mine) { return !host_cuda::meet(barrier, kThreads, !mine); }

template <int>
void release_registers() {}
template <int>
void acquire_registers() {}

inline uint8_t* shared_pointer(uint32_t address) { return host_cuda::shared + (address - host_cuda::kSharedStart); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - host_cuda::shared) + host_cuda::kSharedStart;
}

template <int kBytes>
void load_shared(uint32_t address, uint32_t* words) { std::memcpy(words, shared_pointer(address), kBytes); }
inline void store_shared(uint32_t address, uint32_t word) { std::memcpy(shared_pointer(address), &word, 4); }

template <int kBytes>
void copy_async(uint32_t target, const uint8_t* source) { std::memcpy(shared_pointer(target), source, kBytes); }
inline void copy_commit() {}
template <int>
void copy_wait() {}

constexpr uint64_t kBarrierMark = 0x5EA1ED0123456789ull;  // where a barrier lies, nothing else may be written

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  host_cuda::memory_barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
  *reinterpret_cast<uint64_t*>(shared_pointer(barrier)) = kBarrierMark;
}
inline host_cuda::MemoryBarrier& find_barrier(uint32_t barrier) {
  if (*reinterpret_cast<uint64_t*>(shared_pointer(barrier)) != kBarrierMark) {
    std::fprintf(stderr, "a barrier in shared memory was written over\n");
    std::abort();
  }
  return host_cuda::memory_barriers.at(barrier);
}
inline void mbarrier_publish() {}
inline void mbarrier_arrive(uint32_t barrier) {
  host_cuda::MemoryBarrier& found = find_barrier(barrier);
  --found.pending;
  host_cuda::complete(found);
  host_cuda::progress = true;
}
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  find_barrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const host_cuda::MemoryBarrier& found = find_barrier(barrier);
  host_cuda::wait_until([&] { return (found.phase & 1u) != parity; });
}
inline void copy_bulk(uint32_t target, const uint8_t* source, uint32_t bytes, uint32_t barrier) {
  host_cuda::copies.push_back({shared_pointer(target), source, bytes, barrier, host_cuda::draw(30)});
}

// --- products: what registers of keys and queries stand for, multiplied in double -------------------------------------

inline float element(E4M3, const uint32_t* registers, int i) {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (uint32_t code = 0; code < 256; ++code) values[code] = e4m3_number(code);
    return values;
  }();
  return table[registers[i / 4] >> (i % 4 * 8) & 0xFFu];
}
inline float element(BF16, const uint32_t* registers, int i) { return bf16_value(registers[i / 2] >> (i % 2 * 16)); }

struct FourWords {
  uint32_t words[4];
};

// The keys of this lane's two rows, as eight words of consecutive K: those of its quad in the order of its lanes.
inline void gather_rows(const uint32_t* a, uint32_t (&rows)[2][8]) {
  const FourWords* all = host_cuda::collect(FourWords{{a[0], a[1], a[2], a[3]}});
  for (int c = 0; c < 4; ++c) {
    const uint32_t* words = all[threadIdx.x % 32 / 4 * 4 + c].words;
    for (int i = 0; i < 2; ++i) rows[i][c] = words[i], rows[i][4 + c] = words[2 + i];
  }
}

template <class Element>
float dot(const uint32_t (&row)[8], const uint32_t (&column)[8]) {
  double sum = 0;
  for (int i = 0; i < Element::kStep; ++i) {
    sum += static_cast<double>(element(Element{}, row, i)) * element(Element{}, column, i);
  }
  return static_cast<float>(sum);
}

template <class Element>
void mma_sync(Element, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t rows[2][8];
  gather_rows(a, rows);
  struct Two {
    uint32_t b0, b1;
  };
  const Two* all = host_cuda::collect(Two{b0, b1});
  for (int j = 0; j < 2; ++j) {
    uint32_t column[8];
    for (int c = 0; c < 4; ++c) {
      const Two& two = all[(threadIdx.x % 4 * 2 + j) * 4 + c];
      column[c] = two.b0, column[4 + c] = two.b1;
    }
    for (int i = 0; i < 2; ++i) d[2 * i + j] += dot<Element>(rows[i], column);
  }
}

}  // namespace lightning_indexer
