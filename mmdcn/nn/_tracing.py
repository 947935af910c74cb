# SPDX-License-Identifier: Apache-2.0
"""What torch's tracers see of a layer: torch.fx one node, TorchScript's compiler a sentence."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from torch import fx


class OneNode:
    """The first base of a layer, which torch.fx then takes for one node, as it does the layers of torch.

    So the graph runs the layer itself, with its hooks, checks, and types under autocast; quantization in FX graph mode
    leaves it in floating point.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if 'forward' in vars(cls):
            cls.forward = _as_one_node(cls.forward)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse; torch.jit.script asks each module of a model for this.

        Raises:
            NotImplementedError: Always, with the remedy.
        """
        raise NotImplementedError(
            f'torch.jit.script cannot compile the Python of mmdcn.{type(self).__name__}: use torch.jit.trace, whose '
            'file loads in every process that has imported mmdcn, or torch.export, or torch.compile'
        )


def _as_one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def one_node(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = next((each for each in (*args, *kwargs.values()) if isinstance(each, fx.Proxy)), None)
        if proxy is None:
            return forward(self, *args, **kwargs)
        tracer: Any = proxy.tracer
        if self is tracer.root:
            raise NotImplementedError(
                f'torch.fx takes mmdcn.{type(self).__name__} for one node, and so cannot trace a model that is nothing '
                'else: trace nn.Sequential(layer)'
            )
        return tracer.create_proxy('call_module', tracer.path_of_module(self), args, kwargs)

    return one_node
