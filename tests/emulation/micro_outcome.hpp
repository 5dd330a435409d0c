// What a micro-kernel wrote, compared with what it should have written, and recorded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace lstm_cuda::micro {

using WordList = std::vector<std::uint32_t>;

struct Outcome {
  WordList words;         // what the kernel wrote: integers, or float32 by their bits
  std::string complaint;  // empty: as expected
  // How far words may lie from the expected, as float32: relative to the larger of 1 and the
  // expected. 0: equal bits. Of products it covers other orders of summation and the tensor cores'
  // truncation; of functions, the error that the PTX ISA allows ex2, rcp and tanh.approx.
  float tolerance = 0;
};

inline float as_float(std::uint32_t word) { return __builtin_bit_cast(float, word); }
inline std::uint32_t as_word(float f) { return __builtin_bit_cast(std::uint32_t, f); }

inline bool close(std::uint32_t got, std::uint32_t expected, float tolerance) {
  if (got == expected) return true;
  const float a = as_float(got), b = as_float(expected);
  if (std::isnan(a) && std::isnan(b)) return true;
  return std::fabs(a - b) <= tolerance * std::fmax(1.f, std::fabs(b));
}

inline Outcome compared(const Status& status, WordList got, const WordList& expected,
                        float tolerance = 0) {
  Outcome outcome{std::move(got), status.message, tolerance};
  if (!status.ok()) return outcome;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (close(outcome.words[i], expected[i], tolerance)) continue;
    char text[160];
    std::snprintf(text, sizeof text, "word %zu is %08x (%g), expected %08x (%g)", i,
                  outcome.words[i], as_float(outcome.words[i]), expected[i], as_float(expected[i]));
    outcome.complaint = text;
    break;
  }
  return outcome;
}

// {"device": ..., "cases": {name: {"tolerance": ..., "words": [...]}}}
inline bool write_record(const char* path, const char* device,
                         const std::vector<std::pair<std::string, Outcome>>& outcomes) {
  std::FILE* f = std::fopen(path, "w");
  if (!f) return false;
  std::fprintf(f, "{\"device\": \"%s\", \"cases\": {", device);
  const char* comma = "";
  for (const auto& [name, outcome] : outcomes) {
    std::fprintf(f, "%s\n\"%s\": {\"tolerance\": %g, \"words\": [", comma, name.c_str(),
                 double(outcome.tolerance));
    const char* separator = "";
    for (const std::uint32_t word : outcome.words) {
      std::fprintf(f, "%s%u", separator, word);
      separator = ", ";
    }
    std::fprintf(f, "]}");
    comma = ",";
  }
  std::fprintf(f, "\n}}\n");
  return std::fclose(f) == 0;
}

}  // namespace lstm_cuda::micro
