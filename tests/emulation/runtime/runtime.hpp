// Runs CUDA kernels on the CPU for tests: a fiber for each CUDA thread, all on one thread of the
// system. A kernel is written against csrc/cuda/ptx.cuh, whose host half (ptx_host.hpp) calls the
// operations below.
//
// The runtime is always compiled WITHOUT sanitizers, so that they see the kernel's own accesses and
// nothing else; one set of objects serves plain, AddressSanitizer and ThreadSanitizer programs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lstm_cuda::emulation {

// A line of the kernel. (clang 14 has no std::source_location.)
struct Site {
  const char* file = "";
  unsigned line = 0;
  static constexpr Site current(const char* file = __builtin_FILE(),
                                unsigned line = __builtin_LINE()) {
    return {file, line};
  }
};

// Which of the threads that could go on does.
enum class Order : std::uint8_t {
  forward,  // the one that waits longest; copies land when nothing else is left to do
  reverse,  // the one woken last
  random,   // as the seed draws; it also draws how strongly the newest is preferred and how late
            // copies land
};

// How kernels are run, and on what device. Tests set it; it holds until they set it again.
struct Settings {
  Order order = Order::forward;
  std::uint64_t seed = 1;
  std::size_t shared_limit = 227 * 1024;  // bytes of shared memory that a block may ask for
  unsigned resident_blocks = 132;         // of a cooperative launch
  unsigned cluster_limit = 16;            // blocks; more than 8 is what launch.h asks for
  std::string refused;                    // launches of kernels whose names begin so fail; "": none
  unsigned spared = 0;                    // but of these launches, not the first so many
  int device = 0;                         // the index that the caller of kernels sees
  bool watched = true;  // by ThreadSanitizer; else the threads of a block are one to it, and cheap
};
Settings& settings();

struct Launch {
  unsigned blocks, threads, cluster;
  std::size_t shared_bytes;
  bool cooperative, overlap;
};

// Runs a kernel to its end. What it did wrong, or nothing. `entry(context)` calls the kernel once.
std::string run(const Launch& launch, void (*entry)(const void*), const void* context);

// For `entry`: parameters are no memory that a kernel could race for.
void copy_parameters(void* to, const void* from, std::size_t bytes);

// Stands for cudaMalloc: aligned to 256 bytes, filled with NaN, ended by a page that faults (under
// AddressSanitizer by its red zone). device_free says whether what lies between the end and that
// page is as it was.
void* device_alloc(std::size_t bytes);
bool device_free(void* p, std::size_t bytes);

bool sanitized();  // whether this program has AddressSanitizer or ThreadSanitizer

// What a running thread may know about itself.
struct Thread {
  unsigned thread = 0, block = 0, rank = 0;  // rank: of the block in its cluster
  unsigned threads = 0, blocks = 0;
};
extern Thread* current;

struct SharedCursor {
  std::size_t used = 0, pieces = 0;
};

// ---- operations; ptx.cuh says what they promise ----

void* shared_take(SharedCursor& cursor, std::size_t bytes, std::size_t align, Site at);
[[noreturn]] void misaligned(const void* p, std::size_t bytes, Site at);
void readable(const void* p, Site at);

void block_sync(Site at);
void named_sync(unsigned id, unsigned threads, Site at);
void named_arrive(unsigned id, unsigned threads, Site at);
void cluster_arrive(Site at);
void cluster_wait(Site at);
void grid_sync(Site at);

void warp_sync(unsigned mask, Site at);
std::uint64_t shuffle(std::uint64_t value, unsigned lane, unsigned mask, Site at);
unsigned ballot(bool predicate, unsigned mask, Site at);
void ldmatrix(std::uint32_t* r, unsigned count, const void* row, bool transpose, Site at);
std::uint32_t movmatrix(std::uint32_t v, Site at);
void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at);
void mma_fp16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at);
void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b, Site at);

void cp_async(const char* name, void* dst, unsigned bytes, const void* src, unsigned source_bytes,
              Site at);
void cp_async_commit(Site at);
void cp_async_wait(unsigned groups_left, Site at);

void mbarrier_init(std::uint64_t* bar, unsigned arrivals, Site at);
void mbarrier_arrive(std::uint64_t* bar, unsigned rank, Site at);
void mbarrier_expect(std::uint64_t* bar, unsigned bytes, Site at);
void mbarrier_wait(std::uint64_t* bar, unsigned parity, Site at);
void bulk_copy(void* dst, const void* src, unsigned bytes, std::uint64_t* bar, Site at);
void* peer_shared(const void* p, unsigned rank, Site at);
void store_async(void* dst, const void* data, unsigned bytes, std::uint64_t* bar, unsigned rank,
                 Site at);

void word_store(std::uint32_t* p, std::uint32_t value, Site at);
void word_load4(std::uint32_t* to, const std::uint32_t* p, Site at);
void word_wait(const std::uint32_t* p, Site at);  // until something was stored near p
std::uint32_t flag_add_release(std::uint32_t* flag, std::uint32_t value, Site at);
void flag_wait_acquire(const std::uint32_t* flag, std::uint32_t at_least, Site at);

void dependency_wait();

}  // namespace lstm_cuda::emulation
