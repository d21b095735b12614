"""Proof, not trust: a recognised MoE block is used only where it computes what the user's own code computes.

The smallest module that holds the block is copied, with random weights and on random inputs of its own shapes (fewer
tokens). Its own forward, and the graph of that forward in its recognised form, must give the same outputs and the same
gradients of every input and parameter, in fp64 where it fits: on random tokens, and on equal ones, whose experts get
all rows while the others stay idle. Otherwise the block stays as written, and the reason says which check failed.

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
from torch.fx import GraphModule, Node

from tedcompile import compat
from tedcompile.capture import Captured, bind, capture, module_path

TOKENS = (2, 64)  # at most so many sequences and positions
LARGE = 2**26  # parameters of a module, beyond which it is proven in fp32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TRIALS = ("random tokens", "equal tokens, so that experts are idle", "other random tokens")


class _Unable(Exception):
    """The module's own code does not run in a dtype."""


class Prover:
    """Proves blocks of one captured model; equal modules once. `recognise` makes the recognised graph of a capture."""

    def __init__(self, model: nn.Module, captured: Captured, recognise: Callable[[Captured], GraphModule]):
        assert captured.calls is not None
        self.model, self.captured, self.recognise = model, captured, recognise
        self.made = captured.calls.made
        self.verdicts: dict[Any, str] = {}
        self.proven: set[str] = set()

    def __call__(self, nodes: Sequence[Node], experts: int) -> str:
        """Why the block of these nodes must stay as it is; empty where it is proven."""
        path = self.holder([module_path(n) for n in nodes])
        module = self.model.get_submodule(path)
        args, kwargs = self.made.get(path, ((), {})) if path else ((), self.whole())
        key = (_facts(module), str(pytree.tree_map(_fact, (args, kwargs))), experts)
        if key not in self.verdicts:
            self.verdicts[key] = self.prove(module, args, kwargs, experts)
        reason = self.verdicts[key]
        if not reason:
            self.proven.add(path)
        return reason and f"the proof of {path or type(module).__name__} failed: {reason}"

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

    def prove(self, module: nn.Module, args: tuple, kwargs: dict, experts: int) -> str:
        large = sum(p.numel() for p in module.parameters()) > LARGE
        with compat.no_modes(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            if not large:
                try:
                    return self.prove_in(torch.float64, module, args, kwargs, experts)
                except _Unable:  # torch's grouped product has no fp64
                    pass
            try:
                return self.prove_in(torch.float32, module, args, kwargs, experts)
            except _Unable as error:
                return f"its own code does not run on random inputs ({error})"

    def prove_in(self, dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: dict, experts: int) -> str:
        torch.manual_seed(0)
        own = _copy(module, dtype)
        state = {n: b.clone() for n, b in own.named_buffers()}
        named = bind(own.forward, args, kwargs)
        trials = [self.inputs(named, kind, experts, dtype) for kind in range(len(TRIALS))]
        try:
            own(**trials[0])
        except Exception as error:
            raise _Unable(error) from None
        try:
            captured = capture(own, trials[0])
            gm = self.recognise(captured)
        except Exception as error:
            return f"alone, it could not be recognised ({error})"
        if not any(str(n.target).startswith("ted.permute") for n in gm.graph.nodes):
            return "alone, it is not recognised"
        for trial, name in zip(trials, TRIALS):
            try:
                reason = _compare(own, captured, gm, trial, state, TOLERANCE[dtype])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                return f"{reason} ({name})"
        return ""

    def inputs(self, named: dict[str, Any], trial: int, experts: int, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(trial)
        sizes = self.sizes()

        def real(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            lead = [sizes.get(s, s) for s in x.shape[:-1]] if x.dim() > 1 else list(x.shape)
            size = (*lead, *x.shape[len(lead) :])
            if x.dtype == torch.bool:
                return torch.rand(size, generator=generator) < 0.5
            if x.is_floating_point() or x.is_complex():
                made = torch.randn(size, generator=generator, dtype=dtype.to_complex() if x.is_complex() else dtype)
            else:
                last = size[-1] if size else 1
                scores = torch.rand(*size[:-1], max(experts, last), generator=generator)
                made = scores.argsort(-1)[..., :last].reshape(size).to(x.dtype) % experts
            if trial == 1 and made.dim() > 1:
                made = made.reshape(-1, size[-1])[:1].expand(math.prod(size[:-1]), -1).reshape(size).clone()
            return made.requires_grad_(x.is_floating_point() and x.requires_grad)

        return pytree.tree_map(real, named)

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


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with random weights of its global shapes, on the cpu; dropout is off, for it has no one result."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5
        made = torch.randn(p.shape, dtype=dtype if p.is_floating_point() else p.dtype) * scale
        memo[id(p)] = nn.Parameter(made, requires_grad=p.requires_grad)
    for b in module.buffers():
        known = b.device.type != "meta" and not isinstance(b, compat.FakeTensor)
        value = b.detach().cpu().clone() if known else torch.rand(b.shape).to(b.dtype)
        memo[id(b)] = value.to(dtype) if value.is_floating_point() else value
    own = copy.deepcopy(module, memo)
    for m in own.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return own


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
