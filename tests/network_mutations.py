"""What people do to a network between two steps: parameters, buffers, modules.

Each function is given a network (7-9-6-5, every stage with BatchNorm but the last, synthesizers
with a hidden layer and a context), its optimizer and an ExitStack for what must be undone.
"""

import torch
from torch import nn

from fastdni import BasicSynthesizer

NETWORKS: dict = {}


def of_networks(function):
    NETWORKS[function.__name__] = function
    return function


def fresh(*shape):
    return 0.3 * torch.randn(*shape, dtype=torch.float64)


# ---- parameters and buffers ----


@of_networks
def frozen_weight(net, optimizer, undo):
    net.stages[1][0].weight.requires_grad_(False)


@of_networks
def frozen_synthesizer(net, optimizer, undo):
    net.synthesizers[0].requires_grad_(False)


@of_networks
def frozen_norm(net, optimizer, undo):
    net.stages[0][1].requires_grad_(False)


@of_networks
def data_replaced(net, optimizer, undo):
    net.stages[0][0].weight.data = fresh(9, 7)


@of_networks
def data_written(net, optimizer, undo):
    net.stages[2][0].bias.data.fill_(0.25)


@of_networks
def data_transposed(net, optimizer, undo):
    net.stages[0][0].weight.data = net.stages[0][0].weight.data.t().contiguous().t()


@of_networks
def data_shared(net, optimizer, undo):
    """Two parameters in one memory, which two updates then change."""
    net.stages[0][1].weight.data = net.stages[0][1].bias.data


@of_networks
def written_without_gradient(net, optimizer, undo):
    with torch.no_grad():
        net.synthesizers[1].input_trigger.weight.mul_(0.5)


@of_networks
def written_through_a_view(net, optimizer, undo):
    torch.nn.utils.vector_to_parameters(
        0.7 * torch.nn.utils.parameters_to_vector(net.parameters()), net.parameters()
    )


@of_networks
def another_parameter(net, optimizer, undo):
    net.stages[1][0].weight = nn.Parameter(fresh(6, 9))


@of_networks
def without_bias(net, optimizer, undo):
    net.stages[2][0].bias = None


@of_networks
def with_a_bias(net, optimizer, undo):
    net.stages[1][0].bias = nn.Parameter(fresh(6))


@of_networks
def a_buffer_replaced(net, optimizer, undo):
    net.stages[0][1].running_mean = fresh(9)


@of_networks
def a_buffer_reset(net, optimizer, undo):
    net.stages[0][1].reset_running_stats()


@of_networks
def loaded(net, optimizer, undo):
    net.load_state_dict({k: (0.9 * v).to(v.dtype) for k, v in net.state_dict().items()})


@of_networks
def loaded_and_assigned(net, optimizer, undo):
    net.load_state_dict(
        {k: (0.9 * v).to(v.dtype) for k, v in net.state_dict().items()}, assign=True
    )


@of_networks
def tied_biases(net, optimizer, undo):
    net.synthesizers[0].input_trigger.bias = net.synthesizers[0].input_context.bias


@of_networks
def tied_over_a_boundary(net, optimizer, undo):
    net.stages[0][1].weight = net.stages[0][1].bias
    net.stages[1][1].bias = net.stages[1][1].weight


@of_networks
def moved_and_back(net, optimizer, undo):
    net.float()
    net.double()


@of_networks
def a_gradient_hook(net, optimizer, undo):
    net.stages[0][0].weight.register_hook(lambda grad: 2 * grad)


@of_networks
def a_gradient_hook_of_a_synthesizer(net, optimizer, undo):
    net.synthesizers[1].layers[0].weight.register_hook(lambda grad: 0 * grad)


@of_networks
def a_gradient_hook_that_came_and_went(net, optimizer, undo):
    net.stages[0][0].weight.register_hook(lambda grad: 2 * grad).remove()


@of_networks
def a_post_accumulate_hook(net, optimizer, undo):
    def clip(parameter):
        parameter.grad.clamp_(-1e-3, 1e-3)

    net.stages[1][0].weight.register_post_accumulate_grad_hook(clip)


@of_networks
def a_second_hook_beside_the_first(net, optimizer, undo):
    net.stages[1][0].weight.register_hook(lambda grad: 2 * grad)
    net.stages[1][0].weight.register_hook(lambda grad: 3 * grad)


# ---- modules ----


@of_networks
def another_activation(net, optimizer, undo):
    net.stages[1][2] = nn.Tanh()


@of_networks
def an_unknown_activation(net, optimizer, undo):
    net.stages[1][2] = nn.GELU()


@of_networks
def a_layer_more(net, optimizer, undo):
    net.stages[1].append(nn.Tanh())


@of_networks
def a_layer_less(net, optimizer, undo):
    del net.stages[0][2]


@of_networks
def a_layer_in_between(net, optimizer, undo):
    net.stages[2].insert(0, nn.Tanh())


@of_networks
def another_stage(net, optimizer, undo):
    net.stages[0] = nn.Sequential(nn.Linear(7, 9), nn.ReLU()).double()
    optimizer.add_param_group({"params": list(net.stages[0].parameters())})


@of_networks
def another_list_of_stages(net, optimizer, undo):
    net.stages = nn.ModuleList([net.stages[0], net.stages[1], nn.Linear(6, 5).double()])


@of_networks
def another_synthesizer(net, optimizer, undo):
    net.synthesizers[0] = BasicSynthesizer(9, context_dim=5).double()
    optimizer.add_param_group({"params": list(net.synthesizers[0].parameters())})


@of_networks
def a_foreign_synthesizer(net, optimizer, undo):
    class Foreign(nn.Linear):
        def forward(self, trigger, context):
            return super().forward(trigger)

    net.synthesizers[1] = Foreign(6, 6).double()
    optimizer.add_param_group({"params": list(net.synthesizers[1].parameters())})


@of_networks
def synthesizers_without_a_context(net, optimizer, undo):
    for synthesizer in net.synthesizers:
        synthesizer.input_context = None


@of_networks
def a_hidden_layer_more(net, optimizer, undo):
    net.synthesizers[0].layers.append(nn.Linear(9, 9).double())


@of_networks
def a_mixture(net, optimizer, undo):
    net.bp_lambda = 0.4


@of_networks
def norm_eps(net, optimizer, undo):
    net.stages[0][1].eps = 0.5


@of_networks
def norm_momentum(net, optimizer, undo):
    net.stages[0][1].momentum = 0.4


@of_networks
def norm_average(net, optimizer, undo):
    net.stages[0][1].momentum = None


@of_networks
def norm_without_statistics(net, optimizer, undo):
    net.stages[0][1].track_running_stats = False


@of_networks
def norm_without_buffers(net, optimizer, undo):
    net.stages[0][1].running_mean = net.stages[0][1].running_var = None


@of_networks
def norm_without_weight(net, optimizer, undo):
    net.stages[1][1].weight = None


@of_networks
def norm_in_eval(net, optimizer, undo):
    net.stages[1][1].eval()


@of_networks
def norm_in_eval_and_back(net, optimizer, undo):
    net.eval()
    net.train()


@of_networks
def norm_counter(net, optimizer, undo):
    net.stages[1][1].num_batches_tracked.fill_(100)
    net.stages[1][1].momentum = None


@of_networks
def another_norm(net, optimizer, undo):
    net.stages[1][1] = nn.LayerNorm(6).double()
