"""The drop-in modules' oracle: the formulas of dni-pytorch in eager PyTorch, written out.

The synthesizer is evaluated twice a step, by autograd, as dni-pytorch does; nothing of fastdni is
used. `networks` makes a fastdni network and its plain twin with the same parameters.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import fastdni as dni


def plain_synthesizer(module, trigger, context):
    """`module` only holds the parameters."""
    a = trigger @ module.input_trigger.weight.t() + module.input_trigger.bias
    if module.input_context is not None:
        a = a + context @ module.input_context.weight.t() + module.input_context.bias
    for layer in module.layers:
        a = torch.clamp(a, min=0) @ layer.weight.t() + layer.bias
    return a


class CatchGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trigger, prediction):
        ctx.save_for_backward(prediction)
        return trigger.clone()

    @staticmethod
    def backward(ctx, gradient):
        (prediction,) = ctx.saved_tensors
        return gradient, 2 / prediction.shape[0] * (prediction - gradient)


def plain_backward_interface(synthesizer, trigger, context, factor=1):
    trigger.backward(plain_synthesizer(synthesizer, trigger.detach(), context).detach() * factor)
    trigger = trigger.detach()
    return CatchGradient.apply(trigger, plain_synthesizer(synthesizer, trigger, context))


def plain_bidirectional_interface(interface, message, trigger, context):
    forward_synthesizer = interface.forward_interface.synthesizer
    backward_synthesizer = interface.backward_interface.synthesizer
    loss = F.mse_loss(plain_synthesizer(forward_synthesizer, trigger, context), message.detach())
    loss.backward()
    message.backward(plain_synthesizer(backward_synthesizer, message.detach(), context).detach())
    synthetic = plain_synthesizer(forward_synthesizer, trigger, context).detach()
    return CatchGradient.apply(
        synthetic, plain_synthesizer(backward_synthesizer, synthetic, context)
    )


class Network(nn.Module):
    """784-256-256-10 with BatchNorm, as in dni-pytorch's MLP and full-unlock examples."""

    def __init__(self, kind, context, plain=False, width=256):
        super().__init__()
        self.kind, self.context, self.plain = kind, context, plain
        self.hidden1 = nn.Linear(784, width, bias=False)
        self.hidden1_bn = nn.BatchNorm1d(width)
        self.hidden2 = nn.Linear(width, width, bias=False)
        self.hidden2_bn = nn.BatchNorm1d(width)
        context_dim = 10 if context else None
        if kind == "backward":
            self.interface = dni.BackwardInterface(
                dni.BasicSynthesizer(width, n_hidden=1, context_dim=context_dim)
            )
        else:
            self.interface = dni.BidirectionalInterface(
                dni.BasicSynthesizer(width, n_hidden=2, trigger_dim=784, context_dim=context_dim),
                dni.BasicSynthesizer(width, n_hidden=2, context_dim=context_dim),
            )
        self.output = nn.Linear(width, 10, bias=False)
        self.output_bn = nn.BatchNorm1d(10)

    def forward(self, images, labels):
        x = self.hidden1_bn(self.hidden1(images))
        x = self.hidden2_bn(self.hidden2(F.relu(x)))
        context = F.one_hot(labels, 10).to(x.dtype) if self.context else None
        x = self._exchange(x, images, context)
        return F.log_softmax(self.output_bn(self.output(F.relu(x))), dim=1)

    def _exchange(self, x, images, context):
        if self.plain:
            if self.kind == "backward":
                return plain_backward_interface(self.interface.synthesizer, x, context)
            return plain_bidirectional_interface(self.interface, x, images, context)
        with dni.synthesizer_context(context):
            return self.interface(x) if self.kind == "backward" else self.interface(x, images)


def networks(kind, context, dtype=torch.float64, width=256):
    network = Network(kind, context, width=width).to(dtype)
    twin = copy.deepcopy(network)
    twin.plain = True
    return network, twin


def train(network, batches, learning_rate=1e-3):
    """Adam steps; returns the losses."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.nll_loss(network(images, labels), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def batches(count, size=64, dtype=torch.float64):
    """Batches with something to learn: ten noisy patterns."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(10, 784, generator=generator, dtype=torch.float64)
    made = []
    for _ in range(count):
        labels = torch.randint(10, (size,), generator=generator)
        noise = torch.randn(size, 784, generator=generator, dtype=torch.float64)
        made.append(((patterns[labels] + 0.3 * noise).to(dtype), labels))
    return made
