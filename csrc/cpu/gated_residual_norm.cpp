// gated_residual_norm: x + gate branch, stored, and the modulated layer norm of it; and the gradient of that.
#include <tuple>

#include "common/registration.h"
#include "cpu/modulated_norm.h"

namespace lfm_fast {
namespace {

template <Element X, Element M>
struct Forward {
  static constexpr Order order = order_of(X, M);
  TokenItems items;
  NormShape shape;
  TokenRows x, branch;
  const VectorTable& modulation;  // gate, shift, 1 + scale
  OutputTokens x_new, y;
  float *mean, *rstd;  // (B, T)

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = items.sample(item), end = items.end(item);
      const char *gate = modulation.row(sample, 0), *shift = modulation.row(sample, 1);
      const char* factor = modulation.row(sample, 2);
      for (int64_t token = items.begin(item); token < end; ++token) {
        const RowIn<X> x_row(x.row(sample, token), items.width);
        const RowIn<M> branch_row(branch.row(sample, token), items.width);
        RowOut<X> new_row(x_new.row(sample, token), items.width);
        const float sum = add_branch<level>(x_row, branch_row, gate, new_row);
        const Statistics s = row_statistics<level, order, X>(new_row, sum, shape);
        RowOut<M> y_row(y.row(sample, token), items.width);
        modulate_row<level, order, X, M>(new_row, shift, factor, s, y_row, shape,
                                         RowAhead<X>(x, items.width, sample, token, end),
                                         RowAhead<M>(branch, items.width, sample, token, end));
        new_row.finish();
        mean[sample * items.length + token] = s.mean;
        rstd[sample * items.length + token] = s.rstd;
      }
    }
  }

  // Writes x + gate branch and returns the sum of what was written.
  template <Level level>
  LFM_HD float add_branch(const RowIn<X>& x_row, const RowIn<M>& branch_row, const char* gate,
                          RowOut<X>& new_row) const {
    LaneSum<level, order> sum;
    for (int64_t block = 0; block < shape.mask.blocks; ++block) {
LFM_UNROLL_PAIRS
      for (int p = 0; p < kPairs<level>; ++p) {
        const int64_t at = 2 * p * Vectors<level>::width;
        Pair<level> v, term, factor;
        load<level, order, X>(x_row.place(block, at), v);
        load<level, order, M>(branch_row.place(block, at), term);
        load_channels<level>(gate, block * kBlock + at, factor);
        v.a += factor.a * term.a;
        v.b += factor.b * term.b;
        store<level, order, X, nan_of(X, M)>(new_row.place(block, at), v);
        round_as_stored<level, X, nan_of(X, M)>(v);
        sum.lanes[2 * p] += v.a;
        sum.lanes[2 * p + 1] += v.b;
      }
    }
    return sum.total();
  }
};

template <Element X, Element M>
struct Backward {
  static constexpr Order order = order_of(X, M);
  TokenItems items;
  NormShape shape;
  TokenRows x_new, branch;
  const VectorTable& modulation;  // gate, 1 + scale
  TokenRows grad_x_new, grad_y;  // one of them may be missing
  const float *mean, *rstd;
  OutputTokens grad_x, grad_branch;
  ColumnSums& sums;  // of gate, shift and scale

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = items.sample(item), end = items.end(item);
      const char *gate = modulation.row(sample, 0), *factor = modulation.row(sample, 1);
      for (int64_t token = items.begin(item); token < end; ++token) {
        const RowIn<X> x_row(x_new.row(sample, token), items.width);
        const RowIn<M> branch_row(branch.row(sample, token), items.width);
        // a gradient that is missing is read nowhere: any row serves to build the object
        const RowIn<X> direct(grad_x_new ? grad_x_new.row(sample, token) : x_new.row(sample, token), items.width);
        const RowIn<M> through(grad_y ? grad_y.row(sample, token) : branch.row(sample, token), items.width);
        const Statistics s = saved_statistics(mean, rstd, sample * items.length + token);
        RowMeans means{};
        if (grad_y)
          means = add_row<level, order, X, M>(through, x_row, factor, s, sums.part(item, 1), sums.part(item, 2),
                                              shape);
        RowOut<X> out(grad_x.row(sample, token), items.width);
        RowOut<M> branch_out(grad_branch.row(sample, token), items.width);
        write_row<level>(direct, through, x_row, branch_row, gate, factor, s, means, sums.part(item, 0), out,
                         branch_out, RowAhead<X>(x_new, items.width, sample, token, end),
                         RowAhead<M>(branch, items.width, sample, token, end),
                         RowAhead<X>(grad_x_new ? grad_x_new : x_new, items.width, sample, token, end),
                         RowAhead<M>(grad_y ? grad_y : branch, items.width, sample, token, end));
      }
    }
  }

  template <Level level, typename... Ahead>
  LFM_HD void write_row(const RowIn<X>& direct, const RowIn<M>& through, const RowIn<X>& x_row,
                        const RowIn<M>& branch_row, const char* gate, const char* factor,
                        const Statistics& s, const RowMeans& means, char* grad_gate, RowOut<X>& out,
                        RowOut<M>& branch_out, const Ahead&... ahead) const {
    const bool has_direct = static_cast<bool>(grad_x_new), has_through = static_cast<bool>(grad_y);
    for (int64_t block = 0; block < shape.mask.blocks; ++block) {
      (ahead.fetch(block), ...);
LFM_UNROLL_PAIRS
      for (int p = 0; p < kPairs<level>; ++p) {
        const int64_t at = 2 * p * Vectors<level>::width;
        const int64_t channel = block * kBlock + at;
        Pair<level> total{}, term, times;
        if (has_through) {
          Pair<level> g, v;
          load<level, order, M>(through.place(block, at), g);
          load<level, order, X>(x_row.place(block, at), v);
          load_channels<level>(factor, channel, times);
          norm_gradient<level>(g, v, times, s, means, total);
        }
        if (has_direct) {
          Pair<level> g;
          load<level, order, X>(direct.place(block, at), g);
          total = has_through ? Pair<level>{g.a + total.a, g.b + total.b} : g;
        }
        store<level, order, X, nan_of(X, M)>(out.place(block, at), total);
        load_channels<level>(gate, channel, times);
        load<level, order, M>(branch_row.place(block, at), term);
        const Pair<level> to_branch{times.a * total.a, times.b * total.b};
        store<level, order, M, nan_of(X, M)>(branch_out.place(block, at), to_branch);
        const Pair<level> to_gate{total.a * term.a, total.b * term.b};
        add_to<level>(grad_gate, channel, to_gate);
      }
    }
    out.finish();
    branch_out.finish();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm(const Tensor& x, const Tensor& branch,
                                                               const Tensor& gate, const Tensor& shift,
                                                               const Tensor& scale, double eps) {
  check_tokens(x, "x");
  const TokenItems items(x);
  const auto dtype = gate.scalar_type();
  const TokenRows x_rows(x, "x"), branch_rows = tokens_like(branch, "branch", x, "x", dtype);
  const TokenRows gate_rows = vectors_for(gate, "gate", x, dtype), shift_rows = vectors_for(shift, "shift", x, dtype),
                  scale_rows = vectors_for(scale, "scale", x, dtype);
  Tensor x_new = new_tensor(shape_of(x), x.scalar_type()), y = new_tensor(shape_of(x), dtype);
  Tensor mean = new_tensor({items.samples, items.length}, ScalarType::Float);
  Tensor rstd = new_tensor({items.samples, items.length}, ScalarType::Float);
  with_elements(x, "x", gate, "gate", [&](auto x_element, auto element) {
    using Kernel = Forward<x_element, element>;
    VectorTable modulation(items, 3);
    FillTable<Kernel::order, element>{
        items, modulation, {{gate_rows, 0.0f}, {shift_rows, 0.0f}, {scale_rows, 1.0f}}}
        .run_all();
    const Kernel kernel{items,
                                             {TailMask(items.width), items.channels(), static_cast<float>(eps)},
                                             x_rows,
                                             branch_rows,
                                             modulation,
                                             OutputTokens(x_new, "x_new"),
                                             OutputTokens(y, "y"),
                                             static_cast<float*>(mean.mutable_data_ptr()),
                                             static_cast<float*>(rstd.mutable_data_ptr())};
    run_kernel(kernel, items.count(), items.grain(1 << 14));
  });
  return {x_new, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(
    const Tensor& x_new, const Tensor& branch, const Tensor& gate, const Tensor& scale, const Tensor& mean,
    const Tensor& rstd, const std::optional<Tensor>& grad_x_new, const std::optional<Tensor>& grad_y) {
  LFM_CHECK(grad_x_new || grad_y, "grad_x_new and grad_y are both missing, pass at least one.");
  check_tokens(x_new, "x_new");
  const TokenItems items(x_new);
  const auto state = x_new.scalar_type(), dtype = scale.scalar_type();
  const TokenRows x_rows(x_new, "x_new"), branch_rows = tokens_like(branch, "branch", x_new, "x_new", dtype);
  const TokenRows gate_rows = vectors_for(gate, "gate", x_new, dtype);
  const TokenRows scale_rows = vectors_for(scale, "scale", x_new, dtype);
  const TokenNumbers means(mean, "mean", x_new), rstds(rstd, "rstd", x_new);
  TokenRows direct, through;
  if (grad_x_new) direct = tokens_like(*grad_x_new, "grad_x_new", x_new, "x_new", state);
  if (grad_y) through = tokens_like(*grad_y, "grad_y", x_new, "x_new", dtype);
  Tensor grad_x = new_tensor(shape_of(x_new), state), grad_branch = new_tensor(shape_of(x_new), dtype);
  const std::vector<int64_t> vector_shape{items.samples, items.width};
  Tensor grad_gate = new_tensor(vector_shape, dtype), grad_shift = new_tensor(vector_shape, dtype),
         grad_scale = new_tensor(vector_shape, dtype);
  ColumnSums sums(items, 3);
  with_elements(x_new, "x_new", scale, "scale", [&](auto x_element, auto element) {
    using Kernel = Backward<x_element, element>;
    VectorTable modulation(items, 2);
    FillTable<Kernel::order, element>{items, modulation, {{gate_rows, 0.0f}, {scale_rows, 1.0f}}}.run_all();
    const Kernel kernel{items,
                        {TailMask(items.width), items.channels(), 0.0f},
                        x_rows,
                        branch_rows,
                        modulation,
                        direct,
                        through,
                        means.data,
                        rstds.data,
                        OutputTokens(grad_x, "grad_x"),
                        OutputTokens(grad_branch, "grad_branch"),
                        sums};
    run_kernel(kernel, items.count(), items.grain(1 << 14));
    AddParts<Kernel::order, element>{items,
                                     sums,
                                     {OutputTokens(grad_gate, "grad_gate"), OutputTokens(grad_shift, "grad_shift"),
                                      OutputTokens(grad_scale, "grad_scale")}}
        .run_all();
  });
  return {grad_x, grad_branch, grad_gate, grad_shift, grad_scale};
}

}  // namespace

LFM_REGISTER(CPU, gated_residual_norm, gated_residual_norm);
LFM_REGISTER(CPU, gated_residual_norm_backward, gated_residual_norm_backward);

}  // namespace lfm_fast
