// Products on the tensor cores, with float32 sums. Rows of A and columns of B lie along k, D is 16×8; lane l holds rows l/4 and
// l/4 + 8 of A and D, column l/4 of B, and columns 2·(l%4) + {0, 1} of D. Registers of A go over its rows first.
//   16 bits wide (mma.m16n8k16): two elements a register; k is 2·(l%4) + {0, 1} and 8 more
//   TensorFloat32 (mma.m16n8k8): an element a register; k is l%4 and 4 more
#pragma once

#include "device.h"

namespace idm::cuda {

template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(IDM_EMULATED)
  if constexpr (std::is_same_v<T, TensorFloat32>)
    emulation::multiply_accumulate<4>(d, a, b, [](uint32_t word) { return load(TensorFloat32{emulation::checked_tf32(word)}); });
  else
    emulation::multiply_accumulate<2>(d, a, b, [](uint32_t half) { return load(T{static_cast<uint16_t>(half)}); });
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, TensorFloat32>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace idm::cuda
