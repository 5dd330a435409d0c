// What kernels with resident weights ask of a device and its driver. Prints one JSON object a line:
// {"name": ..., "value": number, "error": what the runtime says, or null}.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>

namespace {

// As many registers and as much shared memory as a block with resident weights: one a multiprocessor.
constexpr int kThreads = 256, kSharedBytes = 200 * 1024;

__global__ void __launch_bounds__(kThreads, 1) meet(int* rounds) {
  for (int i = 0; i < 3; ++i) cooperative_groups::this_grid().sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*rounds;
}

__global__ void __launch_bounds__(kThreads, 1) clustered(int* rounds) {
  if (threadIdx.x == 0) atomicAdd(rounds, 1);
}

void say(const char* name, int value, cudaError_t error) {
  (void)cudaGetLastError();  // what is said here must not surface at the next call
  if (error == cudaSuccess)
    std::printf("{\"name\": \"%s\", \"value\": %d, \"error\": null}\n", name, value);
  else
    std::printf("{\"name\": \"%s\", \"value\": %d, \"error\": \"%s\"}\n", name, value,
                cudaGetErrorName(error));
  std::fflush(stdout);
}

cudaLaunchConfig_t shape(int blocks, size_t shared_bytes, cudaStream_t stream,
                         cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

// How many clusters of one block a multiprocessor run at once.
void clusters(int size) {
  char name[64];
  std::snprintf(name, sizeof name, "clusters of %d that run at once", size);
  cudaError_t error =
      cudaFuncSetAttribute(clustered, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess && size > 8)
    error = cudaFuncSetAttribute(clustered, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  const cudaLaunchConfig_t config = shape(size, kSharedBytes, nullptr, &attribute);
  int count = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, clustered, &config);
  say(name, count, error);
}

// Rounds that a cooperative launch of a block on each multiprocessor has done: 1, and 3 more by replays
// of a graph that holds it.
void cooperative(int blocks) {
  int* rounds = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaMalloc(&rounds, sizeof *rounds);
  if (error == cudaSuccess) error = cudaMemset(rounds, 0, sizeof *rounds);
  if (error == cudaSuccess) error = cudaStreamCreate(&stream);
  if (error != cudaSuccess) return say("cooperative launch", 0, error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  const cudaLaunchConfig_t config = shape(blocks, 0, stream, &attribute);
  const auto done = [&] {
    int value = 0;
    const cudaError_t status = cudaStreamSynchronize(stream);
    if (error == cudaSuccess) error = status;
    if (error == cudaSuccess)
      error = cudaMemcpy(&value, rounds, sizeof value, cudaMemcpyDeviceToHost);
    return value;
  };

  error = cudaLaunchKernelEx(&config, meet, rounds);
  const int launched = done();
  say("cooperative launch", launched, error);

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t captured = nullptr;
  error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (error == cudaSuccess) {
    const cudaError_t inside = cudaLaunchKernelEx(&config, meet, rounds);
    const cudaError_t end = cudaStreamEndCapture(stream, &graph);
    error = inside != cudaSuccess ? inside : end;
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(&captured, graph, 0);
  for (int i = 0; i < 3 && error == cudaSuccess; ++i) error = cudaGraphLaunch(captured, stream);
  const int replayed = done() - launched;
  say("cooperative launch, replays in a graph of 3", replayed, error);
}

}  // namespace

int main() {
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0);
  if (error != cudaSuccess) {
    say("multiprocessors", 0, error);
    return 2;
  }
  for (int size : {2, 4, 8, 16}) clusters(size);
  cooperative(multiprocessors);
  return 0;
}
