// Runs the kernels of micro_kernels.cuh on made-up inputs; compares what they write with plain loops.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "memory.hpp"
#include "micro_kernels.cuh"
#include "micro_outcome.hpp"

namespace lstm_cuda::micro {

using emulation::DeviceBuffer;

// Numbers without a pattern that an error of an index could keep.
inline std::uint32_t mixed(std::uint32_t i) {
  i *= 0x9E3779B9u, i ^= i >> 15, i *= 0x85EBCA6Bu, i ^= i >> 13;
  return i;
}
inline float unit(std::uint32_t i) { return float(int(mixed(i) % 2049) - 1024) / 1024; }

inline WordList some_words(unsigned count) {
  WordList words(count);
  for (unsigned i = 0; i < count; ++i) words[i] = mixed(i) % 100000;
  return words;
}

inline WordList run_words(LaunchShape shape, Status (*start)(const LaunchShape&, const Words&),
                          const WordList& in, std::size_t out, Status* status) {
  const DeviceBuffer<std::uint32_t> from(in), to(out);
  *status = start(shape, {from.data(), to.data()});
  return to.values();
}
template <auto kernel>
Status start_words(const LaunchShape& shape, const Words& p) {
  return launch<kernel>(shape, p, Stream{});
}

inline Outcome case_identity() {
  constexpr unsigned kBlocks = 3, kThreads = 96, kAll = kBlocks * kThreads;
  const WordList in = some_words(kAll * 8);
  const DeviceBuffer<std::uint32_t> from(in), out(4 * kAll), copies(8 * kAll);
  const Status status =
      launch<identity>({"identity", kBlocks, kThreads},
                       Identity{out.data(), reinterpret_cast<std::byte*>(copies.data()),
                                reinterpret_cast<const std::byte*>(from.data())},
                       Stream{});
  WordList expected, got = out.values();
  for (unsigned i = 0; i < kAll; ++i)
    for (const unsigned v : {i % kThreads, i / kThreads, kThreads, kBlocks}) expected.push_back(v);
  for (const std::uint32_t word : copies.values()) got.push_back(word);
  expected.insert(expected.end(), in.begin(), in.end());
  return compared(status, got, expected);
}

inline Outcome case_exchange_in_block() {
  const WordList in = some_words(128);
  Status status;
  const WordList got = run_words({"exchange_in_block", 1, 128, 4 + 512 + 124 + 512},
                                 start_words<exchange_in_block>, in, 128, &status);
  WordList expected(128);
  for (unsigned i = 0; i < 128; ++i) expected[i] = in[i] + (127 - i) % 3 + 1;
  return compared(status, got, expected);
}

inline Outcome case_hand_over() {
  const WordList in = some_words(32);
  Status status;
  const WordList got =
      run_words({"hand_over", 1, 64, 128}, start_words<hand_over>, in, 32, &status);
  const auto element = [&](unsigned row, unsigned column) {
    return in[row * 4 + column / 2] >> 16 * (column % 2) & 0xFFFF;
  };
  WordList expected(32);
  for (unsigned i = 0; i < 32; ++i)
    expected[i] = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
  return compared(status, got, expected);
}

inline Outcome case_exchange_in_warp() {
  const WordList in = some_words(32);
  Status status;
  const WordList got =
      run_words({"exchange_in_warp", 1, 32, 128}, start_words<exchange_in_warp>, in, 32, &status);
  WordList expected = in;
  for (unsigned step = 0; step < 3; ++step) {
    const WordList before = expected;
    for (unsigned i = 0; i < 32; ++i) expected[i] = before[i / 16 * 16 + (i + 1) % 16] * 3 + step;
  }
  return compared(status, got, expected);
}

inline Outcome case_votes() {
  const WordList in = some_words(32);
  Status status;
  const WordList got = run_words({"votes", 1, 32}, start_words<votes>, in, 32, &status);
  std::uint32_t thirds = 0, v[32];
  for (unsigned i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (unsigned i = 0; i < 32; ++i) v[i] = thirds + in[(i + 1) % 32];
  std::uint32_t w[32];
  for (unsigned i = 0; i < 32; ++i) w[i] = v[i] + (i < 16 ? in[i ^ 1] : 0x55550000u + v[i ^ 2]);
  WordList expected(32);
  for (unsigned i = 0; i < 32; ++i)
    expected[i] = w[i] + std::uint32_t((double(w[31 - i]) + 0.5) * 2);
  return compared(status, got, expected);
}

// bf16 and fp16 hold multiples of 1/128 in [-1, 1] exactly.
inline std::uint32_t short_bits(float f, bool is_bf16) {
  if (is_bf16) return as_word(f) >> 16;
  const __half h = __float2half_rn(f);
  std::uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

template <bool is_bf16, bool transposed = false>
Outcome case_multiply16() {
  std::vector<float> a(256), b(128);
  WordList packed_a(128), packed_b(64), expected;
  for (unsigned i = 0; i < 256; ++i) a[i] = std::floor(unit(i) * 128) / 128;
  for (unsigned i = 0; i < 128; ++i) b[i] = std::floor(unit(1000 + i) * 128) / 128;
  for (unsigned i = 0; i < 256; ++i) {
    const unsigned at = transposed ? i % 16 * 16 + i / 16 : i;
    packed_a[at / 2] |= short_bits(a[i], is_bf16) << 16 * (at % 2);
  }
  for (unsigned i = 0; i < 128; ++i) packed_b[i / 2] |= short_bits(b[i], is_bf16) << 16 * (i % 2);
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned n = 0; n < 8; ++n) {
      float sum = 0;
      for (unsigned k = 0; k < 16; ++k) sum += a[m * 16 + k] * b[k * 8 + n];
      expected.push_back(as_word(2 * sum));
    }
  const DeviceBuffer<std::uint32_t> da(packed_a), db(packed_b), out(128);
  const Status status = launch<multiply16<is_bf16, transposed>>(
      {"multiply16", 1, 32, 768 + 256},
      Product{da.data(), db.data(), reinterpret_cast<float*>(out.data())}, Stream{});
  return compared(status, out.values(), expected, 1e-5f);
}

inline Outcome case_multiply_tf32() {
  WordList a(128), b(64), expected;
  for (unsigned i = 0; i < 128; ++i) a[i] = as_word(unit(i) * 1.0003f);
  for (unsigned i = 0; i < 64; ++i) b[i] = as_word(unit(2000 + i) * 0.9997f);
  const auto rounded = [](std::uint32_t w) { return as_float((w + 0x1000u) & ~0x1FFFu); };
  for (unsigned m = 0; m < 16; ++m)
    for (unsigned n = 0; n < 8; ++n) {
      float sum = 0;
      for (unsigned k = 0; k < 8; ++k) sum += rounded(a[m * 8 + k]) * rounded(b[k * 8 + n]);
      expected.push_back(as_word(sum));
    }
  const DeviceBuffer<std::uint32_t> da(a), db(b), out(128);
  const Status status = launch<multiply_tf32>(
      {"multiply_tf32", 1, 32}, Product{da.data(), db.data(), reinterpret_cast<float*>(out.data())},
      Stream{});
  return compared(status, out.values(), expected, 1e-5f);
}

inline std::vector<float> arguments() {
  std::vector<float> x = {1.f, -1.f, 0.5f, 3.f, -3.f, 1e-3f, 20.f, -20.f};
  for (unsigned i = 0; i < 56; ++i) x.push_back(4 * unit(i) + 1e-4f);
  return x;
}

inline Outcome case_approximations() {
  const std::vector<float> x = arguments();
  const unsigned n = unsigned(x.size());
  const DeviceBuffer<float> in(x), out(4 * n);
  const Status status =
      launch<functions>({"functions", 1, 32}, Functions{in.data(), out.data(), n}, Stream{});
  WordList got, expected;
  for (unsigned i = 0; i < 3 * n; ++i) got.push_back(as_word(out.values()[i]));
  for (const float v : x) expected.push_back(as_word(std::exp2(v)));
  for (const float v : x) expected.push_back(as_word(1 / v));
  for (const float v : x) expected.push_back(as_word(std::tanh(v)));
  return compared(status, got, expected, 6e-4f);
}

// Exactly: ties go away from zero, and what is not finite stays so.
inline Outcome case_round_tf32() {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x = {0.f,
                          -0.f,
                          inf,
                          -inf,
                          as_float(0x3F801000),
                          as_float(0xBF801000),
                          as_float(0x3F800FFF),
                          as_float(0x7F7FF000)};
  const WordList expected = {0,          0x80000000, 0x7F800000, 0xFF800000,
                             0x3F802000, 0xBF802000, 0x3F800000, 0x7F800000};
  const unsigned n = unsigned(x.size());
  const DeviceBuffer<float> in(x), out(4 * n);
  const Status status =
      launch<functions>({"functions", 1, 32}, Functions{in.data(), out.data(), n}, Stream{});
  WordList got;
  for (unsigned i = 0; i < n; ++i) got.push_back(as_word(out.values()[3 * n + i]));
  return compared(status, got, expected);
}

template <unsigned width>
Outcome case_copy_ahead() {
  constexpr unsigned kPieces = 6, kLastBytes = width == 16 ? 12 : 16;
  std::vector<float> in(256 * kPieces);
  for (unsigned i = 0; i < in.size(); ++i) in[i] = unit(i);
  const DeviceBuffer<float> from(in), out(64);
  const Status status =
      launch<copy_ahead<width>>({"copy_ahead", 1, 64, 3 * 1024},
                                Stream16{from.data(), out.data(), kPieces, kLastBytes}, Stream{});
  WordList got, expected;
  for (unsigned thread = 0; thread < 64; ++thread) {
    float sum = 0;
    for (unsigned i = 0; i < kPieces; ++i)
      for (unsigned j = 0; j < 4; ++j) {
        const unsigned at = 64 * j + 63 - thread;
        if (i + 1 < kPieces || at % 4 * 4 < kLastBytes) sum += in[i * 256 + at];
      }
    got.push_back(as_word(out.values()[thread]));
    expected.push_back(as_word(sum));
  }
  return compared(status, got, expected);
}

#if !defined(LSTM_BELOW_SM90)

inline Outcome case_bulk_sum() {
  constexpr unsigned kPieces = 9;
  std::vector<float> in(256 * kPieces);
  float total = 0;  // exact: multiples of 1/1024
  for (unsigned i = 0; i < in.size(); ++i) total += in[i] = unit(i);
  const DeviceBuffer<float> from(in), out(1);
  const Status status = launch<bulk_sum>({"bulk_sum", 1, 128, 2048 + 32 + 512},
                                         Stream16{from.data(), out.data(), kPieces, 16}, Stream{});
  return compared(status, {as_word(out.values()[0])}, {as_word(total)});
}

inline Outcome case_ring_of_stores() {
  constexpr unsigned kBlocks = 8, kSteps = 5;  // two clusters
  const DeviceBuffer<std::uint32_t> out(kBlocks * 32);
  const Status status = launch<ring_of_stores>({"ring_of_stores", kBlocks, 32, 256, 4},
                                               Ring{out.data(), kSteps}, Stream{});
  WordList expected(kBlocks * 32);
  for (unsigned i = 0; i < kBlocks * 32; ++i) expected[i] = 100 * (i / 32) + i % 32;
  for (unsigned step = 0; step < kSteps; ++step) {
    const WordList before = expected;
    for (unsigned b = 0; b < kBlocks; ++b) {
      const unsigned from = b / 4 * 4 + (b + 3) % 4;
      for (unsigned i = 0; i < 32; ++i) expected[b * 32 + i] = before[from * 32 + i] + from % 4;
    }
  }
  return compared(status, out.values(), expected);
}

template <class T>
Outcome case_all_to_all() {
  constexpr unsigned kBlocks = 8, kSteps = 7;
  const DeviceBuffer<std::uint32_t> out(kBlocks * 32);
  const Status status =
      launch<all_to_all<T>>({"all_to_all", kBlocks, 32, 2 * 4 * 32 * sizeof(T) + 16, 4},
                            Ring{out.data(), kSteps}, Stream{});
  const auto mix = [](std::uint32_t v) {
    std::uint32_t m = v;
    for (unsigned i = 1; i < sizeof(T) / 4; ++i) m ^= (v + i) << 8 * i;
    return m;
  };
  WordList expected(kBlocks * 32);
  for (unsigned i = 0; i < kBlocks * 32; ++i) expected[i] = 1000 * (i / 32) + i % 32;
  for (unsigned step = 0; step < kSteps; ++step) {
    const WordList before = expected;
    for (unsigned b = 0; b < kBlocks; ++b)
      for (unsigned i = 0; i < 32; ++i) {
        expected[b * 32 + i] = step;
        for (unsigned r = 0; r < 4; ++r)
          expected[b * 32 + i] += mix(before[(b / 4 * 4 + r) * 32 + i]);
      }
  }
  return compared(status, out.values(), expected);
}

inline Outcome case_relay() {
  constexpr unsigned kSteps = 3;
  const DeviceBuffer<std::uint32_t> out(4 * 32);
  const Status status = launch<relay>({"relay", 4, 32, 16, 4}, Ring{out.data(), kSteps}, Stream{});
  std::uint32_t value[4] = {};
  for (unsigned turn = 0; turn < 4 * kSteps; ++turn)
    value[(turn + 1) % 4] = value[turn % 4] + turn % 4 + 1;
  WordList expected;
  for (unsigned i = 0; i < 128; ++i) expected.push_back(value[i / 32] + i % 32);
  return compared(status, out.values(), expected);
}

#endif

inline Outcome case_chain() {
  constexpr unsigned kBlocks = 24;
  const DeviceBuffer<std::uint32_t> flag(WordList{0}), value(WordList{5});
  LaunchShape shape{"chain", kBlocks, 32};
  shape.cooperative = true;
  const Status status = launch<chain>(shape, Chain{flag.data(), value.data()}, Stream{});
  return compared(status, {flag.values()[0], value.values()[0]},
                  {kBlocks, 5 + kBlocks * (kBlocks + 1) / 2});
}

inline Outcome case_sum_over_grid() {
  constexpr unsigned kBlocks = 6;
  const WordList in = some_words(kBlocks * 32);
  LaunchShape shape{"sum_over_grid", kBlocks, 32};
  shape.cooperative = true;
  Status status;
  WordList got = run_words(shape, start_words<sum_over_grid>, in, 3 * kBlocks * 32, &status);
  got.resize(kBlocks * 32);
  WordList expected = in;
  for (unsigned round = 0; round < 3; ++round) {
    const WordList before = expected;
    for (unsigned i = 0; i < kBlocks * 32; ++i) {
      expected[i] = round;
      for (unsigned b = 0; b < kBlocks; ++b) expected[i] += before[b * 32 + i % 32];
    }
  }
  return compared(status, got, expected);
}

template <class T>
Outcome case_words_around() {
  constexpr unsigned kBlocks = 3, kSteps = 9;
  const DeviceBuffer<std::uint32_t> slots(WordList(2 * kBlocks * 32)), out(kBlocks * 32);
  LaunchShape shape{"words_around", kBlocks, 32};
  shape.cooperative = true;
  const Status status =
      launch<words_around<T>>(shape, PingPong{slots.data(), out.data(), kSteps}, Stream{});
  WordList expected(kBlocks * 32);
  for (unsigned i = 0; i < kBlocks * 32; ++i) expected[i] = 64 * (i / 32) + i % 32;
  for (unsigned step = 0; step < kSteps; ++step) {
    const WordList before = expected;
    for (unsigned i = 0; i < kBlocks * 32; ++i) {
      const unsigned lane = i % 32;
      expected[i] = step;
      for (unsigned b = 0; b < kBlocks; ++b)
        for (unsigned j = 0; j < 4; ++j)
          expected[i] += (before[b * 32 + lane / 4 * 4 + j] & 0x7FFFFFFFu) * (2 * j + 1);
      expected[i] = (expected[i] + kBlocks * lane) & 0xFFFFFFu;
    }
  }
  return compared(status, out.values(), expected);
}

inline Outcome case_overlapping() {
  constexpr unsigned kBlocks = 4, kThreads = 64, kAll = kBlocks * kThreads;
  const WordList constant = some_words(kAll);
  const DeviceBuffer<std::uint32_t> c(constant), state(WordList(kAll, 3));
  WordList expected(kAll, 3);
  Status status;
  for (unsigned step = 0; step < 4 && status.ok(); ++step) {
    LaunchShape shape{"overlapping", kBlocks, kThreads};
    shape.overlap = step > 0;
    status = launch<overlapping>(shape, Overlap{c.data(), state.data(), step + 2}, Stream{});
    for (unsigned i = 0; i < kAll; ++i) expected[i] = expected[i] * (step + 2) + constant[i];
  }
  return compared(status, state.values(), expected);
}

struct Case {
  const char* name;
  int architecture;  // the least that has what the kernel uses
  Outcome (*run)();
};

inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"identity", 80, case_identity},
      {"exchange_in_block", 80, case_exchange_in_block},
      {"hand_over", 80, case_hand_over},
      {"exchange_in_warp", 80, case_exchange_in_warp},
      {"votes", 80, case_votes},
      {"multiply_bf16", 80, case_multiply16<true>},
      {"multiply_fp16", 80, case_multiply16<false>},
      {"multiply_transposed", 80, case_multiply16<false, true>},
      {"multiply_tf32", 80, case_multiply_tf32},
      {"approximations", 80, case_approximations},
      {"round_tf32", 80, case_round_tf32},
      {"copy_ahead_16", 80, case_copy_ahead<16>},
      {"copy_ahead_8", 80, case_copy_ahead<8>},
      {"chain", 80, case_chain},
      {"sum_over_grid", 80, case_sum_over_grid},
      {"words_around_1", 80, case_words_around<std::uint32_t>},
      {"words_around_2", 80, case_words_around<uint2>},
      {"words_around_4", 80, case_words_around<uint4>},
      {"overlapping", 80, case_overlapping},
#if !defined(LSTM_BELOW_SM90)
      {"bulk_sum", 90, case_bulk_sum},
      {"ring_of_stores", 90, case_ring_of_stores},
      {"all_to_all_4", 90, case_all_to_all<std::uint32_t>},
      {"all_to_all_8", 90, case_all_to_all<uint2>},
      {"all_to_all_16", 90, case_all_to_all<uint4>},
      {"relay", 90, case_relay},
#endif
  };
  return all;
}

}  // namespace lstm_cuda::micro
