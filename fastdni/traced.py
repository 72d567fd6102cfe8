"""For who traces this library's Python: torch.compile."""

from collections.abc import Callable


def constant(function: Callable) -> Callable:
    """Marks a function whose result stays as it is: it is called once, while tracing.

    As `torch.compiler.assume_constant_result` does, which would import the compiler with fastdni.
    """
    function._dynamo_marked_constant = True
    return function
