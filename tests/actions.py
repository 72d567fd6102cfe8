"""What is done to a network and its optimizers between steps, for a property test; see histories.

The number says on what, and how far.
"""

import contextlib
import copy
import json
import pickle

import torch
from histories import ACTIVATIONS, KINDS, Side, optimizers_of
from torch import Tensor, nn

from fastdni import BasicSynthesizer

ACTIONS: dict = {}


def action(function):
    ACTIONS[function.__name__] = function
    return function


def chosen(items: list, number: int):
    return items[number % len(items)] if items else None


# ---- parameters ----


def _may_freeze(side: Side) -> list[Tensor]:
    head = side.linears()[-1].weight  # a loss must have something to learn
    return [p for p in side.net.parameters() if p is not head]


@action
def freeze(side, number):
    chosen(_may_freeze(side), number).requires_grad_(False)


@action
def thaw(side, number):
    side.net.requires_grad_(True)


@action
def replace_data(side, number):
    parameter = chosen(list(side.net.parameters()), number)
    parameter.data = 0.5 * parameter.data


@action
def write_data(side, number):
    with torch.no_grad():
        chosen(list(side.net.parameters()), number).mul_(0.5)


@action
def leave_a_gradient(side, number):
    parameter = chosen(list(side.net.parameters()), number)
    parameter.grad = torch.ones_like(parameter)


@action
def hook_a_gradient(side, number):
    parameter = chosen(list(side.net.parameters()), number)
    if parameter.requires_grad:
        handle = parameter.register_hook(lambda grad: 0.5 * grad)
        if number % 3 == 0:
            handle.remove()


def halve_gradient(parameter):
    parameter.grad.mul_(0.5)


@action
def hook_an_accumulated_gradient(side, number):
    parameter = chosen(list(side.net.parameters()), number)
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(halve_gradient)


# ---- modules ----


@action
def replace_an_activation(side, number):
    if len(side.net.stages) > 1:
        stage = chosen(list(side.net.stages)[:-1], number)
        stage[-1] = ACTIVATIONS[number % len(ACTIVATIONS)]()


@action
def replace_a_layer(side, number):
    stage = chosen(list(side.net.stages), number)
    torch.manual_seed(number)
    old = stage[0] if isinstance(stage, nn.Sequential) else stage
    new = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype)
    if isinstance(stage, nn.Sequential):
        stage[0] = new
    else:
        side.net.stages[len(side.net.stages) - 1] = new
    side.hold_their_own()
    if number % 2:
        side.optimizers[0].add_param_group({"params": list(new.parameters())})


@action
def replace_a_synthesizer(side, number):
    if not len(side.net.synthesizers):
        return
    place = number % len(side.net.synthesizers)
    old = side.net.synthesizers[place]
    torch.manual_seed(number)
    width = old.input_context.in_features if old.input_context is not None else None
    new = BasicSynthesizer(
        old.input_trigger.in_features, n_hidden=number % 3, context_dim=width
    ).to(old.input_trigger.weight.dtype)
    side.net.synthesizers[place] = new
    side.hold_their_own()
    side.optimizers[-1].add_param_group({"params": list(new.parameters()), "lr": 0.01})


@action
def hook_a_module(side, number):
    chosen(side.linears(), number).register_forward_hook(lambda m, arguments, output: 0.5 * output)


@action
def hook_a_synthesizer(side, number):
    found = chosen(list(side.net.synthesizers), number)
    if found is not None:
        found.register_forward_hook(lambda m, arguments, output: 0.5 * output)


@action
def hook_a_backward_pass(side, number):
    layer = chosen(side.linears()[1:], number)
    if layer is not None:
        layer.register_full_backward_hook(lambda m, inner, outer: (0.5 * inner[0],))


@action
def remove_hooks(side, number):
    for module in side.net.modules():
        for name in ("_forward_hooks", "_backward_hooks"):
            getattr(module, name).clear()


@action
def give_a_forward(side, number):
    layer = chosen(side.linears(), number)
    layer.forward = lambda x: 0.5 * nn.functional.linear(x, layer.weight, layer.bias)


@action
def take_a_forward(side, number):
    for layer in side.linears():
        vars(layer).pop("forward", None)


@action
def norm_in_eval(side, number):
    if side.norms():
        chosen(side.norms(), number).eval()


@action
def norm_options(side, number):
    if side.norms():
        norm = chosen(side.norms(), number)
        norm.momentum = (0.1, 0.5, None)[number % 3]
        norm.eps = (1e-5, 1e-2)[number % 2]


@action
def norm_statistics(side, number):
    if side.norms():
        norm = chosen(side.norms(), number)
        norm.running_mean = torch.full_like(norm.running_mean, 0.5)


@action
def eval_and_train(side, number):
    side.net.eval()
    side.net.train()


@action
def change_the_share(side, number):
    if side.net.input_synthesizers is None:
        side.net.bp_lambda = (0.0, 0.5, 1.0)[number % 3]


# ---- loading and copying ----


@action
def load_the_network(side, number):
    state = side.net.state_dict()
    side.net.load_state_dict({k: (0.9 * v).to(v.dtype) for k, v in state.items()})


@action
def load_the_network_by_assignment(side, number):
    state = {k: v.clone() for k, v in side.net.state_dict().items()}
    side.net.load_state_dict(state, assign=True)
    side.hold_their_own()
    side.optimizers[0].add_param_group({"params": list(side.net.parameters())})


def saved(optimizer):
    """An optimizer's state dict; of state of parameters that it has lost torch can make none."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[parameter]
    return copy.deepcopy(optimizer.state_dict())


@action
def load_the_optimizers(side, number):
    for optimizer in side.optimizers:
        optimizer.load_state_dict(saved(optimizer))


@action
def load_the_optimizers_from_json(side, number):
    """Tuples come back as lists."""
    for optimizer in side.optimizers:
        state = saved(optimizer)
        state["param_groups"] = json.loads(json.dumps(state["param_groups"], default=float))
        optimizer.load_state_dict(state)


@action
def copy_both(side, number):
    side.net, side.given = copy.deepcopy((side.net, side.given))


@action
def pickle_both(side, number):
    with contextlib.suppress(pickle.PicklingError, AttributeError):  # hooks of this file's
        side.net, side.given = pickle.loads(pickle.dumps((side.net, side.given)))


# ---- optimizers ----


def grouped(function):
    """An action on one group."""

    def run(side, number):
        function(chosen(side.groups(), number), number)

    run.__name__ = function.__name__
    return action(run)


@grouped
def rate(group, number):
    group["lr"] = 0.03 / (1 + number % 7)


@grouped
def rate_in_a_tensor(group, number):
    group["lr"] = torch.tensor(0.03 / (1 + number % 7), dtype=torch.float64)
    group["foreach"] = False


@grouped
def rate_in_place(group, number):
    if not isinstance(group["lr"], Tensor):
        group.update(lr=torch.tensor(group["lr"], dtype=torch.float64), foreach=False)
    group["lr"].mul_(0.8)


@grouped
def betas(group, number):
    if "betas" in group:
        group["betas"] = ((0.9, 0.99), [0.5, 0.9], (0.0, 0.5))[number % 3]


@grouped
def betas_in_place(group, number):
    if "betas" in group:
        if not isinstance(group["betas"], list):
            group["betas"] = list(group["betas"])
        group["betas"][0] = 0.1 * (number % 9)


@grouped
def momentum(group, number):
    if "nesterov" in group:
        group["momentum"] = (0.0, 0.5, 0.9)[number % 3]
        group["nesterov"] = number % 2 == 0 and group["momentum"] > 0
        group["dampening"] = 0.0 if group["nesterov"] else (0.0, 0.4)[number % 2]


@grouped
def decay(group, number):
    group["weight_decay"] = 0.1 * (number % 3)


@grouped
def maximize(group, number):
    group["maximize"] = number % 2 == 0


@grouped
def drop_a_parameter(group, number):
    if len(group["params"]) > 1:
        del group["params"][number % len(group["params"])]


@grouped
def reorder_parameters(group, number):
    group["params"] = group["params"][::-1]


@action
def split_a_group(side, number):
    optimizer = chosen(side.optimizers, number)
    group = optimizer.param_groups[0]
    if len(group["params"]) > 1:
        rest = group["params"][1:]
        group["params"] = group["params"][:1]
        optimizer.param_groups.append({**group, "params": rest, "lr": 0.005})


@action
def forget_state(side, number):
    optimizer = chosen(side.optimizers, number)
    held = [p for g in optimizer.param_groups for p in g["params"] if p in optimizer.state]
    if held:
        del optimizer.state[chosen(held, number)]


@action
def replace_state(side, number):
    optimizer = chosen(side.optimizers, number)
    for parameter, entry in optimizer.state.items():
        optimizer.state[parameter] = {
            k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()
        }


@action
def share_counts(side, number):
    optimizer = chosen(side.optimizers, number)
    entries = [e for e in optimizer.state.values() if "step" in e]
    for entry in entries[1:]:
        entry["step"] = entries[0]["step"]


@action
def new_optimizers(side, number):
    layout, first, second = number % 4, (number // 4) % len(KINDS), (number // 28) % len(KINDS)
    side.given = optimizers_of(side.net, layout, first, second)


@action
def hook_the_step(side, number):
    def shrink(optimizer, arguments, options):
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(0.999)

    handle = side.optimizers[0].register_step_post_hook(shrink)
    if number % 2:
        handle.remove()
