"""What people do to an optimizer between two steps; see network_mutations."""

import copy
from collections import OrderedDict, defaultdict
from unittest import mock

import torch
from network_mutations import fresh
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

OPTIMIZERS: dict = {}  # name -> (kinds of optimizers, function)
BOTH = ("nesterov", "adam")


def of_optimizers(*kinds: str):
    def add(function):
        OPTIMIZERS[function.__name__] = kinds, function
        return function

    return add


@of_optimizers(*BOTH)
def rate(net, optimizer, undo):
    optimizer.param_groups[0]["lr"] = 0.02


@of_optimizers(*BOTH)
def rate_in_a_tensor(net, optimizer, undo):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)


@of_optimizers("adam")
def betas(net, optimizer, undo):
    optimizer.param_groups[0]["betas"] = (0.3, 0.8)


@of_optimizers("adam")
def betas_in_a_list(net, optimizer, undo):
    optimizer.param_groups[0]["betas"] = list(optimizer.param_groups[0]["betas"])


@of_optimizers("adam")
def eps(net, optimizer, undo):
    optimizer.param_groups[0]["eps"] = 0.1


@of_optimizers(*BOTH)
def decay(net, optimizer, undo):
    optimizer.param_groups[0]["weight_decay"] = 0.5


@of_optimizers("adam")
def decoupled_decay(net, optimizer, undo):
    group = optimizer.param_groups[0]
    group["decoupled_weight_decay"] = not group["decoupled_weight_decay"]


@of_optimizers("sgd", "nesterov")
def momentum(net, optimizer, undo):
    optimizer.param_groups[0]["momentum"] = 0.5


@of_optimizers("nesterov", "dampened")
def momentum_off(net, optimizer, undo):
    optimizer.param_groups[0].update(momentum=0, nesterov=False)


@of_optimizers("nesterov")
def not_nesterov(net, optimizer, undo):
    optimizer.param_groups[0].update(nesterov=False, dampening=0.5)


@of_optimizers(*BOTH)
def maximize(net, optimizer, undo):
    optimizer.param_groups[0]["maximize"] = True


@of_optimizers(*BOTH)
def foreach(net, optimizer, undo):
    optimizer.param_groups[0]["foreach"] = True


@of_optimizers(*BOTH)
def loaded_state(net, optimizer, undo):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@of_optimizers(*BOTH)
def cleared_state(net, optimizer, undo):
    optimizer.state.clear()


@of_optimizers(*BOTH)
def another_state(net, optimizer, undo):
    kept = {p: {k: v * 0.5 for k, v in e.items()} for p, e in optimizer.state.items()}
    optimizer.state = defaultdict(dict, kept)


@of_optimizers(*BOTH)
def a_state_entry_replaced(net, optimizer, undo):
    weight = net.stages[0][0].weight
    optimizer.state[weight] = {k: v * 0.5 for k, v in optimizer.state[weight].items()}


@of_optimizers(*BOTH)
def a_state_entry_deleted(net, optimizer, undo):
    del optimizer.state[net.stages[0][0].weight]


@of_optimizers("adam")
def a_moment_replaced(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["exp_avg"] = fresh(9, 7)


@of_optimizers("adam")
def a_moment_in_place(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["exp_avg_sq"].fill_(0.5)


@of_optimizers("nesterov")
def a_buffer_of_momentum_replaced(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["momentum_buffer"] = fresh(9, 7)


@of_optimizers("nesterov")
def a_buffer_of_momentum_deleted(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["momentum_buffer"] = None


@of_optimizers("nesterov")
def a_buffer_of_momentum_shared(net, optimizer, undo):
    first, second = net.stages[0][1].weight, net.stages[0][1].bias
    shared = optimizer.state[first]["momentum_buffer"]
    optimizer.state[second]["momentum_buffer"] = shared


@of_optimizers("adam")
def a_count_replaced(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["step"] = torch.tensor(30.0)


@of_optimizers("adam")
def a_count_in_place(net, optimizer, undo):
    optimizer.state[net.stages[0][0].weight]["step"].fill_(30.0)


@of_optimizers("adam")
def counts_in_one_tensor(net, optimizer, undo):
    shared = torch.tensor(4.0)
    for entry in optimizer.state.values():
        entry["step"] = shared


@of_optimizers("adam")
def two_counts_in_one_tensor(net, optimizer, undo):
    kept = optimizer.state
    kept[net.stages[0][0].weight]["step"] = kept[net.stages[2][0].weight]["step"]


@of_optimizers("adam")
def counts_in_views_of_one_tensor(net, optimizer, undo):
    shared = torch.full((len(optimizer.state),), 4.0)
    for entry, count in zip(optimizer.state.values(), shared, strict=True):
        entry["step"] = count


@of_optimizers("adam")
def counts_in_float64(net, optimizer, undo):
    for entry in optimizer.state.values():
        entry["step"] = entry["step"].double()


@of_optimizers("adam")
def one_count_in_float64(net, optimizer, undo):
    entry = optimizer.state[net.stages[1][0].weight]
    entry["step"] = entry["step"].double()


@of_optimizers(*BOTH)
def a_group_added(net, optimizer, undo):
    late = nn.Linear(6, 5).double()
    net.stages[2] = late
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.03})


@of_optimizers(*BOTH)
def groups_replaced(net, optimizer, undo):
    optimizer.param_groups = [dict(optimizer.param_groups[0], lr=0.02)]


@of_optimizers(*BOTH)
def a_groups_dictionary_replaced(net, optimizer, undo):
    optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.02)


@of_optimizers(*BOTH)
def groups_split(net, optimizer, undo):
    (group,) = optimizer.param_groups
    other = dict(group, params=group["params"][3:], lr=0.02)
    group["params"] = group["params"][:3]
    optimizer.param_groups.append(other)


@of_optimizers(*BOTH)
def a_parameter_removed(net, optimizer, undo):
    del optimizer.param_groups[0]["params"][0]


@of_optimizers(*BOTH)
def a_list_of_parameters_replaced(net, optimizer, undo):
    group = optimizer.param_groups[0]
    group["params"] = [*reversed(group["params"])][2:]


@of_optimizers(*BOTH)
def parameters_in_another_order(net, optimizer, undo):
    optimizer.param_groups[0]["params"].reverse()


@of_optimizers(*BOTH)
def a_parameter_exchanged(net, optimizer, undo):
    spare = net.stages[0][0].weight
    net.stages[0][0].weight = nn.Parameter(fresh(9, 7))
    parameters = optimizer.param_groups[0]["params"]
    (index,) = [i for i, p in enumerate(parameters) if p is spare]
    parameters[index] = net.stages[0][0].weight


def clamped(optimizer):
    """A step after which parameters are within bounds."""
    own = optimizer.step

    def step(closure=None):
        own()
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.2, 0.2)

    return step


@of_optimizers(*BOTH)
def a_step_attribute(net, optimizer, undo):
    optimizer.step = clamped(optimizer)


@of_optimizers(*BOTH)
def a_patched_step(net, optimizer, undo):
    own = type(optimizer).step

    def step(self, closure=None):
        own(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].clamp_(-0.2, 0.2)

    undo.enter_context(mock.patch.object(type(optimizer), "step", step))


@of_optimizers(*BOTH)
def another_class_of_the_optimizer(net, optimizer, undo):
    class Own(type(optimizer)):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0].clamp_(-0.2, 0.2)

    optimizer.__class__ = Own


def clamp_first(optimizer, arguments, options):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].clamp_(-0.2, 0.2)


@of_optimizers(*BOTH)
def a_hook_before_the_step(net, optimizer, undo):
    optimizer.register_step_pre_hook(clamp_first)


@of_optimizers(*BOTH)
def a_hook_after_the_step(net, optimizer, undo):
    optimizer.register_step_post_hook(clamp_first)


@of_optimizers(*BOTH)
def a_hook_of_the_step_that_came_and_went(net, optimizer, undo):
    optimizer.register_step_post_hook(clamp_first).remove()


@of_optimizers(*BOTH)
def a_dictionary_of_hooks_after_the_step(net, optimizer, undo):
    optimizer._optimizer_step_post_hooks = OrderedDict({0: clamp_first})


@of_optimizers(*BOTH)
def a_hook_after_all_steps(net, optimizer, undo):
    handle = register_optimizer_step_post_hook(clamp_first)
    undo.callback(handle.remove)


@of_optimizers(*BOTH)
def a_scheduler(net, optimizer, undo):
    optimizer.scheduler = LambdaLR(optimizer, lambda epoch: 0.5)


@of_optimizers(*BOTH)
def a_gradient_that_was_there(net, optimizer, undo):
    net.stages[0][0].weight.grad = fresh(9, 7)
