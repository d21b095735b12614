"""What a captured graph says of the user's program, and the sentences for programs that no graph can hold."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tedcompile.capture import bind, capture, module_path, source_line
from tedcompile.layouts import aten
from tedcompile.ops import ops


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return F.gelu(self.linear(x)) + self.shift


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.tied = Inner(), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.linear.weight

    def forward(self, x, scale=None):
        return {"loss": self.tied(self.inner(x)).sum(), "nothing": None, "pair": (x, x * 2)}


def test_roles_paths_and_lines():
    model = Outer()
    captured = capture(model, dict(x=torch.zeros(3, 4)))
    roles = {n.meta["role"] for n in captured.gm.graph.nodes if n.op == "placeholder"}
    assert ("parameter", "inner.linear.bias") in roles and ("buffer", "inner.shift") in roles and ("input", 0) in roles
    (gelu,) = (n for n in captured.gm.graph.nodes if n.target is aten.gelu.default)
    assert module_path(gelu) == "inner"
    assert source_line(gelu).startswith("test_capture.py:") and "F.gelu(self.linear(x))" in source_line(gelu)
    assert captured.out_spec.num_leaves == 4


def test_the_model_is_left_as_it_was():
    model = Outer()
    before = {n: (id(t), t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    capture(model, dict(x=torch.zeros(3, 4)))
    for n, t in (*model.named_parameters(), *model.named_buffers()):
        assert id(t) == before[n][0] and torch.equal(t, before[n][1])
    assert model.tied.weight is model.inner.linear.weight


def test_also_after_a_failure():
    class Broken(Inner):
        def forward(self, x):
            raise RuntimeError("no")

    model = Broken()
    weight = model.linear.weight
    with pytest.raises(ValueError, match=r"Broken cannot be captured: .*test_capture.py:\d+ .*RuntimeError: no"):
        capture(model, dict(x=torch.zeros(3, 4)))
    assert model.linear.weight is weight and type(weight) is nn.Parameter


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Item(nn.Module):
    def forward(self, x):
        return torch.zeros(int(x[0, 0].item()) + 1).sum() + x.sum() if float(x.sum()) > 1 else x.sum()


@pytest.mark.parametrize("model", [Branch(), Item()], ids=["branch", "item"])
def test_data_dependent_control_flow_names_the_line(model, capfd):
    with pytest.raises(ValueError, match=r"test_capture.py:\d+ .*depends on the values of tensors; use torch.where"):
        capture(model, dict(x=torch.ones(3, 4)))
    assert not capfd.readouterr().err  # one sentence, not torch's graph


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = x * self.w
        with torch.no_grad():
            scale = h.abs().amax()
            with torch.enable_grad():
                pass
        return (h / scale).sum()


def test_no_grad_is_inlined_as_detach():
    model, x = NoGrad(), torch.arange(1.0, 13).view(3, 4)
    gm = capture(model, dict(x=x)).gm
    assert all(n.op in ("placeholder", "call_function", "output") for n in gm.graph.nodes)
    assert not any("wrap_with" in str(n.target) for n in gm.graph.nodes)
    (loss,) = gm(*(model.w if n.meta["role"][0] == "parameter" else x for n in gm.graph.nodes if n.op == "placeholder"))
    want = model(x)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, model.w)[0] for y in (loss, want)))


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            return F.gelu(h.float()).sum()


def test_autocast_regions_are_marked():
    gm = capture(Autocast(), dict(x=torch.zeros(3, 4))).gm
    marks = {n.target: n.meta.get("autocast") for n in gm.graph.nodes if n.op == "call_function"}
    assert marks[aten.linear.default][1:3] == (torch.bfloat16, True)
    assert marks[aten.gelu.default][2] is False


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x, ends):
        return torch._grouped_mm(x, self.w, offs=ends).sum()


def test_torchs_grouped_product_is_ours_in_any_dtype():
    gm = capture(Grouped(), dict(x=torch.zeros(6, 8), ends=torch.tensor([1, 1, 6], dtype=torch.int32))).gm
    assert any(n.target is ops.grouped_mm.default for n in gm.graph.nodes)


def test_shapes_only():
    """Capture reads no value: a meta tensor of the same shape gives the same graph."""
    real, meta = (capture(Inner(), dict(x=torch.zeros(3, 4, device=d))).gm for d in ("cpu", "meta"))
    assert str(real.graph) == str(meta.graph)


def test_bind():
    def forward(x, labels=None, **rest):
        pass

    assert bind(forward, (1,), dict(labels=2, mask=3)) == dict(x=1, labels=2, mask=3)
    with pytest.raises(TypeError):
        bind(forward, (), {})
    with pytest.raises(TypeError, match=r"takes \*xs"):
        bind(lambda *xs: None, (1, 2), {})


class Reads(nn.Module):
    """Under no_grad a value is only read, by ops that may give the very same tensor."""

    def __init__(self, read):
        super().__init__()
        self.linear, self.read = nn.Linear(4, 4), read

    def forward(self, x):
        h = self.linear(x)
        with torch.no_grad():
            scale = self.read(h)
        return (h * h * scale).sum()


@pytest.mark.parametrize("read", [
    lambda h: h.to(h.dtype).sum(), lambda h: h.float().contiguous().mean(), lambda h: F.dropout(h, 0.0).type_as(h),
    lambda h: h.to(h.dtype, copy=True), lambda h: h, lambda h: h.to(torch.float64).exp(),
    lambda h: h.to(h.dtype, non_blocking=True).flatten(0, 0),
])  # fmt: skip
def test_what_is_read_under_no_grad_keeps_its_gradient(read):
    model, x = Reads(read), torch.randn(3, 4)
    gm = capture(model, dict(x=x)).gm
    values = [x if n.meta["role"][0] == "input" else model.get_parameter(n.meta["role"][1])
              for n in gm.graph.nodes if n.op == "placeholder"]  # fmt: skip
    gm.recompile()
    want = torch.autograd.grad(model(x), list(model.parameters()))
    got = torch.autograd.grad(gm(*values)[0], list(model.parameters()))
    torch.testing.assert_close(got, want)
