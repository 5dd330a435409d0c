// The choices of zoneout: Philox4x32-10 (Salmon et al. 2011), keyed by a seed from torch's generator for
// each recurrence.
//
// A choice is a function of the seed and of its place, so forward, backward and whoever else wants it
// make the same again, however a sequence is cut. lstm_cuda/masks.py writes the same in torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lstm_cuda {

enum class Choice : uint32_t { h, c };

// A number or a vector of them; Product::wide(a, m, high, low) gives both halves of a m.
template <class U>
struct PhiloxState {
  U word[4];
};

template <class Product, class U>
LSTM_HOST_DEVICE void philox(PhiloxState<U>& s, int64_t seed) {
  uint32_t key[2] = {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
  for (int round = 0; round < 10; ++round) {
    U high[2], low[2];
    Product::wide(s.word[0], 0xD2511F53u, high[0], low[0]);
    Product::wide(s.word[2], 0xCD9E8D57u, high[1], low[1]);
    s.word[0] = high[1] ^ s.word[1] ^ key[0];
    s.word[1] = low[1];
    s.word[2] = high[0] ^ s.word[3] ^ key[1];
    s.word[3] = low[0];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

// Unit j at batch row b and time t has word `random_word(j)` of the counter
// (random_lane(j), b, t, choice): a run of 16 units is one word of 16 counters.
LSTM_HOST_DEVICE uint32_t random_lane(int64_t j) { return uint32_t(j / 64 * 16 + j % 16); }
LSTM_HOST_DEVICE int random_word(int64_t j) { return int(j / 16 % 4); }

// State is kept where the word is below this.
LSTM_HOST_DEVICE uint64_t random_threshold(double probability) {
  return uint64_t(probability * 4294967296.0);
}

struct ScalarProduct {
  static LSTM_HOST_DEVICE void wide(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
    const uint64_t product = uint64_t(a) * m;
    high = uint32_t(product >> 32);
    low = uint32_t(product);
  }
};

LSTM_HOST_DEVICE bool random_keep(int64_t seed, Choice choice, int64_t t, int64_t b, int64_t j,
                                  double probability) {
  PhiloxState<uint32_t> s{{random_lane(j), uint32_t(b), uint32_t(t), uint32_t(choice)}};
  philox<ScalarProduct>(s, seed);
  const int which = random_word(j);  // an index would put the words into memory
  const uint32_t word =
      which < 2 ? (which == 0 ? s.word[0] : s.word[1]) : (which == 2 ? s.word[2] : s.word[3]);
  return word < random_threshold(probability);
}

}  // namespace lstm_cuda
