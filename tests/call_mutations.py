"""What people do between two steps to what a call of a module does; see network_mutations."""

from collections import OrderedDict
from unittest import mock

import torch
from network_mutations import fresh
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastdni import BasicSynthesizer

CALLS: dict = {}


def of_calls(function):
    CALLS[function.__name__] = function
    return function


def double(module, arguments, output):
    return 2 * output


@of_calls
def a_forward_hook(net, optimizer, undo):
    net.stages[1].register_forward_hook(double)


@of_calls
def a_forward_hook_of_a_layer(net, optimizer, undo):
    net.stages[1][0].register_forward_hook(double)


@of_calls
def a_forward_pre_hook(net, optimizer, undo):
    net.stages[1][2].register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))


@of_calls
def a_hook_of_a_synthesizer(net, optimizer, undo):
    net.synthesizers[0].register_forward_hook(double)


@of_calls
def a_hook_within_a_synthesizer(net, optimizer, undo):
    net.synthesizers[0].layers[0].register_forward_hook(double)


@of_calls
def a_backward_hook(net, optimizer, undo):
    net.stages[1][0].register_full_backward_hook(lambda module, inner, outer: (2 * inner[0],))


@of_calls
def a_backward_pre_hook(net, optimizer, undo):
    net.stages[1][0].register_full_backward_pre_hook(lambda module, outer: (2 * outer[0],))


@of_calls
def a_hook_that_came_and_went(net, optimizer, undo):
    net.stages[1].register_forward_hook(double).remove()


@of_calls
def a_dictionary_of_hooks(net, optimizer, undo):
    net.stages[1][0]._forward_hooks = OrderedDict({0: double})


@of_calls
def a_dictionary_of_hooks_of_a_synthesizer(net, optimizer, undo):
    net.synthesizers[1].layers[0]._forward_hooks = OrderedDict({0: double})


@of_calls
def a_dictionary_of_backward_hooks(net, optimizer, undo):
    twin = nn.Linear(1, 1)
    twin.register_full_backward_hook(lambda module, inner, outer: (2 * inner[0],))
    net.stages[2][0]._backward_hooks = twin._backward_hooks
    net.stages[2][0]._is_full_backward_hook = True


@of_calls
def a_dictionary_of_parameters(net, optimizer, undo):
    layer = net.stages[1][0]
    layer._parameters = dict(layer._parameters, weight=nn.Parameter(fresh(6, 9)))


@of_calls
def a_dictionary_of_calls(net, optimizer, undo):
    stage = net.stages[1]
    stage._modules = dict(stage._modules, **{"2": nn.Tanh()})


@of_calls
def a_dictionary_of_buffers(net, optimizer, undo):
    norm = net.stages[1][1]
    norm._buffers = dict(norm._buffers, running_mean=fresh(6))


@of_calls
def hooks_on_all_modules(net, optimizer, undo):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, arguments, output: 2 * output if type(module) is nn.Linear else None
    )
    undo.callback(handle.remove)


@of_calls
def a_forward_attribute(net, optimizer, undo):
    layer = net.stages[1][0]
    layer.forward = lambda x, own=layer: 3 * nn.functional.linear(x, own.weight, own.bias)


@of_calls
def a_forward_attribute_of_an_activation(net, optimizer, undo):
    net.stages[0][2].forward = torch.tanh


@of_calls
def a_forward_attribute_of_a_stage(net, optimizer, undo):
    stage = net.stages[1]
    stage.forward = lambda x: 3 * type(stage).forward(stage, x)


@of_calls
def a_forward_attribute_of_a_synthesizer(net, optimizer, undo):
    own = net.synthesizers[1]
    own.forward = lambda h, context: 3 * type(own).forward(own, h, context)


@of_calls
def a_forward_attribute_within_a_synthesizer(net, optimizer, undo):
    own = net.synthesizers[1].layers[0]
    own.forward = lambda x: 3 * nn.functional.linear(x, own.weight, own.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledSynthesizer(BasicSynthesizer):
    def forward(self, trigger, context=None):
        return 2 * super().forward(trigger, context)


class DoubledStage(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


@of_calls
def another_class(net, optimizer, undo):
    net.stages[1][0].__class__ = Doubled


@of_calls
def another_class_of_an_activation(net, optimizer, undo):
    net.stages[1][2].__class__ = nn.Tanh


@of_calls
def another_class_of_a_stage(net, optimizer, undo):
    net.stages[1].__class__ = DoubledStage


@of_calls
def another_class_of_a_synthesizer(net, optimizer, undo):
    net.synthesizers[0].__class__ = DoubledSynthesizer


@of_calls
def another_class_within_a_synthesizer(net, optimizer, undo):
    net.synthesizers[0].layers[0].__class__ = Doubled


def patched(kind: type):
    """A class whose forward is replaced process-wide, as patching libraries do."""
    own = kind.forward

    def patch(net, optimizer, undo):
        undo.enter_context(mock.patch.object(kind, "forward", lambda *given: 2 * own(*given)))

    patch.__name__ = f"patched_{kind.__name__}"
    return of_calls(patch)


for _kind in (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Sequential, BasicSynthesizer):
    patched(_kind)


@of_calls
def parametrized(net, optimizer, undo):
    parametrizations.weight_norm(net.stages[1][0])
    fresh_ones = [p for p in net.stages[1][0].parametrizations.parameters()]
    optimizer.add_param_group({"params": fresh_ones})


@of_calls
def pruned(net, optimizer, undo):
    prune.l1_unstructured(net.stages[1][0], "weight", amount=0.5)


@of_calls
def a_pruned_synthesizer(net, optimizer, undo):
    prune.l1_unstructured(net.synthesizers[0].layers[0], "weight", amount=0.5)
