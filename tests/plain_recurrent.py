"""A decoupled recurrent network written out: one step of time after the other, autograd, no
fastdni but its synthesizers' modules.

Formulas and letters are those of `fastdni.DecoupledRNN`.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


def parts(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def joined(tensors, layout):
    """[trigger, ..] of a state."""
    layers = [t if t.dim() == 3 else t[None] for t in tensors]
    if layout == "hidden":
        layers = layers[:1]
    if layout in ("joined", "hidden"):
        return [torch.cat([t[layer] for t in layers for layer in range(len(t))], 1)]
    of_layers = [torch.cat([t[layer] for t in layers], 1) for layer in range(len(layers[0]))]
    if layout == "layers":
        return of_layers
    return [torch.stack(of_layers) if tensors[0].dim() == 3 else of_layers[0]]


class PlainRNN:
    """Copies of a DecoupledRNN's modules, and its windows by hand."""

    def __init__(self, rnn, head):
        self.rnn, self.head = copy.deepcopy(rnn.rnn), copy.deepcopy(head)
        own = rnn.synthesizer
        own = list(own) if isinstance(own, nn.ModuleList) else [own]
        # In one copy: those of the horizon share the hidden layers.
        self.synthesizers, self.ahead = copy.deepcopy((own, [list(each) for each in rnn.ahead]))
        self.layout, self.s = rnn.layout, rnn.settings
        self.cell = isinstance(self.rnn, nn.RNNCellBase)
        self.met, self.trace, self.kept = [], None, []
        self.ready = None  # rows whose start counts: None before the first window

    def parameters(self):
        heads = [m for each in self.ahead for m in each]
        every = [self.rnn, *self.synthesizers, *heads, self.head]
        return [*{id(p): p for m in every for p in m.parameters()}.values()]

    # ---- one step of time after the other ----

    def unroll(self, x, state, done):
        outputs, endings = [], []
        for t in range(len(x)):
            if self.cell:
                state = self.rnn(x[t], state)
                outputs.append(parts(state)[0])
            else:
                output, state = self.rnn(x[t : t + 1], state)
                outputs.append(output[0])
            if done is not None:
                endings.append((done[t][:, None], [s.detach() for s in parts(state)]))
                if t < len(x) - 1:
                    keep = (~done[t]).to(x.dtype)[:, None]
                    after = [s * keep for s in parts(state)]
                    state = tuple(after) if len(after) > 1 else after[0]
        return torch.stack(outputs), parts(state), endings

    @staticmethod
    def loss_by(head, output, y, name):
        output = head(output)
        if name == "mse":
            return F.mse_loss(output, y)
        return F.cross_entropy(output.flatten(0, 1), y.flatten())

    # ---- units ----

    def unit(self, batch):
        return self.s.target_scale * (batch if self.s.scale == "batch" else 1)

    def scale(self, trigger, tensors):
        if self.s.scale == "batch":
            return 2 / tensors[0].shape[-2]
        if self.s.scale == "layers":
            return 2 / (len(tensors[0]) if tensors[0].dim() == 3 else 1)
        return 2 / trigger.numel()

    def target(self, gradient, batch):
        per_row = gradient * (self.unit(batch) / self.s.target_scale)
        if self.s.target_clip is not None:
            norm = per_row.norm(dim=-1, keepdim=True)
            per_row = torch.where(
                norm > self.s.target_clip, per_row * self.s.target_clip / norm, per_row
            )
        return per_row * self.s.target_scale

    def said(self, tensors, ctx, modules=None):
        triggers = joined([t.detach() for t in tensors], self.layout)
        return [m(t, ctx) for m, t in zip(modules or self.synthesizers, triggers, strict=True)]

    def regress(self, tensors, ctx, targets, rows, modules=None, weight=1.0):
        """Adds gradients of the loss; the loss. Rows None: nothing, not even zeros."""
        total = 0.0
        if rows is None:
            return total
        for said, target in zip(self.said(tensors, ctx, modules), targets, strict=True):
            error = (said - target.detach()) * rows.to(said.dtype)
            loss = error.square().sum() * self.scale(said, tensors) / 2
            (loss * weight).backward()
            total += loss.item()
        return total

    def value(self, tensors, ctx, open_rows):
        """< M(s) / unit, s >, whose gradient is what the synthesizer says; rows that end: 0."""
        batch = tensors[0].shape[-2]
        with torch.no_grad():
            said = self.said(tensors, ctx)
        triggers = joined(tensors, self.layout)
        return sum(
            (m * t * open_rows).sum() for m, t in zip(said, triggers, strict=False)
        ) / self.unit(batch)

    # ---- a window ----

    def window(self, x, y, state, done, ctx, criterion):
        """Adds all gradients to `p.grad`; loss (0: there is none), synthesis loss, state."""
        batch, s = x.shape[1], self.s
        discount = s.factor if s.discount is None else s.discount
        if state is None:
            state = [t * 0 for t in self.unroll(x[:1], None, None)[1]]
            state = [t.detach() for t in state]
            self.ready, self.met, self.trace, self.kept = None, [], None, []
        start = [t.detach().clone().requires_grad_() for t in state]
        as_state = tuple(start) if len(start) > 1 else start[0]
        output, end, endings = self.unroll(x, as_state, done)
        none = torch.zeros(batch, 1, dtype=torch.bool)
        last = none if done is None else done[-1][:, None]
        open_rows = (~last).to(x.dtype)
        skips = s.first == "skip"
        # A window from no state learns nothing at all there, others by rows.
        ready = (None if skips else ~none) if self.ready is None else self.ready
        loss = None if y is None else self.loss_by(self.head, output, y, criterion)

        own = loss if loss is not None else output.sum() * 0
        value = self.value(end, ctx, open_rows)
        found = torch.autograd.grad(own + discount * value, start, retain_graph=True)
        synthesis = 0.0
        if s.trace_lambda is None:
            targets = [self.target(g, batch) for g in joined(list(found), self.layout)]
            synthesis += self.regress(start, ctx, targets, ready)
        elif s.trace_view == "online":
            synthesis += self.online(start, end, found, ctx, ready, done, discount)
        elif loss is not None:
            (of_output,) = torch.autograd.grad(loss, output, retain_graph=True)
        else:
            of_output = torch.zeros_like(output)
        if loss is not None or s.factor != 0:
            (own + s.factor * value).backward()
        if s.trace_lambda is not None and s.trace_view == "forward":
            self.kept.append((x, start, done, ctx, of_output.detach(), ready, end))
            if bool(last.all()) or len(self.kept) == s.trace_windows:
                synthesis += self.run_again(discount)
        if s.end == "zero":
            for rows, tensors in endings:
                zeros = [torch.zeros_like(t) for t in joined(tensors, self.layout)]
                synthesis += self.regress(tensors, ctx, zeros, rows)
        self.look_ahead(start, end, ctx, ready, done)
        self.ready = ~last if skips else ~none
        after = [t.detach() * open_rows for t in end]
        return 0.0 if loss is None else loss.item(), synthesis, after

    def run_again(self, discount):
        kept, self.kept = self.kept, []
        lam, synthesis, after = self.s.trace_lambda, 0.0, None
        grads = {p: p.grad for p in self.parameters()}
        for x, start, done, ctx, of_output, ready, end in reversed(kept):
            start = [t.detach().clone().requires_grad_() for t in start]
            as_state = tuple(start) if len(start) > 1 else start[0]
            output, reached, _ = self.unroll(x, as_state, done)
            keep = 1.0 if done is None else (~done[-1]).to(x.dtype)[:, None]
            share = discount if after is None else (1 - lam) * discount
            with torch.no_grad():
                said = self.said(end, ctx if after is None else after[1])
            wide = joined(reached, self.layout)
            total = (output * of_output).sum()
            total = total + share / self.unit(x.shape[1]) * sum(
                (m * t * keep).sum() for m, t in zip(said, wide, strict=False)
            )
            if after is not None:
                pairs = zip(after[0], reached, strict=False)
                total = total + lam * discount * sum((g * t * keep).sum() for g, t in pairs)
            found = torch.autograd.grad(total, start)
            for p, grad in grads.items():
                p.grad = grad
            targets = [self.target(g, x.shape[1]) for g in joined(list(found), self.layout)]
            synthesis += self.regress(start, ctx, targets, ready)
            grads = {p: p.grad for p in self.parameters()}
            after = ([g.detach() for g in found], ctx)
        return synthesis

    def online(self, start, end, found, ctx, ready, done, discount):
        if ready is None:
            return 0.0
        (m,) = self.synthesizers
        (trigger,), (reached,) = joined(start, self.layout), joined(end, self.layout)
        batch, size = trigger.shape
        jacobian = torch.zeros(batch, size, size, dtype=trigger.dtype)
        for i in range(size):
            rows = torch.autograd.grad(reached[:, i].sum(), start, retain_graph=True)
            jacobian[:, i] = joined(list(rows), self.layout)[0]
        parameters = list(m.parameters())
        count = sum(p.numel() for p in parameters)
        trace = self.trace
        if trace is None:
            trace = torch.zeros(batch, size, count, dtype=trigger.dtype)
        slopes = torch.zeros_like(trace)
        for b in range(batch):
            for i in range(size):
                one = m(trigger[b : b + 1].detach(), None if ctx is None else ctx[b : b + 1])
                grads = torch.autograd.grad(one[0, i], parameters)
                slopes[b, i] = torch.cat([g.flatten() for g in grads])
        trace = trace + slopes * ready[:, :, None]
        with torch.no_grad():
            said = m(trigger, ctx)
        (gradient,) = joined(list(found), self.layout)
        error = (said - self.target(gradient, batch)) * ready
        total = self.scale(trigger, start) * torch.einsum("bsp,bs->p", trace, error)
        for p, g in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            g = g.view_as(p)
            p.grad = g if p.grad is None else p.grad + g
        ended = torch.zeros(batch, dtype=torch.bool) if done is None else done.any(0)
        decay = discount * self.s.trace_lambda * (~ended).to(trigger.dtype)
        self.trace = decay[:, None, None] * torch.einsum("bij,bjp->bip", jacobian, trace)
        return (error.square().sum() * self.scale(trigger, start) / 2).item()

    def look_ahead(self, start, end, ctx, ready, done):
        ended = False if done is None else done.any(0)[:, None]
        self.met.insert(0, (start, ctx, ready))
        self.met = [
            (a, b, rows if rows is None or done is None else rows & ~ended)
            for a, b, rows in self.met[: len(self.ahead)]
        ]
        with torch.no_grad():
            said = self.said(end, ctx)
        for modules, (tensors, c, rows) in zip(self.ahead, self.met, strict=False):
            self.regress(tensors, c, said, rows, modules, self.s.horizon_weight)
