"""Volumes as formulas: DeepSpeed-TED's counts and ratios, and what each candidate of an MoE block sends."""

import itertools
import math
from collections import Counter

import pytest
import sympy
import torch

import tedcompile
from tedcompile import volumes as v
from tedcompile.volumes import Candidate
from tests.models import MODELS

VALUES = dict(T=1024, K=8, H=2048, I=768, E=128, tp=2, ep=4, dp=1, bytes=2)


def bytes_of(c: Candidate, kind: str, axis: str, phase: str) -> sympy.Expr:
    return v.total((x for x in v.block(c) if (x.axis, x.phase) == (axis, phase)), kind)


def test_counts_of_a_ted_layer():
    """DeepSpeed-TED section 5: 6 all-reduces and 6 all-to-alls under full checkpointing, 4 and 4 with CAC."""
    for save, count in ((False, 6), (True, 4)):
        kinds = Counter(c.kind for c in v.ted_layer(False, save))
        assert kinds == {"all_reduce": count, "all_to_all": count}


def test_ratios_of_a_ted_layer():
    before, after = v.ted_layer(False, False), v.ted_layer(True, True)
    ratio = lambda kind: sympy.simplify(v.total(after, kind) / v.total(before, kind))
    assert ratio("all_to_all") == sympy.Rational(2, 3) / v.tp  # -66.7 % at tp 2, -83.3 % at tp 4
    assert ratio("all_reduce") == sympy.Rational(2, 3)  # -33.3 %


def test_dropping_divides_the_all_to_all_by_tp_and_gathers_rows_over_tp():
    whole, dropped = Candidate(), Candidate(drop=True)
    for phase in ("forward", "backward"):
        assert bytes_of(whole, "all_to_all", "ep", phase) == 2 * v.K * v.T * v.H * v.size
        assert bytes_of(dropped, "all_to_all", "ep", phase) == 2 * v.K * v.T * v.H * v.size / v.tp
    # tokens come home as T rows, not as K*T
    home = [c for c in v.block(dropped) if c.why == "slices to whole tokens"]
    assert [c.bytes for c in home] == [v.T * v.H * v.size / v.tp]


def test_folded_experts_gather_no_rows_over_tp():
    folded = Candidate("folded", drop=True)
    assert bytes_of(folded, "all_to_all", "ept", "forward") == 2 * v.K * v.T * v.H * v.size / v.tp
    assert bytes_of(folded, "", "tp", "forward") == v.T * v.H * v.size / v.tp


@pytest.mark.parametrize("E, K, D", [(8, 2, 2), (8, 2, 4), (6, 3, 3), (8, 8, 4), (8, 1, 4), (8, 2, 1)])
def test_expected_destinations_against_counting(E, K, D):
    choices = list(itertools.combinations(range(E), K))
    mean = sum(len({e * D // E for e in chosen}) for chosen in choices) / len(choices)
    assert v.evaluate(v.destinations(D), dict(E=E, K=K)) == pytest.approx(mean)


def test_four_times_less_for_qwen3_on_ep_2():
    """K 8, ep 2: each token once instead of eight times for two ranks."""
    values = VALUES | {"ep": 2, "tp": 1}
    rows, once = (v.evaluate(bytes_of(Candidate(dispatch=d), "all_to_all", "ep", "forward"), values)
                  for d in ("all_to_all", "dedup"))  # fmt: skip
    assert rows / once == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("dispatch", ["all_to_all", "dedup", "all_gather"])
@pytest.mark.parametrize("experts, drop", [("tensor", False), ("tensor", True), ("folded", True)])
def test_backward_sends_what_the_forward_sends(experts, dispatch, drop):
    """All-gather and reduce-scatter change places, an all-to-all stays: the bytes on the wire are the same."""
    payload = [c for c in v.block(Candidate(experts, dispatch, drop)) if c.role == "payload"]
    sent = lambda phase: sum(v.evaluate(c.sent, VALUES) for c in payload if c.phase == phase)
    assert sent("forward") == pytest.approx(sent("backward"))
    assert Counter(c.phase for c in payload)["forward"] == Counter(c.phase for c in payload)["backward"]


def test_drop_point():
    after, before = (v.block(Candidate(drop=True, drop_point=p), aux=True) for p in ("after_gate", "before_gate"))
    extra = set(before) - set(after)
    assert {(c.kind, c.phase, c.bytes) for c in extra} == {
        ("all_gather", "forward", v.T * v.E * v.size / v.tp),
        ("all_reduce", "backward", v.H * v.E * v.size),
    }
    assert "logits, for the aux loss" not in {c.why for c in v.block(Candidate(drop=True, drop_point="before_gate"))}


def test_memory_bound():
    """DeepSpeed-TED section 3: 6.7B base, 16 experts, 128 devices; and section 4's optimizer spike on 32."""
    values = dict(P=6.7e9, E=16, G=128)
    bound = [round(v.evaluate(v.MEMORY, values | {"tp": tp}) / 1e9, 1) for tp in (1, 2, 4, 8)]
    assert bound == [30.6, 17.2, 10.5, 7.1]
    assert v.evaluate(v.OPTIMIZER_SPIKE, values | {"G": 32}) / 1e9 == pytest.approx(4.47, abs=0.01)


def test_missing_values_are_named():
    with pytest.raises(ValueError, match="no value for H, K"):
        v.evaluate(v.T * v.H * v.K, dict(T=3))


def test_evaluation_is_that_of_sympy():
    for c in v.block(Candidate(dispatch="dedup", drop=True)):
        exact = c.bytes.subs({sympy.Symbol(k): x for k, x in VALUES.items()})
        assert math.isclose(v.evaluate(c.bytes, VALUES), float(exact), rel_tol=1e-12)


def test_formulas_are_the_bytes_of_the_graph():
    """Candidate() is TED's block without dropping: a Mixtral layer holds these, in these bytes."""
    transformers = pytest.importorskip("transformers")
    from tedcompile import explain

    from .models import COMMON, families

    config = transformers.MixtralConfig(**COMMON, **families(8)["mixtral"])
    plan = {"experts": "tensor", "dispatch": "all_to_all"}
    off = ["drop_duplicates", "simplify_collectives"]
    facts = explain(config, "ep=2,tp=2", seq=16, dtype=torch.float32, plan=plan, off=off)
    there: Counter[tuple] = Counter()
    for c in facts["collectives"]:
        if c["role"] in ("payload", "counts"):
            there[c["axis"], c["kind"], c["phase"], c["bytes_per_rank"], c["wire_bytes"]] += c["count"]
    values = dict(T=16, K=config.num_experts_per_tok, H=config.hidden_size, I=config.intermediate_size,
                  E=config.num_local_experts, tp=2, ep=2, bytes=4)  # fmt: skip
    number = lambda formula: round(v.evaluate(formula, values))
    ours: Counter[tuple] = Counter()
    for c in v.block(Candidate()):
        ours[c.axis, c.kind, c.phase, number(c.bytes), number(c.sent)] += config.num_hidden_layers
    assert {k: n for k, n in there.items() if k[0] == "ep"} == {k: n for k, n in ours.items() if k[0] == "ep"}
    assert all(there[key] >= n for key, n in ours.items())  # attention reduces over tp too


TED = dict(experts="tensor", dispatch="all_to_all")


def sent_by_a_layer(**options) -> dict[str, tuple[int, int]]:
    """(calls, bytes) by kind of collective, of one of two layers of Mixtral, counting what carries whole features."""
    model, make_batch = MODELS["mixtral"]()
    inputs = make_batch(0, 0)
    found: dict[str, list[int]] = {}
    rows = tedcompile.explain(model, "ep=2,tp=2", example_inputs=inputs, checkpoint="full", **options)["collectives"]
    for row in rows:
        if row["role"] == "payload" and "layers" in row["module"] and row["bytes_per_rank"] >= 32 * 64 * 4 // 2:
            calls = found.setdefault(row["kind"], [0, 0])
            calls[0] += row["count"]
            calls[1] += row["count"] * row["bytes_per_rank"]
    return {kind: (calls // 2, size // 2) for kind, (calls, size) in found.items()}


def test_all_to_alls_of_a_replayed_layer_are_teds():
    """6 + 6 collectives become 4 + 4, and a third of the bytes of the all-to-alls is left at tp 2 (arXiv 2303.06318,
    section 5). The replay leaves out the sum behind the experts, which begins the next layer: 5 all-reduces."""
    pytest.importorskip("transformers")
    off = ["simplify_collectives"]
    plain = sent_by_a_layer(off=[*off, "save_collectives"], plan=TED | {"drop": "no"})
    kept = sent_by_a_layer(off=off, plan=TED | {"drop": "no"})
    both = sent_by_a_layer(off=off, plan=TED | {"drop": "yes"})
    assert (plain["all_to_all"][0], plain["all_reduce"][0]) == (6, 5)
    assert (kept["all_to_all"][0], kept["all_reduce"][0]) == (4, 4)
    assert both["all_to_all"] == (4, plain["all_to_all"][1] // 3)
