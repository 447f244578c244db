"""benchmarks/benchmark.py: the proof finds what changes the function, calls alternate, tables are complete."""

import re
import socket
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import benchmark, interleaved, variants
from benchmarks import published_formulation as published
from tests.trees import forked, ranks

objective = published.objective


@pytest.fixture
def quick():
    threads = torch.get_num_threads()
    yield benchmark.with_defaults(benchmark.get_parser().parse_args(["--quick", "--threads", "1"]))
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------- the proof


def test_published_and_ours_compute_the_same(quick):
    figures = [float(figure) for figure in re.findall(r"\d+e-\d+", variants.prove(quick))]
    assert len(figures) == 5 and 0 < max(figures) < 1e-8


def test_the_published_formulation_has_no_optimization_and_our_state_dict(quick):
    ours = variants.network(quick)
    theirs = published.as_published(ours)
    replaced = {kind for parts in published.PARTS.values() for kind in parts}
    assert {type(module) for module in ours.modules()} >= replaced
    assert not {type(module) for module in theirs.modules()} & replaced
    assert theirs.conv1.weight.is_contiguous() and not ours.conv1.weight.is_contiguous()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a.equal(b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    optimizer = published.adamw(variants.flags("--lr", "1e-3", "--weight-decay", "0.05"), theirs)
    assert all(not group["fused"] and group["foreach"] is False for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.05]


@pytest.mark.parametrize("optimization", [*published.PARTS, "channels_last"])
def test_one_optimization_alone_is_that_one(quick, optimization):
    model = published.as_published(variants.network(quick), (optimization,))
    kinds = {type(module) for module in model.modules()}
    for name, parts in published.PARTS.items():
        assert kinds >= set(parts if name == optimization else parts.values())
    assert model.conv1.weight.is_contiguous() == (optimization != "channels_last")


def _sharper(self, x, **_):
    return published.Attention.forward(self, x) * 1.000001


def _max_pool(self, x, class_token):
    x = F.max_pool2d(self.conv_project(x), self.stride).flatten(2).transpose(1, 2)
    return torch.cat([class_token, F.gelu(self.ln(x))], dim=1)


def _transposed(self, tokens, grid):
    return published.FCUUp.forward(self, tokens, grid).transpose(2, 3)


def _no_decay(args, model):
    return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)


def _never(policy, conv, trans):
    return 0, 0.0


@pytest.mark.parametrize(
    "owner, name, mutant, words",
    [
        (published.ExplicitAttention, "forward", _sharper, "loss parts differ"),
        (published.ConvThenPool, "forward", _max_pool, "loss parts differ"),
        (published.ConvOnMap, "forward", _transposed, "loss parts differ"),
        (published, "objective", lambda *given: [2 * x if torch.is_tensor(x) else x for x in objective(*given)],
         "gradients differ"),
        (published, "adamw", _no_decay, "parameters and statistics differ"),
        (published.PerTensorEma, "update", lambda self, model: None, "averages differ"),
        (published, "arbitrate", _never, "differ|labels other images"),
    ],
)  # fmt: skip
def test_the_proof_finds_what_changes_the_function(quick, monkeypatch, owner, name, mutant, words):
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(ValueError, match=words):
        variants.prove(quick)


def test_the_proof_finds_a_fold_that_changes_the_function(quick, monkeypatch):
    def leave_out(network):
        copy = published.as_published(network)
        copy.bn1 = nn.Identity()
        return copy

    monkeypatch.setattr(variants.models, "fold_batchnorm", leave_out)
    with pytest.raises(ValueError, match="evaluation logits differ"):
        variants.prove(quick)


# -------------------------------------------------------------------------------- the clock


def test_calls_go_in_turn_and_the_warm_up_does_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved.measure(calls, rounds=3, warmup=2, device=torch.device("cpu"))
    assert "".join(order) == "abc" * 5
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys("abc", 3)


def test_a_line_has_medians_quartiles_ratio_and_images_a_second(quick, monkeypatch):
    took = {"old": iter([9, 0.1, 0.3, 0.2, 0.4, 0.5]), "new": iter([9, 0.1, 0.1, 0.15, 0.1, 0.1])}
    monkeypatch.setattr(interleaved, "clock", lambda call, *_, **__: next(took[call()]))
    quick.rounds = 5
    calls = {"published": lambda: "old", "ours": lambda: "new"}
    lines = [interleaved.Line("x", "published", "ours", 1.5), interleaved.Line("y", "published", "ours bf16", 2)]
    rows = interleaved.table(lines, calls, quick, images=4).splitlines()[2:]
    assert rows[0] == "| x | 300 (200-400) | 100 (100-100) | **3.00** | 1.5 | 40 |"
    assert rows[1] == "| y | not run: no avx512_bf16 | | | 2 | |"


def test_idle_share_by_hand():
    assert interleaved.idle_share([(0, 4), (6, 10)]) == pytest.approx(0.2)
    assert interleaved.idle_share([(5, 10), (0, 6), (1, 2)]) == 0.0  # overlapping, nested, out of order


def test_a_profile_names_the_kernels(quick):
    a = torch.randn(64, 64)
    rows = interleaved.profiled(lambda: a @ a @ a, quick).splitlines()[2:]
    name, calls, *_, share = rows[0].strip("| ").split(" | ")
    assert (name, calls) == ("`aten::mm`", "2") and 0 < float(share.rstrip("%")) <= 100


# -------------------------------------------------------------------------------- the parts


def rows(markdown):
    """{first cell: [other cells]} of all tables."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines if name.strip()}


def ratio(cells):
    return float(cells[2].strip("*"))


def test_train_without_bf16(quick, monkeypatch):
    monkeypatch.setattr(benchmark, "has_bf16", lambda device: False)
    quick.rounds, quick.warmup = 1, 0
    found = rows(benchmark.train(quick))
    assert [found[name][3] for name in ("fp32", "bf16", "bf16 `--compile`")] == ["1.2", "1.85", "2.4"]
    assert found["bf16"][0] == found["bf16 `--compile`"][0] == found["bf16 alone"][0] == "not run: no avx512_bf16"
    optimizations = ("pool first", "channels_last", "SDPA", "compile", "fused AdamW", "foreach EMA")
    assert all(ratio(found[f"{optimization} alone"]) > 0 for optimization in optimizations) and ratio(found["fp32"]) > 0


def test_two_ranks_measure_the_step_under_ddp_and_the_first_prints():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ["ddp", "--quick", "--rounds", 1, "--threads", 1, "--rank"]
    first, second = forked("benchmarks.benchmark", *words, environments=[env | meeting for env in ranks(2)])
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert "| alone, ms | under DDP, ms | alone / under DDP |" in first.stdout
    found = rows(first.stdout)
    assert list(found) == ["fp32", "bf16", "bf16 --compile"] and ratio(found["fp32"]) > 0


def test_eval_has_both_precisions(quick, monkeypatch):
    monkeypatch.setattr(benchmark, "has_bf16", lambda device: True)
    found = rows(benchmark.evaluation(quick))
    assert (found["fp32"][3], found["bf16"][3]) == ("1.7", "3.3")
    assert {
        f"{optimization} alone" for optimization in ("pool first", "SDPA", "channels_last", "folded", "bf16")
    } <= set(found)
    assert all(ratio(cells) > 0 for cells in found.values())


def test_data_has_every_backend(quick):
    found = rows(benchmark.data(quick))
    assert [cells[3] for cells in found.values()] == ["1.9", "1.7", "1"]
    assert all(ratio(cells) > 0 for cells in found.values())


def test_other_views_are_found(quick, monkeypatch):
    monkeypatch.setattr(published.PillowToFloat, "__call__", lambda self, path: (torch.zeros(3, 32, 32),) * 2)
    with pytest.raises(ValueError, match="--data-backend pil differ"):
        benchmark.data(quick)


def test_policies_are_all_eleven(quick):
    found = rows(benchmark.policies(quick))
    assert len(found) == 11 and all(cells[3] == "5" and ratio(cells) > 0 for cells in found.values())


def test_optimizer_has_both(quick):
    found = rows(benchmark.optimizer(quick))
    assert {name: cells[3] for name, cells in found.items()} == {"AdamW": "2.3", "EMA": "2.2"}


def test_memory_is_measured_in_a_process_of_its_own(quick, monkeypatch):
    monkeypatch.setattr(benchmark, "MEMORY", {"published fp32": 1.0})
    ((megabytes, share, most),) = rows(benchmark.memory(quick)).values()
    # Weights, gradients, moments and average of the micro network: five times 8.2 MB, and what a step adds.
    assert float(megabytes) > 40 and share == "**1.00**" and most == "1.0"


def test_memory_lists_every_variant():
    assert list(benchmark.MEMORY.values()) == [1.0, 0.92, 0.70, 0.62, 0.52]
    assert set(benchmark.MEMORY) <= set(benchmark.VARIANTS)


def test_the_report_is_appended(monkeypatch, tmp_path, capsys):
    report = tmp_path / "benchmarks.md"
    report.write_text("before\n")
    words = ["benchmark.py", "optimizer", "--quick", "--threads", "1", "--output", str(report)]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    text = report.read_text()
    assert text.startswith("before\n\n") and "### Optimizer" in text and "Both compute the same" in text
    assert capsys.readouterr().out == "" and f"torch {torch.__version__}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="it says that there is no GPU")
def test_a_missing_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", "--device", "cuda"])
    with pytest.raises(SystemExit, match="^benchmark.py: error: --device cuda, but PyTorch sees no CUDA GPU here"):
        benchmark.main()
