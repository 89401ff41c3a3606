// The instructions of wgmma (Hopper), the first operand in registers: `issue` adds the product of a step to d, or starts
// it where `accumulate` is 0. Columns: of the second operand, which a descriptor finds in shared memory.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

// Every thread that stored to the second operand, before the block meets: wgmma reads behind ordinary accesses' back.
__device__ __forceinline__ void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_finish() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Four registers of a result are read no earlier than here.
__device__ __forceinline__ void wgmma_pin(float* d) {
  asm volatile("" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
}

template <class Element, int kColumns>
struct WgmmaInstruction;

#define LI_D4 "%0,%1,%2,%3"
#define LI_D8 LI_D4 ",%4,%5,%6,%7"
#define LI_D16 LI_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LI_D32 LI_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LI_D64                                                                                        \
  LI_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
         "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LI_O4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LI_O8(i) LI_O4(i), LI_O4(i + 4)
#define LI_O16(i) LI_O8(i), LI_O8(i + 8)
#define LI_O32(i) LI_O16(i), LI_O16(i + 16)
#define LI_O64(i) LI_O32(i), LI_O32(i + 32)

// REGISTERS: of the result, half as many as columns. Then the numbers of the operands behind them.
#define LI_WGMMA(ELEMENT, SHAPE, COLUMNS, REGISTERS, A0, A1, A2, A3, B, P, TAIL)                            \
  template <>                                                                                               \
  struct WgmmaInstruction<ELEMENT, COLUMNS> {                                                               \
    __device__ static __forceinline__ void issue(float* d, const uint32_t* a, uint64_t b, int accumulate) { \
      asm volatile(                                                                                         \
          "{.reg .pred p; setp.ne.b32 p, %" #P ", 0;\n"                                                     \
          "wgmma.mma_async.sync.aligned.m64n" #COLUMNS SHAPE " {" LI_D##REGISTERS "}, {%" #A0 ",%" #A1      \
          ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1" TAIL ";}\n"                                               \
          : LI_O##REGISTERS(0)                                                                              \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                           \
    }                                                                                                       \
  };
#define LI_WGMMA_BOTH(COLUMNS, REGISTERS, A0, A1, A2, A3, B, P)                            \
  LI_WGMMA(E4M3, "k32.f32.e4m3.e4m3", COLUMNS, REGISTERS, A0, A1, A2, A3, B, P, "")        \
  LI_WGMMA(BF16, "k16.f32.bf16.bf16", COLUMNS, REGISTERS, A0, A1, A2, A3, B, P, ", 0")

LI_WGMMA_BOTH(8, 4, 4, 5, 6, 7, 8, 9)
LI_WGMMA_BOTH(16, 8, 8, 9, 10, 11, 12, 13)
LI_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
LI_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
LI_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)

}  // namespace lightning_indexer
