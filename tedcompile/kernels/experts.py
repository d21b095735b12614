"""The experts' ops of `tedcompile.ops` from the kernels: the same arguments and results as the references there."""

from __future__ import annotations

import torch
from torch import Tensor

from tedcompile.kernels import combine, grouped
from tedcompile.kernels.configs import Config, choose
from tedcompile.kernels.routing import Plan, route

ops = torch.ops.ted


# from this width on, a copy of the rows costs less than reading them one by one in every tile: on an H200 products of
# rows for each expert run at 530 TFLOP/s while gathering and at 700 from a copy, which takes the time of 4 bytes moved
# for each element of it
GATHERED_WIDTH = 1280


class Plans:
    """The plans of one op call, by tile height."""

    def __init__(self, counts: Tensor, rows: int):
        self.counts, self.rows, self.made = counts, rows, dict[int, Plan]()

    def __getitem__(self, config: Config) -> Plan:
        if config.m not in self.made:
            self.made[config.m] = Plan(self.counts, self.rows, config.m)
        return self.made[config.m]

    def config(self, kind: str, width: int, depth: int, dtype: torch.dtype) -> Config:
        return choose(kind, self.rows // max(1, self.counts.shape[0]), width, depth, dtype)


def rows_mm(a: Tensor, weight: Tensor, plans: Plans, end: str = "none", **options) -> tuple[Tensor, ...]:
    width = weight.shape[2] // (2 if end == "gate" else 1)
    config = plans.config(end, width, weight.shape[1], a.dtype)
    return grouped.rows_mm(a, weight, plans[config], config, rows=plans.rows, end=end, **options)


def outer(a: Tensor, b: Tensor, plans: Plans, dtype: torch.dtype, **options) -> Tensor:
    config = plans.config("outer" if options else "outer_rows", b.shape[1], plans.rows, a.dtype)
    plan = next(iter(plans.made.values()), None) or plans[config]
    return grouped.outer(a, b, plan, config, dtype, **options)


def limit(plans: Plans) -> Tensor:
    """The number of rows that have an expert, an int32 tensor of one element."""
    return next(iter(plans.made.values())).offsets[-1:]  # of any: rows_mm has made one


def tokens(order: Tensor, k: int) -> Tensor:
    """The token of each row, as kernels read it."""
    return torch.div(order, k, rounding_mode="floor", out=order.new_empty(order.shape, dtype=torch.int32))


def gated_experts(x, weights, counts, perm, order, up, down, act, dtype):
    plans = Plans(counts, order.shape[0])
    h, pre = rows_mm(x, up, plans, "gate", act=act, source=tokens(order, perm.shape[1]))
    (y,) = rows_mm(h, down, plans)
    return combine.gather_sum(y, perm, limit(plans), weights, dtype), pre


def gated_vjp(g, weights, counts, perm, order, down, pre, act):
    plans = Plans(counts, order.shape[0])
    h, grad_pre, parts = rows_mm(
        g, down.transpose(1, 2), plans, "gate_vjp", act=act, source=tokens(order, perm.shape[1]), pre=pre, order=order,
        weights=weights.contiguous(),
    )  # fmt: skip
    return grad_pre, h, combine.slot_sums(parts, perm, limit(plans), weights.dtype)


def gated_vjp_x(grad_pre, counts, perm, up):
    plans = Plans(counts, grad_pre.shape[0])
    (rows,) = rows_mm(grad_pre, up.transpose(1, 2), plans)
    return combine.gather_sum(rows, perm, limit(plans), None, rows.dtype)


def tokens_outer(x, rows, counts, order, k, transposed):
    source = tokens(order, k)
    if rows.shape[1] >= GATHERED_WIDTH:
        x, rows = x[source], rows.contiguous()
        if transposed:
            return ops.grouped_outer(rows, x, counts).transpose(1, 2)
        return ops.grouped_outer(x, rows, counts)
    plans = Plans(counts, order.shape[0])
    if transposed:
        return outer(rows, x, plans, x.dtype, b_source=source).transpose(1, 2)
    return outer(x, rows, plans, x.dtype, a_source=source)


def permute(x, index, experts):
    counts, perm, order = route(index, experts)
    return x[order // index.shape[1]], counts, perm, order


def gather_sum(rows, perm, order):
    return combine.gather_sum(rows, perm, None, None, rows.dtype)


def unpermute(rows, perm, order, weights):
    return combine.gather_sum(rows, perm, None, weights, torch.promote_types(rows.dtype, weights.dtype))


def grouped_mm(rows, weight, counts):
    return rows_mm(rows, weight, Plans(counts, rows.shape[0]))[0]


def grouped_outer(rows, g, counts):
    return outer(rows, g, Plans(counts, rows.shape[0]), rows.dtype)
