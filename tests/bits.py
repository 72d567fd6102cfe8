"""The bits that twenty steps of twelve networks leave: `python tests/bits.py` prints their hashes.

To compare two commits, run it in both, `--save FILE` in one and `--against FILE` in the other,
which prints the largest difference of each network besides. Steps on one thread of the CPU.
"""

import argparse
import hashlib

import torch
from torch import nn

import fastdni

_STEPS = 20
_ROWS, _INPUTS, _CLASSES = 33, 20, 10


def _network(dtype, norm=False, n_hidden=0, context=_CLASSES, unlocked=False, middle=None, lam=0.0):
    widths = [_INPUTS, 36, 28, _CLASSES]
    stages = []
    for k, n in zip(widths, widths[1:], strict=False):
        last = n == _CLASSES
        # In front of a BatchNorm a bias has no gradient but rounding, of which Adam makes steps.
        layers = [nn.Linear(k, n, bias=last or not norm)]
        if not last:
            layers += [nn.BatchNorm1d(n)] if norm else []
            layers += [nn.ReLU() if n == 36 else nn.Tanh()]
        stages.append(nn.Sequential(*layers))
    if middle is not None:
        stages[1].append(middle)
    of_gradients = [
        fastdni.BasicSynthesizer(n, n_hidden=n_hidden, context_dim=context) for n in widths[1:-1]
    ]
    of_inputs = None
    if unlocked:
        of_inputs = [
            fastdni.BasicSynthesizer(n, trigger_dim=_INPUTS, context_dim=context)
            for n in widths[1:-1]
        ]
    net = fastdni.DecoupledSequential(
        *stages, synthesizers=of_gradients, input_synthesizers=of_inputs, bp_lambda=lam
    )
    for parameter in net.synthesizer_parameters():
        nn.init.normal_(parameter, std=0.02)
    return net.to(dtype)


def _adam(net):
    return torch.optim.Adam(net.parameters(), lr=1e-3)


def _adamw(net):
    groups = [
        {"params": net.stage_parameters(), "lr": 1e-3},
        {"params": net.synthesizer_parameters(), "lr": 1e-4, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95))


def _momentum(net):
    return torch.optim.SGD(
        net.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-3
    )


# Of each network how it is made, its optimizer, and further arguments of a step.
_CASES = {
    "sgd": ({}, lambda net: torch.optim.SGD(net.parameters(), lr=0.01), {}),
    "momentum": ({}, _momentum, {}),
    "adam": ({"context": None}, _adam, {}),
    "adamw-groups": ({"n_hidden": 1}, _adamw, {}),
    "batch-norm": ({"norm": True, "n_hidden": 2}, _adam, {}),
    "unlocked": ({"unlocked": True}, _adam, {}),
    "unlocked-norm": ({"unlocked": True, "norm": True}, _momentum, {}),
    "masked": ({"norm": True}, _adam, {"update_mask": [True, False, True]}),
    "mixed": ({"middle": nn.ELU()}, _adam, {}),
    "mixed-unlocked": ({"middle": nn.ELU(), "unlocked": True}, _momentum, {}),
    "bp-lambda": ({"lam": 0.5}, _adam, {}),
    "rmsprop": ({}, lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3), {}),
}


def trained(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Parameters, buffers and losses of a case after its steps, in one row."""
    torch.manual_seed(0)
    made, optimizer_of, further = _CASES[name]
    net = _network(dtype, **made)
    optimizer = optimizer_of(net)
    losses = []
    for _ in range(_STEPS):
        x, target = torch.randn(_ROWS, _INPUTS, dtype=dtype), torch.randint(_CLASSES, (_ROWS,))
        result = net.step(x, target, optimizer, **further)
        losses += [result.loss.reshape(-1), result.synthesis_loss.reshape(-1)]
    found = [*net.state_dict().values(), *losses]
    return torch.cat([t.detach().to(dtype).reshape(-1) for t in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", help="file to write all values to")
    parser.add_argument("--against", help="such a file, to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = torch.load(arguments.against) if arguments.against else {}
    values = {}
    for name in _CASES:
        for dtype in (torch.float32, torch.float64):
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            values[key] = row = trained(name, dtype)
            text = hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]
            if key in before:
                now, known = torch.nan_to_num(row), torch.nan_to_num(before[key])
                off = (now - known).abs().max() / known.abs().max()
                text += "  the same bits" if torch.equal(now, known) else f"  off by {off:.1e}"
            print(f"{key:24}{text}")
    if arguments.save:
        torch.save(values, arguments.save)


if __name__ == "__main__":
    main()
