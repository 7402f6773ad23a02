"""Fine-tune a distilled student, or any ViT, for segmentation: UPerNet, ADE20K.

    python extras/segment.py --checkpoint runs/base-mae_large/last.pth
    torchrun --nproc-per-node 8 extras/segment.py --checkpoint mae_base --batch-size 2
    python extras/segment.py --eval --checkpoint runs/segment-mae_base/last.pth

--data is ade20k (downloaded to data/, 1 GB), or a folder in its format: {images,annotations}/{training,
validation}, where a label map is a PNG of the photo's name and size, one byte a pixel: 0 is ignored, 1 is the
first class. Distillation trains only the qkv of a student's last block. The rest of it starts untrained, and
so does UPerNet. The recipe is the authors' for ViT-B, without relative position bias and layer scale.
"""

import colorsys
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.ops import Conv2dNormActivation as Conv  # convolution, batch norm, ReLU
from torchvision.transforms import v2
from torchvision.utils import save_image
from tqdm import tqdm

import finetune
import tinymim
from tinymim import DTYPES, IMAGENET_MEAN, LOCAL_RANK, RANK, STUDENTS, WORLD, ImageDataset, UserError, ViT

IGNORED = 255  # the label of pixels that do not count
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"  # its challenge's version

# ---- 1. Model ----------------------------------------------------------------------------------------------

def resize(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

class UPerHead(nn.Module):
    """UPerNet (Xiao et al., ECCV 2018): four maps (B, dim, ...), finest first, to logits."""
    def __init__(self, dim, channels, num_classes):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), Conv(dim, channels, 1))
                                   for n in (1, 2, 3, 6))  # the pyramid of PSPNet, on the coarsest map
        self.pyramid = Conv(dim + 4 * channels, channels, 3)
        self.lateral = nn.ModuleList(Conv(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(Conv(channels, channels, 3) for _ in range(3))
        self.fuse = Conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps):
        pooled = [resize(pool(maps[-1]), maps[-1].shape[2:]) for pool in self.pools]
        x = self.pyramid(torch.cat([maps[-1], *pooled], dim=1))
        outputs = [x]
        for finer, lateral, smooth in zip(maps[-2::-1], self.lateral, self.smooth):  # from coarse to fine
            x = lateral(finer) + resize(x, finer.shape[2:])
            outputs.append(smooth(x))
        return self.classify(self.fuse(torch.cat([resize(y, x.shape[2:]) for y in outputs], dim=1)))

class Segmenter(ViT):
    """A ViT, the usual neck, UPerNet, and an auxiliary head for training.

    The four maps come out of blocks 4, 6, 8 and 12 of 12, or at 1/3, 1/2, 2/3 and all of another depth.
    """
    def __init__(self, dim, depth, heads, num_classes=150, patch_size=16, img_size=512, drop_path=0.1,
                 channels=768):
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(dim, depth, heads, patch_size, img_size, rates)
        self.config |= dict(num_classes=num_classes, channels=channels)
        self.pos_embed.requires_grad_(True)
        self.norm = nn.Identity()
        self.taps = [max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]  # blocks, from 1
        up = [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2) for _ in range(3)]
        finest = nn.Sequential(up[0], nn.BatchNorm2d(dim), nn.GELU(), up[1])
        self.neck = nn.ModuleList([finest, up[2], nn.Identity(), nn.MaxPool2d(2)])  # x4, x2, x1, x1/2
        self.decoder = UPerHead(dim, channels, num_classes)
        self.auxiliary = nn.Sequential(Conv(dim, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))

    def features(self, images):
        """Images (B, 3, H, H) to four maps (B, dim, s, s), s = 4, 2, 1 and (rounded down) 1/2 times grid."""
        x, outputs = self.embed(images), {}
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            outputs[number] = x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return [neck(outputs[number]) for neck, number in zip(self.neck, self.taps)]

    def forward(self, images):
        """Images (B, 3, H, H) to logits (B, num_classes, 4 * grid, 4 * grid)."""
        return self.decoder(self.features(images))

class Supervised(finetune.Supervised):
    """The objective: images (B, 3, H, H) and labels (B, H, H) to each head's cross-entropy."""
    def forward(self, images, labels):
        def loss(logits):  # ignored pixels count as 0 in the mean, as in mmsegmentation
            logits = resize(logits.float(), labels.shape[1:])
            return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none").mean()

        maps = self.model.features(images)
        return {"main": loss(self.model.decoder(maps)), "aux": 0.4 * loss(self.model.auxiliary(maps[2]))}

def build(args):
    """A Segmenter that starts from --checkpoint or, with --eval, the one that was saved there."""
    tensors, sizes, config = {}, dict(zip(("dim", "depth", "heads"), STUDENTS[args.student])), {}
    if args.checkpoint != "none":
        tensors, sizes, config = tinymim.read_checkpoint(args.checkpoint, args.heads)
    new = ("neck", "decoder", "auxiliary")
    if args.eval:
        if "channels" not in config:
            raise UserError(f"{args.checkpoint} is not a checkpoint of this script: train it first")
        model = Segmenter(**config)
    else:
        for name in ("dim", "depth", "heads", "patch_size"):
            sizes[name] = getattr(args, name) or sizes.get(name, 16)
        sizes |= dict(img_size=args.img_size or 512, num_classes=args.num_classes, channels=args.channels)
        model = Segmenter(**sizes, drop_path=args.drop_path)
    if tensors:
        initial = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(new)}
        merged = initial | tensors if args.eval else tensors | initial  # UPerNet always starts anew
        tinymim.load_weights(model, merged, args.checkpoint)
    return model

# ---- 2. Data -----------------------------------------------------------------------------------------------

def ade20k(root="data"):
    """The folder of ADE20K, downloaded the first time."""
    folder = os.path.join(root, "ADEChallengeData2016")
    if not os.path.isdir(folder):
        print(f"downloading ADE20K, 1 GB, to {root}/")
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as partial:  # `folder` appears whole or not at all
            download_and_extract_archive(ADE20K, partial)
            os.replace(os.path.join(partial, "ADEChallengeData2016"), folder)
    return folder

class SegmentationDataset(ImageDataset):
    """A photo and its labels, transformed: uint8 (3, H, W) and (H, W). In training an epoch has `items` and
    goes on where the one before ended, through all photos, shuffled once, again and again."""
    def __init__(self, folder, split, num_classes, size, seed=0, items=None):
        images, annotations = (os.path.join(folder, name, split) for name in ("images", "annotations"))
        super().__init__(tinymim.find_images(images), Transform(size, train=bool(items)), seed)
        self.num_classes, self.items = num_classes, items or len(self.paths)
        names = [os.path.splitext(os.fsdecode(path).removeprefix(images))[0] for path in self.paths]
        label_paths = [f"{annotations}{name}.png" for name in names]
        missing = [path for path in label_paths if not os.path.exists(path)]
        if missing:
            raise UserError(f"{len(missing)} photos have no label map: there is no {missing[0]}")
        self.label_paths = np.array([os.fsencode(path) for path in label_paths])
        self.order = np.random.RandomState(seed).permutation(len(names)) if items else range(self.items)

    def __len__(self):
        return self.items

    def __getitem__(self, key):
        index = self.order[int(key) % len(self.order)]
        path, label_path = os.fsdecode(self.paths[index]), os.fsdecode(self.label_paths[index])
        try:
            photo, labels = tinymim.decode(path), torch.from_numpy(np.array(Image.open(label_path)))
        except Exception as error:  # Pillow raises many types
            raise UserError(f"cannot decode {path} or {label_path} ({error})") from error
        size = photo.shape[1:]
        if labels.dtype != torch.uint8 or labels.shape != size or labels.max() > self.num_classes:
            raise UserError(f"{label_path} is not {(*size,)} bytes of 0 to --num-classes {self.num_classes}")
        pair = self.seeded_transform(key, tv_tensors.Image(photo), tv_tensors.Mask(labels - 1))  # 0 to 255
        return tuple(tensor.as_subclass(torch.Tensor) for tensor in pair)

class Transform:
    """mmsegmentation's. In training: rescale, crop to (size, size), flip, change the colours (torchvision's
    way, in its ranges). Else the photo's shorter side becomes `size`, the longer 4 * size at most."""
    def __init__(self, size, train):
        self.size, self.train = size, train
        fill = {tv_tensors.Image: [round(255 * mean) for mean in IMAGENET_MEAN], tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
        colours = dict(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=18 / 180)
        jitters = [v2.ColorJitter(**{name: amount}) for name, amount in colours.items()]
        self.change = v2.Compose([v2.RandomHorizontalFlip(), *(v2.RandomApply([x], 0.5) for x in jitters)])

    def __call__(self, photo, labels):
        scale = torch.empty(()).uniform_(0.5, 2).item() if self.train else 1
        rescale = v2.Resize(round(self.size * scale), max_size=round(4 * self.size * scale))
        if not self.train:
            return rescale(photo), labels
        photo, labels = rescale(photo, labels)
        for _ in range(10):  # until no class has more than 75% of the crop
            cropped = self.crop(photo, labels)
            counts = torch.bincount(cropped[1].flatten(), minlength=256)[:IGNORED]
            if 0 < counts.max() <= 0.75 * counts.sum():
                break
        return self.change(*cropped)

# ---- 3. Evaluation -----------------------------------------------------------------------------------------

def slide(model, image, size, stride):
    """The mean logits (num_classes, H, W) of all windows of an image (3, H, W), `stride` pixels apart."""
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, size - width), 0, max(0, size - height)))
    tops, lefts = ([*range(0, length - size, stride), length - size] for length in image.shape[1:])
    windows = [np.s_[..., top:top + size, left:left + size] for top in tops for left in lefts]
    logits = resize(model(torch.stack([image[window] for window in windows])).float(), (size, size))
    total = logits.new_zeros(logits.shape[1], *image.shape[1:])
    count = torch.zeros_like(total[0])
    for window, window_logits in zip(windows, logits):
        total[window] += window_logits
        count[window] += 1
    return (total / count)[:, :height, :width]

def confusion(predicted, labels, num_classes):
    """How many pixels of class `row` are predicted as class `column`, (num_classes, num_classes)."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

def scores(matrix):
    """Of a confusion matrix, in percent: mean IoU and accuracy of the classes that occur, accuracy of all
    pixels; and the IoU of each class."""
    matrix = matrix.double()
    right, truth, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = 100 * right / (truth + predicted - right)  # 0 / 0 is nan: the class does not occur
    return {"mIoU": iou.nanmean().item(), "mean_accuracy": 100 * (right / truth).nanmean().item(),
            "pixel_accuracy": 100 * (right.sum() / matrix.sum()).item()}, iou.tolist()

@torch.no_grad()
def evaluate(model, dataset, args):
    """scores() of all photos. Writes segmentation.png: six photos, truth, prediction."""
    model.eval()
    for buffer in model.buffers() if WORLD > 1 else ():  # batch statistics: those of process 0 for all
        dist.broadcast(buffer, 0)
    loader = DataLoader(dataset, batch_size=None, sampler=range(RANK, len(dataset), WORLD),
                        num_workers=args.workers)
    matrix = torch.zeros(args.num_classes, args.num_classes, dtype=torch.long, device=args.device)
    palette = [colorsys.hsv_to_rgb(0.618 * i % 1, 0.5 + i % 2 / 2, 1 - i % 3 / 5) for i in range(IGNORED)]
    palette = torch.tensor([*palette, (0, 0, 0)])  # of neighbours in the circle of hues, one is darker
    square, pictures = v2.Resize((256, 256), v2.InterpolationMode.NEAREST), []
    for photo, labels in tqdm(loader, "evaluation", disable=RANK > 0, leave=False):
        labels = labels.to(args.device)
        with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
            image = tinymim.normalize(photo.to(args.device) / 255)
            logits = slide(model, image, model.img_size, model.img_size * 341 // 512)
        predicted = resize(logits[None], labels.shape)[0].argmax(dim=0)
        matrix += confusion(predicted, labels, args.num_classes)
        if len(pictures) < 18:
            maps = [palette[x.long().cpu()].permute(2, 0, 1) for x in (labels, predicted)]
            pictures += [square(x) for x in (photo / 255, *maps)]
    if WORLD > 1:
        dist.all_reduce(matrix)
    if RANK == 0:
        folder = args.out or os.path.dirname(args.checkpoint)
        save_image(pictures, os.path.join(folder, "segmentation.png"), nrow=6)
    return scores(matrix)

# ---- 4. Training and command line --------------------------------------------------------------------------

def linear(epoch, peak, warmup_epochs, epochs, floor=0.0):
    """In place of tinymim.learning_rate: linear from `peak` to 0, times linear warm-up."""
    return peak * (1 - epoch / epochs) * min(1, epoch / max(warmup_epochs, 1e-9))

def train(args):
    tinymim.setup(args)
    if LOCAL_RANK > 0:
        dist.barrier()  # see tinymim.train
    folder = ade20k() if args.data == "ade20k" else args.data
    model = build(args).to(args.device)
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()
    args.num_classes, size = model.config["num_classes"], model.img_size
    validation = SegmentationDataset(folder, "validation", args.num_classes, size)
    if args.eval:
        result, iou = evaluate(model, validation, args)
        if RANK == 0:
            print(*(f"class {label:3}  IoU {value:6.2f}" for label, value in enumerate(iou, 1)), sep="\n")
            print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        return

    args.epochs = args.iterations // args.eval_every
    args.warmup_epochs = args.warmup_iterations / args.eval_every
    if min(args.batch_size, model.grid) < 2:
        raise UserError("batch norm and pooling need --batch-size 2, and 2 patches a side, at least")
    images = args.eval_every * args.batch_size * args.accum * WORLD  # in what fit calls an epoch
    dataset = SegmentationDataset(folder, "training", args.num_classes, size, args.seed, images)
    if WORLD > 1 and args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dataset[0], validation[0]  # what is wrong with all label maps should not show after hours
    groups = finetune.parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=args.device == "cuda")
    if RANK == 0:
        print(f"{args.checkpoint} on {len(dataset.paths)} photos, {args.iterations} iterations: {args.out}")
    tinymim.fit(objective=Supervised(model, 0.0, freeze=False), model=model, dataset=dataset,
                prepare=lambda images, labels: (tinymim.normalize(images / 255), labels), optimizer=optimizer,
                args=args, after_epoch=lambda _: evaluate(model, validation, args)[0], schedule=linear)

def main(argv=None):
    parser = tinymim.make_parser("extras/segment.py", __doc__)
    parser.set_defaults(data="ade20k", batch_size=16, blr=1.6e-3, min_lr=0.0, drop_path=0.1)
    add = parser.add_argument_group("segmentation").add_argument
    add("--checkpoint", required=True, help="of tinymim.py, of MAE, mae_base..., or none: from scratch")
    add("--iterations", type=int, default=160000, help="instead of --epochs (default: 160000)")
    add("--warmup-iterations", type=int, default=1500, help="default: 1500")
    add("--eval-every", type=int, default=16000, help="iterations, then it saves, too (default: 16000)")
    add("--layer-decay", type=float, help="see finetune.py (default: 0.75, from scratch 1)")
    add("--patch-size", type=int, help="in pixels, with --checkpoint none")
    add("--channels", type=int, default=768, help="width of UPerNet (default: 768)")
    add("--num-classes", type=int, default=150, help="without the ignored one, 0 (default: 150)")
    add("--eval", action="store_true", help="only evaluate a checkpoint of this script")
    args = parser.parse_args(argv)
    if args.epochs or args.iterations % max(1, args.eval_every) or args.warmup_iterations >= args.iterations:
        parser.error("not epochs, but --iterations, a multiple of --eval-every and more than the warm-up")
    args.layer_decay = args.layer_decay or (1.0 if args.checkpoint == "none" else 0.75)
    name = f"segment-{tinymim.run_name(args.checkpoint)}"
    args.out = None if args.eval else args.out or os.path.join("runs", name)
    tinymim.run(parser, args, train)

if __name__ == "__main__":
    main()
