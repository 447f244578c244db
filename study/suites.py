"""The named runs of the study: for each suite, {name: flags of semi_main.py}."""

VALIDATION = 2000  # training images that --tune keeps apart
COMMON = """--data-set FASHION --input-size 64 --amp bf16 --warmup-epochs 0 --mixup 0 --cutmix 0
    --no-repeated-aug --smoothing 0 --drop-path 0 --num_workers 0"""
SUPERVISED = "--supervise-only --batch-size 8"  # the labelled images of a step with pseudo labels
NETWORKS = {  # within 20 % of one another in parameters
    "semiformer": "--model Semiformer_micro_patch16 --lr 1e-3",
    "cnn": "--model conv_micro --lr 1e-3",
    "vit": "--model deit_micro_patch16_224 --lr 1e-3",
}
# What each flag must change besides the accuracy: meters of the log, or entries of run.json.
POLICIES = """transformer fuse softmax_fuse Vote_equal Vote_cnnBias Vote_larger Vote_larger2 Vote_equal2 weight_v1
    weight_v2 weight_v3 weight_v4 weight_v5 weight_v6""".split()
PSEUDO = ("train_mask_rate", "train_loss_0_u", "train_loss_1_u")
CHANGES = {  # name: (flags, quantities that must differ from the baseline's)
    **{f"policy-{name}": (f"--pseudo-type {name}", PSEUDO) for name in POLICIES},
    "no-fusion": ("--remove-fcu", ("train_loss_0", "train_loss_1")),
    "threshold": ("--threshold 0.5", ("train_mask_rate",)),
    "mu": ("--mu 0.125", ("labelled", "unlabelled")),
    "lambda": ("--semi-lambda 4", ("train_loss",)),
    "smoothing": ("--smoothing 0.1", ("train_loss_0", "train_loss_1")),
    "unlabelled-smoothing": ("--smoothing 0.1 --unlabel-smooth", ("train_loss_0_u", "train_loss_1_u")),
    "ema": ("--model-ema-decay 0.9", ("test_ema_acc1", "test_ema_loss")),
    "consistency-triplet": ("--dual-consistency", ("train_loss_consistency",)),
    "consistency-infonce": ("--dual-consistency --consistency-type infonce", ("train_loss_consistency",)),
    "position-embedding": ("--model Semiformer_PE_micro_patch16", ("n_parameters",)),
    "labelled-excluded": ("--unlabelDataset_exclude_labeledData", ("unlabelled_images",)),
}
BASE = f"""{COMMON} --epochs 30 --steps-per-epoch 100 --evaluate-freq 5 --model-ema-decay 0.99 --batch-size 16 --mu 0.25
    --threshold 0.9 --semi-lambda 1 {NETWORKS["semiformer"]}"""
ABLATION = {"baseline": BASE} | {name: f"{BASE} {flags}" for name, (flags, _) in CHANGES.items()}
# The temperature is so low that an untrained network is confident of some images. The log has a line every five steps.
BRIEF = "--epochs 4 --steps-per-epoch 5 --evaluate-freq 1 --batch-size 16 --temperature 0.15 --threshold 0.7"
SMOKE = {"baseline": f"{BASE} {BRIEF}"} | {name: f"{BASE} {BRIEF} {flags}" for name, (flags, _) in CHANGES.items()}

# ------------------------------------------------------------------------------- the methods after 2022

FEW = "--epochs 30 --steps-per-epoch 50 --evaluate-freq 10"  # 1,500 steps
SHARED = f"{COMMON} {FEW} {NETWORKS['semiformer']} --batch-size 16 --mu 0.25"


def method(flags, ema=False):
    """The flags of a run of 1,500 steps with pseudo labels; without `ema` no average is kept, which takes time."""
    return f"{SHARED} {'' if ema else '--no-model-ema '}{flags}"


# The average of FreeMatch and the like moves with 0.999 over thousands of steps; these runs have 1,500.
LEARNED = "--confidence-momentum 0.99 --semi-lambda 1"
CANDIDATES = {  # name: (flags, whether it needs the average)
    "fixed-0.9": ("--threshold 0.9 --semi-lambda 1", False),
    "fixed": ("--threshold 0.95 --semi-lambda 1", False),
    "flex": ("--confidence flex --threshold 0.95 --semi-lambda 1", False),
    "free": (f"--confidence free --fairness-lambda 0.01 {LEARNED}", False),
    "soft": (f"--confidence soft --align uniform {LEARNED}", False),
    "ada": (f"--confidence ada --align labelled --threshold 0.9 {LEARNED}", False),
    "teacher": ("--teacher ema --model-ema-decay 0.99 --threshold 0.9 --semi-lambda 1", True),
    "pseudo-mixup": ("--pseudo-mixup --threshold 0.9 --semi-lambda 1", False),
    "soft-teacher": (f"--confidence soft --align uniform --teacher ema --model-ema-decay 0.99 {LEARNED}", True),
}
SOFT, _ = CANDIDATES["soft"]
VARIANTS = {  # of soft-wide
    "labelled-strong": "--labelled-view strong",
    "fuse": "--pseudo-type fuse",
    "from-4": "--semi-start-epoch 4",
    "lambda-2": "--semi-lambda 2",
    "regularised": "--drop-path 0.1 --smoothing 0.1",
    "lr-2e-3": "--lr 2e-3",
    "lr-5e-4": "--lr 5e-4",
}
WIDE = "--batch-size 32 --epochs 20"
# Every trial of the search for settings; it is run on kept-apart training images only (--tune).
TRIALS = {
    "supervised": f"{COMMON} {FEW} --no-model-ema {NETWORKS['semiformer']} {SUPERVISED}",
    "fixed-lambda-10": method("--threshold 0.95"),
    **{name: method(*settings) for name, settings in CANDIDATES.items()},
    **{  # pseudo labels begin after 500 supervised steps
        f"{name}-from-10": method(f"{flags} --semi-start-epoch 10", ema) for name, (flags, ema) in CANDIDATES.items()
    },
    # 1,000 steps of 8 labelled and 24 unlabelled images
    "supervised-wide": f"{COMMON} {FEW} --no-model-ema {NETWORKS['semiformer']} {SUPERVISED} --epochs 20",
    **{f"{name}-wide": method(f"{flags} {WIDE}", ema) for name, (flags, ema) in CANDIDATES.items()},
    **{f"soft-wide-{name}": method(f"{SOFT} {WIDE} {flags}") for name, flags in VARIANTS.items()},
}

# ------------------------------------------------------------------------------- the comparison, on test images

LENGTH = "--epochs 20 --steps-per-epoch 50 --evaluate-freq 7"  # 1,000 steps; an evaluation costs as much as 100
PUBLISHED, RECIPE = CANDIDATES["fixed-0.9"], CANDIDATES["soft-teacher"]
LATER = ("flex", "free", "soft", "ada", "teacher", "pseudo-mixup")  # of CANDIDATES


def comparison(common):
    """The runs that are compared on a data set, whose flags are `common`; the first are of Semiformer."""

    def learning(network, flags, ema=False):
        average = "" if ema else "--no-model-ema"
        return f"{common} {LENGTH} {NETWORKS[network]} {average} --batch-size 32 --mu 0.25 {flags}"

    runs = {"supervised": learning("semiformer", SUPERVISED), "published": learning("semiformer", *PUBLISHED)}
    for name in LATER:
        runs[name] = learning("semiformer", *CANDIDATES[name])
    runs["recipe"] = learning("semiformer", *RECIPE)
    for network in ("cnn", "vit"):
        runs[f"{network}-supervised"] = learning(network, SUPERVISED)
        runs[f"{network}-published"] = learning(network, *PUBLISHED)
        runs[f"{network}-recipe"] = learning(network, *RECIPE)
    return runs


METHODS = comparison(COMMON)
# Colour pictures in the layout of ImageNet, with the views of ImageNet.
PICTURES = comparison(COMMON.replace("--data-set FASHION", "--data-set SEMI-IMNET"))
CLIPART = {name: PICTURES[name] for name in ("supervised", "published", "recipe")}
CLIPART_TRIALS = CLIPART | {"published-0.7": f"{PICTURES['published']} --threshold 0.7"}

LABELS = {"trials": 40, "methods": 40, "clipart-trials": 80, "clipart": 80, "ablation": 100, "smoke": 100}
TUNED = ("trials", "clipart-trials")  # suites that are evaluated on kept-apart training images alone
SUITES = {
    "trials": TRIALS,
    "methods": METHODS,
    "clipart-trials": CLIPART_TRIALS,
    "clipart": CLIPART,
    "ablation": ABLATION,
    "smoke": SMOKE,
}
