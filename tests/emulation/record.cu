// Runs the micro-kernels on the GPU and writes what they wrote:  record FILE
// README.md in this folder says how to build it and where the file goes.
#include "micro_cases.hpp"

using namespace lstm_cuda;

int main(int argc, char** argv) {
  if (argc != 2) emulation::give_up("usage: record FILE");
  cudaDeviceProp device;
  emulation::must(cudaGetDeviceProperties(&device, 0));
  const int architecture = 10 * device.major + device.minor;
  std::vector<std::pair<std::string, micro::Outcome>> record;
  unsigned failed = 0, skipped = 0;
  for (const micro::Case& c : micro::cases()) {
    if (architecture < c.architecture) {
      ++skipped;
      continue;
    }
    micro::Outcome outcome = c.run();
    if (!outcome.complaint.empty()) {
      ++failed;
      std::printf("FAILED %s: %s\n", c.name, outcome.complaint.c_str());
    }
    record.emplace_back(c.name, std::move(outcome));
  }
  std::printf("%s: %zu ran, %u failed, %u skipped\n", device.name, record.size(), failed, skipped);
  // What a GPU does is the truth, agreeing or not; a failure here means the comparison, too.
  if (!micro::write_record(argv[1], device.name, record)) return 2;
  return failed != 0;
}
