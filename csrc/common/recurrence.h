// The cells of a recurrent layer: what of a step follows from its products, element by element.
#pragma once
#include <cstdint>

#include "common/activation.h"

namespace fastdni {

enum class Cell { lstm, gru, tanh, relu };

// Blocks of H rows in a cell's weights: i, f, g, o; r, z, n; or one.
constexpr int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Tensors of a state: h, and an LSTM's c.
constexpr int64_t states_of(Cell cell) { return cell == Cell::lstm ? 2 : 1; }

}  // namespace fastdni
