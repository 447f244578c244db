"""The step and the evaluation on a CUDA device that is only imagined: no tensor on another device, no wait for it.

PyTorch's FakeTensorMode computes shapes, dtypes and devices without data. An operation whose operands are on different
devices raises an error, and so does one that needs the data on the host, for which a program would wait for the GPU.
Backward cannot run without a driver.
"""

from itertools import product

import pytest
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import engine
import utils
from confidence import RULES
from losses import Recipe
from models import build_model, channels_last, fold_batchnorm
from pseudo_labels import POLICIES, PseudoLabeller
from tests.trees import parse
from training.checkpoint import TrainState
from training.optimization import build_optimizer, build_scheduler, mixed_precision

CUDA, CLASSES, L, U = torch.device("cuda"), 10, 2, 6
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:Accessing the data pointer")


class Imagined(FakeTensorMode):
    """A mode under which CUDA tensors can be made; a copy of a tensor is of the same mode."""

    def __deepcopy__(self, memo):
        return self


@pytest.fixture(scope="module")
def imagined():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        # Without a GPU autocast and the gradient scaler would switch themselves off.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        yield Imagined()


def there(mode, x):
    """A tensor like x, or the module x with such tensors, on the device."""

    def moved(tensor):
        with mode:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CUDA)

    return x._apply(moved) if isinstance(x, torch.nn.Module) else moved(x)


def labeller(mode, policy="cnn", rule="fixed", align="none"):
    made = PseudoLabeller(
        policy, 0.7, 1.0, num_classes=CLASSES, rule=rule, align=align,
        shares=torch.full((CLASSES,), 0.1) if align == "shares" else None,
        images=torch.arange(20) if rule == "flex" else None)  # fmt: skip
    return there(mode, made)


def test_what_a_gpu_would_refuse_or_wait_for_is_an_error(imagined):
    with imagined:
        scores = torch.rand(3, device=CUDA)
        for waits in (scores.tolist, scores.sum().item, lambda: bool(scores[0] > 0)):
            with pytest.raises(DataDependentOutputException):
                waits()
        with pytest.raises(RuntimeError, match="device"):
            scores + torch.rand(3)


POLICY_AND_RULE = [(policy, "fixed", "none") for policy in POLICIES]
POLICY_AND_RULE += product(("cnn", "Vote_larger"), ("free", "flex", "ada"), ("none", "uniform", "shares", "labelled"))
POLICY_AND_RULE += product(("cnn",), ("soft",), ("none", "uniform", "shares", "labelled"))


@pytest.mark.parametrize("policy, rule, align", POLICY_AND_RULE)
def test_every_policy_and_rule_labels_there(imagined, policy, rule, align):
    assert {rule for _, rule, _ in POLICY_AND_RULE} == set(RULES)
    made = labeller(imagined, policy, rule, align)
    with imagined:
        logits, labelled = ([torch.rand(n, CLASSES, device=CUDA) for _ in range(2)] for n in (U, L))
        pseudo = made(logits, torch.arange(U, device=CUDA), labelled_logits=labelled)
        figures = [value for value, _ in made.level().values()]
        if rule == "free":
            figures.append(made.fairness(logits, pseudo.weights))
        assert all(x.device.type == "cuda" for x in (pseudo.targets, pseudo.weights, *figures))


@pytest.fixture(scope="module")
def step(imagined):
    """A function that computes a loss, then updates the weights with a gradient; returns the diagnosis."""
    plain = channels_last(build_model("Semiformer_micro_patch16", CLASSES, 32, drop_path=0.1))
    average = ModelEmaV3(plain, decay=0.9)
    model = there(imagined, plain.train())
    there(imagined, average.module)

    def run(*words, recipe=None, rule="fixed", align="none", teacher="student", mixup=None, clip_grad=None):
        args = parse("--opt", "adamw", "--lr", "1e-3", *words)
        made = labeller(imagined, rule=rule, align=align)
        with imagined:
            autocast, scaler, _ = mixed_precision(args.amp, CUDA)
            optimizer = build_optimizer(args, model)
            state = TrainState(model, optimizer, build_scheduler(args, optimizer), scaler, average, labeller=made)
            images, strong, weak = (torch.rand(n, 3, 32, 32, device=CUDA) for n in (L, U, U))
            labels, truth, index = (torch.zeros(n, dtype=torch.long, device=CUDA) for n in (L, U, U))
            network = average.module if teacher == "ema" else model
            recipe = recipe or Recipe()
            loss, parts, diagnosis = engine._loss(
                model, network, made, (images, labels), (strong, weak, truth, index), recipe, autocast,
                recipe.dual_consistency, mixup)  # fmt: skip
            assert {x.device.type for x in (loss, *parts.values())} == {"cuda"} and loss.dtype == torch.float32
            scaler.scale(loss)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            diagnosis |= engine._update(state, clip_grad, with_norm=True)
            assert {x.device.type for x, _ in diagnosis.values()} == {"cuda"}
        return diagnosis

    run.model = model
    return run


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("clip_grad", [None, 5.0])
def test_a_step_stays_there(step, amp, clip_grad):
    diagnosis = step("--amp", amp, clip_grad=clip_grad)
    assert "grad_norm" in diagnosis and ("skipped" in diagnosis) == (amp == "fp16")


CONSISTENT = Recipe(dual_consistency=True)


@pytest.mark.parametrize("more", [
    {"rule": "free", "align": "uniform", "recipe": Recipe(fairness_lambda=0.01), "teacher": "ema"},
    {"rule": "soft", "align": "labelled"}, {"rule": "flex"}, {"recipe": Recipe(pseudo_mixup=True)},
    {"recipe": Recipe(smoothing=0.1, unlabel_smooth=True)},
    *({"recipe": Recipe(dual_consistency=True, consistency_type=kind, anchor_type=anchor, dis_type=distance)}
      for kind, anchor, distance in (("triplet", "weak", "cos"), ("triplet", "both", "l2"),
                                     ("triplet", "strong", "cos"), ("infonce", "weak", "cos"),
                                     ("infonce", "both", "cos"))),
    *({"mixup": Mixup(0.8, 1.0, mode=mode, num_classes=CLASSES)} for mode in ("batch", "pair", "elem"))])  # fmt: skip
def test_the_parts_of_the_method_stay_there(step, more):
    step("--amp", "bf16", **more)


@pytest.mark.parametrize("folded", [False, True])
def test_an_evaluation_stays_there(imagined, step, monkeypatch, folded):
    monkeypatch.setattr(utils.Meters, "means_over_ranks", lambda meters: meters._sums)  # which are read at its end
    monkeypatch.setattr(utils.Meters, "count_over_ranks", lambda *_: 0)
    with imagined:
        model = fold_batchnorm(step.model) if folded else step.model
        batches = [(torch.rand(3, 3, 32, 32, device=CUDA), torch.zeros(3, dtype=torch.long, device=CUDA))] * 2
        meters = engine.evaluate(model, batches, autocast=mixed_precision("bf16", CUDA)[0])
    assert meters.pop("images") == 0 and {x.device.type for x in meters.values()} == {"cuda"}
