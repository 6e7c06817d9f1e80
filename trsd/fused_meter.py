"""Compiled layers as a meter sees them: what torch would fuse counts as one kernel, which reads and writes once.

``fused`` is a backend of ``torch.compile`` that compiles nothing. It takes the graphs that torch's own compiler would
be given, forward and backward, with what is kept between them, and runs them operation by operation. But operations
that neither multiply matrices nor belong to anyone else are run in groups, as large as their order allows: of a group
the meter is told the bytes that come in and go out, and counts as held what goes out alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from trsd.live_bytes import LiveBytes
from trsd.meta_results import MetaResults, new_tensors
from trsd.step_meter import ELEMENTWISE, StepMeter, moved_bytes


def fused(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend; it counts for the ``LiveBytes`` or ``StepMeter`` that is on when the graph runs."""
    return aot_autograd(
        fw_compiler=_in_groups,
        bw_compiler=_in_groups,
        decompositions=lambda: import_module("torch._inductor.compile_fx").select_decomp_table(),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )(graph, inputs)


class _Fusible(OperatorSupportBase):
    """What may share a kernel with its neighbours."""

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        packet = getattr(node.target, "overloadpacket", None)
        return packet is not None and node.target.namespace in ("aten", "prims") and packet not in flop_registry


def _in_groups(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    groups = CapabilityBasedPartitioner(graph, _Fusible(), allows_single_node_partition=True).partition_and_fuse()
    steps = _Run(groups)

    def run(inputs: list[Any]) -> Any:
        return steps(inputs)

    run._boxed_call = True  # so torch hands over its only list of the inputs, to be emptied
    return run


class _Run:
    """Runs a graph of operations and groups, and drops every value, its inputs too, after its last use."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, nodes = graph, list(graph.graph.nodes)
        self.results = MetaResults(pure=True)
        last = {used: node for node in nodes for used in node.all_input_nodes}
        self.steps = [(node, [used for used in node.all_input_nodes if last[used] is node]) for node in nodes]

    def __call__(self, inputs: list[Any]) -> Any:
        inputs.reverse()
        values: dict[fx.Node, Any] = {}
        for node, done in self.steps:
            if node.op == "placeholder":
                values[node] = inputs.pop()
                continue
            arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return arguments[0][0]
            values[node] = self._value(node, *arguments)
            del arguments
            for used in done:
                del values[used]
        raise AssertionError("a graph ends with its output")

    def _value(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self.graph, node.target)
        if node.op == "call_module":
            return self._as_one(self.graph.get_submodule(node.target), args)
        return node.target(*args, **kwargs)

    def _as_one(self, group: fx.GraphModule, args: tuple) -> Any:
        """What ``group`` makes of ``args``, one operation to the meter."""
        meters = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, LiveBytes)]
        with _disable_current_modes():
            result = self.results(group, args, {})
        made = new_tensors(result, args)
        for meter in meters:
            meter.hold_results(made)
            if made and isinstance(meter, StepMeter):
                meter.num_fused += 1
                meter.add(ELEMENTWISE, moved_bytes=moved_bytes([*args, *made]))
        return result
