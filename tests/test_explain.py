"""`explain`: its object, its sizes, and the backward's collectives against the graph that autograd makes."""

import itertools
import json
import math
import re
from collections import Counter

import pytest
import sympy
import torch

from tedcompile import compile, graphs
from tedcompile.api import _example
from tedcompile.explain import Explanation, analyse, explain
from tedcompile.listing import layers_of
from tedcompile.load import from_config
from tedcompile.mesh import shape_of
from tedcompile.options import OPTIONAL, Options
from tedcompile.passes import reduce_gradients
from tedcompile.report import render

from .joint import Stop, build, parts, replayed
from .models import COMMON, MODELS, families

transformers = pytest.importorskip("transformers")

BATCH, SEQ, EXPERTS = 2, 16, 8
KEYS = {
    "passes": {"name", "seconds", "nodes_before", "nodes_after", "inserted", "removed"},
    "collectives": {
        "kind", "axis", "role", "phase", "module", "count", "bytes_per_rank", "wire_bytes", "formula",
    },
    "parameters": {"name", "layout", "shape", "local_shape"},
    "replicated": {"module", "reason"},
    "choices": {"module", "candidates"},
}  # fmt: skip


def tiny(family: str, mesh: str, dump: str = "", **sizes) -> Explanation:
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **families(EXPERTS)[family], **sizes})
    return analyse(config, mesh, batch=BATCH, seq=SEQ, dump=dump)


@pytest.fixture(scope="module")
def qwen3() -> Explanation:
    return tiny("qwen3_moe", "dp=2,ep=2,tp=2", dump="shard_experts")


def test_keys(qwen3):
    facts = json.loads(json.dumps(qwen3.facts))
    assert set(facts) == {"model", "mesh", "machine", "letters", "savings", *KEYS}
    assert facts["model"] == "Qwen3MoeForCausalLM" and facts["mesh"] == {"dp": 2, "ep": 2, "tp": 2}
    for name, keys in KEYS.items():
        assert facts[name] and all(set(row) == keys for row in facts[name])
    for row in facts["collectives"]:
        assert row["kind"] in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        assert row["role"] in ("payload", "counts", "parameter", "gradient")
        assert row["phase"] in ("forward", "recompute", "backward")
    merged = [tuple(row[k] for k in sorted(row) if k != "count") for row in facts["collectives"]]
    assert len(set(merged)) == len(merged)


def test_one_moe_layer(qwen3):
    """Two layers: rows go and come back, forward and backward, in T*K rows of H."""
    rows = [c for c in qwen3.facts["collectives"] if c["axis"] == "ep" and c["role"] == "payload"]
    size = BATCH * SEQ * 2 * 64 * 2  # T, K, H, bytes of bf16
    assert [(c["phase"], c["count"], c["bytes_per_rank"], c["wire_bytes"]) for c in rows] == [
        ("forward", 4, size, size // 2),
        ("backward", 4, size, size // 2),
    ]
    assert {c["formula"] for c in rows} == {"H*K*T*bytes"}
    counts = [c for c in qwen3.facts["collectives"] if c["role"] == "counts"]
    assert [(c["count"], c["bytes_per_rank"], c["module"]) for c in counts] == [
        (2, EXPERTS * 8, "model.layers.*.mlp.experts")
    ]


def test_parameters(qwen3):
    rows = {p["name"]: p for p in qwen3.facts["parameters"]}
    assert rows["model.layers.1.mlp.experts.gate_up_proj"] == {
        "name": "model.layers.1.mlp.experts.gate_up_proj",
        "layout": "ep: Shard(0), tp: Shard(1) of 2 sections",
        "shape": [8, 96, 64],
        "local_shape": [4, 48, 64],
    }
    assert rows["model.layers.0.self_attn.o_proj.weight"]["layout"] == "tp: Shard(1)"
    assert rows["model.layers.0.mlp.gate.weight"]["layout"] == "replicated"
    assert [r["module"] for r in qwen3.facts["replicated"]] == ["model.layers.*.mlp.gate.weight"]


PLANS = {
    "chosen": {},
    "dedup": dict(experts="tensor", dispatch="dedup", drop="yes"),
    "all_gather": dict(experts="tensor", dispatch="all_gather", drop="yes"),
    "folded": dict(experts="folded", dispatch="dedup"),
}


@pytest.mark.parametrize(
    "family, plan", [*((f, "chosen") for f in families(EXPERTS)), *(("qwen3_moe", p) for p in list(PLANS)[1:])]
)
def test_formulas_give_the_bytes(family, plan):
    """Exactly, but for the expected number of pairs U, which a graph holds rounded, and its parts over tp."""
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **families(EXPERTS)[family]})
    facts = explain(config, "dp=1,ep=2,tp=2", batch=BATCH, seq=SEQ, plan=PLANS[plan])
    letters = facts["letters"] | facts["mesh"]
    want = dict(T=BATCH * SEQ, B=BATCH, S=SEQ, K=2, E=EXPERTS, H=64, V=128, bytes=2)
    assert {name: letters[name] for name in want} == want
    assert letters["I"] == getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert any("T*" in row["formula"] for row in facts["collectives"])
    symbols = {name: sympy.Symbol(name) for name in letters}
    for row in facts["collectives"]:
        formula = sympy.sympify(row["formula"], locals=symbols)
        value = formula.subs({symbols[name]: x for name, x in letters.items()})
        assert abs(value - row["bytes_per_rank"]) <= (64 * 8 if sympy.Symbol("U") in formula.free_symbols else 0), row


def test_savings():
    """Each optimisation left out and not: TED's plan, so dropping halves the all-to-alls at tp 2."""
    config = transformers.AutoConfig.for_model("qwen3_moe", **{**COMMON, **families(EXPERTS)["qwen3_moe"]})
    replayed = Options.of(plan=dict(experts="tensor", dispatch="all_to_all"), checkpoint="full")
    found = analyse(config, "ep=2,tp=2", batch=BATCH, seq=SEQ, options=replayed)
    savings = {s["pass"]: s for s in found.facts["savings"]}
    assert list(savings) == [
        name
        for name in OPTIONAL
        if name not in ("chunk_tokens", "fuse_experts", "fuse_loss", "cut_layers", "cuda_graphs")
    ]  # which do not change what is sent
    assert all(set(s) == {"pass", "rewrite", "note", "before", "after"} for s in savings.values())
    assert len({tuple(s["after"].items()) for s in savings.values()}) == 1
    kept = savings["save_collectives"]
    assert kept["before"]["calls"] > kept["after"]["calls"] and kept["before"]["tp"] > kept["after"]["tp"]
    assert f"{kept['before']['calls']} -> {kept['after']['calls']}" in render(found)
    off = analyse(config, "ep=2,tp=2", batch=BATCH, seq=SEQ, options=Options.of(off=["simplify_collectives"]))
    assert [s["pass"] for s in off.facts["savings"]] == ["drop_duplicates", "save_collectives"]
    assert analyse(config, "dp=2", batch=BATCH, seq=SEQ).facts["savings"] == []
    forced = Options.of(plan=dict(experts="folded"))
    refused = analyse(config, "ep=2,tp=2", batch=BATCH, seq=SEQ, options=forced).facts["savings"][0]
    assert refused["before"] is None and "folded experts need drop_duplicates" in refused["note"]


@pytest.mark.parametrize("plan", list(PLANS)[1:])
def test_formulas_of_payload_hold_no_numbers(plan):
    """Of sizes: what is left are the 8 bytes of an index, and 2 in 2*I."""
    config = transformers.AutoConfig.for_model("qwen3_moe", num_hidden_layers=2)
    facts = explain(config, "dp=2,ep=2,tp=2", seq=512, plan=PLANS[plan])
    assert any("U" in row["formula"] for row in facts["collectives"]) == (plan != "all_gather")
    for row in facts["collectives"]:
        if row["role"] in ("payload", "counts"):
            assert not {int(n) for n in re.findall(r"\b\d+\b", row["formula"])} - {2, 4, 8}, row


def sent(nodes, mesh: str) -> Counter:
    """Collectives, with the bytes of each call."""
    shape, found = shape_of(mesh), Counter()
    for node in nodes:
        kind = graphs.collective(node)
        if kind and shape[node.args[-1]] > 1:
            sizes = [s if isinstance(s, int) else BATCH * SEQ * 2 for s in node.args[0].meta["val"].shape]
            found[kind, node.args[-1], math.prod(sizes) * node.args[0].meta["val"].element_size()] += 1
    return found


def joint_nodes(name: str, mesh: str, monkeypatch, **options) -> list[torch.fx.Node]:
    """The nodes of the joint graph of forward and backward as it is compiled."""
    found: list[torch.fx.Node] = []

    def look(name, run, graph, ctx):
        run(graph, ctx)
        if name == "reduce_gradients":  # after it, no pass makes or removes a collective
            graph.graph.eliminate_dead_code()
            found.extend(graph.graph.nodes)
            raise Stop

    monkeypatch.setattr(compile, "run_pass", look)
    model, make_batch = MODELS[name]()
    with pytest.raises(Stop):
        build(model, _example(model, make_batch(0, 0)), shape_of(mesh), **options)
    return found


def predicted(name: str, mesh: str, **options) -> Counter:
    model, make_batch = MODELS[name]()
    expected: Counter = Counter()
    for row in explain(model, mesh, example_inputs=make_batch(0, 0), **options)["collectives"]:
        expected[row["kind"], row["axis"], row["bytes_per_rank"]] += row["count"]
    return expected


MESHES = [
    ("qwen3_moe_aux", "dp=2,ep=2,tp=2"),
    ("deepseek_v3", "ep=2,tp=2"),
    ("gpt_oss", "dp=1,ep=4,tp=2"),
    ("olmoe", "tp=4"),
    ("qwen2_moe", "dp=2,ep=2"),
    ("nano_moe", "dp=1,ep=2,tp=2"),
]
on_every_mesh = pytest.mark.parametrize("name, mesh", MESHES)
RECOMPUTED: dict[str, dict] = {
    "sent_again": dict(checkpoint="full", off=["save_collectives"]),
    "full": dict(checkpoint="full"),
    "selective": dict(checkpoint="selective", memory_budget=0.4),
}


@on_every_mesh
def test_collectives_are_those_of_the_joint_graph(name, mesh, monkeypatch):
    monkeypatch.setattr(reduce_gradients, "BUCKET", 30_000)  # several buckets of several gradients
    assert sent(joint_nodes(name, mesh, monkeypatch), mesh) == predicted(name, mesh)


@pytest.mark.parametrize(
    "options",
    [
        dict(plan=dict(experts="tensor", dispatch="all_to_all", drop="yes")),
        dict(plan=dict(experts="tensor", dispatch="dedup", drop="yes")),
        dict(plan=dict(experts="tensor", dispatch="all_gather", drop="yes")),
        dict(plan=dict(experts="folded", dispatch="all_to_all")),
        dict(plan=dict(experts="folded", dispatch="dedup")),
        dict(plan=dict(experts="folded", dispatch="all_gather")),
        dict(plan=dict(experts="tensor", dispatch="all_to_all"), off=["simplify_collectives"]),
        dict(plan=dict(experts="tensor", dispatch="dedup"), off=["drop_duplicates"]),
    ],
    ids=lambda o: "-".join((*o["plan"].values(), *o.get("off", ()))),
)
def test_every_plans_collectives_are_those_of_the_joint_graph(options, monkeypatch):
    """Calls by kind and axis, and bytes where shapes are static; a number of rows that arrive is a symbol there."""
    mesh, expected = "ep=2,tp=2", predicted("qwen3_moe", "ep=2,tp=2", **options)
    nodes = [n for n in joint_nodes("qwen3_moe", mesh, monkeypatch, **options) if graphs.collective(n)]
    nodes = [n for n in nodes if shape_of(mesh)[n.args[-1]] > 1]
    dynamic = [n for n in nodes if not isinstance(n.args[0].meta["val"].shape[0], int)]
    static = sent([n for n in nodes if n not in dynamic], mesh)
    assert not static - expected
    rest = list((expected - static).elements())
    kinds = lambda rows: Counter((kind, axis) for kind, axis, *_ in rows)
    widths = [(graphs.collective(n), n.args[-1], n.args[0].meta["val"][0].nbytes) for n in dynamic]
    assert kinds(rest) == kinds(widths)
    for kind, axis, size in rest:
        assert any(size % width == 0 for *found, width in widths if found == [kind, axis])


@pytest.mark.parametrize("name, mesh, how", [(*m, h) for m, h in zip(MESHES, itertools.cycle(RECOMPUTED))])
def test_replayed_collectives_are_those_of_the_backward_graph(name, mesh, how):
    options = RECOMPUTED[how]
    model, make_batch = MODELS[name]()
    expected: Counter = Counter()
    for row in explain(model, mesh, example_inputs=make_batch(0, 0), **options)["collectives"]:
        if row["phase"] == "recompute":
            expected[row["kind"], row["axis"], row["bytes_per_rank"]] += row["count"]
    assert bool(expected) == ("off" in options)
    forward, backward = parts(model, _example(model, make_batch(0, 0)), shape_of(mesh), **options)
    assert sent(replayed(forward, backward), mesh) == expected


@pytest.mark.parametrize(
    "plan",
    [
        dict(experts="tensor", dispatch="all_to_all", drop="yes"),
        dict(experts="folded", dispatch="dedup"),
        dict(experts="tensor", dispatch="all_gather", drop="yes"),
    ],
    ids=lambda p: "-".join(p.values()),
)
def test_every_plans_replayed_collectives_are_those_of_the_backward_graph(plan):
    """Calls by kind and axis."""
    options = dict(checkpoint="full", off=["save_collectives"], plan=plan)
    model, make_batch = MODELS["qwen3_moe"]()
    expected: Counter = Counter()
    for row in explain(model, "ep=2,tp=2", example_inputs=make_batch(0, 0), **options)["collectives"]:
        if row["phase"] == "recompute":
            expected[row["kind"], row["axis"]] += row["count"]
    forward, backward = parts(model, _example(model, make_batch(0, 0)), shape_of("ep=2,tp=2"), **options)
    again = [n for n in replayed(forward, backward) if graphs.collective(n)]
    assert expected and Counter((graphs.collective(n), n.args[-1]) for n in again) == expected


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def default(family: str, mesh: str) -> tuple[int, int, int, int]:
    """Bytes of all parameters, on one rank and whole, and of the experts, of the default configuration cut in depth."""
    config = transformers.AutoConfig.for_model(family)
    config.num_hidden_layers = 2
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    parameters = explain(config, mesh, seq=32)["parameters"]
    experts = [p for p in parameters if re.search(r"\.experts\.", p["name"])]
    assert experts
    return tuple(sum(math.prod(p[k]) for p in rows) for rows in (parameters, experts) for k in ("local_shape", "shape"))


@pytest.mark.parametrize("family", FAMILIES)
def test_share_of_one_rank(family):
    local, whole, _, _ = default(family, "tp=2")
    assert local <= 0.55 * whole
    _, _, local, whole = default(family, "ep=2")
    assert 2 * local == whole


def test_plain_module_and_meta_weights():
    with torch.device("meta"):
        model = from_config(transformers.AutoConfig.for_model("mixtral", **{**COMMON, **families(8)["mixtral"]}))
    model.eval()
    assert explain(model, {"tp": 2}, seq=SEQ)["mesh"] == {"dp": 1, "ep": 1, "tp": 2}
    assert not model.training
    assert all(p.is_meta for p in model.parameters())


def test_nothing_to_do_on_one_rank():
    facts = tiny("mixtral", "dp=1").facts
    assert facts["collectives"] == [] and facts["replicated"] == []
    assert all(p["local_shape"] == p["shape"] and p["layout"] == "replicated" for p in facts["parameters"])


def test_errors():
    with pytest.raises(TypeError, match="needs example inputs: explain"):
        explain(torch.nn.Linear(4, 4), "tp=2")
    with pytest.raises(TypeError, match="got int"):
        explain(3, "tp=2")
    with pytest.raises(ValueError, match="unknown mesh axis 'xp'"):
        explain("mixtral", "xp=2")
    with pytest.raises(ValueError, match="tp=5 cannot work, no parameter divides over it: .*; tp = 2, 4, 8 would"):
        tiny("mixtral", "tp=5")
    with pytest.raises(ValueError, match="8 experts do not divide over ep=3; ep = 2, 4, 8 would"):
        tiny("mixtral", "ep=3")
    with pytest.raises(ValueError, match="the passes are functionalise, "):
        analyse("mixtral", "tp=2", dump="polish")


def test_text(qwen3):
    plain = Explanation(qwen3.facts, qwen3.lines, None)
    text = render(plain)
    assert "\033" not in text
    assert "model.layers.0: Qwen3MoeDecoderLayer" in text
    assert re.search(r">> +\w+ = all_to_all\(rows, splits, 'ep'\) +# bf16 \[64, 64\] E", text)
    assert re.search(r"<< +enter = enter\(\w+, 'tp'\) .*backward: all_reduce over tp", text)
    assert re.search(r"linear = linear\(enter, self_attn.q_proj.weight\) +# bf16 \[2, 16, 64\] S\(2\)", text)
    assert re.search(r"transpose\(mlp.experts.down_proj, 1, 2\) +# bf16 \[4, 24, 64\] S\(1\)", text)
    for title in ("Passes", "Parameters", "Left replicated", "Collectives of one training step"):
        assert f"\n{title}\n" in text
    assert "data (dp x ep): " in text
    coloured = render(plain, colour=True)
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == text != coloured


def test_layers(qwen3):
    plain = Explanation(qwen3.facts, qwen3.lines, None)
    assert layers_of(qwen3.lines) == ["model.layers.0", "model.layers.1"]
    assert "model.layers.1: Qwen3" in render(plain, 1) and "model.layers.0: Qwen3" not in render(plain, 1)
    assert all(f"model.layers.{i}: Qwen3" in render(plain, "all") for i in (0, 1))
    with pytest.raises(ValueError, match="layer 2 is out of range: the model has layers 0 to 1"):
        render(plain, 2)


def test_first_layer_with_experts_is_shown():
    assert "model.layers.1: DeepseekV3DecoderLayer" in render(tiny("deepseek_v3", "ep=2"))


def test_one_pass(qwen3):
    """The pair shows what the pass did and nothing else: values keep their names."""
    lines = render(qwen3).splitlines()
    added = [line for line in lines if line.startswith("+")]
    assert sum("all_to_all" in line for line in added if line.startswith("+>>")) == 2
    assert not any("all_to_all" in line for line in lines if line.startswith("-"))
    assert not any("self_attn" in line for line in added)
    assert "Passes" not in lines
