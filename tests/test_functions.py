"""autograd.Functions survive capture with a backward that autograd would never derive; hooks are refused by name."""

import contextlib
import copy
import functools
import inspect

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tedcompile import compat, functions
from tedcompile.functions import find_hooks, keep_functions

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


class Old(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return 3 * g * y, 5 * g * x


old_apply = Old.apply


class New(Function):
    @staticmethod
    def forward(x, factor=2.0):
        return x.sin() * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * x * y * ctx.factor, None


class Several(Function):
    """An unused output, an int output, a number and None beside tensors."""

    @staticmethod
    def forward(ctx, x, nothing, y):
        assert nothing is None
        order = x.argsort(-1)
        ctx.mark_non_differentiable(order)
        ctx.save_for_backward(order)
        return x * 2, order, 7, None, y * 2, x + y

    @staticmethod
    def backward(ctx, gx, g_order, g_number, g_none, gy, unused):
        (order,) = ctx.saved_tensors
        assert g_number is None and g_none is None
        assert not g_order.any() and g_order.dtype == torch.int64
        assert unused.shape == gx.shape
        return 3 * gx.gather(-1, order), None, 5 * gy + unused


class Listed(Function):
    """Autograd looks at no tensor inside a list, given or returned."""

    @staticmethod
    def forward(ctx, x, many):
        return x * many[0], [x + 1, x + 2]

    @staticmethod
    def backward(ctx, g, g_list):
        assert g_list is None
        return 3 * g, None


class Unmaterialized(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, used, unused):
        assert unused is None
        return 7 * used


class Attributes(Function):
    """Everything that ctx can hold."""

    @staticmethod
    def forward(ctx, x, w, mode, act, power):
        hidden = torch.tanh(x)
        ctx.save_for_backward(hidden, None, x.view(-1), w.t())
        ctx.mode, ctx.act, ctx.power, ctx.shape, ctx.rows = mode, act, power, x.shape, x.shape[0]
        ctx.nested = {"mean": hidden.mean(), "flags": (True, 2.5)}
        return act(hidden**power @ w)

    @staticmethod
    def backward(ctx, g):
        hidden, nothing, flat, wt = ctx.saved_tensors
        assert nothing is None and ctx.mode == "three" and ctx.shape.numel() == flat.numel()
        gx = 3 * (g @ wt) * hidden * ctx.nested["mean"] * ctx.nested["flags"][1]
        gw = ctx.power * flat.view(ctx.rows, -1).t() @ ctx.act(g)
        return gx.view(ctx.shape), gw, None, None, None


class Needs(Function):
    @staticmethod
    def forward(ctx, x, y):
        assert ctx.needs_input_grad == (True, False) and x.requires_grad and not y.requires_grad
        return x * y

    @staticmethod
    def backward(ctx, g):
        assert ctx.needs_input_grad == (True, False)
        return 3 * g, None


class NoGradient(Function):
    @staticmethod
    def forward(ctx, x, y):
        return x * y

    @staticmethod
    def backward(ctx, g):
        return 3 * g, None


class Aliases(Function):
    """Returns its input, a view of it, one tensor twice, and saves its output; writes to its gradient."""

    @staticmethod
    def forward(ctx, x):
        y = x + 1
        ctx.save_for_backward(y, y.view(-1), x)
        return x, x.view(-1), y, y

    @staticmethod
    def backward(ctx, a, b, c, d):
        y, flat, x = ctx.saved_tensors
        return a.mul_(3) + b.view_as(a) * flat.view_as(a) + 2 * c * x + y * d


class DataDependent(Function):
    """Its backward cannot run on fakes; it takes gradients inside and returns views of one buffer."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        with torch.enable_grad():
            (gx,) = torch.autograd.grad((x**2 * y).sum(), x)
        if (x.mean() > -100).item():
            gx = gx * len((x > 0).tolist())
        return torch.stack([gx * g, torch.ones_like(g)]).unbind()


class GradInForward(Function):
    @staticmethod
    def forward(ctx, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            cube = leaf**3
            cube[0].mul_(5)
            loss = cube.sum()
            (ctx.grad,) = torch.autograd.grad(loss, leaf)
        return loss

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.grad


class Broadcast(Function):
    """Gradients in another shape and dtype, which autograd converts."""

    @staticmethod
    def forward(ctx, x, b):
        return x + b.float()

    @staticmethod
    def backward(ctx, g):
        return 3 * g.double(), 5 * g


class NestedInside(Function):
    @staticmethod
    def forward(ctx, x):
        return Old.apply(x, x)

    @staticmethod
    def backward(ctx, g):
        return 3 * Old.apply(g, g)


TABLE = torch.arange(4.0)


class Foreign(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(TABLE)
        ctx.state = torch.get_rng_state()
        return x * TABLE

    @staticmethod
    def backward(ctx, g):
        assert ctx.state.dtype == torch.uint8
        return 3 * g + ctx.saved_tensors[0]


class Model(nn.Module):
    def __init__(self, body, *frozen):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.b16 = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        for name in frozen:
            getattr(self, name).requires_grad_(False)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def several(m, x):
    a, order, number, nothing, b, _ = Several.apply(m.w * x, None, m.b * x)
    assert number == 7 and nothing is None
    return (a * order).sum() * number + b.sum()


def listed(m, x):
    y, (z, _) = Listed.apply(m.w * x, [m.b * 2, x])
    return (y * z).sum()


def attributes(m, x, act=torch.nn.functional.silu):
    y = Attributes.apply((m.w * x).sin(), m.square, "three", act, 2)
    return Attributes.apply(y, m.square, "three", lambda t: act(t), 3).sum()


def aliases(m, x):
    a, b, c, d = Aliases.apply(m.w * x)
    return (a.exp() + c * d).sum() + (b * b).sum()


CASES = {
    "old": lambda m, x: Old.apply(m.w * 2, m.b * x).sin().sum(),
    "bound_before": lambda m, x: old_apply(m.w * 2, m.b * x).sum(),
    "same_twice": lambda m, x: (lambda t: Old.apply(t, t))(m.w * x).sum(),
    "old_transposed": lambda m, x: Old.apply((m.w * 2).t(), (m.b * x).t()).sin().sum(),
    "new": lambda m, x: New.apply(New.apply(m.w * x), 3.0).sum(),
    "several": several,
    "listed": listed,
    "unmaterialized": lambda m, x: Unmaterialized.apply(m.w * x)[0].sum(),
    "attributes": attributes,
    "no_gradient": lambda m, x: NoGradient.apply(m.w * x, m.b).sum(),
    "aliases": aliases,
    "data_dependent": lambda m, x: DataDependent.apply(m.w * x, m.b * x).sum(),
    "grad_in_forward": lambda m, x: GradInForward.apply(m.w * x),
    "broadcast": lambda m, x: Broadcast.apply(m.w * x, m.b16).sum(),
    "nested_inside": lambda m, x: NestedInside.apply(m.w * x).sum(),
    "foreign": lambda m, x: Foreign.apply(m.w * x).sum(),
    "constant_input": lambda m, x: Old.apply(m.w, x).sum(),
}


def model_of(case):
    return Model(Needs_body, "b") if case == "needs" else Model(CASES[case])


def Needs_body(m, x):
    return Needs.apply(m.w * 2, m.b * x).sum()


def reference(model, x, region=None):
    model = copy.deepcopy(model)
    with region or contextlib.nullcontext():
        loss = model(x)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def check(actual, expected):
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        if grad is None:
            assert actual[1][name] is None, name
        else:
            torch.testing.assert_close(actual[1][name], grad, msg=lambda m, name=name: f"{name}: {m}")


def captured(model, x):
    with keep_functions():
        return torch.export.export(model, (x,), strict=False)


def run_module(program, x):
    return reference(program.module(), x)


def run_decomposed(program, x):
    return reference(program.run_decompositions({}).module(), x)


def joint(module, x, decompositions=None, **compilers):
    """A compiled step and its parameters, as the compiler makes it: traced on fakes, then run on real tensors."""
    mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    real = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in module.named_parameters()}
    module = copy.deepcopy(module)
    for sub in module.modules():
        for node in getattr(sub, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("unbacked_bindings", None)
        for name, p in sub._parameters.items():
            fake = mode.from_tensor(p.detach(), static_shapes=True)
            sub._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
    with contextlib.ExitStack() as stack:
        fake_x = mode.from_tensor(x, static_shapes=True)
        graph = compat.aot_export_joint_with_descriptors(stack, module, (fake_x,), decompositions=decompositions)
        assert "tedfn.forward" in graph.graph_module.code and "tedfn.backward" in graph.graph_module.code
        compiled = compat.aot_compile_joint_with_descriptors(graph, **compilers)
    buffers = dict(module.named_buffers())

    def step():
        out = compiled(*(real[n] for n in graph.params_spec), *(buffers[n] for n in graph.buffers_spec), x)
        loss = out[0] if isinstance(out, (tuple, list)) else out
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in real.items()}

    return step


def run_joint(program, x):
    return joint(program.module(), x)()


def run_inductor(program, x):
    return joint(
        program.module(),
        x,
        compat.select_decomp_table(),
        fw_compiler=compat.compile_fx_inner,
        bw_compiler=compat.compile_fx_inner,
        partition_fn=compat.min_cut_rematerialization_partition,
    )()


@pytest.mark.parametrize("case", [*CASES, "needs"])
def test_loss_and_gradients_are_eager(case):
    model, x = model_of(case), torch.randn(3, 4)
    expected = reference(model, x)
    program = captured(model, x)
    for run in (run_module, run_decomposed, run_joint):
        check(run(program, x), expected)


def test_inductor_runs_the_ops():
    model, x = model_of("attributes"), torch.randn(3, 4)
    check(run_inductor(captured(model, x), x), reference(model, x))


class Cast(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        y = x @ w
        ctx.low = y.dtype == torch.bfloat16
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        assert ctx.low and torch.is_autocast_enabled("cpu")
        return 3 * (g @ w.t()), x.t() @ g


@pytest.mark.parametrize("run", [run_module, run_decomposed, run_joint])
def test_autocast_region(run):
    def body(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = Cast.apply(m.w * x, m.square)
        return y.float().sum()

    model, x = Model(body), torch.randn(3, 4)
    check(run(captured(model, x), x), reference(model, x))


def test_autocast_around_the_compiled_step():
    model, x = Model(lambda m, x: Cast.apply(m.w * x, m.square).sum()), torch.randn(3, 4)
    program = captured(model, x)
    region = lambda: torch.autocast("cpu", torch.bfloat16)
    with region():
        step = joint(program.module(), x)
    check(step(), reference(model, x, region()))


def test_no_grad_region_has_no_gradient():
    def body(m, x):
        with torch.no_grad():
            scale = Old.apply(m.w, x)
        return Old.apply(m.b * x, scale).sum()

    model, x = Model(body), torch.randn(3, 4)
    check(run_module(captured(model, x), x), reference(model, x))


def test_one_readable_node_and_no_other_trace():
    program = captured(model_of("old"), torch.randn(3, 4))
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [str(n.target) for n in nodes if "getitem" not in str(n.target)] == [
        "aten.mul.Tensor",
        "aten.mul.Tensor",
        "tedfn.forward.default",
        "aten.sin.default",
        "aten.sum.default",
    ]
    (node,) = [n for n in nodes if "tedfn" in str(n.target)]
    assert node.args[0].endswith("test_functions.Old(Tensor, Tensor)") and list(node.args[2:]) == [[], [True, True], ""]


def test_the_same_capture_registers_nothing_new():
    class Holder(nn.Module):
        def double(self, t):
            return t * 2

    holder = Holder()

    def body(m, x):
        scale = 2.5
        y = Attributes.apply(m.w * x, m.square, "three", lambda t: t * scale, 2)
        y = Attributes.apply(y, m.square, "three", holder.double, 2)
        return Attributes.apply(y, m.square, "three", functools.partial(torch.mul, other=3.0), 2).sum()

    model, x = Model(body), torch.randn(3, 4)
    expected = reference(model, x)
    check(run_joint(captured(model, x), x), expected)
    names, plans = set(functions._FUNCTIONS), sum(len(f.plans) for f in functions._FUNCTIONS.values())
    check(run_joint(captured(model, x), x), expected)
    assert set(functions._FUNCTIONS) == names
    assert sum(len(f.plans) for f in functions._FUNCTIONS.values()) == plans


def test_classes_and_constants_of_one_name_are_told_apart():
    def make(factor):
        class Local(Function):
            @staticmethod
            def forward(ctx, x, function, number):
                return function(x) + number

            @staticmethod
            def backward(ctx, g):
                return factor * g, None, None

        return Local

    two, five = make(2), make(5)
    functions_ = [lambda t: t + 1, lambda t: t + 2]

    def body(m, x):
        y = two.apply(m.w * x, functions_[0], 0.0) * five.apply(m.w, functions_[0], -0.0)
        return (y * two.apply(m.b, functions_[1], True) * two.apply(m.b, functions_[1], 1.0)).sum()

    model, x = Model(body), torch.randn(3, 4)
    check(run_joint(captured(model, x), x), reference(model, x))


def test_graph_runs_with_other_shapes_and_dtypes_than_captured():
    """Shards and mixed precision change both: what ctx holds is found again when the graph is traced again."""
    model, x = Model(lambda m, x: Attributes.apply(m.b * x, m.square, "three", torch.sin, 2).sum()), torch.randn(6, 4)
    program = captured(model, x)
    gm = program.graph_module

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.ParameterList([getattr(model, n).double() for n in ("w", "b", "square", "b16")])

        def forward(self, x):
            return torch.fx.Interpreter(gm).run(*self.p, x)[0]

    run, x = Run(), torch.randn(2, 4, dtype=torch.float64)
    expected = reference(copy.deepcopy(model).double(), x)
    loss, grads = reference(run, x)
    check((loss, dict(zip(expected[1], grads.values()))), expected)
    loss, grads = joint(run, x)()
    check((loss, dict(zip(expected[1], grads.values()))), expected)


class Rows(Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(x.view(-1))
        ctx.rows, ctx.shape = rows, x.shape
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0].view(ctx.shape) * ctx.rows, None


@pytest.mark.parametrize("run", [run_module, run_joint])
def test_sizes_that_depend_on_data(run):
    def body(m, x):
        rows = m.w[x[:, 0] > 0]
        return Rows.apply(rows, rows.shape[0]).sum()

    model, x = Model(body), torch.tensor([1.0, -1.0, 1.0])[:, None].expand(3, 4).contiguous()
    check(run(captured(model, x), x), reference(model, x))


def test_capture_on_fake_parameters_leaks_none():
    model, x = model_of("attributes"), torch.randn(3, 4)
    mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        fake = Model(model.body)
        fake_x = torch.empty(3, 4)
        gm = captured(fake, fake_x).graph_module
    parameters = [p.detach().requires_grad_() for p in model.parameters()]
    (loss,) = torch.fx.Interpreter(gm).run(*parameters, x)
    loss.backward()
    grads = dict(zip((n for n, _ in model.named_parameters()), (p.grad for p in parameters)))
    check((loss.detach(), grads), reference(model, x))


def scale_kernel(x, y, factor, n):
    at = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@pytest.mark.skipif(triton is None, reason="needs triton")
def test_triton_launches_are_skipped_at_capture(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    scale = triton.jit(scale_kernel)

    def launch(x, factor):
        y = torch.empty_like(x)
        scale[(triton.cdiv(x.numel(), 8),)](x, y, factor, x.numel())
        return y

    class Scale(Function):
        @staticmethod
        def forward(ctx, x):
            return launch(x, 2.0)

        @staticmethod
        def backward(ctx, g):
            return launch(g.contiguous(), 3.0)

    model, x = Model(lambda m, x: Scale.apply(m.w * x).sum()), torch.randn(3, 4)
    check(run_joint(captured(model, x), x), reference(model, x))


class Dirty(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)


class Undeclared(Function):
    @staticmethod
    def forward(ctx, x):
        x.add_(1)
        return x * 2


class Reads(Function):
    @staticmethod
    def forward(ctx, x):
        return x * int(x.sum())


class Calls(Function):
    @staticmethod
    def forward(ctx, function, x):
        return function(x)


REFUSED = {
    "Dirty.*mark_dirty": lambda m, x: Dirty.apply(m.w * 2),
    "Undeclared.*writes to its input": lambda m, x: Undeclared.apply(m.w * 2),
    "Reads.forward must run on tensors without values": lambda m, x: Reads.apply(m.w),
    "Calls is given the module Linear; pass its parameters": lambda m, x: Calls.apply(nn.Linear(4, 4), x),
    "Calls is given the module Model": lambda m, x: Calls.apply(m.forward, x),
    "Calls is given a function that holds a tensor": lambda m, x: Calls.apply(lambda t: t * x, x),
    r'use_reentrant=False.*gradient_checkpointing_kwargs={"use_reentrant": False}': lambda m, x: checkpoint(
        torch.sin, m.w, use_reentrant=True
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        captured(Model(REFUSED[message]), torch.randn(3, 4))


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_tensor_hooks_in_a_forward_are_refused_with_their_line(hook):
    def body(m, x):
        getattr(m.w if "post" in hook else m.w * 2, hook)(lambda g: None)
        return m.w.sum()

    line = inspect.getsourcelines(body)[1] + 1
    with pytest.raises(ValueError, match=rf"test_functions.py:{line}: {hook} in a forward is lost"):
        captured(Model(body), torch.randn(3, 4))


def test_hooks_on_parameters_and_modules_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_forward_hook(lambda *args: None)
    find_hooks(model)
    hook = lambda *args: None
    for register, message in [
        (model[1].weight.register_hook, r"parameter 1\.weight.*the model that parallelize returns"),
        (model[1].bias.register_post_accumulate_grad_hook, r"parameter 1\.bias.*the model that parallelize returns"),
        (model[0].register_full_backward_hook, "not supported: module 0"),
        (model.register_full_backward_pre_hook, "not supported: module Sequential"),
        (nn.modules.module.register_module_full_backward_hook, "not supported: all modules"),
    ]:
        handle = register(hook)
        with pytest.raises(ValueError, match=message):
            find_hooks(model)
        handle.remove()
        find_hooks(model)


def test_patches_are_undone_and_nest():
    def patched():
        return Old.apply, "apply" in vars(Function.__base__), vars(torch.Tensor)["register_hook"]

    before, model, x = patched(), model_of("old"), torch.randn(3, 4)
    with pytest.raises(ZeroDivisionError), keep_functions():
        inside = patched()
        program = captured(model, x)
        assert patched() == inside != before
        raise ZeroDivisionError
    assert patched() == before
    check(run_joint(program, x), reference(model, x))


@pytest.mark.parametrize("options", [{}, {"context_fn": True}])
def test_checkpoint_without_reentry_is_captured_as_its_function(options):
    if options:
        policy = lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE
        options = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}

    def body(m, x):
        region = lambda t: Old.apply(m.w * t, m.b * t).sin()
        return (checkpoint(region, x, use_reentrant=False, **options) * m.b).sum()

    model, x = Model(body), torch.randn(3, 4)
    program = captured(model, x)
    assert sum("tedfn.forward" in str(n.target) for n in program.graph.nodes) == 1
    for run in (run_module, run_joint):
        check(run(program, x), reference(model, x))


def test_second_derivative_is_refused():
    model, x = model_of("old"), torch.randn(3, 4)
    loss = captured(model, x).module()(x)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        loss.backward(create_graph=True)


def test_runs_in_inference_mode():
    model, x = model_of("attributes"), torch.randn(3, 4)
    gm = captured(model, x).module()
    with torch.inference_mode():
        torch.testing.assert_close(gm(x * 1), model(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["old", "attributes", "several", "aliases", "data_dependent"])
def test_captured_on_the_cpu_and_run_on_a_gpu(case):
    model, x = model_of(case), torch.randn(3, 4)
    module = captured(model, x).module().cuda()
    model, x = model.cuda(), x.cuda()
    for run in (reference, lambda *args: joint(*args)()):
        check(run(module, x), reference(model, x))
