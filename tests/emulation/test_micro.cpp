// Runs the micro-kernels under emulation, in every order.
//   test_micro [RECORD]   records what they wrote in forward order, to compare with a GPU's record
#include "micro_cases.hpp"

using namespace lstm_cuda;

int main(int argc, char** argv) {
  std::vector<std::pair<std::string, micro::Outcome>> record;
  unsigned ran = 0, failed = 0;
  for (unsigned seed = 0; seed < 14;
       ++seed) {  // 12 seeds meet all combinations of a seed's choices
    auto& settings = emulation::settings();
    settings.seed = seed;
    settings.order = seed == 0   ? emulation::Order::forward
                     : seed == 1 ? emulation::Order::reverse
                                 : emulation::Order::random;
    for (const micro::Case& c : micro::cases()) {
      micro::Outcome outcome = c.run();
      ++ran;
      if (!outcome.complaint.empty()) {
        ++failed;
        std::printf("FAILED %s, seed %u: %s\n", c.name, seed, outcome.complaint.c_str());
      }
      if (seed == 0) record.emplace_back(c.name, std::move(outcome));
    }
  }
  std::printf("%u ran, %u failed\n", ran, failed);
  if (argc > 1 && !micro::write_record(argv[1], "emulation", record)) return 2;
  return failed != 0;
}
