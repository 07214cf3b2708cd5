// modulated_layer_norm: layer norm of each token, then its sample's scale and shift; and the gradient of that.
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
  TokenRows x;
  const VectorTable& modulation;  // shift, 1 + scale
  OutputTokens y;
  float *mean, *rstd;  // (B, T)

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = items.sample(item), end = items.end(item);
      const char *shift = modulation.row(sample, 0), *factor = modulation.row(sample, 1);
      for (int64_t token = items.begin(item); token < end; ++token) {
        const RowIn<X> x_row(x.row(sample, token), items.width);
        const float sum = row_sum<level, order, X>(x_row, shape);
        const Statistics s = row_statistics<level, order, X>(x_row, sum, shape);
        RowOut<M> y_row(y.row(sample, token), items.width);
        modulate_row<level, order, X, M>(x_row, shift, factor, s, y_row, shape,
                                         RowAhead<X>(x, items.width, sample, token, end));
        mean[sample * items.length + token] = s.mean;
        rstd[sample * items.length + token] = s.rstd;
      }
    }
  }
};

template <Element X, Element M>
struct Backward {
  static constexpr Order order = order_of(X, M);
  TokenItems items;
  NormShape shape;
  TokenRows grad_y, x;
  const VectorTable& modulation;  // 1 + scale
  const float *mean, *rstd;
  OutputTokens grad_x;
  ColumnSums& sums;  // of shift and scale

  template <Level level>
  LFM_HD void run(int64_t first, int64_t last) const {
    for (int64_t item = first; item < last; ++item) {
      const int64_t sample = items.sample(item), end = items.end(item);
      const char* factor = modulation.row(sample, 0);
      for (int64_t token = items.begin(item); token < end; ++token) {
        const RowIn<X> x_row(x.row(sample, token), items.width);
        const RowIn<M> grad_row(grad_y.row(sample, token), items.width);
        const Statistics s = saved_statistics(mean, rstd, sample * items.length + token);
        const RowMeans means = add_row<level, order, X, M>(grad_row, x_row, factor, s, sums.part(item, 0),
                                                           sums.part(item, 1), shape);
        RowOut<X> out(grad_x.row(sample, token), items.width);
        write_row<level>(grad_row, x_row, factor, s, means, out,
                         RowAhead<M>(grad_y, items.width, sample, token, end),
                         RowAhead<X>(x, items.width, sample, token, end));
      }
    }
  }

  template <Level level>
  LFM_HD void write_row(const RowIn<M>& grad_row, const RowIn<X>& x_row, const char* factor, const Statistics& s,
                        const RowMeans& means, RowOut<X>& out, const RowAhead<M>& next_grad,
                        const RowAhead<X>& next_x) const {
    for (int64_t block = 0; block < shape.mask.blocks; ++block) {
      next_grad.fetch(block);
      next_x.fetch(block);
LFM_UNROLL_PAIRS
      for (int p = 0; p < kPairs<level>; ++p) {
        const int64_t at = 2 * p * Vectors<level>::width;
        Pair<level> g, v, times, result;
        load<level, order, M>(grad_row.place(block, at), g);
        load<level, order, X>(x_row.place(block, at), v);
        load_channels<level>(factor, block * kBlock + at, times);
        norm_gradient<level>(g, v, times, s, means, result);
        store<level, order, X, nan_of(X, M)>(out.place(block, at), result);
      }
    }
    out.finish();
  }
};

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                        double eps) {
  check_tokens(x, "x");
  const TokenItems items(x);
  const auto dtype = shift.scalar_type();
  const TokenRows shift_rows = vectors_for(shift, "shift", x, dtype);
  const TokenRows scale_rows = vectors_for(scale, "scale", x, dtype);
  const TokenRows x_rows(x, "x");
  Tensor y = new_tensor(shape_of(x), dtype);
  Tensor mean = new_tensor({items.samples, items.length}, ScalarType::Float);
  Tensor rstd = new_tensor({items.samples, items.length}, ScalarType::Float);
  with_elements(x, "x", shift, "shift", [&](auto x_element, auto element) {
    using Kernel = Forward<x_element, element>;
    VectorTable modulation(items, 2);
    FillTable<Kernel::order, element>{items, modulation, {{shift_rows, 0.0f}, {scale_rows, 1.0f}}}.run_all();
    const Kernel kernel{items,
                                             {TailMask(items.width), items.channels(), static_cast<float>(eps)},
                                             x_rows,
                                             modulation,
                                             OutputTokens(y, "y"),
                                             static_cast<float*>(mean.mutable_data_ptr()),
                                             static_cast<float*>(rstd.mutable_data_ptr())};
    run_kernel(kernel, items.count(), items.grain(1 << 14));
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                                 const Tensor& scale, const Tensor& mean,
                                                                 const Tensor& rstd) {
  check_tokens(x, "x");
  const TokenItems items(x);
  const auto dtype = scale.scalar_type();
  const TokenRows x_rows(x, "x"), grad_rows = tokens_like(grad_y, "grad_y", x, "x", dtype);
  const TokenRows scale_rows = vectors_for(scale, "scale", x, dtype);
  const TokenNumbers means(mean, "mean", x), rstds(rstd, "rstd", x);
  Tensor grad_x = new_tensor(shape_of(x), x.scalar_type());
  Tensor grad_shift = new_tensor({items.samples, items.width}, dtype);
  Tensor grad_scale = new_tensor({items.samples, items.width}, dtype);
  ColumnSums sums(items, 2);
  with_elements(x, "x", scale, "scale", [&](auto x_element, auto element) {
    using Kernel = Backward<x_element, element>;
    VectorTable modulation(items, 1);
    FillTable<Kernel::order, element>{items, modulation, {{scale_rows, 1.0f}}}.run_all();
    const Kernel kernel{items,
                        {TailMask(items.width), items.channels(), 0.0f},
                        grad_rows,
                        x_rows,
                        modulation,
                        means.data,
                        rstds.data,
                        OutputTokens(grad_x, "grad_x"),
                        sums};
    run_kernel(kernel, items.count(), items.grain(1 << 14));
    AddParts<Kernel::order, element>{
        items, sums, {OutputTokens(grad_shift, "grad_shift"), OutputTokens(grad_scale, "grad_scale")}}
        .run_all();
  });
  return {grad_x, grad_shift, grad_scale};
}

}  // namespace

LFM_REGISTER(CPU, modulated_layer_norm, modulated_layer_norm);
LFM_REGISTER(CPU, modulated_layer_norm_backward, modulated_layer_norm_backward);

}  // namespace lfm_fast
