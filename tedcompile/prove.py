"""Proof, not trust: a recognised MoE block is used only where it computes what the user's own code computes.

The smallest module that holds the block is copied, with random weights and on random inputs of its own shapes (fewer
tokens). Its own forward, and the graph of that forward in its recognised form, must give the same outputs and the same
gradients of every input and parameter, in fp64 where it fits: on random tokens, and on equal ones, whose experts get
all rows while the others stay idle. Otherwise the block stays as written, and the reason says which check failed.
A wide module is proven on a narrower copy, whose graph must be that of the module in all but the widths; so a proof of
any model takes seconds and megabytes, also of one whose parameters are on the meta device, and every rank makes it.

The copy runs the user's Python, so it also covers control flow that a capture has assumed (`hints.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tedcompile import compat
from tedcompile.capture import Captured, bind, capture, module_path

TOKENS = (2, 64)  # at most so many sequences and positions
NARROW = 64  # widths from which on the copy is made narrower, where its code is the same then
LARGE = 2**26  # parameters of a module of full width, beyond which it is proven in fp32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CASTS = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default}  # `x.to(y.dtype)` is none where x has that dtype
TRIALS = ("random tokens", "equal tokens, so that experts are idle", "other random tokens")


class _Unable(Exception):
    """The module's own code does not run in a dtype."""


class _Unfit(Exception):
    """The module alone is not recognised, and why."""


class Prover:
    """Proves blocks of one captured model; equal modules once. `recognise` makes the recognised graph of a capture."""

    def __init__(self, model: nn.Module, captured: Captured, recognise: Callable[[Captured], GraphModule]):
        assert captured.calls is not None
        self.model, self.captured, self.recognise = model, captured, recognise
        self.made = captured.calls.made
        self.code = [(module_path(n), n) for n in _copied(captured.gm).nodes if n.op == "call_function"]
        self.verdicts: dict[Any, str] = {}
        self.proven: set[str] = set()

    def __call__(self, nodes: Sequence[Node], experts: int) -> str:
        """Why the block of these nodes must stay as it is; empty where it is proven."""
        path = self.holder([module_path(n) for n in nodes])
        module = self.model.get_submodule(path)
        args, kwargs = self.made.get(path, ((), {})) if path else ((), self.whole())
        key = (_facts(module), str(pytree.tree_map(_fact, (args, kwargs))), experts)
        if key not in self.verdicts:
            given = nodes[0].op == "placeholder"  # the choice of experts
            try:
                reason = self.prove(path, args, kwargs, experts, experts if given else 8 * experts)
                what = path or type(module).__name__
                self.verdicts[key] = reason and f"the proof of {what} failed: {reason}"
            except _Unfit as error:
                self.verdicts[key] = str(error)
        if not self.verdicts[key]:
            self.proven.add(path)
        return self.verdicts[key]

    def whole(self) -> dict:
        names = list(bind(self.model.forward, (), self.captured.kwargs))
        return {n: self.captured.kwargs[n] for n in names}

    def holder(self, paths: list[str]) -> str:
        """The innermost module that runs all of these."""
        parts = [p.split(".") if p else [] for p in paths]
        common: list[str] = []
        for names in zip(*parts):
            if len(set(names)) > 1:
                break
            common.append(names[0])
        while common and ".".join(common) not in self.made:
            common.pop()
        return ".".join(common)

    def covers(self, path: str) -> bool:
        return any(not p or path == p or path.startswith(p + ".") for p in self.proven)

    def prove(self, path: str, args: tuple, kwargs: dict, experts: int, numbers: int) -> str:
        module = self.model.get_submodule(path)
        problem = ""
        with compat.no_modes(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            for narrow in dict.fromkeys((_narrower(module, experts), ())):
                large = not narrow and sum(p.numel() for p in module.parameters()) > LARGE
                for dtype in (torch.float64, torch.float32)[large:]:  # torch's grouped product has no fp64
                    for most in dict.fromkeys((numbers, experts)):  # ids may be beyond the user's tables
                        try:
                            return _Proof(self, path, dtype, dict(narrow), experts, most).run(module, args, kwargs)
                        except _Unable as error:
                            problem = str(error)
        return f"its own code does not run on random inputs ({problem})"

    def sizes(self) -> dict[int, int]:
        """What the numbers of sequences and of positions, and their product, become."""
        tensors = [x for x in pytree.tree_leaves(self.captured.inputs) if isinstance(x, Tensor) and x.dim() > 1]
        if not tensors:
            return {}
        if tensors[0].dim() == 2 and tensors[0].is_floating_point():  # tokens
            tokens = tensors[0].shape[0]
            return {tokens: min(tokens, math.prod(TOKENS))}
        batch, seq = tensors[0].shape[:2]
        fewer = [min(batch, TOKENS[0]), min(seq, TOKENS[1])]
        return {batch: fewer[0], seq: fewer[1], batch * seq: fewer[0] * fewer[1]}


class _Proof:
    """One proof: in a dtype, with narrower widths, with integers below `numbers` for inputs."""

    def __init__(
        self, prover: Prover, path: str, dtype: torch.dtype, narrow: dict[int, int], experts: int, numbers: int
    ):
        self.recognise, self.sizes = prover.recognise, prover.sizes()
        within = [n for p, n in prover.code if not path or p == path or p.startswith(path + ".")]
        self.code = [n for n in within if n.target not in CASTS]
        self.assume = prover.captured.refusal is not None
        self.dtype, self.narrow, self.experts, self.numbers = dtype, narrow, experts, numbers

    def run(self, module: nn.Module, args: tuple, kwargs: dict) -> str:
        torch.manual_seed(0)
        own = _copy(module, self.dtype, self.narrow)
        state = {n: b.clone() for n, b in own.named_buffers()}
        named = bind(own.forward, args, kwargs)
        trials = [self.inputs(named, kind) for kind in range(len(TRIALS))]
        try:
            own(**trials[0])
        except Exception as error:
            raise _Unable(error) from None
        try:
            captured = capture(own, trials[0], self.assume)
            if self.narrow and (other := self.other_code(captured)):
                raise _Unable(other)
            gm = self.recognise(captured)
        except _Unable:
            raise
        except Exception as error:
            return f"alone, it could not be recognised ({error})"
        if not any(str(n.target).startswith("ted.permute") for n in gm.graph.nodes):
            raise _Unfit("; ".join(gm.meta["unfit"]) or "alone, it is not recognised")
        for trial, name in zip(trials, TRIALS):
            try:
                reason = _compare(own, captured, gm, trial, state, TOLERANCE[self.dtype])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                return f"{reason} ({name})"
        return ""

    def other_code(self, captured: Captured) -> str:
        """How the module's part of the model's graph differs from its narrow copy's by more than sizes and dtypes."""
        own = [n for n in _copied(captured.gm).nodes if n.op == "call_function" and n.target not in CASTS]
        if len(own) != len(self.code):
            return "its code depends on its widths"
        at: dict[Node, Node] = {}
        learned: dict[int, set[int]] = {}

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, (list, tuple)):
                return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
            if isinstance(a, Node) and isinstance(b, Node):  # what enters the module has one counterpart, too
                a, b = _uncast(a), _uncast(b)
                return at.setdefault(a, b) is b
            if isinstance(a, torch.dtype) and isinstance(b, torch.dtype):
                return a == b or a.is_floating_point and b == self.dtype
            if type(a) is int and type(b) is int and a != b:
                known = learned.setdefault(a, {self.narrow.get(a, b), self.sizes.get(a, b)})
                return b in known
            return a == b or (isinstance(a, float) and isinstance(b, float))

        for a, b in zip(self.code, own):
            if a.target != b.target or not same((a.args, *a.kwargs.items()), (b.args, *b.kwargs.items())):
                return f"its code depends on its widths ({a.name})"
            at[a] = b
        return ""

    def inputs(self, named: dict[str, Any], trial: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(trial)

        def real(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            lead = [self.sizes.get(s, s) for s in x.shape[:-1]] if x.dim() > 1 else list(x.shape)
            last = [self.narrow.get(s, s) for s in x.shape[len(lead) :]]
            size = (*lead, *last)
            if x.dtype == torch.bool:
                return torch.rand(size, generator=generator) < 0.5
            if x.is_floating_point() or x.is_complex():
                kind = self.dtype.to_complex() if x.is_complex() else self.dtype
                made = torch.randn(size, generator=generator, dtype=kind)
            else:
                width = size[-1] if size else 1
                scores = torch.rand(*size[:-1], max(self.numbers, width), generator=generator)
                made = scores.argsort(-1)[..., :width].reshape(size).to(x.dtype) % self.numbers
            if trial == 1 and made.dim() > 1:
                made = made.reshape(-1, size[-1])[:1].expand(math.prod(size[:-1]), -1).reshape(size).clone()
            elif trial == 1 and made.dim() == 1 and not made.is_floating_point():
                made = made[:1].expand(size).clone()
            return made.requires_grad_(x.is_floating_point() and x.requires_grad)

        return pytree.tree_map(real, named)


def _narrower(module: nn.Module, experts: int) -> tuple[tuple[int, int], ...]:
    """(width, a smaller one) of a module's parameters, in one ratio, so that sums and multiples of widths stay so."""
    sizes = {s for p in module.parameters() for s in p.shape if s != experts}
    wide = sorted(s for s in sizes if s >= NARROW)
    ratio = math.gcd(*wide)
    while ratio > 1 and any((s // ratio) % 8 for s in wide):
        ratio = next((r for r in range(ratio - 1, 0, -1) if ratio % r == 0), 1)
    return tuple((s, s // ratio) for s in wide) if ratio > 1 else ()


def _uncast(node: Node) -> Node:
    while node.target in CASTS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _copied(gm: GraphModule) -> Graph:
    """A copy that passes leave alone."""
    graph = Graph()
    graph.graph_copy(gm.graph, {})
    return graph


def _fact(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x if isinstance(x, (int, float, str)) else type(x)


def _facts(module: nn.Module) -> str:
    """What tells modules apart: classes, shapes, and numbers and words that they hold."""
    plain = (int, float, str, bool)
    modules = [
        (n, type(m), m.training, sorted((k, v) for k, v in vars(m).items() if isinstance(v, plain)))
        for n, m in module.named_modules()
    ]
    return str((modules, [(n, tuple(t.shape)) for n, t in (*module.named_parameters(), *module.named_buffers())]))


def _copy(module: nn.Module, dtype: torch.dtype, narrow: dict[int, int]) -> nn.Module:
    """The module with random weights, on the cpu; dropout is off, for it has no one result."""
    memo: dict[int, Any] = {}

    def size(tensor: Tensor) -> list[int]:
        return [narrow.get(s, s) for s in tensor.shape]

    for p in module.parameters():
        scale = size(p)[-1] ** -0.5 if p.dim() > 1 else 0.5
        made = torch.randn(size(p), dtype=dtype if p.is_floating_point() else p.dtype) * scale
        memo[id(p)] = nn.Parameter(made, requires_grad=p.requires_grad)
    for b in module.buffers():
        known = b.device.type != "meta" and not isinstance(b, compat.FakeTensor)
        value = b.detach().cpu().clone() if known else torch.rand(b.shape).to(b.dtype)
        value = value[tuple(slice(n) for n in size(b))].clone()
        memo[id(b)] = value.to(dtype) if value.is_floating_point() else value
    own = copy.deepcopy(module, memo)
    for m in own.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        for holder in (m, *(v for v in vars(m).values() if narrow and _holds_sizes(v))):
            for name, value in list(vars(holder).items()):
                if type(value) is int and value in narrow:
                    vars(holder)[name] = narrow[value]
                elif type(value) is tuple and any(type(v) is int and v in narrow for v in value):
                    vars(holder)[name] = tuple(narrow.get(v, v) for v in value)
    return own


def _holds_sizes(value: Any) -> bool:
    """Whether an attribute is a plain object with attributes, such as a configuration."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)


def _compare(
    own: nn.Module, captured: Captured, gm: GraphModule, inputs: dict, state: dict[str, Tensor], tolerance: float
) -> str:
    names = {id(p): n for n, p in own.named_parameters()}
    leaves = pytree.tree_leaves(inputs)
    given = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    learned = [p for p in own.parameters() if p.requires_grad]

    def reset() -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for n, b in own.named_buffers():
                b.copy_(state[n])

    reset()
    want = _floating(own(**inputs))
    reset()
    values = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            kind, name = node.meta["role"]
            values.append(
                leaves[name] if kind == "input"
                else captured.constants[name] if kind == "constant"
                else own.get_parameter(name) if kind == "parameter"
                else own.get_buffer(name)
            )  # fmt: skip
    gm.recompile()
    got = _floating(gm(*values))[: len(want)]
    for i, (a, b) in enumerate(zip(got, want)):
        if difference := _differs(a, b, tolerance):
            return f"output {i} differs by {difference:.1e}"
    weights = [torch.randn_like(w) for w in want]
    pairs = []
    for results in (got, want):
        total = sum((r * w).sum() for r, w in zip(results, weights) if r.requires_grad)
        if not isinstance(total, Tensor):
            return ""
        pairs.append(torch.autograd.grad(total, [*given, *learned], allow_unused=True))
    for x, a, b in zip([*given, *learned], *pairs):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        if difference := _differs(a, b, tolerance):
            return f"the gradient of {names.get(id(x), 'an input')} differs by {difference:.1e}"
    return ""


def _floating(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _differs(a: Tensor, b: Tensor, tolerance: float) -> float:
    if a.shape != b.shape:
        return math.inf
    difference = float((a - b).detach().abs().max()) if a.numel() else 0.0
    bad = not difference <= tolerance * (1 + float(b.detach().abs().max() if b.numel() else 0))
    return (difference if difference == difference else math.inf) if bad else 0.0
