// A call of the layer op on CUDA (ops_cuda.cpp), forward or backward, as every kernel family runs it: what
// kernels are told, what memory they need, and what torch multiplies for them before and after.
#pragma once

#include "cuda/cell_norms.h"
#include "cuda/families.h"
#include "cuda/operands.h"
#include "cuda/pack.h"
#include "cuda/plan.h"
#include "ops.h"
#include "ops_projection.h"

namespace lstm_cuda {

// [D, 4H, P]
inline Tensor stacked_w_hh(const Inputs& in) {
  return shaped(cat(in.w_hh), {in.shape.D, 4 * in.shape.H, in.shape.P});
}

// Families whose kernels keep the weights. For them alone, weights are packed. What the initial state
// is multiplied with is torch's for them, and wherever a projection is folded:
// gates_x[first step] += h0 w_hh^T, dh0 = dgates[first step] w_hh.
inline bool keeps_weights(Family family) {
  return family == Family::rec_cluster || family == Family::rec_group;
}

// Memory that the kernels of one call need besides operands and results.
struct Scratch {
  Tensor memory;
  PackedWeights weights{};  // of families with resident weights
  void* words = nullptr;    // of rec_group

  Scratch(const Inputs& in, int64_t bytes) : memory(empty({bytes}, ScalarType::Byte, in.x)) {}
  std::byte* data() const { return static_cast<std::byte*>(memory.data_ptr()); }
};

// A call forward: what kernels are told, and what torch multiplies for them.
struct ForwardCall {
  static constexpr bool kBackward = false;
  const Inputs& in;
  Products products;
  OptionalTensor biases;  // [D * 4H], the sum
  OptionalTensor packed;  // weights that were packed before, in this layout
  int64_t layout;
  OptionalTensor h0;  // [D, B, P], as w_hh meets it
  Tensor y, h_n;
  RecurrenceForward p{};
  Tensor gates{};       // [T, B, D, 4H]
  Tensor h0_product{};  // [D, B, 4H], where kernels read it

  // Once for all families that are tried.
  bool has_input_to_multiply() const { return !p.gates && !p.gates_x; }
  void multiply_input() {
    if (!has_input_to_multiply()) return;
    const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
    gates =
        result_shaped(products.linear_each(in.x, cat(in.w_ih), biases, inputs), {T, B, D, 4 * H});
    p.gates = gates.data_ptr();
  }

  Status start(const CudaPlan& plan, const Scratch& scratch, Stream stream) const {
    switch (plan.family) {
      case Family::rec_cta:
        return (p.variant ? variant_cta_forward : rec_cta_forward)(p, plan, stream);
      case Family::rec_cluster:
        return (p.variant ? variant_cluster_forward : rec_cluster_forward)(p, plan, scratch.weights,
                                                                           stream);
      case Family::rec_group:
        return rec_group_forward(p, plan, scratch.weights, scratch.words, stream);
      default:
        return rec_step_forward(p, plan, scratch.data(), stream);
    }
  }
  Status add_initial_state(Stream stream) {
    if (!h0) return {};
    h0_product = bmm(*h0, transpose(stacked_w_hh(in), 1, 2));
    p.h0_product = h0_product.data_ptr();
    // What is normalised by itself must not be in gates_x.
    if (kind_of(p.variant) == CellKind::norm) return {};
    return add_initial_product(in.shape, p.h0_product, p.lengths, p.reset, p.gates, stream);
  }
  Status start_resident(const CudaPlan& plan, const Scratch& scratch, Stream stream) {
    const Status status = add_initial_state(stream);
    return status.ok() ? start(plan, scratch, stream) : status;
  }

  // What comes before and after a recurrence over m, with a projection folded into its weights.
  Status before_folded(ForwardCall& over_m, Stream stream) {
    const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
    over_m.y = empty({T, B, D * H}, in.type, in.x);
    over_m.h_n = empty({D, B, H}, in.type, in.x);
    over_m.p.y = over_m.y.data_ptr();
    over_m.p.h_n = over_m.h_n.data_ptr();
    over_m.p.h0 = nullptr;
    over_m.h0 = {};
    return add_initial_state(stream);
  }
  Status after_folded(const ForwardCall& over_m, Stream stream) {
    const auto project = [&](const Tensor& m, int64_t d) {
      return products.linear(m, in.w_hr[d], {});
    };
    y = result_shaped(each_recurrence(over_m.y, in.shape, project), sizes_of(y));
    return last_outputs(in.shape, y.data_ptr(), p.h0, p.lengths, p.h_n, stream);
  }
  // Whether a launch is refused is known only after h0's product was put in gates_x, where the next
  // family would add it again; of several launches, the first may have saved gates there, too. That
  // happens once, so gates_x is made anew.
  void undo_resident() {
    if (!p.gates_x) p.gates = nullptr;
  }

  // Weights that need not be packed any more.
  const void* packed_before(const CudaPlan& plan, int64_t bytes) const {
    if (!packed || layout != packed_layout(plan)) return nullptr;
    STD_TORCH_CHECK(packed->numel() == bytes, "lstm_cuda: packed must have ", bytes,
                    " bytes for this layer; got ", packed->numel());
    return packed->data_ptr();
  }
};

struct BackwardCall {
  static constexpr bool kBackward = true;
  const Inputs& in;
  Products products;
  OptionalTensor dy, dh_n;
  Tensor dgates, dh0;
  bool need_dh;  // where the recurrence does without
  RecurrenceBackward p{};
  // What only some families want of other cells: norms of c [T, B, D, 2], and the part of dh0 that comes
  // through no product [D, B, H].
  OptionalTensor c_norms{}, dh_kept{};

  Status start(const CudaPlan& plan, const Scratch& scratch, Stream stream) {
    switch (plan.family) {
      case Family::rec_cta: {
        const Status status = find_norms(stream);
        if (!status.ok()) return status;
        return (p.variant ? variant_cta_backward : rec_cta_backward)(p, plan, stream);
      }
      case Family::rec_cluster: {
        const Status status = find_norms(stream);
        if (!status.ok()) return status;
        return (p.variant ? variant_cluster_backward : rec_cluster_backward)(
            p, plan, scratch.weights, stream);
      }
      case Family::rec_group:
        return rec_group_backward(p, plan, scratch.weights, scratch.words, stream);
      default:
        return rec_step_backward(p, plan, scratch.data(), stream);
    }
  }
  Status find_norms(Stream stream) {
    if (kind_of(p.variant) != CellKind::norm) return {};
    const LayerShape& s = in.shape;
    c_norms = empty({s.T, s.B, s.D, 2}, compute_type(in.type), in.x);
    p.c_norms = c_norms->data_ptr();
    return cell_norms(s, *p.variant, p.gates, p.c, p.c0, p.wide_c, p.lengths, p.reset,
                      c_norms->data_ptr(), stream);
  }
  Status start_resident(const CudaPlan& plan, const Scratch& scratch, Stream stream) {
    if (p.dh0 && p.variant && p.variant->cell.zoneout_h > 0) {
      dh_kept = empty({in.shape.D, in.shape.B, in.shape.H}, compute_type(in.type), in.x);
      p.dh_kept = dh_kept->data_ptr();
    }
    const Status status = start(plan, scratch, stream);
    return status.ok() ? finish_initial_state(stream) : status;
  }
  Status finish_initial_state(Stream stream) {
    if (!p.dh0) return {};
    const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
    const Tensor first = empty({D, B, 4 * H}, in.type, in.x);
    const Status status =
        first_dgates(in.shape, p.dgates, p.lengths, p.reset, first.data_ptr(), stream);
    if (!status.ok()) return status;
    dh0 = bmm(first, stacked_w_hh(in));
    return finish_dh0(in.shape, p.dh_n, p.lengths, p.reset,
                      p.variant ? p.variant->h_scale : nullptr, p.dh_kept, dh0.data_ptr(), stream);
  }
  static bool has_input_to_multiply() { return false; }
  void multiply_input() {}

  // What comes before and after a recurrence over m, with a projection folded into its weights.
  Status before_folded(BackwardCall& over_m, Stream) const {
    const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
    const auto project = [&](const Tensor& rows, int64_t d) {
      return products.multiply(rows, in.w_hr[d]);
    };
    if (dy) over_m.dy = each_recurrence(*dy, in.shape, project);
    if (dh_n) over_m.dh_n = bmm(*dh_n, shaped(cat(in.w_hr), {D, P, H}));
    over_m.p.dy = pointer(over_m.dy);
    over_m.p.dh_n = pointer(over_m.dh_n);
    over_m.p.dh = over_m.p.dh0 = nullptr;
    return {};
  }
  Status after_folded(const BackwardCall&, Stream stream) {
    if (need_dh) {
      const auto back = [&](const Tensor& rows, int64_t d) {
        return products.multiply(rows, in.w_hh[d]);
      };
      const Tensor product = each_recurrence(dgates, in.shape, back);
      const Status status = output_gradients(in.shape, p.dy, p.dh_n, product.data_ptr(), p.lengths,
                                             p.reset, p.dh, stream);
      if (!status.ok()) return status;
    }
    return finish_initial_state(stream);
  }
  void undo_resident() {}  // what was given is as it was, and results are written again
  static const void* packed_before(const CudaPlan&, int64_t) { return nullptr; }
};

}  // namespace lstm_cuda
