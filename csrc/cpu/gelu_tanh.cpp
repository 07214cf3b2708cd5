// gelu_tanh and its gradient: y = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
#include "common/activations.h"
#include "common/registration.h"
#include "cpu/elementwise.h"
#include "cpu/rows.h"

namespace lfm_fast {
namespace {

struct Gelu {
  static constexpr int kInputs = 1;
  static LFM_HD float of(float x) { return gelu(x); }
};

struct GeluGradient {
  static constexpr int kInputs = 2;
  static LFM_HD float of(float x, float grad) { return grad * gelu_derivative(x); }
};

Tensor contiguous_on_cpu(const Tensor& tensor, const char* name) {
  check_on_cpu(tensor, name);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor gelu_tanh(const Tensor& x) {
  const Tensor dense = contiguous_on_cpu(x, "x");
  element_of(x, "x");  // refuses what it cannot compute before anything is made
  Tensor y = new_tensor(shape_of(x), x.scalar_type());
  run_elementwise<Gelu>(dense, nullptr, y);
  return y;
}

Tensor gelu_tanh_backward(const Tensor& grad, const Tensor& x) {
  const Tensor dense = contiguous_on_cpu(x, "x"), dense_grad = contiguous_on_cpu(grad, "grad");
  element_of(x, "x");
  check_dtype(grad, "grad", x.scalar_type());
  check_same_shape(grad, "grad", x, "x");
  Tensor grad_x = new_tensor(shape_of(x), x.scalar_type());
  run_elementwise<GeluGradient>(dense, &dense_grad, grad_x);
  return grad_x;
}

}  // namespace

LFM_REGISTER(CPU, gelu_tanh, gelu_tanh);
LFM_REGISTER(CPU, gelu_tanh_backward, gelu_tanh_backward);

}  // namespace lfm_fast
