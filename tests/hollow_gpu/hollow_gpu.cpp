// A GPU whose kernels do nothing. Preloaded, it answers for the CUDA runtime, the driver, cuBLAS and cuDNN, so that a CUDA build
// of PyTorch does all of its work on the host: it allocates, dispatches, picks algorithms, launches, records and waits.
//
// Memory of the device is reserved, not taken: pages come when a copy touches them. Copies to and from it are made, so that
// parameters arrive; copies of more than TOUCHED bytes are not. A launch that a GPU would refuse is refused, and its sizes are
// said on stderr. What is asked of the device is answered as by an H100 with 80 GiB, the only one.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#undef cudaGetDeviceProperties
#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t MEMORY = size_t(80) << 30, TOUCHED = size_t(64) << 20;
constexpr unsigned SHARED_MEMORY = 232448;

std::mutex guard;
std::map<uintptr_t, size_t> blocks;  // of the device, by where they begin
size_t allocated = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;

// Whether [p, p + n) lies in one block of the device.
bool on_device(const void* p, size_t n = 1) {
  const std::lock_guard<std::mutex> lock(guard);
  auto block = blocks.upper_bound(uintptr_t(p));
  if (block == blocks.begin()) return false;
  --block;
  return uintptr_t(p) + n <= block->first + block->second;
}

template <class T>
T handle() {  // something to hold, never looked into
  return reinterpret_cast<T>(malloc(64));
}

int attribute(int which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_MEMORY;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
  }
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && threads && threads <= 1024;
  if (fits && shared <= SHARED_MEMORY) return cudaSuccess;
  fprintf(stderr, "hollow GPU: no launch of grid %u×%u×%u, block %u×%u×%u, %zu bytes of shared memory\n", grid.x, grid.y,
          grid.z, block.x, block.y, block.z, shared);
  return last_error = cudaErrorInvalidConfiguration;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const bool writes = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool reads = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((writes && !on_device(to, bytes)) || (reads && !on_device(from, bytes))) return cudaErrorInvalidValue;
  if (bytes <= TOUCHED) memmove(to, from, bytes);
  return cudaSuccess;
}

struct Event {
  std::chrono::steady_clock::time_point at;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

CUresult agree() { return CUDA_SUCCESS; }

}  // namespace

// The runtime: the device and its memory.

API cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { return *value = attribute(which), cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API const char* cudaGetErrorString(cudaError_t error) { return error ? "an error of the hollow GPU" : "no error"; }
API const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }
API cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* name, int length, int) {
  snprintf(name, length, "0000:00:00.0");
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "hollow GPU");
  p->totalGlobalMem = MEMORY;
  p->major = attribute(cudaDevAttrComputeCapabilityMajor);
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = p->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimY);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimX);
  p->maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
  return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard<std::mutex> lock(guard);
  *total = MEMORY;
  *free = MEMORY - allocated;
  return cudaSuccess;
}

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const std::lock_guard<std::mutex> lock(guard);
  if (allocated + bytes > MEMORY) return cudaErrorMemoryAllocation;
  void* block = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) return cudaErrorMemoryAllocation;
  blocks[uintptr_t(block)] = bytes;
  allocated += bytes;
  *pointer = block;
  return cudaSuccess;
}

API cudaError_t cudaFree(void* pointer) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto block = blocks.find(uintptr_t(pointer));
  if (block == blocks.end()) return cudaSuccess;
  munmap(pointer, block->second ? block->second : 1);
  allocated -= block->second;
  blocks.erase(block);
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* pointer) { return free(pointer), cudaSuccess; }
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) { return copy(to, from, bytes, kind); }
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return copy(to, from, bytes, kind);
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (!on_device(to, bytes)) return cudaErrorInvalidValue;
  if (bytes <= TOUCHED) memset(to, value, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  const bool of_device = on_device(pointer);
  attributes->type = of_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = of_device ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}

// Streams, events and graphs: all is done when it is asked for.

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = handle<cudaStream_t>(), cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return free(stream), cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return capturing == cudaStreamCaptureStatusNone ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) { return *status = capturing, cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
  *status = capturing;
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return capturing = cudaStreamCaptureStatusActive, cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = cudaStreamCaptureStatusNone;
  return *graph = handle<cudaGraph_t>(), cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  return call(stream, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) { return call(data), cudaSuccess; }
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  return *graph = handle<cudaGraphExec_t>(), cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* graph, cudaGraph_t from, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(graph, from, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return free(graph), cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return free(graph), cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) { return *count = 1, cudaSuccess; }

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event*>(event), cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return reinterpret_cast<Event*>(event)->at = std::chrono::steady_clock::now(), cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const auto time = reinterpret_cast<Event*>(end)->at - reinterpret_cast<Event*>(begin)->at;
  return *milliseconds = std::chrono::duration<float, std::milli>(time).count(), cudaSuccess;
}

// Kernels of PyTorch and of the CUDA extension, through the runtime.

API void** __cudaRegisterFatBinary(void*) {
  static void* binary[4];
  return binary;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 0; }
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return configurations.push_back({grid, block, shared, stream}), 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(grid, block, shared);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return launch(grid, block, shared);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
  return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = SHARED_MEMORY;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

// The driver, as Triton, inductor and PyTorch ask it.

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = reinterpret_cast<void*>(agree);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                        cudaDriverEntryPointQueryResult* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, found);
}
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { return *n = 1, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) { return *value = attribute(which), CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the hollow GPU", CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* context) { return *context = reinterpret_cast<CUcontext>(1), CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { return *flags = 0, *active = 1, CUDA_SUCCESS; }
API CUresult cuModuleLoad(CUmodule* module, const char*) { return *module = reinterpret_cast<CUmodule>(1), CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule* module, const void*) { return cuModuleLoad(module, nullptr); }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  return *function = reinterpret_cast<CUfunction>(1), CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) { return *clusters = 1, CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction, void**, void**) {
  const dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
  return launch(grid, block, c->sharedMemBytes) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                            CUstream, void**, void**) {
  return launch(dim3(gx, gy, gz), dim3(bx, by, bz), shared) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return *static_cast<int*>(value) = 0, CUDA_SUCCESS;
  if (!on_device(reinterpret_cast<void*>(pointer))) return CUDA_ERROR_INVALID_VALUE;
  return *static_cast<CUdeviceptr*>(value) = pointer, CUDA_SUCCESS;
}

// What PyTorch looks up at its first graph or cooperative kernel. cuda.h declares these with other arguments.
#define AGREES_AS(name)                       \
  API CUresult hollow_##name() __asm__(#name); \
  API CUresult hollow_##name() { return CUDA_SUCCESS; }
AGREES_AS(cuGetErrorName)
AGREES_AS(cuCtxPopCurrent)
AGREES_AS(cuCtxPushCurrent)
AGREES_AS(cuStreamGetCtx)
AGREES_AS(cuLinkCreate)
AGREES_AS(cuLinkAddData)
AGREES_AS(cuLinkComplete)
AGREES_AS(cuLinkDestroy)
AGREES_AS(cuLaunchCooperativeKernel)
AGREES_AS(cuLibraryLoadData)
AGREES_AS(cuLibraryLoadFromFile)
AGREES_AS(cuLibraryGetKernel)
AGREES_AS(cuLibraryUnload)
AGREES_AS(cuKernelSetAttribute)
AGREES_AS(cuKernelGetAttribute)
AGREES_AS(cuOccupancyMaxPotentialClusterSize)

// cuBLAS and cuDNN: descriptors are made, algorithms found, without workspaces, and nothing is computed. Of cuDNN only what
// PyTorch takes with TORCH_CUDNN_V8_API_DISABLED=1.

#define AGREES(name) \
  API int name(...) { return 0; }
#define MAKES(name) \
  API int name(void** made, ...) { return *made = malloc(64), 0; }
#define FREES(name) \
  API int name(void* made) { return free(made), 0; }

MAKES(cublasCreate_v2)
FREES(cublasDestroy_v2)
AGREES(cublasSetStream_v2)
AGREES(cublasSetWorkspace_v2)
AGREES(cublasSetMathMode)
AGREES(cublasSetPointerMode_v2)
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
AGREES(cublasSgemm_v2)
AGREES(cublasDgemm_v2)
AGREES(cublasGemmEx)
AGREES(cublasSgemmEx)
AGREES(cublasGemmStridedBatchedEx)
AGREES(cublasSgemmStridedBatched)
AGREES(cublasDgemmStridedBatched)
AGREES(cublasSgemv_v2)
AGREES(cublasDgemv_v2)
AGREES(cublasSdot_v2)
AGREES(cublasDdot_v2)
AGREES(cublasDotEx)

API size_t cublasLtGetVersion() { return 10000 * CUDART_VERSION / 1000; }
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)
FREES(cublasLtMatmulDescDestroy)
FREES(cublasLtMatrixLayoutDestroy)
FREES(cublasLtMatmulPreferenceDestroy)
AGREES(cublasLtMatmulDescSetAttribute)
AGREES(cublasLtMatrixLayoutSetAttribute)
AGREES(cublasLtMatmulPreferenceSetAttribute)
AGREES(cublasLtMatmul)
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int wanted, Heuristic* found, int* count) {
  memset(found, 0, wanted * sizeof *found);
  return *count = wanted, 0;
}

API size_t cudnnGetVersion() {
  const char* version = getenv("HOLLOW_GPU_CUDNN");  // PyTorch asks for the one that it was built with
  return version ? atol(version) : 0;
}
API size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
MAKES(cudnnCreate)
MAKES(cudnnCreateTensorDescriptor)
MAKES(cudnnCreateFilterDescriptor)
MAKES(cudnnCreateConvolutionDescriptor)
FREES(cudnnDestroyTensorDescriptor)
FREES(cudnnDestroyFilterDescriptor)
FREES(cudnnDestroyConvolutionDescriptor)
AGREES(cudnnSetStream)
AGREES(cudnnSetTensorNdDescriptor)
AGREES(cudnnSetFilterNdDescriptor)
AGREES(cudnnSetConvolutionNdDescriptor)
AGREES(cudnnSetConvolutionGroupCount)
AGREES(cudnnSetConvolutionMathType)
AGREES(cudnnConvolutionForward)
AGREES(cudnnConvolutionBackwardData)
AGREES(cudnnConvolutionBackwardFilter)
AGREES(cudnnConvolutionBiasActivationForward)
struct Algorithm {
  int algorithm, status;
  float time;
  size_t workspace;
  int deterministic, math, reserved[3];
};
static int found(int* count, Algorithm* algorithms) {
  memset(algorithms, 0, sizeof *algorithms);
  algorithms->algorithm = algorithms->deterministic = 1;
  algorithms->math = 3;  // CUDNN_FMA_MATH, which PyTorch insists on without TF32
  return *count = 1, 0;
}
#define FINDS(direction)                                                                                                       \
  API int cudnnGetConvolution##direction##Algorithm_v7(void*, void*, void*, void*, void*, int, int* count, Algorithm* out) {   \
    return found(count, out);                                                                                                  \
  }                                                                                                                            \
  API int cudnnFindConvolution##direction##AlgorithmEx(void*, void*, const void*, void*, const void*, void*, void*, void*, int, \
                                                       int* count, Algorithm* out, void*, size_t) {                            \
    return found(count, out);                                                                                                  \
  }                                                                                                                            \
  API int cudnnGetConvolution##direction##WorkspaceSize(void*, void*, void*, void*, void*, int, size_t* bytes) {               \
    return *bytes = 0;                                                                                                         \
  }
FINDS(Forward)
FINDS(BackwardData)
FINDS(BackwardFilter)
