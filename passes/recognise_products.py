"""Experts as batched products become the canonical MoE ops: one-hot dispatch, dense experts, gathered weights.

What a user writes (x (T, H), weights and index (T, K) from a top-k, stacked weights w1 (E, H, I), w2 (E, I, H)):

    # one-hot (GShard): dispatch and combine (T, E, C), what is over the capacity C is dropped
    y = bmm(act(bmm(einsum("tec,th->ech", dispatch, x), w1)), w2);  out = einsum("tec,ech->th", combine, y)
    # dense: every expert on every token
    y = bmm(act(bmm(x.expand(E, T, H), w1)), w2);  out = (y * scores.t()[..., None]).sum(0)
    # gathered: the weights of each slot
    y = matmul(act(matmul(x[:, None, None], w1[index])), w2[index]);  out = (y[:, :, 0] * weights[..., None]).sum(1)

After:  rows, counts, perm, order = permute(x, index);  y = grouped_mm(act(grouped_mm(rows, w1, counts)), w2, counts)
        out = unpermute(y, perm, order, weights)

where index is the user's own for gathered weights, every expert for dense ones, and for one-hot dispatch the experts of
each token's places. A token that was dropped is a row with weight 0: which ones are dropped stays the user's code.
The body is carried over op by op, with one leading dim of rows; an op that mixes rows leaves the block as written.
"""

from __future__ import annotations

import math
import operator
import string
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tedcompile import graphs
from tedcompile.capture import module_path, source_line
from tedcompile.layouts import aten, shape
from tedcompile.ops import ops
from tedcompile.passes.merge_experts import DIMS, SAME, Differs
from tedcompile.passes.recognise_sorted import combine

PRODUCTS = {aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.einsum.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
            aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int}  # fmt: skip
COPIES = RESHAPES | {aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.clone.default,
                     aten.contiguous.default, aten.transpose.int, aten.permute.default}  # fmt: skip


def run(gm: GraphModule, ctx) -> None:
    if not any(n.target in PRODUCTS and _weight(n) for n in gm.graph.nodes):
        return
    _fold_einsums(gm.graph)
    tried: set[Node] = set()
    while True:
        node = next((n for n in gm.graph.nodes if n.target in PRODUCTS and n not in tried and _weight(n)), None)
        if node is None:
            return
        tried.add(node)
        try:
            _rewrite(gm, ctx, node)
        except Differs as error:
            at = source_line(node) or module_path(node)
            ctx.replicated.append((node, f"the product at {at} is not one of experts and tokens: {error}"))
            ctx.unfit.append(str(error))
            tried |= {n for n in gm.graph.nodes if n.target in PRODUCTS and module_path(n) == module_path(node)}
        graphs.erase_unused(gm.graph)


def _rewrite(gm: GraphModule, ctx, node: Node) -> None:
    weight, index = _weight(node)  # type: ignore[misc]
    after, reached = [], {node}
    for n in gm.graph.nodes:
        if reached.intersection(n.all_input_nodes):
            reached.add(n)
            after.append(n)
    problem = "nothing sums what its experts make of each token"
    ends: list[tuple[Node, Any]] = [
        (end, style) for end in after for style in ((_Gathered,) if index is not None else (_OneHot, _Chosen, _Dense))
    ]
    if index is None:
        ends += [(end, _Places) for end in reversed(after)]
    for end, style in ends:
        block = style(gm, ctx, node, weight, index)
        if not block.ends(end):
            continue
        before = list(gm.graph.nodes)
        try:
            with gm.graph.inserting_before(end):
                block.prepare()
                out = block.leave(end)
                if shape(out) != shape(end):
                    out = block.add(aten.reshape.default, (out, list(shape(end))))
            if out.meta["val"].dtype != end.meta["val"].dtype:
                raise Differs("its sum has another dtype")
            if ctx.prove and (reason := ctx.prove([node, end, *block.own], block.experts)):
                raise Differs(reason)
        except Differs as error:
            if style is not _Places or "proof" in str(error):
                problem = f"as {style.style}: {error}"
            known = set(before)
            for n in reversed(gm.graph.nodes):
                if n not in known:
                    gm.graph.erase_node(n)
            continue
        end.replace_all_uses_with(out)
        return
    raise Differs(problem)


def _weight(node: Node) -> tuple[Node, Node | None] | None:
    """The experts' weight (E, ., .) of a product, and the index by which it is gathered."""
    for a in _operands(node):
        if not isinstance(a, Node) or not isinstance(a.meta.get("val"), torch.Tensor):
            continue
        if a.meta.get("weights_only") and len(shape(a)) == 3:
            return a, None
        if (found := _gathered(a)) and len(shape(found[0])) == 3:
            return found
    return None


def _operands(node: Node) -> list[Node]:
    return list(node.args[1]) if node.target is aten.einsum.default else list(node.args)


def _gathered(a: Node) -> tuple[Node, Node] | None:
    """(parameter, index) of `parameter[index]`, also transposed behind it."""
    if a.target is aten.index.Tensor and a.args[0].meta.get("weights_only") and len(a.args[1]) == 1:
        (index,) = a.args[1]
        return None if index is None or index.meta["val"].dtype == torch.bool else (a.args[0], index)
    if a.target is aten.index_select.default and a.args[0].meta.get("weights_only") and a.args[1] == 0:
        return a.args[0], a.args[2]
    return None


def _fold_einsums(graph) -> None:
    """Products of three or more operands two by two, from the left; dots become letters."""
    for node in list(graph.nodes):
        if node.target is not aten.einsum.default:
            continue
        if "..." in node.args[0]:
            inputs = node.args[0].replace(" ", "").partition("->")[0].split(",")
            dots = {len(shape(a)) - len(i) + 3 for i, a in zip(inputs, node.args[1]) if "..." in i}
            if len(dots) == 1:
                free = [c for c in string.ascii_letters if c not in node.args[0]]
                node.args = (node.args[0].replace("...", "".join(free[: dots.pop()])), *node.args[1:])
        if len(node.args[1]) < 3:
            continue
        if "->" not in node.args[0] or "." in node.args[0]:
            continue
        inputs, out = node.args[0].replace(" ", "").split("->")
        letters, values = inputs.split(","), list(node.args[1])
        with graph.inserting_before(node):
            while len(values) > 2:
                rest = set(out).union(*letters[2:])
                kept = "".join(dict.fromkeys(c for c in letters[0] + letters[1] if c in rest))
                equation = f"{letters[0]},{letters[1]}->{kept}"
                made = graphs.call(graph, aten.einsum.default, (equation, values[:2]), node)
                letters, values = [kept, *letters[2:]], [made, *values[2:]]
        node.args = (f"{','.join(letters)}->{out}", values)


class _Block:
    """The body between the tokens and what leaves, made anew over rows (N, ...) by `rows_of`."""

    def __init__(self, gm: GraphModule, ctx, node: Node, weight: Node, index: Node | None):
        self.gm, self.ctx, self.node, self.index = gm, ctx, node, index
        self.experts = shape(weight)[0]
        self.done: dict[Node, Node] = {}
        self.own: list[Node] = []
        self.number = 0  # of the user's places: leading dims have this product
        self.like = node

    def add(self, target, args) -> Node:
        if target is aten.reshape.default and list(args[1]) == list(shape(args[0])):
            return args[0]  # rows that are viewed as they are would be gathered over tp for it
        return graphs.call(self.gm.graph, target, args, self.like)

    def dispatch(self, x: Node, index: Node) -> None:
        if len(shape(x)) != 2:
            x = self.add(aten.reshape.default, (x, [-1, shape(x)[-1]]))
        made = self.add(ops.permute.default, (x, index, self.experts))
        self.rows, self.counts, self.perm, self.order = (self.add(operator.getitem, (made, i)) for i in range(4))
        self.back = self.add(aten.reshape.default, (self.perm, [-1]))

    def rest(self, n: Node) -> list[int]:
        """The sizes of a value behind its leading dims, which are the places."""
        product, size = 1, list(shape(n))
        for i, s in enumerate(size):
            if product == self.number:
                return size[i:]
            product *= s
        if product == self.number:
            return []
        raise Differs(f"{n.name} has no dims of tokens and experts in front", n)

    def inside(self, n: Node) -> bool:
        """Whether a value is made of what enters."""
        pending, seen = [n], set()
        while pending:
            a = pending.pop()
            if a in self.entries or a in self.done or (a.target in PRODUCTS and _weight(a)):
                return True
            if a not in seen and not a.meta.get("weights_only") and a is not self.x:
                seen.add(a)
                pending.extend(a.all_input_nodes)
        return False

    x: Node
    entries: set[Node]
    style: str

    def rows_of(self, n: Node) -> Node:
        if n not in self.done:
            self.done[n] = self.convert(n)
        return self.done[n]

    def convert(self, n: Node) -> Node:
        target = n.target
        if n.op != "call_function":
            raise Differs(f"{n.name} is not made of tokens", n)
        if target in PRODUCTS:
            return self.product(n)
        if target in (*RESHAPES, aten.transpose.int, aten.expand.default):
            x = self.rows_of(n.args[0])
            if target is aten.transpose.int and not self.transposes_places(n):
                raise Differs(f"{n.name} moves the dims of rows", n)
            return self.add(aten.reshape.default, (x, [shape(x)[0], *self.rest(n)]))
        if target in DIMS and len(n.args) > max(DIMS[target]) and not isinstance(n.args[0], (list, tuple)):
            dims = [n.args[p] for p in DIMS[target]]
            flat = [d for each in dims for d in (each if isinstance(each, (list, tuple)) else [each])]
            size = len(shape(n.args[0]))
            if any(d % size < size - len(self.rest(n.args[0])) for d in flat):
                raise Differs(f"{n.name} mixes tokens or experts", n)
            args = list(n.args)
            args[0] = self.rows_of(n.args[0])
            for p in DIMS[target]:
                d = args[p]
                args[p] = [i % size - size for i in d] if isinstance(d, (list, tuple)) else d % size - size
            return self.add(target, tuple(args))
        pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
        if not pointwise and target not in SAME:
            raise Differs(f"{target} of rows has no form over the rows of all experts", n)
        rest = self.rest(n) if target is not operator.getitem else []
        made = tuple(self.operand(a, len(rest), shape(n)) if isinstance(a, Node) and pointwise
                     else self.rows_of(a) if isinstance(a, Node) else a for a in n.args)  # fmt: skip
        new = self.gm.graph.call_function(target, made, dict(n.kwargs))
        new.meta = {k: n.meta[k] for k in graphs.KEPT if k in n.meta}
        new.meta["val"] = graphs.value_of(new)
        graphs.set_facts(new)
        return new

    def transposes_places(self, n: Node) -> bool:
        size = len(shape(n))
        return all(d % size < size - len(self.rest(n)) for d in n.args[1:3])

    def operand(self, a: Node, rest: int, whole: tuple) -> Node:
        """An operand of a pointwise op, against rows (N, *rest)."""
        if self.inside(a):
            return self.rows_of(a)
        if found := self.expert_of(a):
            parameter, tail = found
            x = self.add(ops.per_expert.default, (parameter, self.counts, self.rows))
        elif len(shape(a)) <= rest:
            return a  # broadcasts along the features
        else:
            x = self.foreign(a, whole)
            tail = list(shape(x))[1:]
        return self.add(
            aten.reshape.default,
            (x, [shape(x)[0], *[1] * (rest - len(tail)), *tail[len(tail) - rest if len(tail) > rest else 0 :]]),
        )

    def expert_of(self, a: Node) -> tuple[Node, list[int]] | None:
        """A per-expert value: the parameter (E, ...) and its sizes behind the experts."""
        raise NotImplementedError

    def foreign(self, a: Node, whole: tuple) -> Node:
        """A value of each place, as a value of each row."""
        raise Differs(f"{a.name} joins values of its own to the rows", a)

    def product(self, n: Node) -> Node:
        a, b, bias = self.product_operands(n)
        x = self.entry(a, n) if a not in self.done and not self.inside(a) else self.rows_of(a)
        if len(shape(x)) != 2:
            x = self.add(aten.reshape.default, (x, [shape(x)[0], math.prod(shape(x)[1:])]))
        y = self.add(ops.grouped_mm.default, (x, b, self.counts))
        if len(self.rest(n)) != 1:
            y = self.add(aten.reshape.default, (y, [shape(y)[0], *self.rest(n)]))
        if bias is not None:
            y = self.add(aten.add.Tensor, (y, self.operand(bias, len(self.rest(n)), shape(n))))
        return y

    def entry(self, a: Node, n: Node) -> Node:
        raise Differs(f"{n.name} is a product of something that is no tokens", n)

    def product_operands(self, n: Node) -> tuple[Node, Node, Node | None]:
        """(rows, weight (E, in, out), bias)."""
        bias = None
        if n.target is aten.einsum.default:
            equation = n.args[0].replace(" ", "")
            inputs, out = equation.split("->") if "->" in equation else ("", "")
            letters = inputs.split(",")
            if len(letters) != 2 or "." in equation:
                raise Differs(f"{n.name} is an einsum of another form", n)
            pairs = list(zip(letters, n.args[1]))
            found = [i for i, (_, a) in enumerate(pairs) if self.weight_of(a) is not None]
            if len(found) != 1:
                raise Differs(f"{n.name} has no weight of experts", n)
            (wl, w), (xl, x) = pairs[found[0]], pairs[1 - found[0]]
            weight = self.weight_of(w)
            inner = [c for c in wl[-2:] if c in xl and c not in out]
            outer = [c for c in wl[-2:] if c not in xl and c in out]
            if len(inner) != 1 or len(outer) != 1 or out[-1] != outer[0] or xl[-1] != inner[0]:
                raise Differs(f"{n.name} is an einsum of another form", n)
            if wl.index(inner[0]) > wl.index(outer[0]):
                weight = self.add(aten.transpose.int, (weight, 1, 2))
            return x, weight, bias
        if n.target is aten.baddbmm.default:
            bias, x, w = n.args
            if n.kwargs:
                raise Differs(f"{n.name} scales its operands", n)
        else:
            x, w = n.args
        weight = self.weight_of(w)
        if weight is None:
            raise Differs(f"{n.name} has no weight of experts", n)
        return x, weight, bias

    def weight_of(self, w: Node) -> Node | None:
        return w if w.meta.get("weights_only") and len(shape(w)) == 3 and shape(w)[0] == self.experts else None

    def scaled(self, y: Node) -> Node:
        return combine(self.add, y, self.perm, self.order)


def _source(a: Node) -> Node:
    """What a value copies, through views and repeats."""
    while a.target in COPIES:
        a = a.args[0]
    return a


def _is_copy(value: Node, source: Node, want) -> bool:
    """Whether a value holds source's token `want(places)` at each of its places."""
    ids = torch.arange(math.prod(shape(source)[:-1]), dtype=torch.float64)
    given = {source: ids.reshape(*shape(source)[:-1], 1).expand(shape(source))}
    try:
        got = graphs.evaluate(value, given)
    except (graphs.Unknown, RuntimeError, IndexError):
        return False
    flat = got.reshape(-1, shape(value)[-1])
    return flat.shape[0] == want.numel() and bool((flat == want.reshape(-1, 1)).all())


class _Gathered(_Block):
    """Places are slots (T, K) or (T*K): weights[index]."""

    style = "weights gathered for each slot"

    def prepare(self) -> None:
        assert self.index is not None
        self.entries = set()
        self.slots = math.prod(shape(self.index))
        self.number = self.slots
        flat = self.index
        if flat.target in RESHAPES and len(shape(flat)) == 1 and len(shape(flat.args[0])) == 2:
            flat = flat.args[0]
        self.k = shape(flat)[-1] if len(shape(flat)) > 1 else 1
        self.tokens = self.slots // self.k
        x = _source(self.product_operands(self.node)[0])
        if math.prod(shape(x)[:-1]) != self.tokens:
            raise Differs(f"{x.name} is not the tokens", x)
        self.x = x
        self.own = [self.index, x]
        self.dispatch(x, self.add(aten.reshape.default, (flat, [self.tokens, self.k])))

    def entry(self, a: Node, n: Node) -> Node:
        slots = torch.arange(self.slots) // self.k
        if _source(a) is self.x and (_is_copy(a, self.x, slots) or _is_copy(a, self.x, torch.arange(self.tokens))):
            return self.rows
        raise Differs(f"{a.name} is not the token of each slot", a)

    def same_index(self, index: Node) -> bool:
        return index is self.index or _source(index) is _source(self.index)  # type: ignore[arg-type]

    def weight_of(self, w: Node) -> Node | None:
        transposed = w.target is aten.transpose.int and {d % len(shape(w)) for d in w.args[1:3]} == {
            len(shape(w)) - 1,
            len(shape(w)) - 2,
        }
        found = _gathered(w.args[0] if transposed else w)
        if found is None or not self.same_index(found[1]) or len(shape(found[0])) != 3:
            return None
        return self.add(aten.transpose.int, (found[0], 1, 2)) if transposed else found[0]

    def expert_of(self, a: Node) -> tuple[Node, list[int]] | None:
        tail = None
        while a.target in RESHAPES:
            tail = self.rest(a) if tail is None else tail
            a = a.args[0]
        found = _gathered(a)
        if found is None or not self.same_index(found[1]):
            return None
        return found[0], tail if tail is not None else list(shape(found[0]))[1:]

    def foreign(self, a: Node, whole: tuple) -> Node:
        rest = self.rest(a)
        slots = self.add(aten.reshape.default, (a, [self.slots, *rest]))
        return self.add(ops.take.default, (slots, self.order, self.back))

    def ends(self, n: Node) -> bool:
        if n.target is aten.einsum.default:
            return bool(self.summed(n))
        return n.target is aten.sum.dim_IntList and len(shape(n.args[0])) >= 3 and list(n.args[1]) in ([1], [-2])

    def summed(self, n: Node):
        """(rows, weights with the slots last or first, which of both) of "tkh,tk->th", with any dims of tokens."""
        equation = n.args[0].replace(" ", "")
        if "->" not in equation or len(n.args[1]) != 2:
            return None
        inputs, out = equation.split("->")
        letters = inputs.split(",")
        for i in (0, 1):
            of_rows, of_weights = letters[i], letters[1 - i]
            slot = set(of_rows) - set(out)
            if len(slot) == 1 and out and out == of_rows.replace(k := slot.pop(), "") and out[-1] == of_rows[-1]:
                for last in (True, False):
                    if of_weights == (out[:-1] + k if last else k + out[:-1]):
                        return n.args[1][i], n.args[1][1 - i], last
        return None

    def leave(self, n: Node) -> Node:
        if n.target is aten.einsum.default:
            x, w, last = self.summed(n)
            if math.prod(shape(w)) != self.slots:
                raise Differs(f"{n.name} sums other dims than the slots of a token", n)
            y = self.rows_of(x)
            w = self.add(aten.reshape.default, (w, [self.tokens, self.k] if last else [self.k, self.tokens]))
            w = w if last else self.add(aten.transpose.int, (w, 0, 1))
            return self.add(ops.unpermute.default, (y, self.perm, self.order, w))
        size = shape(n.args[0])
        if size[0] * size[1] != self.slots or size[1] != self.k:
            raise Differs(f"{n.name} sums other dims than the slots of a token", n)
        y = self.rows_of(n.args[0])
        return self.scaled(y if len(shape(y)) == 2 else self.add(aten.reshape.default, (y, [shape(y)[0], -1])))


class _Dense(_Gathered):
    """Places are (E, T) or (T, E): every expert on every token."""

    style = "every expert on every token"

    def prepare(self) -> None:
        self.entries = set()
        x = _source(self.product_operands(self.node)[0])
        self.scale = None
        if x.target is aten.mul.Tensor:  # scores before the experts
            inner = [a for a in x.args if isinstance(a, Node) and _source(a) is not a]
            x = next(
                (_source(a) for a in inner if shape(_source(a))[-1] == shape(x)[-1] and len(shape(_source(a))) > 1), x
            )
        self.x = x
        self.tokens = math.prod(shape(x)[:-1])
        self.number = self.tokens * self.experts
        if self.tokens == self.experts:
            raise Differs(f"{self.tokens} tokens are as many as experts, and cannot be told from them")
        self.own = [x]
        self.index = self.choose()
        self.k = shape(self.index)[1]
        self.slots = self.tokens * self.k
        self.dispatch(x, self.index)
        self.entries = {n for n in self.gm.graph.nodes if n.target in COPIES and _source(n) is x and self.copies(n)}

    def choose(self) -> Node:
        """The experts (T, k) whose results count."""
        val = self.node.meta["val"].new_empty((self.experts,), dtype=torch.int64)
        each = graphs.call(self.gm.graph, aten.arange.default, (self.experts,), self.like, val)
        each = self.add(aten.expand.default, (self.add(aten.unsqueeze.default, (each, 0)), [self.tokens, -1]))
        return self.add(aten.contiguous.default, (each,))

    def copies(self, n: Node) -> bool:
        """A value (E, T, H) or (E*T, H) that holds every token for every expert."""
        size = shape(n)
        return (
            size[-1] == shape(self.x)[-1]
            and math.prod(size[:-1]) == self.number
            and _is_copy(n, self.x, torch.arange(self.tokens).repeat(self.experts))
        )

    def convert(self, n: Node) -> Node:
        return self.rows if n in self.entries else super().convert(n)

    def entry(self, a: Node, n: Node) -> Node:
        if (
            a in self.entries
            or a is self.x
            or (_source(a) is self.x and _is_copy(a, self.x, torch.arange(self.tokens)))
        ):
            return self.rows
        raise Differs(f"{a.name} is not every token for every expert", a)

    weight_of = _Block.weight_of

    def expert_of(self, a: Node) -> tuple[Node, list[int]] | None:
        if not a.meta.get("weights_only"):
            return None
        size = list(shape(a))
        at = next((i for i, s in enumerate(size) if s != 1), None)
        if at is None or size[at] != self.experts or at > 1:
            return None
        tail = size[at + 1 :]
        while len(tail) > 1 and tail[0] == 1:
            tail = tail[1:]
        while a.target in (*RESHAPES, aten.select.int) and a.args[0].meta["val"].numel() == a.meta["val"].numel():
            a = a.args[0]
        return (a, tail) if shape(a)[0] == self.experts else None

    def foreign(self, a: Node, whole: tuple) -> Node:
        size, rest = list(shape(a)), self.rest(a)
        lead = size[: len(size) - len(rest)]
        if lead[:1] in ([self.experts], [self.number]):
            slots = self.add(aten.reshape.default, (a, [self.experts, self.tokens, *rest]))
            slots = self.add(aten.transpose.int, (slots, 0, 1))
        elif lead[-1:] == [self.experts]:
            slots = self.add(aten.reshape.default, (a, [self.tokens, self.experts, *rest]))
        else:
            raise Differs(f"{a.name} is no value of each token and expert", a)
        slots = self.chosen(slots, rest)
        slots = self.add(aten.reshape.default, (slots, [self.slots, *rest]))
        return self.add(ops.take.default, (slots, self.order, self.back))

    def chosen(self, table: Node, rest: list[int]) -> Node:
        """Of a value (T, E, ...), the entries of the experts that count."""
        return table

    def ends(self, n: Node) -> bool:
        if n.target is aten.einsum.default:
            return bool(self.summed(n))
        if n.target in (aten.bmm.default, aten.matmul.default):  # scores (T, 1, E) and results (T, E, H)
            a, b = (shape(a) if isinstance(a, Node) else () for a in n.args)
            return len(a) == len(b) == 3 and a[1] == 1 and a[2] == b[1] == self.experts
        return n.target is aten.sum.dim_IntList and len(shape(n.args[0])) >= 3 and len(n.args[1]) == 1

    def leave(self, n: Node) -> Node:
        if n.target in (aten.bmm.default, aten.matmul.default):
            w, y = n.args
            if self.inside(w) or not self.inside(y) or shape(y)[0] != self.tokens:
                raise Differs(f"{n.name} is no weighted sum over the experts", n)
            w = self.add(aten.reshape.default, (w, [self.tokens, self.experts]))
            return self.add(ops.unpermute.default, (self.rows_of(y), self.perm, self.order, w))
        if n.target is aten.einsum.default:
            return super().leave(n)
        size = shape(n.args[0])
        dim = n.args[1][0] % len(size)
        if dim not in (0, len(size) - 2) or size[dim] != self.experts or math.prod(size[:-1]) != self.number:
            raise Differs(f"{n.name} sums other dims than the experts", n)
        return self.scaled(self.rows_of(n.args[0]))


class _Chosen(_Dense):
    """Every expert on every token, and then the results of some: only those are computed."""

    style = "every expert on every token, some results of which are chosen"

    def ends(self, n: Node) -> bool:
        if n.target is aten.gather.default and n.args[1] == 1 and len(shape(n.args[0])) == 3:
            index = n.args[2]
            while index.target in COPIES:
                index = index.args[0]
            self.picked, self.places = index, n.args[2]
            return shape(n)[2] == shape(n.args[0])[2] and math.prod(shape(index)) == math.prod(shape(n)[:2])
        return False

    def choose(self) -> Node:
        index = self.add(aten.reshape.default, (self.picked, [self.tokens, -1]))
        ids = torch.arange(math.prod(shape(self.picked)))
        spread = graphs.evaluate(self.places, {self.picked: ids.reshape(shape(self.picked))})
        if not torch.equal(spread, ids.reshape(self.tokens, -1, 1).expand(spread.shape)):
            raise Differs(f"{self.places.name} is no choice of experts for each token")
        return index

    def chosen(self, table: Node, rest: list[int]) -> Node:
        spread = self.add(aten.reshape.default, (self.index, [*shape(self.index), *[1] * len(rest)]))
        return self.add(aten.gather.default, (table, 1, self.add(aten.expand.default, (spread, [-1, -1, *rest]))))

    def leave(self, n: Node) -> Node:
        if shape(n.args[0])[:2] != (self.tokens, self.experts) or not self.inside(n.args[0]):
            raise Differs(f"{n.name} chooses from something else", n)
        return self.add(ops.take.default, (self.rows_of(n.args[0]), self.back, self.order))


class _OneHot(_Dense):
    """Places are (E, C): a token in each, or none."""

    style = "one-hot dispatch"

    def prepare(self) -> None:
        self.entries = set()
        entering = self.product_operands(self.node)[0]
        while entering.target in RESHAPES:
            entering = entering.args[0]
        dispatch, x = self.tokens_by(entering)
        self.x, self.tokens = x, math.prod(shape(x)[:-1])
        (self.capacity,) = {shape(self.product_operands(self.node)[0])[1]}
        E, C = self.experts, self.capacity
        self.number = self.slots = E * C
        self.hot = self.add(aten.reshape.default, (dispatch, [self.tokens, E, C]))
        self.k = _most(dispatch, self.tokens, E, C)
        self.own = [x, dispatch, entering]
        self.entering = entering
        hits = self.add(aten.sum.dim_IntList, (self.hot, [2]))
        best = self.add(aten.topk.default, (self.add(aten.detach.default, (hits,)), self.k))
        self.index = self.add(operator.getitem, (best, 1))
        self.dispatch(x, self.index)
        self.entries = {entering}

    def convert(self, n: Node) -> Node:
        return self.rows if n is self.entering else _Block.convert(self, n)

    def entry(self, a: Node, n: Node) -> Node:
        return self.rows_of(a)

    def foreign(self, a: Node, whole: tuple) -> Node:
        return _Block.foreign(self, a, whole)

    def tokens_by(self, n: Node) -> tuple[Node, Node]:
        """(dispatch, x) of a product that puts tokens into places: "tec,th->ech", or its matrix form."""
        if n.target is aten.einsum.default and len(n.args[1]) == 2:
            equation = n.args[0].replace(" ", "")
            letters, out = equation.split("->")[0].split(","), equation.split("->")[-1]
            for i in (0, 1):
                d, t = letters[i], letters[1 - i]
                if len(d) == 3 and len(t) == 2 and d[0] == t[0] and out == d[1:] + t[1]:
                    return n.args[1][i], n.args[1][1 - i]
        if n.target in (aten.matmul.default, aten.mm.default):
            a, x = n.args
            transposed = a.target is aten.t.default or (
                a.target is aten.transpose.int and {d % 2 for d in a.args[1:3]} == {0, 1}
            )
            if transposed and len(shape(x)) == 2:
                return a.args[0], x
        raise Differs(f"{n.name} does not put tokens into places of experts", n)

    def ends(self, n: Node) -> bool:
        if n.target is aten.einsum.default and len(n.args[1]) == 2:
            equation = n.args[0].replace(" ", "")
            letters, out = equation.split("->")[0].split(","), equation.split("->")[-1]
            return any(len(letters[i]) == 3 and letters[1 - i] == letters[i][1:] + out[-1] and out[0] == letters[i][0]
                       for i in (0, 1))  # fmt: skip
        return n.target in (aten.matmul.default, aten.mm.default) and all(
            isinstance(a, Node) and len(shape(a)) == 2 for a in n.args
        )

    def leave(self, n: Node) -> Node:
        if n.target is aten.einsum.default:
            letters = n.args[0].replace(" ", "").split("->")[0].split(",")
            combine, y = n.args[1] if len(letters[0]) == 3 and letters[1][:2] == letters[0][1:] else n.args[1][::-1]
        else:
            combine, y = n.args
        E, C = self.experts, self.capacity
        if math.prod(shape(combine)) != self.tokens * E * C or not self.inside(y):
            raise Differs(f"{n.name} combines other places", n)
        table = self.add(aten.reshape.default, (combine, [self.tokens, E, C]))
        table = self.add(aten.sum.dim_IntList, (table, [2]))
        weights = self.add(aten.gather.default, (table, 1, self.index))
        return self.add(ops.unpermute.default, (self.rows_of(y), self.perm, self.order, weights))


class _Places(_Block):
    """Places (E, C) that are filled in any way: their rows go to the experts and come back as they are."""

    style = "places of a capacity"

    def prepare(self) -> None:
        x = self.product_operands(self.node)[0]
        if len(shape(x)) < 3 or shape(x)[0] != self.experts or not all(isinstance(s, int) for s in shape(x)):
            raise Differs(f"{x.name} is no value of each expert's places", x)
        if x.meta.get("weights_only"):
            raise Differs(f"{x.name} is a weight", x)
        self.x, self.entries = x, {x}
        self.number = math.prod(shape(x)[:-1])
        self.own = [x]
        val = x.meta["val"].new_empty((self.number,), dtype=torch.int64)
        place = graphs.call(self.gm.graph, aten.arange.default, (self.number,), self.like, val)
        expert = self.add(aten.floor_divide.default, (place, self.number // self.experts))
        self.dispatch(x, self.add(aten.unsqueeze.default, (expert, 1)))

    def convert(self, n: Node) -> Node:
        return self.rows if n is self.x else super().convert(n)

    def entry(self, a: Node, n: Node) -> Node:
        if a is self.x:
            return self.rows
        raise Differs(f"{a.name} is another value than that of the places", a)

    weight_of = _Block.weight_of
    expert_of = _Dense.expert_of

    def ends(self, n: Node) -> bool:
        """The last product of at least two, and the bias behind it."""
        value = n.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() < 3 or shape(n)[:-1] != shape(self.node)[:-1]:
            return False
        last = n
        if n.target is aten.add.Tensor:
            made = [a for a in n.all_input_nodes if not a.meta.get("weights_only")]
            last = made[0] if len(made) == 1 else n
        return last is not self.node and last.target in PRODUCTS and _weight(last) is not None

    def leave(self, n: Node) -> Node:
        return self.add(ops.take.default, (self.rows_of(n), self.back, self.order))


def _most(dispatch: Node, tokens: int, experts: int, capacity: int) -> int:
    """In how many places a token is at most, on random routers."""
    most = 1
    for seed in range(3):
        values: dict[Node, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        seen: set[Node] = set()

        def guess(n: Node) -> None:
            if n in seen:  # noqa: B023
                return
            seen.add(n)  # noqa: B023
            value = n.meta.get("val")
            cut = n.op == "placeholder" or n.target in (aten.linear.default, aten.mm.default, aten.matmul.default)
            cut = cut or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
            if cut and isinstance(value, torch.Tensor):
                size = tuple(value.shape)
                values[n] = (  # noqa: B023
                    torch.randn(size, generator=generator, dtype=value.dtype)  # noqa: B023
                    if value.is_floating_point()
                    else torch.randint(experts, size, generator=generator)  # noqa: B023
                )
                return
            for a in n.all_input_nodes:
                guess(a)

        guess(dispatch)
        try:
            made = graphs.evaluate(dispatch, values)
        except (graphs.Unknown, RuntimeError, IndexError) as error:
            raise Differs(f"its places could not be tried ({error})") from None
        most = max(most, int((made.reshape(tokens, -1) != 0).sum(1).max()))
    if most > experts:
        raise Differs("a token is in more places than there are experts")
    return most
