// The kernel behind pack.h.
//
// One block for each row tile: 16 rows of an A operand over their whole depth, so that it sees all that
// the scale of a row depends on. Its warps share the fragments of these rows, one fragment a turn; they
// read the weights twice, for the scales and to pack them, the second time mostly from the cache.
// 16-bit weights have no scales and are read once.
// A lane's 8 values of a fragment are 4 pairs of neighbours in w_hh (Pairs), read with one access
// where rows are aligned. A warp reads whole sectors of 32 bytes with that, and writes 512 bytes in
// one piece.
// Shared memory: the largest value of each row and warp, [warps][16].
#include "pack.h"

#include <type_traits>

#include "element.cuh"
#include "scale.cuh"

namespace lstm_cuda {
namespace {

// Which elements of a fragment are neighbours in w_hh: of pair p of lane (g, q), the first element, and
// the place of element e among the lane's 8 values (half e of register r has place 2r + e; its row is
// g + 8 * (r % 2)).
template <class Fragments>
struct Pairs;

template <>
struct Pairs<ForwardFragments> {
  static constexpr int kWarps = 8;  // no warp is idle: depth is a multiple of 128
  static constexpr const char* kName = "pack_forward";
  static LSTM_DEVICE int row(int g, int p) { return g + p % 2 * 8; }
  static LSTM_DEVICE int column(int q, int p) { return 2 * q + p / 2 * 8; }
  static LSTM_DEVICE int place(int p, int e) { return 2 * p + e; }

  // Warps of the kernel that have the same rows, at different depth.
  static LSTM_HOST_DEVICE int split(const ForwardFragments& f) { return f.shape.split; }
  static LSTM_HOST_DEVICE int64_t scales(const ResidentShape&) { return 4; }  // times padded H
  static LSTM_DEVICE int64_t scale(const ResidentShape& s, int, const WeightSource& w) {
    return w.gate * s.hidden + w.unit;
  }
};

template <>
struct Pairs<BackwardFragments> {
  static constexpr int kWarps = 4;  // depth is a multiple of 64
  static constexpr const char* kName = "pack_backward";
  static LSTM_DEVICE int row(int g, int) { return g; }
  static LSTM_DEVICE int column(int q, int p) { return 2 * q + p % 2 + p / 2 * 8; }
  static LSTM_DEVICE int place(int p, int e) { return 2 * (p / 2 * 2 + e) + p % 2; }

  static LSTM_HOST_DEVICE int split(const BackwardFragments&) { return 1; }
  static LSTM_HOST_DEVICE int64_t scales(const ResidentShape& s) { return s.blocks; }
  static LSTM_DEVICE int64_t scale(const ResidentShape& s, int block, const WeightSource& w) {
    return block * s.hidden + w.k;
  }
};

template <class Fragments>
struct Pack {
  Fragments fragments;
  int H;
  uint4* to;
  float* unscale;
  uint4* words;
  int64_t word_pieces;
  const void* w_hh[kMaxRecurrences];  // [4H, H] each
};

// The bits of a weight of 16 bits are copied, whatever type it has.
using Bits16 = uint16_t;

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// What one lane has of a fragment.
template <class T>
struct alignas(16) Piece {
  T v[8];
};

// One row tile of one recurrence and block of the kernel that will multiply.
template <class Fragments, class Element>
struct RowTile {
  const Fragments& fragments;
  const Element* w_hh;
  int H, block, group, tile;
  bool paired;  // pairs of neighbours are aligned to their size

  LSTM_DEVICE WeightSource source(int warp, int step, int row, int column) const {
    return fragments.source(block, warp, tile, step, row, column);
  }

  // Calls visit(warp, step) for this warp's share of the tile's fragments.
  template <class Visit>
  LSTM_DEVICE void each_fragment(Visit visit) const {
    constexpr int kWarps = Pairs<Fragments>::kWarps;
    const int steps = fragments.steps(), split = Pairs<Fragments>::split(fragments);
    const int groups = fragments.shape.warps / split;
    for (int i = int(ptx::thread_index()) / 32; i < split * steps; i += kWarps)
      visit(i / steps * groups + group, i % steps);
  }

  // A lane's values of a fragment; zeros past H.
  LSTM_DEVICE void fetch(int warp, int step, Element (&values)[8]) const {
    using P = Pairs<Fragments>;
    const int g = int(ptx::thread_index()) % 32 / 4, q = int(ptx::thread_index()) % 4;
    LSTM_UNROLL
    for (int p = 0; p < 4; ++p) {
      const WeightSource s = source(warp, step, P::row(g, p), P::column(q, p));
      Pair<Element> pair{};
      if (s.unit < H) {
        const Element* const from = w_hh + (int64_t(s.gate) * H + s.unit) * H + s.k;
        if (paired) {  // H is even, and so is k
          if (s.k < H) pair = ptx::load<Pair<Element>>(from);
        } else {
          if (s.k < H) pair.v[0] = from[0];
          if (s.k + 1 < H) pair.v[1] = from[1];
        }
      }
      values[P::place(p, 0)] = pair.v[0];
      values[P::place(p, 1)] = pair.v[1];
    }
  }
};

// The exponents of the scales of the lane's rows, g and g + 8.
template <class Tile>
LSTM_DEVICE void find_scales(const Tile& tile, int warps, unsigned* maxima, int (&exponents)[2]) {
  const int lane = int(ptx::thread_index()) % 32, warp = int(ptx::thread_index()) / 32;
  unsigned largest[2] = {0, 0};
  tile.each_fragment([&](int fragment_warp, int step) {
    float values[8];
    tile.fetch(fragment_warp, step, values);
    LSTM_UNROLL
    for (int i = 0; i < 8; ++i) {
      const unsigned size = finite_size(values[i]);
      if (size > largest[i / 2 % 2]) largest[i / 2 % 2] = size;
    }
  });
  LSTM_UNROLL
  for (int half = 0; half < 2; ++half) {
    LSTM_UNROLL
    for (unsigned lanes = 1; lanes < 4; lanes *= 2) {
      const unsigned other = ptx::shuffle_xor(largest[half], lanes);
      if (other > largest[half]) largest[half] = other;
    }
    if (lane % 4 == 0) maxima[16 * warp + 8 * half + lane / 4] = largest[half];
  }
  ptx::block_sync();  // the maxima of all warps are complete before they are read
  LSTM_UNROLL
  for (int half = 0; half < 2; ++half) {
    for (int w = 0; w < warps; ++w) {
      const unsigned other = maxima[16 * w + 8 * half + lane / 4];
      if (other > largest[half]) largest[half] = other;
    }
    exponents[half] = scale_exponent(largest[half]);
  }
}

// The parts of a scaled weight. What is not finite, the high part says alone.
template <int kParts>
LSTM_DEVICE __half part_of(int part, float w) {
  const __half high = __float2half_rn(w);
  if (kParts == 1 || part == 0) return high;
  const float rest = w - __half2float(high);
  return __float2half_rn(rest == rest ? rest * kLowPart : 0.f);
}

template <class Fragments, class Element, int kParts>
LSTM_KERNEL(32 * Pairs<Fragments>::kWarps,
            2)  // more blocks, for which ptxas would spill, gain nothing
pack(LSTM_PARAMETER Pack<Fragments> p) {
  using P = Pairs<Fragments>;
  constexpr bool kScaled = std::is_same_v<Element, float>;
  const Fragments& f = p.fragments;
  const int lane = int(ptx::thread_index()) % 32;
  const int tiles = f.row_tiles(), groups = f.shape.warps / P::split(f);
  int index = int(ptx::block_index());
  const int number = index % tiles;
  index /= tiles;
  const int group = index % groups;
  index /= groups;
  const int block = index % f.shape.blocks, d = index / f.shape.blocks;
  const Element* const w_hh = static_cast<const Element*>(p.w_hh[d]);
  const RowTile<Fragments, Element> tile{
      f,
      w_hh,
      p.H,
      block,
      group,
      number,
      (reinterpret_cast<uintptr_t>(w_hh) | unsigned(p.H) * sizeof(Element)) %
              sizeof(Pair<Element>) ==
          0};

  ptx::Shared shared;
  int exponents[2] = {0, 0};
  if constexpr (kScaled)
    find_scales(tile, P::kWarps, shared.take<unsigned>(16 * P::kWarps), exponents);
  if (int(ptx::thread_index()) < 32 && lane % 4 == 0) {
    LSTM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const WeightSource row = tile.source(group, 0, lane / 4 + 8 * half, 0);
      p.unscale[d * P::scales(f.shape) * f.shape.hidden + P::scale(f.shape, block, row)] =
          power_of_two(-exponents[half]);
    }
  }

  tile.each_fragment([&](int warp, int step) {
    Element values[8];
    tile.fetch(warp, step, values);
    const int64_t first = first_piece(f, d, block, warp, kParts) + lane;
    LSTM_UNROLL
    for (int part = 0; part < kParts; ++part) {
      uint4* const to = p.to + first + ((part * tiles + number) * f.steps() + step) * 32;
      if constexpr (kScaled) {
        Piece<__half> piece;
        LSTM_UNROLL
        for (int i = 0; i < 8; ++i)
          piece.v[i] = part_of<kParts>(part, values[i] * power_of_two(exponents[i / 2 % 2]));
        ptx::store(to, piece);
      } else {
        Piece<Element> piece;
        LSTM_UNROLL
        for (int i = 0; i < 8; ++i) piece.v[i] = values[i];
        ptx::store(to, piece);
      }
    }
  });

  const int64_t threads = int64_t(ptx::grid_blocks()) * ptx::block_threads();
  for (int64_t i = int64_t(ptx::block_index()) * ptx::block_threads() + ptx::thread_index();
       i < p.word_pieces; i += threads)
    p.words[i] = uint4{0, 0, 0, 0};
}

// Calls use(fragments) for the direction's.
template <class Use>
auto with_fragments(const CudaPlan& plan, bool backward, Use use) {
  return backward ? use(BackwardFragments{plan.resident}) : use(ForwardFragments{plan.resident});
}

int64_t fragment_bytes(const LayerShape& shape, const CudaPlan& plan, bool backward) {
  return with_fragments(plan, backward, [&](const auto& fragments) {
    return 16 * packed_pieces(fragments, shape.D, parts_of(plan.arithmetic));
  });
}

template <class Fragments, class Element, int kParts>
Status start(const Pack<Fragments>& params, int64_t D, Stream stream) {
  using P = Pairs<Fragments>;
  const Fragments& f = params.fragments;
  const int64_t tiles = D * f.shape.blocks * (f.shape.warps / P::split(f)) * f.row_tiles();
  const std::size_t shared =
      std::is_same_v<Element, float> ? 16 * P::kWarps * sizeof(unsigned) : std::size_t(0);
  return launch<pack<Fragments, Element, kParts>>(
      {P::kName, unsigned(tiles), 32 * P::kWarps, shared}, params, stream);
}

}  // namespace

int64_t packed_bytes(const LayerShape& shape, const CudaPlan& plan, bool backward) {
  const int64_t scales = with_fragments(plan, backward, [&](const auto& fragments) {
    using P = Pairs<std::decay_t<decltype(fragments)>>;
    return shape.D * P::scales(fragments.shape) * fragments.shape.hidden;
  });
  const int64_t bytes = fragment_bytes(shape, plan, backward) + scales * int64_t(sizeof(float));
  return (bytes + 255) / 256 * 256;
}

PackedWeights packed_weights(const LayerShape& shape, const CudaPlan& plan, bool backward,
                             const void* packed) {
  const void* const scales =
      static_cast<const std::byte*>(packed) + fragment_bytes(shape, plan, backward);
  return {packed, static_cast<const float*>(scales)};
}

Status pack_weights(const LayerShape& shape, const CudaPlan& plan, bool backward,
                    const void* const* w_hh, void* packed, void* words, int64_t word_bytes,
                    Stream stream) {
  return with_fragments(plan, backward, [&](const auto& fragments) -> Status {
    using Fragments = std::decay_t<decltype(fragments)>;
    Pack<Fragments> params{};
    params.fragments = fragments;
    params.H = int(shape.H);
    params.to = static_cast<uint4*>(packed);
    params.unscale = const_cast<float*>(packed_weights(shape, plan, backward, packed).unscale);
    params.words = static_cast<uint4*>(words);
    params.word_pieces = words ? word_bytes / 16 : 0;
    for (int64_t d = 0; d < shape.D; ++d) params.w_hh[d] = w_hh[d];
    switch (plan.arithmetic) {
      case Arithmetic::float32:
        return start<Fragments, float, 2>(params, shape.D, stream);
      case Arithmetic::tf32:
        return start<Fragments, float, 1>(params, shape.D, stream);
      case Arithmetic::float16:
      case Arithmetic::bfloat16:
        return start<Fragments, Bits16, 1>(params, shape.D, stream);
      default: {
        Status status;
        std::snprintf(status.message, sizeof status.message, "%s has no fragments of float64",
                      Pairs<Fragments>::kName);
        return status;
      }
    }
  });
}

}  // namespace lstm_cuda
