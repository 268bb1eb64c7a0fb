// The coupling's ops on the CPU, for those that end in a coupling.
#pragma once

#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace idm::cpu {

using torch::stable::Tensor;

Tensor couple(Tensor F, Tensor x2, Tensor v);
std::tuple<Tensor, Tensor, Tensor> couple_backward(Tensor d1, Tensor F, Tensor x2, Tensor v);
std::tuple<Tensor, Tensor, Tensor, Tensor> uncouple(Tensor y1, Tensor F, Tensor d1, Tensor v);
std::tuple<Tensor, Tensor, Tensor> uncouple_in_place(Tensor y1, Tensor F, Tensor d1, Tensor v);

}  // namespace idm::cpu
