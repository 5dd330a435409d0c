// The kernels behind operands.h: one element a thread and turn, read once and written once, in the
// order of the output.
#include "operands.h"

#include "../schedule.h"
#include "element.cuh"

namespace lstm_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

// Calls visit(index) for each index below count, over all threads of the grid.
template <class Visit>
LSTM_DEVICE void each(int64_t count, Visit visit) {
  const int64_t threads = int64_t(ptx::grid_blocks()) * ptx::block_threads();
  for (int64_t index = int64_t(ptx::block_index()) * ptx::block_threads() + ptx::thread_index();
       index < count; index += threads)
    visit(index);
}

LaunchShape grid_for(const char* kernel, int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return {kernel, unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads};
}

struct AddBiases {
  const void *b_ih[kMaxRecurrences], *b_hh[kMaxRecurrences];
  void* to;
  int64_t D, G;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
add_biases_kernel(LSTM_PARAMETER AddBiases p) {
  using Element = typename Types<a>::Element;
  each(p.D * p.G, [&](int64_t index) {
    const int64_t d = index / p.G, j = index % p.G;
    static_cast<Element*>(p.to)[index] =
        to_element<Element>(to_compute(static_cast<const Element*>(p.b_ih[d])[j]) +
                            to_compute(static_cast<const Element*>(p.b_hh[d])[j]));
  });
}

struct CopyInput {
  LayerShape shape;
  const void* x;
  int64_t stride_t, stride_b;
  const int64_t* lengths;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
copy_input_kernel(LSTM_PARAMETER CopyInput p) {
  using Element = typename Types<a>::Element;
  const Schedule schedule = schedule_of(p.shape, 0, p.lengths, nullptr);
  const int64_t B = p.shape.B, width = p.shape.inputs * p.shape.I;
  each(p.shape.T * B * width, [&](int64_t index) {
    const int64_t t = index / (B * width), b = index / width % B, j = index % width;
    Element v = to_element<Element>(typename Types<a>::Compute(0));
    if (schedule.active(t, b))
      v = static_cast<const Element*>(p.x)[t * p.stride_t + b * p.stride_b + j];
    static_cast<Element*>(p.to)[index] = v;
  });
}

struct CopyPreviousH {
  LayerShape shape;
  const void *y, *h0;
  const int64_t* lengths;
  const uint8_t* reset;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
copy_previous_h_kernel(LSTM_PARAMETER CopyPreviousH p) {
  using Element = typename Types<a>::Element;
  const int64_t B = p.shape.B, D = p.shape.D, P = p.shape.P;
  each(p.shape.T * B * D * P, [&](int64_t index) {
    const int64_t j = index % P, d = index / P % D, b = index / (P * D) % B,
                  t = index / (P * D * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    const int64_t before = schedule.previous(t, b);
    Element v = to_element<Element>(typename Types<a>::Compute(0));
    if (schedule.active(t, b) && !schedule.fresh(t, b)) {
      if (before >= 0)
        v = static_cast<const Element*>(p.y)[((before * B + b) * D + d) * P + j];
      else if (p.h0)
        v = static_cast<const Element*>(p.h0)[(d * B + b) * P + j];
    }
    static_cast<Element*>(p.to)[index] = v;
  });
}

struct CellOutputs {
  LayerShape shape;
  const void *gates, *c;
  const int64_t* lengths;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
cell_outputs_kernel(LSTM_PARAMETER CellOutputs p) {
  using Element = typename Types<a>::Element;
  using Compute = typename Types<a>::Compute;
  const Schedule schedule = schedule_of(p.shape, 0, p.lengths, nullptr);
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H;
  each(p.shape.T * B * D * H, [&](int64_t index) {
    const int64_t row = index / H, j = index % H;  // row: of [T, B, D]
    Compute m = 0;
    if (schedule.active(row / (D * B), row / D % B))
      m = to_compute(static_cast<const Element*>(p.gates)[row * 4 * H + 3 * H + j]) *
          DeviceMath<a>::tanh(static_cast<const Compute*>(p.c)[index]);
    static_cast<Element*>(p.to)[index] = to_element<Element>(m);
  });
}

struct LastOutputs {
  LayerShape shape;
  const void *y, *h0;
  const int64_t* lengths;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
last_outputs_kernel(LSTM_PARAMETER LastOutputs p) {
  using Element = typename Types<a>::Element;
  const int64_t B = p.shape.B, D = p.shape.D, P = p.shape.P;
  each(D * B * P, [&](int64_t index) {
    const int64_t j = index % P, b = index / P % B, d = index / (P * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, nullptr);
    Element v = to_element<Element>(typename Types<a>::Compute(0));
    if (schedule.length(b) > 0)
      v = static_cast<const Element*>(p.y)[((schedule.last(b) * B + b) * D + d) * P + j];
    else if (p.h0)
      v = static_cast<const Element*>(p.h0)[index];
    static_cast<Element*>(p.to)[index] = v;
  });
}

struct OutputGradients {
  LayerShape shape;
  const void *dy, *dh_n, *product;
  const int64_t* lengths;
  const uint8_t* reset;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
output_gradients_kernel(LSTM_PARAMETER OutputGradients p) {
  using Element = typename Types<a>::Element;
  using Compute = typename Types<a>::Compute;
  const int64_t B = p.shape.B, D = p.shape.D, P = p.shape.P;
  const auto value = [](const void* from, int64_t at) {
    return from ? to_compute(static_cast<const Element*>(from)[at]) : Compute(0);
  };
  each(p.shape.T * B * D * P, [&](int64_t index) {
    const int64_t j = index % P, d = index / P % D, b = index / (P * D) % B,
                  t = index / (P * D * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    Compute dh = 0;
    if (schedule.active(t, b)) {
      const int64_t after = schedule.next(t, b);
      dh = value(p.dy, index);
      if (after < 0)
        dh += value(p.dh_n, (d * B + b) * P + j);
      else if (!schedule.fresh(after, b))
        dh += value(p.product, ((after * B + b) * D + d) * P + j);
    }
    static_cast<Element*>(p.to)[index] = to_element<Element>(dh);
  });
}

// True if the initial state of row b reaches a step, its first.
LSTM_DEVICE bool initial_state_used(const Schedule& schedule, int64_t b) {
  return schedule.length(b) > 0 && !schedule.fresh(schedule.first(b), b);
}

// What the three kernels below read and write.
struct FirstSteps {
  LayerShape shape;
  const void* from;
  const int64_t* lengths;
  const uint8_t* reset;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
add_initial_product_kernel(LSTM_PARAMETER FirstSteps p) {
  using Element = typename Types<a>::Element;
  const int64_t B = p.shape.B, D = p.shape.D, G = 4 * p.shape.H;
  each(D * B * G, [&](int64_t index) {
    const int64_t j = index % G, b = index / G % B, d = index / (G * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    if (!initial_state_used(schedule, b)) return;
    Element& gate = static_cast<Element*>(p.to)[((schedule.first(b) * B + b) * D + d) * G + j];
    gate = to_element<Element>(to_compute(gate) +
                               to_compute(static_cast<const Element*>(p.from)[index]));
  });
}

template <Arithmetic a>
LSTM_KERNEL(kThreads)
first_dgates_kernel(LSTM_PARAMETER FirstSteps p) {
  using Element = typename Types<a>::Element;
  const int64_t B = p.shape.B, D = p.shape.D, G = 4 * p.shape.H;
  each(D * B * G, [&](int64_t index) {
    const int64_t j = index % G, b = index / G % B, d = index / (G * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    Element v = to_element<Element>(typename Types<a>::Compute(0));
    if (initial_state_used(schedule, b))
      v = static_cast<const Element*>(p.from)[((schedule.first(b) * B + b) * D + d) * G + j];
    static_cast<Element*>(p.to)[index] = v;
  });
}

struct FinishDh0 : FirstSteps {
  const void *h_scale, *kept;  // [D, B, P], compute, or null
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
finish_dh0_kernel(LSTM_PARAMETER FinishDh0 p) {
  using Element = typename Types<a>::Element;
  using Compute = typename Types<a>::Compute;
  const int64_t B = p.shape.B, D = p.shape.D, P = p.shape.P;
  each(D * B * P, [&](int64_t index) {
    const int64_t b = index / P % B, d = index / (P * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    Element& to = static_cast<Element*>(p.to)[index];
    if (initial_state_used(schedule, b)) {
      Compute v = to_compute(to);
      if (p.h_scale) v *= static_cast<const Compute*>(p.h_scale)[index];
      if (p.kept) v += static_cast<const Compute*>(p.kept)[index];
      to = to_element<Element>(v);
    } else if (schedule.length(b) == 0 && p.from) {
      to = static_cast<const Element*>(p.from)[index];
    } else {
      to = to_element<Element>(Compute(0));
    }
  });
}

}  // namespace

Status add_biases(const LayerShape& shape, const void* const* b_ih, const void* const* b_hh,
                  void* to, Stream stream) {
  AddBiases p{{}, {}, to, shape.D, 4 * shape.H};
  for (int64_t d = 0; d < shape.D; ++d) p.b_ih[d] = b_ih[d], p.b_hh[d] = b_hh[d];
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<add_biases_kernel<a>>(grid_for("add_biases", p.D * p.G), p, stream);
  });
}

Status copy_input(const LayerShape& shape, const void* x, int64_t x_stride_t, int64_t x_stride_b,
                  const int64_t* lengths, void* to, Stream stream) {
  const CopyInput p{shape, x, x_stride_t, x_stride_b, lengths, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<copy_input_kernel<a>>(
        grid_for("copy_input", shape.T * shape.B * shape.inputs * shape.I), p, stream);
  });
}

Status copy_previous_h(const LayerShape& shape, const void* y, const void* h0,
                       const int64_t* lengths, const uint8_t* reset, void* to, Stream stream) {
  const CopyPreviousH p{shape, y, h0, lengths, reset, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<copy_previous_h_kernel<a>>(
        grid_for("copy_previous_h", shape.T * shape.B * shape.D * shape.P), p, stream);
  });
}

Status cell_outputs(const LayerShape& shape, const void* gates, const void* c,
                    const int64_t* lengths, void* to, Stream stream) {
  const CellOutputs p{shape, gates, c, lengths, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<cell_outputs_kernel<a>>(
        grid_for("cell_outputs", shape.T * shape.B * shape.D * shape.H), p, stream);
  });
}

Status last_outputs(const LayerShape& shape, const void* y, const void* h0, const int64_t* lengths,
                    void* to, Stream stream) {
  const LastOutputs p{shape, y, h0, lengths, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<last_outputs_kernel<a>>(grid_for("last_outputs", shape.D * shape.B * shape.P), p,
                                          stream);
  });
}

Status output_gradients(const LayerShape& shape, const void* dy, const void* dh_n,
                        const void* product, const int64_t* lengths, const uint8_t* reset, void* to,
                        Stream stream) {
  const OutputGradients p{shape, dy, dh_n, product, lengths, reset, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<output_gradients_kernel<a>>(
        grid_for("output_gradients", shape.T * shape.B * shape.D * shape.P), p, stream);
  });
}

Status add_initial_product(const LayerShape& shape, const void* product, const int64_t* lengths,
                           const uint8_t* reset, void* gates, Stream stream) {
  const FirstSteps p{shape, product, lengths, reset, gates};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<add_initial_product_kernel<a>>(
        grid_for("add_initial_product", shape.D * shape.B * 4 * shape.H), p, stream);
  });
}

Status first_dgates(const LayerShape& shape, const void* dgates, const int64_t* lengths,
                    const uint8_t* reset, void* to, Stream stream) {
  const FirstSteps p{shape, dgates, lengths, reset, to};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<first_dgates_kernel<a>>(grid_for("first_dgates", shape.D * shape.B * 4 * shape.H),
                                          p, stream);
  });
}

Status finish_dh0(const LayerShape& shape, const void* dh_n, const int64_t* lengths,
                  const uint8_t* reset, const void* h_scale, const void* kept, void* dh0,
                  Stream stream) {
  // Else every row has a first step that the initial state reaches, through nothing but the product.
  if (!lengths && !reset && !h_scale && !kept) return {};
  const FinishDh0 p{{shape, dh_n, lengths, reset, dh0}, h_scale, kept};
  return by_dtype(shape.dtype, [&]<Arithmetic a>() {
    return launch<finish_dh0_kernel<a>>(grid_for("finish_dh0", shape.D * shape.B * shape.P), p,
                                        stream);
  });
}

}  // namespace lstm_cuda
