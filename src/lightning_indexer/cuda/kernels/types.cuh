// Fixed-width integers. NVRTC brings no <cstdint>, and kernels include nothing but the files beside them: the NVRTC
// wheel alone compiles them, and the cache key covers every line that the compiler reads.
#pragma once

namespace lightning_indexer {

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

static_assert(sizeof(uint32_t) == 4 && sizeof(int64_t) == 8 && sizeof(uint64_t) == 8, "integer widths");

constexpr int kWarpThreads = 32;
constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

template <bool kFirst, class First, class Second>
struct Either {
  using Type = First;
};
template <class First, class Second>
struct Either<false, First, Second> {
  using Type = Second;
};

// Element types of a matrix product: how many fill a register, and how many a step of K takes (32 bytes of both).
struct E4M3 {
  static constexpr int kPerRegister = 4;
  static constexpr int kStep = 32;
};

struct BF16 {
  static constexpr int kPerRegister = 2;
  static constexpr int kStep = 16;
};

}  // namespace lightning_indexer
