"""Every use of a private torch module, in one place: a torch upgrade is this file's work."""

from __future__ import annotations

import contextlib
import datetime
import pathlib
import re
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._export import non_strict_utils
from torch._functorch._aot_autograd import graph_compile
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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
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


@contextlib.contextmanager
def user_frames() -> Iterator[None]:
    """torch.export notes for every node the user's own lines, also those outside of `forward` methods."""

    def kept(self: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        first = next((i for i, f in enumerate(frames) if f.name == "forward"), len(frames))
        own = [f for f in frames[first:] if f.name == "forward" or not re.search("/(torch|tedcompile)/", f.filename)]
        return traceback.StackSummary.from_list(own)

    with unittest.mock.patch.object(torch.fx.proxy.TracerBase, "_filter_traceback_frames", kept):
        yield


def no_modes():
    """Real tensors, and no trace of what is done with them, also inside a capture."""
    return _disable_current_modes()


def example_of(tensor: torch.Tensor) -> torch.Tensor | None:
    return getattr(tensor, "real_tensor", None)


def set_example(tensor: torch.Tensor, value: torch.Tensor | None) -> None:
    if isinstance(tensor, FakeTensor):
        tensor.real_tensor = value


def compile_fx_inner(*args, deterministic: bool = False, ordered: bool = False, **kwargs):
    """`deterministic`: no kernel whose rounding differs is chosen by timing, so all ranks run the same ones.

    `ordered`: kernels stay in the order of the graph. Inductor's own, for the least memory, starts every reduction of
    gradients when the backward is over.
    """
    from torch._inductor import config  # seconds, and only this backend needs it
    from torch._inductor.compile_fx import compile_fx_inner

    with config.patch(deterministic=deterministic, reorder_for_peak_memory=not ordered):
        return compile_fx_inner(*args, **kwargs)


def unprinted_export():
    """torch.export prints the graph so far to stderr before it raises; not inside this context."""
    import torch.export._trace as trace

    return unittest.mock.patch.object(trace, "print", lambda *_, **__: None, create=True)


def undonated() -> contextlib.AbstractContextManager:
    """A backward that is compiled inside may run again, with retain_graph=True: it writes over nothing it was given."""
    return unittest.mock.patch.object(graph_compile, "collect_bw_donated_buffer_idxs", lambda *_: [])


def own_tracing():
    """What is compiled inside is no part of the graph that AOTAutograd is compiling: its strides and donated inputs."""
    return torch._guards.tracing(None)


def lazy_modules():
    """Graph modules made inside are turned into Python when they run: those that a pass only changes never are."""
    return torch.fx._lazy_graph_module._use_lazy_graph_module(True)


def range_of(size: torch.SymInt) -> Any:
    return size.node.shape_env.bound_sympy(size.node.expr)


def inductor_kernel(
    function: Callable[..., tuple], arguments: list[tuple], device: torch.device
) -> Callable[[list], Any]:
    """A function of tensors, compiled by Inductor for any number of rows, without guards: run([tensors]) -> results.

    `arguments` are (dtype, *sizes); 2-D ones share a number of rows, which is a hint. What the function does last to
    its arguments, by `copy_`, is done in place. Each operation rounds, as torch's own kernels do: Triton would contract
    a * b + c to one rounding.
    """
    from torch._dynamo.source import ConstantSource
    from torch._inductor import config

    shapes = ShapeEnv()
    source, hint = ConstantSource("rows"), max((a[1] for a in arguments if len(a) == 3), default=2)
    symbol = shapes.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    rows = shapes.create_symintnode(symbol, hint=hint, source=source)
    mode = FakeTensorMode(shape_env=shapes)
    with mode:
        sizes = [(rows, a[2]) if len(a) == 3 else a[1:] for a in arguments]
        fakes = [torch.empty(s, dtype=a[0], device=device) for s, a in zip(sizes, arguments, strict=True)]
        graph = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
    with config.patch(emulate_precision_casts=True):
        run = compile_fx_inner(graph, fakes, is_inference=True)
    if device.type == "cuda":  # configurations are chosen in the first call, on copies of the arguments: of small ones
        sizes = [(1 << 13, a[2]) if len(a) == 3 else a[1:] for a in arguments]
        run([torch.zeros(s, dtype=a[0], device=device) for s, a in zip(sizes, arguments, strict=True)])
    return run


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


def select_decomp_table(parallel: bool = False):
    """Inductor's decompositions; `parallel`: without that of an embedding's gradient, which adds atomically."""
    from torch._inductor.decomposition import select_decomp_table

    table = dict(select_decomp_table())
    if parallel:
        table.pop(torch.ops.aten.embedding_dense_backward.default, None)
    return table


IN_BACKWARD = {"partitioner_tag": "must_be_in_backward"}  # meta of a node of a joint graph


def new_group(ranks: list[int], device_type: str) -> dist.ProcessGroup:
    """A group for tensors of a device. Kernels of NCCL begin before those of a product that wait for a place.

    Called by all ranks, in one order. Its timeout is that of the default group.
    """
    if device_type != "cuda" or "cuda:nccl" not in dist.get_backend_config():
        return dist.new_group(ranks)
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = dist.group.WORLD._get_backend(torch.device("cuda")).options._timeout
    return dist.new_group(ranks, backend="nccl", timeout=options._timeout, pg_options=options)


def register_group(name: str, group: dist.ProcessGroup) -> None:
    """Gives this rank's group a name that is the same on every rank, so graphs and compiler caches are too."""
    torch._C._distributed_c10d._register_process_group(name, group)


def wait_for(name: str, done: bool) -> None:
    """Until the rank that says `done` has come here, however long it takes: no collective, so none times out."""
    store = dist.distributed_c10d._get_default_store()
    if done:
        store.set(name, "done")
    store.wait([name], datetime.timedelta(days=7))


def store_client() -> dist.Store:
    """The default store by another connection: a call that waits there does not block this one."""
    return dist.distributed_c10d._get_default_store().clone()


def issued(name: str) -> int:
    """How many collectives this rank has started in the group of a name; 0 where the backend does not count."""
    try:
        return torch._C._distributed_c10d._resolve_process_group(name)._get_sequence_number_for_group()
    except RuntimeError:
        return 0


def settle_gloo(patience: float = 5.0) -> None:
    """Waits until gloo's threads have nothing left to do; for the end of a process (pytorch issue 190489).

    A collective is over for its caller before gloo's thread has let go of the tensors, which takes the interpreter's
    lock. A thread that comes late, when the interpreter ends already, aborts the process. Linux only; elsewhere nothing
    is waited for.
    """
    tasks = pathlib.Path("/proc/self/task")
    quiet, deadline = 0, time.monotonic() + patience
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.001)  # others may take the lock
        try:
            states = [(t / "stat").read_text().rpartition(")") for t in tasks.iterdir()]
        except OSError:  # no such folder, or a thread has just ended
            states = []
        running = any("pt_gloo" in name and state.split()[0] != "S" for name, _, state in states)
        quiet = 0 if running else quiet + 1


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
    if not isinstance(gradient, DTensor):
        return
    if gradient._spec.placements == parameter._spec.placements:
        if gradient._spec is not parameter._spec:
            parameter.grad = like(parameter, gradient._local_tensor)
    elif getattr(gradient._spec, "use_strided_shard_as_shard_order", False):
        mesh, placements = gradient.device_mesh, gradient.placements
        parameter.grad = dtensor(gradient._local_tensor, mesh, placements, gradient.shape, gradient.stride())


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard, without autograd and without communication."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """`local` with the mesh, layout and global shape of `tensor`.

    torch's deepcopy takes a DTensor for a plain tensor when its local one starts later in its memory than at 0.
    """
    start = local.as_strided(local.shape, local.stride(), 0) if local.storage_offset() else local
    made = DTensor(start, tensor._spec, requires_grad=False)  # type: ignore[call-arg]
    made._local_tensor = local
    return made


def set_local(tensor: torch.Tensor, local: torch.Tensor) -> None:
    """Moves a parameter to the memory of `local`, which takes its values."""
    local.copy_(local_tensor(tensor).detach())
    if isinstance(tensor, DTensor):
        tensor._local_tensor = local.data
    else:
        tensor.data = local


def all_gather(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], Any]:
    """Starts to gather equal parts, stacked on dim 0; the result waits. Renamed in torch 2.13.

    On CPUs it is over at once: a part that Python lets go of meanwhile is gloo's undoing (`passes.lower`).
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = gather(whole, part, group=group, async_op=whole.is_cuda)
    return work.wait if work is not None else lambda: None


def storage(tensor: torch.Tensor) -> int:
    """Names a tensor's memory, while it lives."""
    return tensor.untyped_storage()._cdata


def storage_uses(storage: int) -> int:
    """How many tensors hold this memory."""
    return torch._C._storage_Use_Count(storage)


def capturing() -> bool:
    """Whether somebody records a CUDA graph of what runs now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def stream(device: torch.device | None = None) -> int:
    """Names the stream that work goes to now, on the current GPU or a device; 0 where that is none."""
    there = torch.cuda.is_initialized() and (device is None or device.type == "cuda")
    return torch.cuda.current_stream(device).cuda_stream if there else 0


def device_memory() -> float:
    """Bytes of the current GPU; without one, without end."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else float("inf")


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies each source to its target, in few kernels."""
    if targets:
        torch._foreach_copy_(targets, sources)


def foreach_add(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Adds each source to its target, in few kernels."""
    torch._foreach_add_(targets, sources)


def only_accumulates(parameter: torch.Tensor, node: Any) -> bool:
    """In a backward: whether all that it does with this parameter's gradient, by `node`, is to add it to `.grad`.

    Hooks of the node itself, which torch does not show, are not seen.
    """
    after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    if (
        not parameter.requires_grad
        or getattr(parameter, "_backward_hooks", None)
        or any(hook is not keep_spec for hook in after.values())
    ):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad has asked for it
        return False


def with_local(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` as a tensor of the kind of `tensor`: a DTensor of the same layout, or itself."""
    return like(tensor, local) if isinstance(tensor, DTensor) else local


def cut(whole: torch.Tensor, tensor: DTensor) -> torch.Tensor:
    """This rank's part of a whole tensor in the layout of `tensor`, without communication."""
    mesh = tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        dim, parts = placement.dim, getattr(placement, "split_factor", 1)  # type: ignore[attr-defined]
        size, index = mesh.size(axis), mesh.get_local_rank(axis)
        whole = torch.cat([s.chunk(size, dim)[index] for s in whole.chunk(parts, dim)], dim)
    return whole


def make_boxed_func(f):
    """A function of a list that it empties, so that inputs are freed as early as they can be."""

    def boxed(args: list):
        operands = list(args)
        args.clear()
        return f(*operands)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
