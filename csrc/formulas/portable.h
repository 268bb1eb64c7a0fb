// Formulas are written once, as inline functions of float or double, for the CPU's and the GPU's kernels alike.
#pragma once

#if defined(__CUDACC__)
#define IDM_INLINE __host__ __device__ __forceinline__
#else
#define IDM_INLINE inline __attribute__((always_inline))
#endif
