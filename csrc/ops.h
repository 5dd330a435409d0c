// What the torch side of the CPU and of the CUDA path share: schemas, checks, allocation. Only
// csrc/ops* knows torch, through its stable ABI, so that one binary loads on torch 2.11 and newer.
// Messages for users are made in Python; those here keep a direct caller of the ops from reading
// memory that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "recurrence.h"

namespace lstm_cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::optional<Tensors>;
using Sizes = std::vector<int64_t>;

// A list that may be absent is optional, not empty: AOTInductor cannot pass an empty list of tensors.
inline constexpr const char* kForwardSchema =
    "layer_forward(Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? bias, Tensor[]? w_hr, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int reversed, bool save, bool cells, "
    "bool allow_tf32, Tensor? packed=None, int packed_layout=0, int before=0, int after=0) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)";
inline constexpr const char* kBackwardSchema =
    "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor[] w_ih, "
    "Tensor[] w_hh, Tensor[]? w_hr, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, "
    "int reversed, Tensor y, Tensor gates, Tensor c, bool need_dx, bool need_dw, bool allow_tf32, "
    "Tensor? dgates=None) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, "
    "Tensor db, Tensor dw_hr)";

// layer_backward, on CPUs, for a piece of a sequence with so many steps before and after it. Calls go
// from the last piece to the first and hand on carry [D, B, 4H], dc0 as dc_n, and `sums` [2 * parts
// of the plan * elements of the weights]. The last call gives dh0 and the gradients of the weights.
// All that goes out is in the compute type.
inline constexpr const char* kPieceBackwardSchema =
    "piece_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor[] w_ih, "
    "Tensor[] w_hh, Tensor[]? w_hr, Tensor h0, Tensor c0, Tensor? lengths, Tensor? reset, "
    "int reversed, Tensor y, Tensor gates, Tensor c, bool need_dx, bool need_dw, int before, "
    "int after, Tensor? carry, Tensor(a!) sums) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr, "
    "Tensor carry)";

// The same for other cells (cell.h): options as in CellOptions, then what Variant points to. Without
// w_ih, x is gates_x [T, B, D * 4H] in the compute type, and so is dx.
#define LSTM_VARIANT_OPTIONS                                                            \
  "int forget, int recurrent_activation, int activation, int output_activation, "       \
  "float cell_clip, float zoneout_h, float zoneout_c, Tensor? peephole, Tensor? norm, " \
  "Tensor? h_scale, Tensor? seed, int first_step"
inline constexpr const char* kVariantForwardSchema =
    "variant_forward(Tensor x, Tensor[]? w_ih, Tensor[] w_hh, Tensor[]? bias, Tensor[]? w_hr, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int reversed, bool save, bool cells, "
    "bool allow_tf32, " LSTM_VARIANT_OPTIONS
    ") "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c, Tensor normed, Tensor rstd)";
inline constexpr const char* kVariantBackwardSchema =
    "variant_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, "
    "Tensor[]? w_ih, Tensor[] w_hh, Tensor[]? w_hr, Tensor? h0, Tensor? c0, Tensor? lengths, "
    "Tensor? reset, int reversed, Tensor y, Tensor gates, Tensor c, bool need_dx, bool need_dw, "
    "bool allow_tf32, " LSTM_VARIANT_OPTIONS
    ", Tensor normed, Tensor rstd) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_hr, "
    "Tensor dpeephole, Tensor dnorm)";

// What derivatives beyond the first take (lstm_cuda/recurrence.py, products.py).
inline constexpr const char* kChangesSchema =
    "changes(bool transposed, Tensor? source_x, Tensor? source_z, Tensor? source_gates, "
    "Tensor? source_c, Tensor? source_m, Tensor gates, Tensor cells, Tensor? c0, Tensor W, "
    "Tensor? V, Tensor? fresh) -> (Tensor x, Tensor z, Tensor c, Tensor m)";
inline constexpr const char* kCellGradientsSchema =
    "cell_gradients(Tensor? source_gates, Tensor dc, Tensor dm, Tensor z, Tensor change_c, "
    "Tensor gates, Tensor cells, Tensor? c0, Tensor? fresh) "
    "-> (Tensor dgates, Tensor dcells, Tensor dc0)";
inline constexpr const char* kTangentsWithGradientsSchema =
    "tangents_with_gradients(Tensor? source_x, Tensor? source_z, Tensor? source_c, "
    "Tensor? source_m, Tensor? source_gates, Tensor dc, Tensor dm, Tensor gates, Tensor cells, "
    "Tensor? c0, Tensor W, Tensor? V, Tensor? fresh) -> (Tensor c, Tensor m, Tensor dgates, Tensor "
    "dcells, Tensor dc0)";
inline constexpr const char* kProductSchema = "product(Tensor a, Tensor w) -> Tensor";
inline constexpr const char* kOuterProductsSchema = "outer_products(Tensor a, Tensor b) -> Tensor";

// w_hh as a call of layer_forward whose plan has this layout would pack it, with w_hr (which may be
// empty) folded into it.
inline constexpr const char* kPackSchema =
    "pack_weights(Tensor[] w_hh, Tensor[] w_hr, int packed_layout) -> Tensor";

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using VariantForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using VariantBackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using PieceResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::string text(const Sizes& sizes);
Sizes sizes_of(const Tensor& t);
ScalarType compute_type(ScalarType type);  // of sums and of the cell state

// The tensor, contiguous, after a check of its shape, type and device.
Tensor checked(const char* name, const Tensor& t, const Sizes& sizes, ScalarType type,
               const Tensor& x);
OptionalTensor checked(const char* name, const OptionalTensor& t, const Sizes& sizes,
                       ScalarType type, const Tensor& x);
Tensors checked(const char* name, const Tensors& list, size_t count, const Sizes& sizes,
                ScalarType type, const Tensor& x);

template <class Pointer = void*>
Pointer pointer(const OptionalTensor& t) {
  return t ? static_cast<Pointer>(t->data_ptr()) : nullptr;
}

std::vector<const void*> pointers(const Tensors& list);

struct Parallel;
const Parallel& torch_threads();

// Uninitialised, on x's device.
Tensor empty(const Sizes& sizes, ScalarType type, const Tensor& x);

// What forward and backward are given alike: checked, contiguous and kept alive.
struct Inputs {
  LayerShape shape;
  ScalarType type;
  ScalarType c_type;  // of c0, and so of c_n and their gradients: `type` or the compute type
  Tensor x;
  Tensors w_ih, w_hh, w_hr;
  OptionalTensor h0, c0, lengths, reset;
  std::vector<const void*> w_ih_pointers, w_hh_pointers, w_hr_pointers;

  // Without w_ih, x is gates_x.
  Inputs(const Tensor& x_in, const Tensors& w_ih_in, const Tensors& w_hh_in, const Tensors& w_hr_in,
         const OptionalTensor& h0_in, const OptionalTensor& c0_in, const OptionalTensor& lengths_in,
         const OptionalTensor& reset_in, int64_t reversed);
};

// The options of another cell: checked, contiguous and kept alive.
struct VariantInputs {
  CellOptions cell;
  OptionalTensor peephole, norm, h_scale, seed;
  int64_t first_step;

  VariantInputs(const Inputs& in, int64_t forget, int64_t recurrent_activation, int64_t activation,
                int64_t output_activation, double cell_clip, double zoneout_h, double zoneout_c,
                const OptionalTensor& peephole_in, const OptionalTensor& norm_in,
                const OptionalTensor& h_scale_in, const OptionalTensor& seed_in,
                int64_t first_step_in);

  // Where there is no w_ih, and norm needs that, biases are part of x.
  void check_gates_x(const Inputs& in, const OptionalTensors& bias) const;

  // normed [T, B, D, 4H] and rstd [T, B, D], uninitialised, for backward; [0] if there is no need.
  std::tuple<Tensor, Tensor> statistics(const Inputs& in, bool save) const;
  // The same, as given to backward.
  std::tuple<Tensor, Tensor> checked_statistics(const Inputs& in, const Tensor& normed,
                                                const Tensor& rstd) const;
  Variant variant(const std::tuple<Tensor, Tensor>& statistics) const;

  // Rows of Variant::dmore, and its parts, [0] where there are none: of peephole, of norm.
  int64_t sums() const { return (peephole ? 3 : 0) + (norm ? 6 : 0); }
  std::tuple<Tensor, Tensor> split(const Tensor& dmore) const;
};

// What backward is given besides: what forward gave, and the gradients of that.
struct Gradients {
  Tensor y, gates, c;
  OptionalTensor dy, dh_n, dc_n, dc;

  Gradients(const Inputs& in, const OptionalTensor& dy_in, const OptionalTensor& dh_n_in,
            const OptionalTensor& dc_n_in, const OptionalTensor& dc_in, const Tensor& y_in,
            const Tensor& gates_in, const Tensor& c_in, ScalarType gates_type);
};

}  // namespace lstm_cuda
