"""Every use of a private torch module, in one place: a torch upgrade is this file's work."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._export import non_strict_utils
from torch._functorch.aot_autograd import (  # noqa: F401
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def hinted_export(note: Callable[[], None]) -> Iterator[FakeTensorMode]:
    """torch.export on fakes that may carry examples (`set_example`), which ops on them carry on.

    A question about the values of tensors is answered as the examples would, and reported by a call of `note`.
    """

    class HintedShapeEnv(ShapeEnv):
        def _log_real_tensor_propagation(self, *_: Any) -> None:
            note()

    class HintedMode(FakeTensorMode):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.propagate_real_tensors, self.cache_enabled = True, False

    with unittest.mock.patch.multiple(non_strict_utils, FakeTensorMode=HintedMode, ShapeEnv=HintedShapeEnv):
        yield HintedMode(shape_env=HintedShapeEnv(), allow_non_fake_inputs=True)


def no_modes():
    """Real tensors, and no trace of what is done with them, also inside a capture."""
    return _disable_current_modes()


def example_of(tensor: torch.Tensor) -> torch.Tensor | None:
    return getattr(tensor, "real_tensor", None)


def set_example(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    if isinstance(tensor, FakeTensor):
        tensor.real_tensor = value


def compile_fx_inner(*args, **kwargs):
    from torch._inductor.compile_fx import compile_fx_inner  # seconds, and only this backend needs it

    return compile_fx_inner(*args, **kwargs)


def partition(joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """Forward and backward of a joint graph, by the least bytes kept between them and by nodes' recompute tags.

    torch takes every attention kernel for random, also without dropout, and would save and restore generators around
    one that is recomputed: it does not see them. Random ops of ours draw from a seed.
    """
    stand_ins: dict[Any, Any] = {}
    for node in joint.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            node.target = stand_ins.setdefault(node.target, _StandIn(node.target))
    forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
    for gm in (joint, forward, backward):
        for node in gm.graph.nodes:
            if isinstance(node.target, _StandIn):
                node.target = node.target.op
        gm.recompile()
    return forward, backward


class _StandIn:
    """What a graph calls instead of an op, while the op's tags are to be hidden."""

    def __init__(self, op: Any):
        self.op, self.__name__, self.__module__ = op, op.__name__, __name__

    def __call__(self, *args, **kwargs):
        return self.op(*args, **kwargs)


def saved_names(joint: GraphModule, outputs: int) -> list[str]:
    """The nodes that `partition` keeps between forward and backward; `outputs` of the joint graph are the forward's."""
    forward, _ = partition(joint, (), num_fwd_outputs=outputs)
    return [node.name for node in forward.graph.output_node().args[0][outputs:]]


def cse(graph: Graph) -> Graph:
    """A copy of the graph in which what is computed twice is computed once."""
    return fx_graph_cse(graph)


def expression(size: torch.SymInt) -> Any:
    """A symbolic size as a sympy expression."""
    return size.node.expr


def select_decomp_table():
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def register_group(name: str, group: dist.ProcessGroup) -> None:
    """Gives this rank's group a name that is the same on every rank, so graphs and compiler caches are too."""
    torch._C._distributed_c10d._register_process_group(name, group)


def strided_shard(dim: int, parts: int):
    """Placement of a dim that is `parts` equal sections, each split over the axis (a fused [gate; up] weight)."""
    return _StridedShard(dim, split_factor=parts)


def dtensor(local: torch.Tensor, mesh, placements, shape, stride) -> DTensor:
    """A DTensor around a local shard, without communication; the shape and stride are the global ones."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    options = {}
    if any(isinstance(p, _StridedShard) for p in placements):
        options["use_strided_shard_as_shard_order"] = False
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta, **options)
    return DTensor(local, spec, requires_grad=local.requires_grad)  # type: ignore[call-arg]


def parameter(tensor: DTensor) -> DTensor:
    """The DTensor as an nn.Parameter; nn.Parameter() itself detaches, and loses the spec of a fused weight on 2.11."""
    tensor._is_param = True  # type: ignore[attr-defined]
    if tensor.requires_grad and any(isinstance(p, _StridedShard) for p in tensor.placements):
        tensor.register_post_accumulate_grad_hook(keep_spec)
    return tensor


def keep_spec(parameter: DTensor) -> None:
    """A gradient gets its parameter's spec: autograd's own detach makes one that 2.11 cannot gather."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and gradient._spec.placements == parameter._spec.placements:
        parameter.grad = like(parameter, gradient._local_tensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard, without autograd and without communication."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """`local` with the mesh, layout and global shape of `tensor`."""
    return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[call-arg]


def make_boxed_func(f):
    """A function of a list that it empties, so that inputs are freed as early as they can be."""

    def boxed(args: list):
        operands = list(args)
        args.clear()
        return f(*operands)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
