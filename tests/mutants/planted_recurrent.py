"""Faults in recurrent windows."""

from planted import Mutant

_PARTS = "fastdni/training/recurrent"
_WINDOW, _ENGINE, _FUSED = f"{_PARTS}/window.py", f"{_PARTS}/engine.py", f"{_PARTS}/fused.py"
_BOUNDARIES, _TRACES = f"{_PARTS}/boundaries.py", f"{_PARTS}/traces.py"
_NET, _CPU = "fastdni/recurrent.py", "csrc/cpu/window.cpp"

_LOOP = "tests/test_recurrent.py"  # drawn cases against a loop that is written out
_CONTRACT = "tests/test_recurrent_contract.py"
_RECIPES = "tests/test_recurrent_recipes.py"
_OPS = "tests/test_window.py"


RECURRENT = [
    # ---- a window ----
    Mutant(_WINDOW, "further = settings.bootstrap - settings.factor", "further = 0.0", _LOOP),
    Mutant(
        _WINDOW,
        "if self._versions_now() != self._versions:",
        "if False:",
        f"{_CONTRACT} -k parameters_stay",
    ),
    Mutant(
        _WINDOW,
        "messages = [torch.where(self._last, 0, message) for message in messages]",
        "pass",
        _LOOP,
    ),
    Mutant(
        _WINDOW,
        "before.ctx is ctx and before.engine is self.engine",
        "before.ctx is ctx",
        f"{_CONTRACT} -k another_synthesizer",
    ),
    Mutant(
        _WINDOW,
        "before.ctx is ctx and before.engine is self.engine",
        "before.engine is self.engine",
        f"{_CONTRACT} -k a_context_of",
    ),
    Mutant(
        _WINDOW,
        "            self._before.is_used = False",
        "            pass",
        f"{_CONTRACT} -k refused",
    ),
    Mutant(_ENGINE, "return True, None if fresh is None else ~fresh", "return True, None", _LOOP),
    Mutant(_ENGINE, 'if engine.settings.first == "train":', "if True:", _LOOP),
    Mutant(
        _ENGINE,
        "fresh = are_zero(tensors_of(state)) if passed is None else passed.fresh",
        "fresh = None if passed is None else passed.fresh",
        f"{_CONTRACT} -k row_of_zeros",
    ),
    Mutant(_NET, "passed is not None and passed.is_used:", "False:", f"{_CONTRACT} -k used_once"),
    Mutant(_NET, "            before.is_used = True", "            pass", f"{_CONTRACT} -k used"),
    # ---- units ----
    Mutant(_BOUNDARIES, 'if scale == "batch" else size)', "if True else size)", _LOOP),
    Mutant(_BOUNDARIES, "clip / norm.clamp_min(clip)", "clip / norm", _LOOP),
    Mutant(_BOUNDARIES, "p.trigger.numel() // windows", "p.trigger.numel()", _LOOP),
    Mutant(_BOUNDARIES, 'if scale == "layers":', "if False:", _LOOP),
    # ---- the auxiliary task ----
    Mutant(
        f"{_PARTS}/horizon.py", "if each is not None and ended is not None:", "if False:", _LOOP
    ),
    Mutant(f"{_PARTS}/horizon.py", "left[: self.length - 1]", "left[: self.length - 2]", _LOOP),
    # ---- traces ----
    Mutant(
        _TRACES,
        "share = (1 - lam) * discount if found else discount",
        "share = (1 - lam) * discount",
        _LOOP,
    ),
    Mutant(
        _TRACES,
        "before is None or before is not self._now.left",
        "before is None",
        f"{_CONTRACT} -k another_stream",
    ),
    Mutant(_TRACES, "        if kept.ended is None:", "        if True:", _LOOP),
    Mutant(
        _TRACES,
        "return given.detach().clone() if",
        "return given.detach() if",
        f"{_CONTRACT} -k writes_over",
    ),
    Mutant(
        _TRACES,
        "gradient = gradient / self.loss_scale",
        "pass",
        f"{_CONTRACT} -k scaled_loss",
    ),
    Mutant(_TRACES, "trace = slopes if trace is None else trace + slopes", "trace = slopes", _LOOP),
    Mutant(
        _TRACES,
        "following = torch.where(ended.any(0).view(-1, 1, 1), 0, following)",
        "pass",
        _LOOP,
    ),
    # ---- windows in two calls ----
    Mutant(_FUSED, "(len(ended) > 1 and bool(ended[:-1].any()))", "False", _LOOP),
    Mutant(
        _FUSED,
        "        if given.lengths is not None or not",
        "        if not",
        f"{_CONTRACT} -k padding_in",
    ),
    Mutant(_FUSED, "and settings.bootstrap != settings.factor:", "and False:", _LOOP),
    Mutant(
        _FUSED,
        "and (x.shape, x.dtype, x.device) == last.x",
        "and True",
        "tests/test_recurrent_errors.py",
    ),
    Mutant(
        _FUSED,
        "            and others == (None,) * len(others)\n",
        "",
        "tests/test_recurrent_errors.py",
    ),
    Mutant(
        _FUSED,
        "if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:",
        "if False:",
        f"{_CONTRACT} -k hooks",
    ),
    Mutant(_FUSED, "        if engine.horizon.length:", "        if False:", _LOOP),
    Mutant(_FUSED, "if self._surroundings.is_cast:", "if False:", f"{_CONTRACT} -k autocast_in"),
    Mutant(
        _FUSED,
        "if not self._no_gradients.unchanged():",
        "if False:",
        f"{_CONTRACT} -k gradients_that_were_there",
    ),
    Mutant(
        _FUSED,
        "return self._unchanged() and self.optimizers",
        "return self.optimizers",
        f"{_CONTRACT} -k between_steps",
    ),
    Mutant(
        _FUSED,
        "self.optimizers.are(optimizer) and self._last.unchanged()",
        "self.optimizers.are(optimizer)",
        f"{_CONTRACT} -k between_steps",
    ),
    Mutant(_FUSED, "key = learns, differs", "key = learns, True", _LOOP),
    Mutant(_FUSED, "        if shared:", "        if False:", f"{_CONTRACT} -k shared"),
    # ---- in C++ ----
    Mutant(_CPU, "if (clip > 0 && norm > clip)", "if (norm > clip)", _OPS),
    Mutant(_CPU, "      if (counting[r]) continue;", "      continue;", _OPS),
    Mutant("csrc/cpu/update.h", "  optimizer.raise_steps();\n", "", _OPS),
    Mutant(_CPU, "masked != nullptr && masked[r]", "false", _OPS),
    Mutant("csrc/ops/window.cpp", "given->numel() == joined.rows,", "true,", f"{_OPS} -k refuses"),
    Mutant(
        "csrc/cpu/recurrence.cpp",
        "saved.bytes == window.saved() * static_cast<int64_t>(sizeof(T))",
        "true",
        "tests/test_recurrence.py -k another_windows",
    ),
]
