"""The paper's questions at small scale: what to distil from a teacher, and how, on any folder of labelled images.

    python extras/study.py --data /path/to/cifar10        (train/ and val/, with a folder of images for each class in both)
    python extras/study.py --data /path/to/cifar10 --smallest          (a trial of every row, in a minute and on a CPU)

For every seed: a teacher is pre-trained by MAE, students learn from it in the ways of TABLE, each is fine-tuned, and its top-1
on val/ after the last epoch counts: the best epoch would be chosen by the very images that measure it. Rows that need the same
network share it. A stop costs no more than the epoch at hand: finished students are in OUT/results.json, and what is half
done goes on in its folder. At the end a Markdown table is printed.
"""

import json
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import tinymim  # the first: it says what is not installed

import torch
from torchvision.datasets.folder import is_image_file

import finetune

NETWORKS = {"teacher": (192, 12, 8), "assistant": (128, 12, 8), "student": (64, 12, 4)}  # width, depth, heads
TEACHERS = {"teacher": "--target pixel", "assistant": ""}  # how they are pre-trained themselves

# The published learning rate, 1.5e-4 for each 256 images, is for batches of 4096. At a sixteenth of that the rate for AdamW
# goes down with the square root only: to a quarter of 16 x 1.5e-4. The teacher's 8 heads are the relations', too.
PRETRAINING = "--blr 6e-4 --decoder 128 4 4"
DISTILLATION = "--teacher teacher --teacher-block 12 --target relation --relations qq kk vv --mask-ratio 0 --drop-path 0.1"

TABLE = (  # question, row, tinymim.py's options where they differ from the above (None: no pre-training), what the paper found
    ("target", "relation", "", "best"),
    ("target", "feature", "--target feature", "worse than relations"),
    ("target", "cls", "--target cls", "worse than relations"),
    ("target", "pixel", "--target pixel", "MAE, no teacher: worse than distillation"),
    ("target", "scratch", None, "worse than distillation"),
    ("block, teacher as deep", "block-12", "", "the last is good"),
    ("block, teacher as deep", "block-9", "--teacher-block 9", ""),
    ("block, teacher deeper", "shallow-block-12", "--depth 6", "the last: worse"),
    ("block, teacher deeper", "shallow-block-9", "--depth 6 --teacher-block 9", "at 3/4 of the depth: better"),
    ("masked input", "masked-0", "", "better"),
    ("masked input", "masked-0.75", "--mask-ratio 0.75", "worse"),
    ("auxiliary MIM", "mim-none", "", "as good or better"),
    ("auxiliary MIM", "mim-none-masked", "--mask-ratio 0.75", ""),  # MIM masks: what that does by itself
    ("auxiliary MIM", "mim", "--target relation pixel --mask-ratio 0.75", "does not help"),
    ("drop path", "drop-path-0", "--drop-path 0", "0 to 0.1 suits small students"),
    ("drop path", "drop-path-0.1", "", "0 to 0.1 suits small students"),
    ("drop path", "drop-path-0.3", "--drop-path 0.3", "worse"),
    ("steps", "direct", "", "worse"),
    ("steps", "sequential", "--teacher assistant", "better"),
    ("relations", "qq-kk-vv", "", "MiniLMv2's choice"),
    ("relations", "qk-vv", "--relations qk vv", "the paper's choice"),
)

FULL = dict(img_size=32, patch_size=4, mae_epochs=200, epochs=100, finetune_epochs=50, seeds=3)
SMALLEST = FULL | dict(mae_epochs=1, epochs=1, finetune_epochs=1, seeds=1)
FEW = 8  # images of each class, with --smallest


def run(main, folder, argv):
    """main(argv) of tinymim.py or finetune.py with results in `folder`, from where an earlier run was cut off, if one was."""
    resume = ["--resume"] if os.path.exists(os.path.join(folder, "last.pth")) else []
    print(f"\n{'go on with' if resume else 'start'} {folder}", flush=True)
    torch.compiler.reset()  # it gives up on code that it has compiled for several networks: let it forget those before
    main([*argv, "--out", folder, *resume])


def name_run(network, options, seed):
    """Where a run lives below OUT. Its options make the name: the same ones are the same run, whichever row asks for it."""
    words = "scratch" if options is None else options.replace("--", "")
    return f"seed{seed}/" + "-".join([network, *words.split()])


def sizes(args, network):
    width, depth, heads = NETWORKS[network]
    width = width // 4 if args.smallest else width  # but as deep: TABLE has numbers of blocks
    return f"--dim {width} --depth {depth} --heads {heads} --img-size {args.img_size} --patch-size {args.patch_size}".split()


def pretrain(args, network, options, seed):
    """The checkpoint of a network pre-trained with these options of tinymim.py; first those it learns from are.

    MAE takes --mae-epochs, on a student, too: that is what distillation has to beat, so it gets the longer training.
    """
    folder = os.path.join(args.out, name_run(network, options, seed))
    if folder not in args.finished:
        mae = options == "--target pixel"
        words = f"{PRETRAINING} {'' if mae else DISTILLATION} {options}".split()  # of an option given twice the last counts
        words = [pretrain(args, word, TEACHERS[word], seed) if word in TEACHERS else word for word in words]
        epochs = str(args.mae_epochs if mae else args.epochs)
        run(tinymim.main, folder, [*sizes(args, network), *words, *args.common, "--epochs", epochs, "--seed", str(seed)])
        args.finished.add(folder)
    return os.path.join(folder, "last.pth")


def accuracy(args, options, seed):
    """The top-1, in percent, of the student that these options describe, pre-trained and fine-tuned.

    From scratch it has as many epochs as the others are distilled and fine-tuned for.
    """
    folder = os.path.join(args.out, name_run("student", options, seed), "finetune")
    if options is None:
        start, epochs = ["none", *sizes(args, "student")], args.epochs + args.finetune_epochs
    else:
        start, epochs = [pretrain(args, "student", options, seed)], args.finetune_epochs
    run(finetune.main, folder, ["--checkpoint", *start, *args.common, "--epochs", str(epochs), "--seed", str(seed)])
    with open(os.path.join(folder, "log.jsonl")) as file:
        return json.loads(file.readlines()[-1])["top1"]


def check_data(folder):
    """Leave with one line unless train/ and val/ have the same classes: fine-tuning would find out after hours of MAE."""
    if not os.path.isdir(folder):
        sys.exit(f"study.py: error: {folder}: no such folder of images")
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(folder, part)):
            test = part == "val" and os.path.isdir(os.path.join(folder, "test"))
            sys.exit(f"study.py: error: {folder} has no folder {part}: " + ("name its test/ val/" if test else
                     "it needs train/ and val/, with a folder of images for each class"))
    train, val = ({entry.name for entry in os.scandir(os.path.join(folder, part)) if entry.is_dir()} for part in ("train", "val"))
    if train != val or len(train) < 2:
        sys.exit(f"study.py: error: {folder}: train/ and val/ need the same two or more classes, a folder of images for each")


def link_few(folder, few):
    """Make `few` a folder like `folder`, of links to the first images of each class."""
    for part in ("train", "val"):
        for name in next(os.walk(os.path.join(folder, part)))[1]:
            source, target = os.path.abspath(os.path.join(folder, part, name)), os.path.join(few, part, name)
            os.makedirs(target, exist_ok=True)
            for image in sorted(filter(is_image_file, os.listdir(source)))[:FEW]:
                if not os.path.lexists(os.path.join(target, image)):
                    os.symlink(os.path.join(source, image), os.path.join(target, image))


def load_results(path, settings):
    """What is in results.json, or none yet. Leaves with one line if it comes from other settings: a table must not mix them."""
    if not os.path.exists(path):
        return {"settings": settings, "top1": {}}
    with open(path) as file:
        results = json.load(file)
    for name, value in settings.items():
        old = results["settings"].get(name)
        if old != value:
            sys.exit(f"study.py: error: {path} comes from {name.replace('_', '-')} {old}, not {value}: name another --out")
    return results


def save_results(path, results):
    with open(path + ".part", "w") as file:
        json.dump(results, file, indent=1)
    os.replace(path + ".part", path)  # whole at any moment


def print_table(args, rows, top1):
    """top1: {run: percent}. The deviation is that of single runs, each seed with a teacher of its own."""
    print(f"\n| question | row | top-1, {args.seeds} seed{'s' * (args.seeds > 1)} | the paper finds |\n|---|---|---|---|")
    for question, row, options, paper in rows:
        values = [top1[name_run("student", options, seed)] for seed in range(args.seeds)]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {question} | {row} | {statistics.mean(values):.2f}{deviation} | {paper} |")
    print("\nThese runs are too small to conclude anything from: they only show that every row works." if args.smallest else
          "\nPercent on val/, mean ± standard deviation. Differences within the deviations, or of one seed, may be chance.")


def study(args):
    """Run what results.json lacks of the rows, seed by seed, and print the table."""
    check_data(args.data)
    os.makedirs(args.out, exist_ok=True)
    path, few = os.path.join(args.out, "results.json"), os.path.join(args.out, "few")
    settings = {name: getattr(args, name) for name in ("smallest", *FULL) if name != "seeds"}  # there may be more later
    results = load_results(path, settings | {"data": os.path.abspath(args.data)})
    save_results(path, results)
    args.finished, args.common = set(), ["--data", args.data, "--batch-size", "256"]
    if args.smallest:
        link_few(args.data, few)
        args.common = ["--data", few, "--batch-size", "16", "--workers", "0"]
    args.common += ["--device", args.device] if args.device else []
    rows = [entry for entry in TABLE if not args.rows or entry[1] in args.rows]
    for seed in range(args.seeds):
        for _, _, options, _ in rows:
            name = name_run("student", options, seed)
            if name not in results["top1"]:
                results["top1"][name] = accuracy(args, options, seed)
                save_results(path, results)
    print_table(args, rows, results["top1"])


def main(argv=None):
    parser = tinymim.Parser("study.py", "The paper's questions at small scale. --epochs: of distillation.")
    add, rows = parser.add_argument, [row for _, row, _, _ in TABLE]
    add("--data", required=True, metavar="FOLDER", help="with train/ and val/, a folder of images for each class in both")
    add("--out", metavar="FOLDER", help="for all results; default: runs/study, with --smallest runs/study-smallest")
    add("--rows", nargs="+", choices=rows, metavar="NAME", help="only these of " + ", ".join(rows))
    for name, value in FULL.items():
        add("--" + name.replace("_", "-"), type=int, metavar="N", help=f"default: {value}")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    add("--smallest", action="store_true",
        help=f"only try that all works: networks a quarter as wide, {FEW} images of each class, one epoch, one seed")
    parser.set_defaults(**SMALLEST if parser.parse_args(argv).smallest else FULL)
    args = parser.parse_args(argv)
    if min(getattr(args, name) for name in FULL) < 1:
        parser.error("sizes, epochs and --seeds start at 1")
    args.out = args.out or ("runs/study-smallest" if args.smallest else "runs/study")
    try:
        study(args)
    except (OSError, json.JSONDecodeError) as error:  # of OUT: what tinymim.py and finetune.py meet they tell themselves
        sys.exit(f"study.py: error: {args.out}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
