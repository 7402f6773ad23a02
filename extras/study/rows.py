"""What the study runs: the rows of its tables. study.py trains them, results.py prints them."""

from dataclasses import dataclass

@dataclass(frozen=True)
class Row:
    """A row of a table: how its student is pre-trained and fine-tuned.

    method: a --target of extras/targets.py, learnt from block 5 of the teacher's 6 unless options
    say otherwise (output: from block 6), or mae, scratch (the student by itself), or teacher (which
    is fine-tuned itself). paper: top-1 on ImageNet, of a ViT-B, in Tables 8 and 11 of a ViT-T.
    """
    table: str
    name: str
    method: str
    pairs: str = ""  # --relations
    options: tuple = ()  # more options of targets.py
    epochs: int = 3
    network: str = "student"
    depth: int = 4  # its blocks
    by_assistant: bool = False  # ASSISTANT teaches it, instead of the teacher
    new_end: bool = False  # what follows the last block's q, k and v is new when fine-tuning starts
    few_epochs: int = 20  # of fine-tuning on a tenth of the labels
    all_epochs: int = 5
    paper: float | None = None

    @property
    def key(self):
        """Names what is trained, in results and folders: rows of two tables can be the same."""
        words = [self.method, *self.pairs.split(), *(word.strip("-") for word in self.options)]
        words += ["assistant"] * (self.network == "assistant")
        words += ["by-assistant"] * self.by_assistant + ["new-end"] * self.new_end
        words += [f"{self.depth}-blocks"] * (self.depth != 4)
        words += [f"epochs-{self.epochs}"] * (self.epochs > 0)
        return "-".join(words)

def mae_epochs(epochs):
    """For as much computing as `epochs` of distillation, without the teacher's own training."""
    return round(epochs * 10 / 3)

LENGTHS = 1, 3, 10, 30  # epochs of distillation
CURVES = {
    "relations": [Row("length", f"relation (qk vv), epochs: {n}", "relation", "qk vv", epochs=n)
                  for n in LENGTHS],
    "features": [Row("length", f"feature, epochs: {n}", "output", epochs=n) for n in LENGTHS],
    "MAE": [Row("length", f"MAE, epochs: {n}", "mae", epochs=n) for n in map(mae_epochs, LENGTHS)],
}
ALL = "qq kk vv"
ASSISTANT = Row("", "between teacher and student", "relation", ALL, network="assistant", depth=5)
ROWS = (  # a table's first row is what its others are compared with
    Row("T5", "MAE", "mae", epochs=mae_epochs(3), paper=83.6),
    Row("T5", "class token", "cls", paper=80.6),
    Row("T5", "class token, and MAE's loss", "cls", options=("--mae",), paper=82.1),
    Row("T6", "Q/K/V", "qkv", paper=84.3),
    Row("T6", "FFN", "ffn", paper=84.2),
    Row("T6", "attention", "attention", paper=84.1),
    Row("T6", "output", "output", paper=83.7),
    Row("T6", "FFN after the residual", "ffn-after", paper=81.8),
    Row("T6", "attention after the residual", "attention-after", paper=81.3),
    Row("T7", "qk vv", "relation", "qk vv", paper=84.6),
    Row("T7", "qk vv without softmax", "logit", "qk vv", paper=84.4),
    Row("T7", "qq kk vv", "relation", ALL, paper=84.5),
    Row("T7", "qq kk vv without softmax", "logit", ALL, paper=84.4),
    Row("T8", "relation (qk vv)", "relation", "qk vv", paper=75.8),
    Row("T8", "relation (qq kk vv)", "relation", ALL),
    Row("T8", "feature", "output", paper=73.4),
    Row("T8", "class token", "cls", paper=70.6),
    Row("T8", "MAE", "mae", epochs=mae_epochs(3), paper=71.6),
    # As many updates as MAE's 10 epochs and fine-tuning have in all. An epoch of MAE has half those
    # of one of fine-tuning on all labels, and five times those of one on a tenth.
    Row("T8", "scratch", "scratch", epochs=0, few_epochs=20 + 50, all_epochs=5 + 5, paper=72.2),
    Row("T8", "the teacher itself", "teacher", epochs=0),
    # Of 6 blocks, 3, 4, 5 and 6 stand for the paper's 12, 15, 21 and 24 of 24.
    Row("T10", "block 5", "relation", ALL, paper=84.8),
    Row("T10", "block 6", "relation", ALL, ("--teacher-block", "6"), paper=84.4),
    Row("T10", "block 4", "relation", ALL, ("--teacher-block", "4"), paper=84.1),
    Row("T10", "block 3", "relation", ALL, ("--teacher-block", "3"), paper=83.6),
    Row("T11", "teacher → assistant → student", "relation", ALL, by_assistant=True, paper=75.0),
    Row("T11", "teacher → student", "relation", ALL, paper=74.4),
    Row("T12", "raw input", "relation", ALL, paper=84.6),
    Row("T12", "75% masked", "relation", ALL, ("--mask-ratio", "0.75"), paper=83.9),
    Row("T12", "75% masked, and MAE's loss", "relation", ALL, ("--mask-ratio", "0.75", "--mae"),
        paper=84.0),
    Row("T13", "drop path 0.1", "relation", ALL, paper=84.6),
    Row("T13", "drop path 0", "relation", ALL, ("--drop-path", "0"), paper=84.3),
    Row("T13", "drop path 0.2", "relation", ALL, ("--drop-path", "0.2"), paper=84.3),
    Row("T13", "drop path 0.3", "relation", ALL, ("--drop-path", "0.3"), paper=84.1),
    Row("T13", "drop path 0.1, and of the teacher", "relation", ALL, ("--teacher-drop-path", "0.1"),
        paper=83.9),
    # Hypothesis 1: relations converge more slowly.
    *(row for rows in CURVES.values() for row in rows),
    # Hypothesis 2: relations that say more about the photo teach better.
    Row("content", "qk vv", "relation", "qk vv"),
    Row("content", "qq kk vv", "relation", ALL),
    Row("content", "vv", "relation", "vv"),
    Row("content", "qk", "relation", "qk"),
    Row("content", "qq kk", "relation", "qq kk"),
    Row("content", "vv, 10 epochs", "relation", "vv", epochs=10),
    *(Row("content", f"vv, block {block}", "relation", "vv", ("--teacher-block", block))
      for block in "2346"),
    # Hypothesis 3: of 12 blocks, relations leave a twelfth half trained; of 4 blocks, a quarter.
    Row("depth", "relation (qk vv), 12 blocks", "relation", "qk vv", depth=12),
    Row("depth", "feature, 12 blocks", "output", depth=12),
    # Hypothesis 4: both from the same start of the last block, features from block 5, too.
    Row("end", "relation (qk vv)", "relation", "qk vv", epochs=10, new_end=True),
    Row("end", "feature of block 5", "output", "", ("--teacher-block", "5"), 10, new_end=True),
    Row("end", "feature", "output", epochs=10, new_end=True),
    Row("end", "feature of block 5, end not new", "output", "", ("--teacher-block", "5"), 10),
    Row("end", "feature, 30 epochs", "output", epochs=30, new_end=True),
)

# --blr of pre-training and of fine-tuning. They were chosen with an earlier teacher, in one seed,
# by 5,000 held-out training photos: from eight pairs after one epoch of distillation (MAE: three)
# and ten of fine-tuning, from eight rates for scratch and three for the teacher.
RATES = {
    "relation": (1.6e-2, 8e-3),  # chosen with qq kk vv
    "logit": (1.6e-2, 8e-3),  # relation's
    "output": (1.6e-2, 8e-3),  # and so for all features
    "cls": (4e-3, 1.6e-2),
    "mae": (4e-3, 1.6e-2),
    "scratch": (0, 2e-3),
    "teacher": (0, 8e-3),
}

def rates(row):
    return RATES.get(row.method, RATES["output"])
