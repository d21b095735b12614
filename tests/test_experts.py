"""Checkpoints with other numbers of experts: what they compute, and that they train."""

import json

import pytest
import torch

from tedcompile import experts
from tedcompile.cli import main

from .models import hugging_face, plain

pytest.importorskip("transformers")
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]  # one by one and fused, with biases, in two kinds of routers


def save(family, folder, seed=0, **sizes):
    model, make_batch = hugging_face(family, num_hidden_layers=2, **sizes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    plain(model.eval()).save_pretrained(folder)
    return model, make_batch(0, 0)


def load(folder):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return plain(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_experts_are_those_of_both(family, tmp_path):
    """Experts and rows of routers side by side, the rest of the first one."""
    folders = [str(tmp_path / name) for name in "abc"]
    models = [save(family, folder, seed, experts=4)[0] for seed, folder in enumerate(folders[:2])]
    assert main(["experts", "merge", *folders[:2], "--out", folders[2]]) == 0
    merged = load(folders[2])
    split = 0
    for name, p in merged.named_parameters():
        a, b = (model.get_parameter(name) for model in models)
        split += p.shape != a.shape
        assert p.equal(a if p.shape == a.shape else torch.cat([a, b])), name
    assert split >= 3 * 2, "a router and two weights of experts in both layers"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pruned_experts_are_those_that_are_used(family, tmp_path, capsys):
    """A model of whose experts only some are ever chosen computes the same without the others."""
    model, batch = save(family, tmp_path / "a", experts=8)
    (tmp_path / "text.txt").write_bytes(bytes(i % 128 for i in range(600)))
    command = [
        "experts",
        "prune",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "b"),
        "--keep",
        "5",
        "--seq",
        "16",
        "--batches",
        "18",
    ]
    assert main([*command, "--data", str(tmp_path / "text.txt")]) == 0
    said = capsys.readouterr().out
    counts = experts.utilisation(str(tmp_path / "a"), [str(tmp_path / "text.txt")], 18, 16)
    whole, seen = load(tmp_path / "a"), {}
    for name, module in whole.named_modules():
        if name.endswith(".experts"):
            path = name.removesuffix(".experts")
            module.register_forward_pre_hook(
                lambda m, args, path=path: seen.update({path: args[1].flatten().bincount(minlength=8)})
            )
    whole(input_ids=torch.tensor([i % 128 for i in range(18 * 16)]).view(18, 16))
    assert counts.keys() == seen.keys() and len(counts) == 2
    assert all(counts[path].equal(seen[path]) for path in counts), "layer by layer as the whole model at once"
    pruned = load(tmp_path / "b")
    for number, (path, count) in enumerate(counts.items()):
        kept = count.argsort(descending=True, stable=True)[:5].sort().values
        assert f"{path}: experts {', '.join(map(str, kept.tolist()))}, " in said.splitlines()[number]
        for name, p in model.named_parameters():
            if name.startswith(path + ".") and p.shape[0] == 8:
                assert pruned.get_parameter(name).equal(p[kept]), name
    dense = [n for n, p in model.named_parameters() if p.shape[0] != 8]
    assert all(pruned.get_parameter(n).equal(model.get_parameter(n)) for n in dense) and dense
    assert pruned(**batch).loss.isfinite()


def test_experts_in_groups_stay_in_them(tmp_path, capsys):
    """A router that chooses groups first: each has as many experts of both, or keeps as many."""
    folders = [str(tmp_path / name) for name in "abcd"]
    models = [
        save("deepseek_v3", folder, seed, experts=4, n_group=2, topk_group=1) for seed, folder in enumerate(folders[:2])
    ]
    assert main(["experts", "merge", *folders[:2], "--out", folders[2]]) == 0
    merged, split = load(folders[2]), 0
    for name, p in merged.named_parameters():
        a, b = (model.get_parameter(name) for model, _ in models)
        split += p.shape != a.shape
        assert p.equal(a if p.shape == a.shape else torch.cat([a[:2], b[:2], a[2:], b[2:]])), name
    assert split
    assert main(["experts", "prune", folders[2], "--out", folders[3], "--keep", "4", "--by", "random"]) == 0
    kept = [
        [int(n) for n in line.rpartition("experts ")[2].split(",")]
        for line in capsys.readouterr().out.splitlines()
        if "experts " in line and ", " in line
    ]
    assert kept and all(sum(n < 4 for n in numbers) == 2 == sum(n >= 4 for n in numbers) for numbers in kept), kept
    assert load(folders[3])(**models[0][1]).loss.isfinite()
    assert main(["experts", "prune", folders[2], "--out", folders[3], "--keep", "5", "--by", "random"]) == 2
    assert "routes in 2 groups of experts, give a multiple of 2" in capsys.readouterr().err


def test_results_train_and_wrong_calls_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("mixtral", tmp_path / "a", experts=4)
    save("mixtral", tmp_path / "b", seed=1, experts=4)
    save("qwen3_moe", tmp_path / "q", experts=4)
    assert main(["experts", "merge", "a", "b", "--out", "c", "--dense", "mean"]) == 0
    assert main(["experts", "prune", "c", "--out", "d", "--keep", "6", "--by", "random", "--seed", "3"]) == 0
    assert json.loads((tmp_path / "d" / "config.json").read_text())["num_local_experts"] == 6
    (tmp_path / "text.txt").write_text("some words, and some more. " * 40)
    options = "--data text.txt --tokenizer bytes --seq 16 --dtype fp32 --device cpu --backend eager --steps 2 --lr 1e-2"
    capsys.readouterr()
    assert main(["train", "--model", "d", *options.split(), "--log-every", "1"]) == 0
    assert "step 2/2" in capsys.readouterr().out
    for command, text in {
        "merge a": "experts merge takes 2 folders, not 1",
        "merge a q": "a is a MixtralForCausalLM, q a Qwen3MoeForCausalLM",
        "merge a none": "there is no folder none",
        "merge a b --dense sum": "--dense cannot be 'sum'",
        "prune a --keep 1": "--keep 1: a has 4 experts, of which a token uses 2",
        "prune a --keep 4": "--keep 4: a has 4 experts",
        "prune a": "needs --keep",
        "prune a --keep 3": "--by utilisation needs --data",
    }.items():
        assert main(["experts", *command.split(), "--out", "e"]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert not (tmp_path / "e").exists()
