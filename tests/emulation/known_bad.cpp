// Runs the kernels of known_bad_kernels.cuh.
//   known_bad --list
//   known_bad ORDER SEED NAME...   prints NAME<tab>, and "report: ..." or "right" or "wrong"
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "known_bad_kernels.cuh"
#include "memory.hpp"

namespace lstm_cuda::bad {

using emulation::DeviceBuffer;

template <auto... kernels>
std::string run(LaunchShape shape, unsigned outputs) {
  std::vector<std::uint32_t> words(kWords);
  for (unsigned i = 0; i < kWords; ++i) words[i] = i + 1;
  const DeviceBuffer<std::uint32_t> in(words), out(kWords);
  const DeviceBuffer<std::uint32_t> scratch(std::vector<std::uint32_t>(64));
  Status status;
  unsigned started = 0;
  const auto start = [&]<auto kernel>() {
    LaunchShape this_shape = shape;
    this_shape.overlap = shape.overlap && ++started == sizeof...(kernels);
    if (status.ok())
      status = launch<kernel>(this_shape, Params{in.data(), out.data(), scratch.data()}, Stream{});
  };
  (start.template operator()<kernels>(), ...);
  if (!status.ok()) return std::string("report: ") + status.message;
  const std::vector<std::uint32_t> got = out.values();
  for (unsigned i = 0; i < outputs; ++i)
    if (got[i] != words[i]) return "wrong";
  return "right";
}

struct Case {
  const char* name;
  std::string (*run)(LaunchShape shape, unsigned outputs);
  unsigned blocks, threads;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false, overlap = false;
};

#define LSTM_CASE(name) #name, run<name>
const Case cases[] = {
    {LSTM_CASE(divergent_barrier), 1, 64},
    {LSTM_CASE(exit_before_barrier), 1, 64},
    {LSTM_CASE(named_counts_differ), 1, 64},
    {LSTM_CASE(named_out_of_range), 1, 64},
    {LSTM_CASE(missing_block_sync), 1, 64, 256},
    {LSTM_CASE(single_buffer), 1, 64, 256},
    {LSTM_CASE(missing_warp_sync), 1, 32, 128},
    {LSTM_CASE(shuffle_for_a_barrier), 1, 32, 128},
    {LSTM_CASE(lane_exits), 1, 32},
    {LSTM_CASE(caller_not_in_mask), 1, 32},
    {LSTM_CASE(source_not_in_mask), 1, 32},
    {LSTM_CASE(divergent_operation), 1, 32},
    {LSTM_CASE(masks_that_cross), 1, 32},
    {LSTM_CASE(ldmatrix_misaligned), 1, 32, 640},
    {LSTM_CASE(misaligned_load), 1, 32},
    {LSTM_CASE(too_little_shared), 1, 32, 112},
    {LSTM_CASE(different_pieces), 1, 64, 256},
    {LSTM_CASE(past_a_piece), 1, 32, 256},
    {LSTM_CASE(past_a_buffer), 1, 32},
    {LSTM_CASE(far_past_a_buffer), 1, 32},
    {LSTM_CASE(not_a_pointer), 1, 32},
    {LSTM_CASE(uninitialised_shared), 1, 32, 128},
    {LSTM_CASE(unwritten_output), 1, 32},
    {LSTM_CASE(blocks_share_output), 2, 32},
    {LSTM_CASE(read_before_landing), 1, 32, 512},
    {LSTM_CASE(landed_for_one_thread), 1, 32, 512},
    {LSTM_CASE(exit_with_copies), 1, 32, 512},
    {LSTM_CASE(copy_misaligned), 1, 32, 512},
    {LSTM_CASE(copy8_misaligned), 1, 32, 512},
    {LSTM_CASE(copy8_for_4), 1, 32, 256},
    {LSTM_CASE(over_arrival), 1, 32, 8},
    {LSTM_CASE(wrong_parity), 1, 32, 8},
    {LSTM_CASE(too_few_arrivals), 1, 32, 8},
    {"bulk_read_before_landing", run<bulk<false, 128>>, 1, 32, 136},
    {"bulk_of_more_than_expected", run<bulk<true, 112>>, 1, 32, 136},
    {LSTM_CASE(no_mbarrier_init), 1, 32, 8},
    {LSTM_CASE(two_mbarrier_inits), 1, 32, 8},
    {LSTM_CASE(init_not_published), 1, 64, 8},
    {LSTM_CASE(arrival_for_others), 1, 64, 136},
    {"store_to_a_block_not_started", run<remote_stores<false, true>>, 2, 32, 128, 2},
    {"store_to_a_block_that_left", run<remote_stores<true, false>>, 2, 32, 128, 2},
    {LSTM_CASE(leaves_before_stores), 2, 32, 136, 2},
    {LSTM_CASE(transfers_for_a_barrier), 2, 64, 400, 2},
    {LSTM_CASE(no_such_block), 2, 32, 128, 2},
    {LSTM_CASE(wait_without_arrive), 2, 32, 0, 2},
    {"cluster_too_large", run<no_such_block>, 32, 32, 128, 32},
    {"grid_sync_of_a_plain_launch", run<grid_barrier>, 2, 32},
    {"grid_larger_than_the_device", run<grid_barrier>, 133, 32, 0, 1, true},
    {"shared_memory_of_no_device", run<unwritten_output>, 1, 32, 227 * 1024 + 16},
    {LSTM_CASE(waits_for_a_later_block), 2, 32},
    {LSTM_CASE(flag_before_data), 2, 32, 0, 1, true},
    {LSTM_CASE(torn_words), 2, 32, 0, 1, true},
    {LSTM_CASE(no_dependency_wait), 1, 32, 0, 1, false, true},
    {"late_dependency_wait", run<write_scratch, late_dependency_wait>, 1, 32, 0, 1, false, true},
};

}  // namespace lstm_cuda::bad

int main(int argc, char** argv) {
  using namespace lstm_cuda;
  if (argc == 2 && !std::strcmp(argv[1], "--list")) {
    for (const bad::Case& c : bad::cases) std::printf("%s\n", c.name);
    return 0;
  }
  if (argc < 4) return 2;
  auto& settings = emulation::settings();
  settings.order = !std::strcmp(argv[1], "forward")   ? emulation::Order::forward
                   : !std::strcmp(argv[1], "reverse") ? emulation::Order::reverse
                                                      : emulation::Order::random;
  settings.seed = std::strtoull(argv[2], nullptr, 10);
  for (int i = 3; i < argc; ++i)
    for (const bad::Case& c : bad::cases) {
      if (std::strcmp(c.name, argv[i])) continue;
      const LaunchShape shape{c.name,    c.blocks,      c.threads, c.shared_bytes,
                              c.cluster, c.cooperative, c.overlap};
      std::string verdict = c.run(shape, 32);
      for (char& letter : verdict)
        if (letter == '\n') letter = ' ';
      std::printf("%s\t%s\n", c.name, verdict.c_str());
      std::fflush(stdout);
    }
}
