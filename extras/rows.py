"""What study.py runs: the rows of its tables, and the learning rates of each method."""

LENGTHS = 1, 3, 10, 30  # epochs of distillation
CURVES = {"relation (qk vv)": "--relations qk vv", "relation (vv)": "--relations vv",
          "feature": "--target output", "MAE": "mae"}
# Table, row, how its student is pre-trained (options of targets.py, or words), top-1 in the paper
# (ViT-B; in Tables 8 and 11 ViT-T). A table's first row is what the others are compared with. The
# teacher has 6 blocks: 3, 4, 5 and 6 stand for the paper's 12, 15, 21 and 24 of 24. Words: mae and
# scratch train the student itself, deep is a student of 12 blocks, new-end starts fine-tuning from
# a last block that is new after its q, k and v, as it is after relations.
ROWS = (
    ("T8", "relation (qk vv)", "--relations qk vv", 75.8),
    ("T8", "relation (qq kk vv)", "", None),
    ("T8", "feature", "--target output", 73.4),
    ("T8", "class token", "--target cls", 70.6),
    ("T8", "MAE", "mae", 71.6),
    ("T8", "scratch", "scratch", 72.2),
    ("T8", "the teacher itself", "teacher", None),
    ("T10", "block 5", "", 84.8),
    ("T10", "block 6", "--teacher-block 6", 84.4),
    ("T10", "block 4", "--teacher-block 4", 84.1),
    ("T10", "block 3", "--teacher-block 3", 83.6),
    ("T12", "raw input", "", 84.6),
    ("T12", "75% masked", "--mask-ratio 0.75", 83.9),
    ("T12", "75% masked, and MAE's loss", "--mask-ratio 0.75 --mae", 84.0),
    ("T13", "drop path of teacher 0, student 0.1", "", 84.6),
    ("T13", "drop path of teacher 0, student 0", "--drop-path 0", 84.3),
    ("T13", "drop path of teacher 0, student 0.2", "--drop-path 0.2", 84.3),
    ("T13", "drop path of teacher 0, student 0.3", "--drop-path 0.3", 84.1),
    ("T13", "drop path of teacher 0.1, student 0.1", "--teacher-drop-path 0.1", 83.9),
    ("T7", "qk vv", "--relations qk vv", 84.6),
    ("T7", "qk vv without softmax", "--relations qk vv --target logit", 84.4),
    ("T7", "qq kk vv", "", 84.5),
    ("T7", "qq kk vv without softmax", "--target logit", 84.4),
    ("T6", "Q/K/V", "--target qkv", 84.3),
    ("T6", "FFN", "--target ffn", 84.2),
    ("T6", "attention", "--target attention", 84.1),
    ("T6", "output", "--target output", 83.7),
    ("T6", "FFN after the residual", "--target ffn-after", 81.8),
    ("T6", "attention after the residual", "--target attention-after", 81.3),
    ("T5", "MAE", "mae", 83.6),
    ("T5", "class token", "--target cls", 80.6),
    ("T5", "class token, and MAE's loss", "--target cls --mae", 82.1),
    ("T11", "teacher → assistant → student", "--teacher assistant", 75.0),
    ("T11", "teacher → student", "", 74.4),
    # Hypothesis 1: relations converge more slowly. MAE has 10/3 of the epochs: as much to compute.
    *(("length", f"{name}, {epochs} epoch{'s' * (epochs > 1)}", f"{spec} --epochs {epochs}", None)
      for epochs in LENGTHS for name, spec in CURVES.items()),
    # Hypothesis 2: relations that say more about the photo teach better. The teacher's block is 5.
    *(("content", pairs, f"--relations {pairs} --epochs 3", None)
      for pairs in ("qk vv", "qq kk vv", "vv", "qk", "qq kk")),
    *(("content", f"vv, block {block}", f"--relations vv --teacher-block {block} --epochs 3", None)
      for block in (2, 3, 4, 6)),
    # Hypothesis 3: of 12 blocks, relations leave a twelfth half trained; of 4 blocks, a quarter.
    ("depth", "relation (qk vv), 12 blocks", "deep --relations qk vv --epochs 3", None),
    ("depth", "relation (vv), 12 blocks", "deep --relations vv --epochs 3", None),
    ("depth", "feature, 12 blocks", "deep --target output --epochs 3", None),
    # Hypothesis 4: both from the same start of the last block, features from block 5.
    ("end", "relation (qk vv)", "--relations qk vv --epochs 10 new-end", None),
    ("end", "feature of block 5", "--target output --teacher-block 5 --epochs 10 new-end", None),
    # And what of it matters: features from the output, and of block 5 with the end they trained.
    ("end", "feature", "--target output --epochs 10 new-end", None),
    ("end", "feature of block 5, end not new", "--target output --teacher-block 5 --epochs 10",
     None),
    ("end", "feature, 30 epochs", "--target output --epochs 30 new-end", None),
)
# A method, the row by which --tune tunes it, and the rates that it has without: of pre-training and
# of fine-tuning, the best for CIFAR-10 (extras/README.md has all that were tried; logit: none).
METHODS = {
    "relation": ("", (1.6e-2, 8e-3)),
    "logit": ("--target logit", (1.6e-2, 8e-3)),
    "feature": ("--target output", (1.6e-2, 8e-3)),
    "cls": ("--target cls", (4e-3, 1.6e-2)),
    "mae": ("mae", (4e-3, 1.6e-2)),
    "scratch": ("scratch", (0, 2e-3)),
    "teacher": ("teacher", (0, 8e-3)),
}

def method_of(spec):
    """Rows of one method share their learning rates."""
    for name in ("mae", "scratch", "teacher", "cls", "logit"):
        if name in spec.split():
            return name
    return "feature" if "--target" in spec else "relation"

def rates_to_try(method, found, epochs):
    """--blr of pre-training and of fine-tuning: eight pairs, three for the teacher, or with
    --tune-epochs three: the best, and half and twice its rate of pre-training."""
    if epochs > 1:
        pretraining, fine = best_rates(method, found)
        return [(pretraining * factor, fine) for factor in (1, 0.5, 2)]
    if method in ("scratch", "teacher"):
        return [(0, 1e-3 * 2**i) for i in ((1, 2, 3) if method == "teacher" else range(-1, 7))]
    usual = 2e-3 if method == "mae" else 4e-3
    tries = [(1, 4e-3), (1, 8e-3), (1, 1.6e-2), (2, 1.6e-2), *((x, 8e-3) for x in (0.5, 2, 4, 8))]
    return [(usual * factor, fine) for factor, fine in tries]

def tune_key(method, rates, epochs=1):
    """The key of a result of --tune."""
    tune = "tune" if epochs == 1 else f"tune{epochs}"
    return f"{tune}/{method}/{rates[0]:g} {rates[1]:g}"

def best_rates(method, found):
    """Those with the best result of --tune, if it is finished, else the best for CIFAR-10."""
    tries = {rates: found.get(tune_key(method, rates))
             for rates in rates_to_try(method, found, epochs=1)}
    if None in tries.values():  # --tune was not finished
        return METHODS[method][1]
    return max(tries, key=lambda rates: tries[rates]["top1"])
