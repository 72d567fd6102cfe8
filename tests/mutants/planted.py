"""The faults: one line each, such as an edit in haste may leave behind."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str  # what stands there, once
    new: str
    tests: str  # arguments of pytest: those of the subject, one of which must fail


_STALE = "tests/test_stale.py"
_WATCH, _OPTIMIZERS = "fastdni/training/watch.py", "fastdni/training/optimizers.py"
_KEPT, _RUNNING = "fastdni/training/kept.py", "fastdni/training/running.py"
_BINDING = "csrc/ops/sweep_binding.cpp"

MUTANTS = [
    # ---- what is not watched ----
    Mutant(_WATCH, '("momentum", "eps", "track', '("momentum", "track', f"{_STALE} -k norm_eps"),
    Mutant(
        _WATCH,
        'watch.items(own, ("forward", *MODULE_HOOKS))',
        "watch.items(own, MODULE_HOOKS)",
        f"{_STALE} -k a_forward_attribute",
    ),
    Mutant(
        _WATCH,
        'watch.items(own, ("forward", *MODULE_HOOKS))',
        'watch.items(own, ("forward",))',
        f"{_STALE} -k a_dictionary_of",
    ),
    Mutant(
        _WATCH,
        '"_backward_hooks", "_post_accumulate_grad_hooks")\n\n\n_form',
        '"_backward_hooks")\n\n\n_form',
        f"{_STALE} -k a_post_accumulate_hook",
    ),
    Mutant(
        _WATCH,
        '_PARAMETER_MARKS = ("requires_grad", ',
        "_PARAMETER_MARKS = (",
        f"{_STALE} -k frozen",
    ),
    Mutant(
        _WATCH,
        "        watch.size(own[name])\n    if not",
        "        pass\n    if not",
        f"{_STALE} -k a_forward_hook",
    ),
    Mutant(
        _WATCH,
        '        watch.items(own, ("training",))',
        "        pass",
        f"{_STALE} -k norm_in_eval",
    ),
    Mutant(
        _WATCH,
        "            watch.items(own[kind], own[kind])\n        watch.size",
        "            pass\n        watch.size",
        f"{_STALE} -k another_parameter",
    ),
    Mutant(
        _WATCH,
        "            watch.kind(module)\n",
        "",
        f"{_STALE} -k another_class",
    ),
    Mutant(
        _WATCH,
        '        watch.attributes(kind, ("forward",))',
        "        pass",
        f"{_STALE} -k patched",
    ),
    Mutant(
        _WATCH,
        'watch.items(own, ("param_groups", "state", *OPTIMIZER_HOOKS)',
        'watch.items(own, ("param_groups", *OPTIMIZER_HOOKS)',
        f"{_STALE} -k another_state",
    ),
    Mutant(
        _WATCH,
        '        watch._facts.append(("item", own, "step", own.get("step")))\n',
        "",
        f"{_STALE} -k a_step_attribute",
    ),
    Mutant(
        _WATCH,
        '        watch.attributes(type(optimizer), ("step",))\n',
        "",
        f"{_STALE} -k a_patched_step",
    ),
    Mutant(
        _WATCH,
        "        watch.items(groups, range(len(groups)))\n",
        "",
        f"{_STALE} -k a_groups_dictionary_replaced",
    ),
    Mutant(
        _WATCH,
        '                watch.items(group["params"], range(len(group["params"])))\n',
        "",
        "tests/test_turns.py -k change_their_groups",
    ),
    Mutant(
        _WATCH,
        '("params", *options, *of_tensors)',
        "(*options, *of_tensors)",
        f"{_STALE} -k a_list_of_parameters_replaced",
    ),
    Mutant(
        _KEPT,
        "                    self.watch.items(state[parameter], keys)\n",
        "                    pass\n",
        f"{_STALE} -k replaced",
    ),
    Mutant(
        _KEPT,
        "                self.watch.items(state, (parameter,))\n",
        "",
        f"{_STALE} -k a_state_entry",
    ),
    # ---- what is not noticed, or not checked ----
    Mutant(
        _RUNNING,
        "            and self._optimizers.are(optimizer)\n",
        "",
        "tests/test_turns.py -k optimizer",
    ),
    Mutant(
        _RUNNING,
        "            and self._unchanged()\n",
        "",
        f"{_STALE} -k another",
    ),
    Mutant(
        _RUNNING,
        "            and self._plan.can_be_repeated()\n",
        "",
        f"{_STALE} -k data_transposed",
    ),
    Mutant(
        _RUNNING,
        "(all(self._mask) if update_mask is None else self._has_mask(update_mask))",
        "(update_mask is None or self._has_mask(update_mask))",
        "tests/test_turns.py -k mask",
    ),
    Mutant(
        _RUNNING,
        " and {*map(type, update_mask)} == {bool}",
        "",
        "tests/test_turns.py -k mask",
    ),
    Mutant(
        _KEPT,
        " and layouts(self._tensors) == self._layouts",
        "",
        f"{_STALE} -k state_of_another_layout",
    ),
    Mutant(
        "fastdni/training/updates.py",
        "        if not found.first:  # what is made is made for one step\n",
        "        if True:\n",
        "tests/test_interruption.py -k in_the_reference",
    ),
    Mutant(
        "fastdni/training/updates.py",
        "    key = (owner, updated)\n",
        "    key = owner\n",
        "tests/test_turns.py -k mask",
    ),
    Mutant(
        "fastdni/training/trainer.py",
        "        if self._version == version:\n",
        "        if True:\n",
        "tests/test_lifetimes.py -k forgotten",
    ),
    Mutant(
        _OPTIMIZERS,
        "        self._check_rates()\n        return True\n",
        "        return True\n",
        "tests/test_accepted.py -k own_step_is_taken",
    ),
    Mutant(
        _RUNNING,
        "        if plan.steps == taken:\n",
        "        if True:\n",
        "tests/test_interruption.py",
    ),
    Mutant(
        _RUNNING,
        "        _increment_version(self._versions)\n",
        "",
        "tests/test_network_repetition.py -k leaves_what",
    ),
    Mutant(
        _OPTIMIZERS,
        "        if any(map(group.get, _UNFUSED_OPTIONS)):\n",
        "        if False:\n",
        "tests/test_network_optimizers.py -k other_optimizers",
    ),
    Mutant(
        _OPTIMIZERS,
        "        if type(optimizer) is not SGD and _rounds(group):\n",
        "        if False:\n",
        "tests/test_accepted.py -k tensor",
    ),
    Mutant(
        _OPTIMIZERS,
        "        if _tensor_numbers(group):\n",
        "        if False:\n",
        "tests/test_turns.py -k the_reason",
    ),
    Mutant(
        _KEPT,
        '_torch_optimizer._get_scalar_dtype(self.group.get("fused"))',
        "torch.float32",
        f"{_STALE} -k float64",
    ),
    Mutant(
        _KEPT,
        "len(set(places)) < len(places)",
        "False",
        f"{_STALE} -k one_tensor",
    ),
    Mutant(
        "fastdni/training/trainer.py",
        "        with self.lock:\n            last",
        "        if True:\n            last",
        "tests/test_threads.py",
    ),
    Mutant(
        "fastdni/training/structure.py",
        " and layouts(self.parameters) == self._layouts",
        "",
        "tests/test_network_optimizers.py -k another_dtype_between_steps",
    ),
    Mutant(
        "fastdni/training/parts.py",
        "        if self._output.requires_grad:\n            if part.boundary is None:\n",
        "        if self._output.requires_grad:\n            if part.boundary is None and self._loss.requires_grad:\n",  # noqa: E501
        "tests/test_accepted.py -k that_torch_refuses",
    ),
    Mutant(
        _WATCH,
        'nn.Dropout: ("p", "inplace")',
        'nn.Dropout: ("inplace",)',
        "tests/test_dropout.py -k that_changes",
    ),
    Mutant(
        "fastdni/training/stages.py",
        "    if dropout is None or not dropout.training:\n",
        "    if dropout is None:\n",
        "tests/test_dropout.py -k that_changes",
    ),
    # ---- rules in C++ ----
    Mutant(
        _BINDING,
        "FASTDNI_CHECK(noise.size() == dropouts,",
        "FASTDNI_CHECK(noise.size() >= dropouts,",
        "tests/test_dropout.py -k one_tensor_for_each",
    ),
    Mutant(
        _BINDING,
        "labels[r] < outputs) || labels[r] == kIgnoreIndex",
        "labels[r] <= outputs) || labels[r] == kIgnoreIndex",
        "tests/test_turns.py -k label_out_of_bounds",
    ),
    Mutant(
        _BINDING,
        "FASTDNI_CHECK(labels[r] < width,",
        "FASTDNI_CHECK(labels[r] <= width,",
        "tests/test_turns.py -k beyond_the_context",
    ),
    Mutant(
        _BINDING,
        "!stage.batch_norm || spec.batch > 1",
        "!stage.batch_norm || spec.batch > 0",
        "tests/test_network_arguments.py -k row",
    ),
    Mutant(
        _BINDING,
        "    if (found) given = torch::stable::clone(given);\n",
        "",
        "tests/test_turns.py -k memory",
    ),
    Mutant(
        "csrc/ops/optimizer_binding.cpp",
        "          memory.step = 1 + host_number(step);\n",
        "          memory.step = host_number(step);\n",
        "tests/test_turns.py -k optimizers_in_turns",
    ),
    Mutant(
        "csrc/ops/optimizer_binding.cpp",
        "      ++*mutable_data<double>(*step);\n",
        "      ++*mutable_data<float>(*step);\n",
        f"{_STALE} -k float64",
    ),
    Mutant(
        "csrc/ops/sweep.cpp",
        "  last.known = false;\n",
        "",
        "tests/test_sweep_rules.py -k what_a_repeated_step_refuses",
    ),
]
