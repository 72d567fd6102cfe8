"""Traces the step's op as torch.compile does, without a GPU, and prints the kernels in the graph.
Not in a process that interprets kernels.

    python tests/triton_traced.py
"""

import contextlib
import json

import torch
from sweep_problem import Problem, cast, fresh_state, stages
from torch._dynamo.backends.common import aot_autograd

import fastdni as dni
from fastdni import ops
from fastdni.triton.sweep import Structure

dni.triton.load()
graphs: list[torch.fx.GraphModule] = []


def keep(graph: torch.fx.GraphModule, inputs) -> None:
    graphs.append(graph)
    raise KeyboardInterrupt  # nothing of it can run here


def main() -> None:
    torch.manual_seed(0)
    one = Problem(stages(norm=True, context=True), settings="adam")
    own = cast(one.given, torch.float32)
    structure = Structure(own, one.criterion, "exact")
    plan = ops.SweepPlan(own, one.batch, one.criterion)
    state = fresh_state(one.settings, plan.parameters)
    count = len(plan.parameters)

    @torch.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    def step(x, target, parameters, statistics, state):
        return torch.ops.fastdni.triton_sweep_(
            structure.number, x, target, None, parameters, statistics, state, [0] * count,
            ops.flat([one.settings]), one.active,
        )  # fmt: skip

    with torch.no_grad(), contextlib.suppress(KeyboardInterrupt):
        step(one.x.float(), one.target, plan.parameters, plan.statistics, state)
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    (graph,) = graphs
    names = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names.append(getattr(kernel, "fn", kernel).__name__)
    print(json.dumps({"kernels": names, "nodes": len(graph.graph.nodes)}))


if __name__ == "__main__":
    main()
