"""MAE's linear probe: train a linear classifier of the class token, and nothing else.

    python extras/probe.py --checkpoint mae_base --data FOLDER
    python extras/probe.py --eval --checkpoint runs/mae_base-probe/best.pth --data FOLDER

--data is as finetune.py's. The recipe is MAE's, but for two things. SGD is in the place of LARS,
which is for updates of 16,384 images; the blr is the same, untuned. And crops are torchvision's
RandomResizedCrop, where MAE has its own, without retries. A student of relations is refused: the
end of its last block is untrained.
"""

import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import tinymim
from tinymim import WORLD, ImageDataset, UserError, ViT

DEFAULTS = tinymim.DEFAULTS | dict(
    epochs=90, batch_size=128, blr=0.1, weight_decay=0.0, crop_scale=0.08, augment="crop",
    # finetune.settle() reads these, too. They are no options here.
    student=None, dim=None, depth=None, patch_size=None, drop_path=0.0, layer_decay=1.0)

class Probe(ViT):
    """A frozen ViT, a batch norm without weights, and a linear head."""
    def __init__(self, *args, num_classes=1000, **options):
        super().__init__(*args, **options)
        self.config |= dict(num_classes=num_classes)
        self.requires_grad_(False)
        self.head_norm = nn.BatchNorm1d(self.dim, affine=False, eps=1e-6)
        self.head = nn.Linear(self.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.head(self.head_norm(super().forward(images)[:, 0]))

def train(args):
    """What the command does. With --eval it evaluates only."""
    checkpoint = finetune.settle(args)
    config = checkpoint[2]
    relations = config.get("relation_heads") and config.get("pretraining") != "WithMAE"
    if relations or config.get("pretraining") in ("TinyMIM", "LogitRelation", "MaskedRelation"):
        raise UserError(f"{args.checkpoint} was distilled by relations: the end of its last block "
                        "is untrained")
    if args.eval and not config.get("classes"):
        raise UserError(f"{args.checkpoint} is not of this script: run it without --eval first")
    if args.batch_size == 1 and not args.eval:
        raise UserError("--batch-size 1 has no statistics for the batch norm: 2 or more")
    tinymim.resolve(args)
    tinymim.start_processes(args)
    if args.eval:
        return finetune.print_accuracy(args, tinymim.by_options(
            finetune.new_classifier, args, checkpoint, config["classes"], Probe, ()))
    folder = tinymim.image_folder(args.data)
    paths, labels, classes = finetune.read_folder(os.path.join(folder, "train"))
    val_paths, val_labels, val_classes = finetune.read_folder(os.path.join(folder, "val"))
    if val_classes != classes:
        raise UserError(f"{folder}/val has other classes than train/")
    model = tinymim.by_options(
        finetune.new_classifier, args, checkpoint, classes, Probe, ("head",)).to(args.device)

    def evaluate(epoch):
        for buffer in model.buffers() if WORLD > 1 else ():
            torch.distributed.broadcast(buffer, 0)  # process 0's, which is saved, counts for all
        return finetune.evaluate(model, val_paths, val_labels, args)

    evaluate(0)  # before training: it finds broken files
    crop = finetune.train_transform(model.img_size, args.crop_scale, args.augment)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.0, 0.9, weight_decay=args.weight_decay)
    tinymim.fit(finetune.Supervised(model, args.augment).to(args.device),
                ImageDataset(paths, crop, args.seed, labels), optimizer, args, evaluate)

def main(argv=None):
    parser = tinymim.make_parser("extras/probe.py", __doc__, DEFAULTS,
                                 without=("student", "dim", "depth", "drop_path"))
    add = parser.add_argument
    add("--checkpoint", required=True, help="of mae.py, mae_base...")
    add("--crop-scale", type=tinymim.between(float, 0.01, 1), help="smallest crop (default: 0.08)")
    add("--eval", action="store_true", help="only evaluate a checkpoint of this script on --data")
    args = finetune.parse(parser, argv, "-probe")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 9  # 10 of 90
    tinymim.run(parser, train, args)

if __name__ == "__main__":
    main()
