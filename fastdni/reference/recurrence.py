"""recurrence: T steps of recurrent layers, in plain PyTorch.

    lstm          [i f g o] = W_ih x + b_ih + W_hh h + b_hh
                  c' = sigmoid(f) c + sigmoid(i) tanh(g);   h' = sigmoid(o) tanh(c')
    gru           r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
                  n = tanh(W_in x + b_in + r (W_hn h + b_hn));   h' = n + z (h - n)
    tanh, relu    h' = phi(W_ih x + b_ih + W_hh h + b_hh)

Those of torch.nn.LSTM, GRU and RNN. A layer's h' of every step is the x of the layer above.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def recurrence(
    cell: str, x: Tensor, state: list[Tensor], weights: list[Tensor], bias: bool
) -> tuple[Tensor, list[Tensor]]:
    """See `fastdni.ops.recurrence`."""
    of_layer = 4 if bias else 2
    after = []
    for layer in range(len(weights) // of_layer):
        own = weights[of_layer * layer : of_layer * (layer + 1)]
        now, outputs = [s[layer] for s in state], []
        for step in x:
            now = _step(cell, step, now, own)
            outputs.append(now[0])
        x = torch.stack(outputs)
        after.append(now)
    return x, [torch.stack(of_layers) for of_layers in zip(*after, strict=True)]


def _step(cell: str, x: Tensor, state: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    w_ih, w_hh, *biases = own
    b_ih, b_hh = biases or (None, None)
    h, a, b = state[0], F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh)
    if cell == "lstm":
        i, f, g, o = (a + b).chunk(4, 1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    if cell == "gru":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3, 1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return [n + z * (h - n)]
    return [torch.relu(a + b) if cell == "relu" else torch.tanh(a + b)]
