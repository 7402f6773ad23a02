"""MAE's linear probe: train a linear classifier of the class token, and nothing else.

    python extras/probe.py --checkpoint mae_base --data FOLDER
    python extras/probe.py --eval --checkpoint runs/mae_base-probe/best.pth --data FOLDER

--data is as finetune.py's. The recipe is MAE's, but with SGD for LARS, which is for updates of
16,384 images; the blr is the same, untuned. A distilled student is refused, as it is not trained
to the end of its last block.
"""

import os
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import tinymim
from tinymim import WORLD, ImageDataset, UserError, ViT

RECIPE = dict(epochs=90, batch_size=128, blr=0.1, min_lr=0.0, weight_decay=0.0, drop_path=0.0)
RECIPE |= dict(student=None, patch_size=None, layer_decay=1.0, augment="crop")  # for settle()

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
    if checkpoint[2].get("relation_heads"):
        raise UserError(f"{args.checkpoint} was distilled: the end of its last block is untrained")
    if args.batch_size == 1 and not args.eval:
        raise UserError("--batch-size 1 has no statistics for the batch norm: 2 or more")
    tinymim.setup(args)
    if args.eval:
        classes = checkpoint[2].get("classes")
        if classes is None:
            raise UserError(f"{args.checkpoint} is not of this script: run it without --eval first")
        model = finetune.build(args, checkpoint, classes, Probe, new=())
        return finetune.print_accuracy(args, model)
    paths, labels, classes = finetune.read_folder(
        os.path.join(tinymim.image_folder(args.data), "train"))
    folder = tinymim.image_folder(args.data, "val")
    val_paths, val_labels, val_classes = finetune.read_folder(folder)
    if val_classes != classes:
        raise UserError(f"{folder} has other classes than train/")
    model = finetune.build(args, checkpoint, classes, Probe, new=("head",)).to(args.device)

    def evaluate(epoch):
        for buffer in model.buffers() if WORLD > 1 else ():
            torch.distributed.broadcast(buffer, 0)  # process 0's, which is saved, counts for all
        return finetune.evaluate(model, val_paths, val_labels, args)

    evaluate(0)  # before training: it finds broken files
    crop = finetune.train_transform(model.img_size, args.crop_scale, args.augment)
    augment = finetune.Augment(len(classes), args.augment)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.0, 0.9, weight_decay=args.weight_decay)
    tinymim.fit(finetune.Supervised(model, args), ImageDataset(paths, crop, args.seed, labels),
                augment, optimizer, args, evaluate)

def main(argv=None):
    parser = tinymim.make_parser("extras/probe.py", __doc__, RECIPE)
    add = parser.add_argument
    add("--checkpoint", required=True, help="of mae.py, mae_base...")
    add("--crop-scale", type=tinymim.between(float, 0.01, 1), default=0.08, help="smallest crop")
    add("--eval", action="store_true", help="only evaluate a checkpoint of this script on --data")
    args = parser.parse_args(argv)
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 9  # 10 of 90
    args.out = finetune.folder_of_run(args, "-probe")
    tinymim.run(parser, train, args)

if __name__ == "__main__":
    main()
