"""Fine-tune a distilled student, or any ViT, for semantic segmentation: UPerNet on ADE20K.

    python extras/segment.py --checkpoint runs/base/last.pth
    torchrun --nproc-per-node 8 extras/segment.py --checkpoint mae_base --batch-size 2
    python extras/segment.py --eval --checkpoint runs/base-segmented/last.pth

--data is ade20k (downloaded to data/, 1 GB) or a folder in its format, {images,annotations}/
{training,validation}. Label maps are PNGs, one byte a pixel: 0 is ignored, 1 is the first class.
Label maps belong to the upright photo: those with an EXIF orientation are turned as it says.
The recipe is the authors', with mmsegmentation 0.11 (52.47 mIoU in their log for B, 45.0 for *-T).
TinyMIM*-T, theirs or from finetune_with_label_teacher.py --star, is known by its parameters' names.
"""

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
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.ops import Conv2dNormActivation as Conv  # convolution, batch norm, ReLU
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import adjust_hue, pad
from torchvision.utils import save_image
from tqdm import tqdm

import finetune
import tinymim
from tinymim import COUNT, DTYPES, RANK, WORLD, UserError, ViT, between

IGNORED = 255  # the label of pixels that do not count
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"

# ---- 1. Model -----------------------------------------------------------------------------------

class Attention(tinymim.Attention):
    """With relative position bias: to q kᵀ / sqrt(D/h) each head adds a number that it learns, for
    each offset of two patches one, and for each of the `others`, the tokens before the patches,
    three: from it to any token, from any to it, to itself. The table has BEiT's name and order."""
    def __init__(self, dim, heads, grid, others):
        super().__init__(dim, heads)
        self.grid, self.others = grid, others
        table = torch.zeros((2 * grid - 1)**2 + 3 * others, heads)
        self.relative_position_bias_table = nn.Parameter(table)

    def bias(self):  # (heads, N, N)
        grid, side, others = self.grid, 2 * self.grid - 1, self.others
        table = self.relative_position_bias_table.T  # (heads, side² + 3 * others)
        place = torch.arange(grid, device=table.device)
        step = place[:, None] - place + grid - 1  # from query to key, 0 to side - 1
        offsets = table[:, :side**2].unflatten(1, (side, side))
        bias = offsets[:, step][..., step].transpose(2, 3)  # (heads, y, x, y of key, x of key)
        bias = F.pad(bias.flatten(3).flatten(1, 2), (others, 0, others, 0))
        for token in reversed(range(others)):  # the class token, 0, is the last in the table
            start = side**2 + 3 * (others - 1 - token)
            bias[:, token], bias[:, :, token] = table[:, start, None], table[:, start + 1, None]
            bias[:, token, token] = table[:, start + 2]
        return bias

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias()[None].to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))  # of (B, heads, N, D/heads)

class Block(tinymim.Block):
    """With the attention above, and layer scale: a factor for each channel of a branch. Both start
    without effect."""
    def __init__(self, dim, heads, grid, others):
        super().__init__(dim, heads)
        self.attn = Attention(dim, heads, grid, others)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x):
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))

def resize(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

class UPerHead(nn.Module):
    """UPerNet (Xiao et al., ECCV 2018): four maps (B, dim, ...), finest first, to logits."""
    def __init__(self, dim, channels, num_classes):
        super().__init__()
        self.pools = nn.ModuleList(  # the pyramid of PSPNet, on the coarsest map
            nn.Sequential(nn.AdaptiveAvgPool2d(n), Conv(dim, channels, 1)) for n in (1, 2, 3, 6))
        self.pyramid = Conv(dim + 4 * channels, channels, 3)
        self.lateral = nn.ModuleList(Conv(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(Conv(channels, channels, 3) for _ in range(3))
        self.fuse = Conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))

    def forward(self, maps):
        pooled = [resize(pool(maps[-1]), maps[-1].shape[2:]) for pool in self.pools]
        x = self.pyramid(torch.cat([maps[-1], *pooled], dim=1))
        outputs = [x]
        for finer, lateral, smooth in zip(maps[-2::-1], self.lateral, self.smooth):
            x = lateral(finer) + resize(x, finer.shape[2:])
            outputs.append(smooth(x))
        return self.classify(self.fuse(torch.cat([resize(y, x.shape[2:]) for y in outputs], dim=1)))

def init_head(module):  # as mmcv and mmsegmentation do
    if isinstance(module, nn.Conv2d) and module.bias is None:  # before batch norm
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d):  # the last, which classifies
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)

class Segmenter(ViT):
    """A ViT, a neck that makes four maps of its tokens, UPerNet, and an auxiliary head. The maps
    come out of blocks 4, 6, 8 and 12 of 12, or at 1/3, 1/2, 2/3 and all of another depth.
    distilled: with a distillation token. star_dim: the width of TinyMIM*-T's last layer, or 0."""
    def __init__(self, dim, depth, heads, patch_size=16, img_size=512, num_classes=150,
                 channels=768, distilled=False, star_dim=0, drop_path=0.1):
        super().__init__(dim, depth, heads, patch_size, img_size)
        self.config |= dict(num_classes=num_classes, channels=channels, distilled=distilled,
                            star_dim=star_dim)
        self.taps = [max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.pos_embed.requires_grad_(True)
        self.others = 1 + distilled  # tokens before the patches
        if distilled:  # finetune.parameter_groups knows no such name: it learns at the full rate
            self.distillation_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        blocks = [Block(dim, heads, self.grid, self.others) for _ in range(depth)]
        for i, block in enumerate(blocks):
            block.drop_path.p = drop_path * i / max(depth - 1, 1)
        self.blocks = nn.Sequential(*blocks).apply(self.init_weights)
        middle, width = (2 * dim, 4 * dim) if star_dim else (dim, dim)
        widths = (dim, middle), (middle, width), (dim, width)
        up = [nn.ConvTranspose2d(*pair, kernel_size=2, stride=2) for pair in widths]
        finest = nn.Sequential(up[0], nn.BatchNorm2d(middle), nn.GELU(), up[1])
        if star_dim:
            self.pre_head = nn.Sequential(nn.Linear(dim, star_dim), nn.GELU())  # after the norm
            same, half = nn.Conv2d(dim, width, 1), nn.Conv2d(star_dim, width, 3, 2, padding=1)
        else:
            self.norm = self.pre_head = nn.Identity()
            same, half = nn.Identity(), nn.MaxPool2d(2)
        self.neck = nn.ModuleList([finest, up[2], same, half])  # x4, x2, x1, x1/2
        self.decoder = UPerHead(width, channels, num_classes).apply(init_head)
        auxiliary = [Conv(width, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1)]
        self.auxiliary = nn.Sequential(*auxiliary).apply(init_head)

    def features(self, images):
        """Images (B, 3, H, H) to four maps (B, width, s, s), s = 4, 2, 1 and 1/2 times grid."""
        x, outputs = self.embed(images), {}
        if self.others == 2:
            x = torch.cat([x[:, :1], self.distillation_token.expand(len(x), -1, -1), x[:, 1:]], 1)
        for number, block in enumerate(self.blocks, 1):
            x = outputs[number] = block(x)
        tokens = [outputs[number] for number in self.taps]
        tokens[-1] = self.pre_head(self.norm(tokens[-1]))
        maps = [x[:, self.others:].transpose(1, 2).unflatten(2, (self.grid, -1)) for x in tokens]
        return [layer(x) for layer, x in zip(self.neck, maps)]

    def forward(self, images):  # to logits (B, num_classes, 4 * grid, 4 * grid)
        return self.decoder(self.features(images))

class Supervised(nn.Module):
    """The objective: uint8 crops (B, 3, H, H), labels (B, H, H) to each head's cross-entropy."""
    def __init__(self, model):
        super().__init__()
        self.student = model

    def forward(self, crops, labels):
        return self.losses(tinymim.normalize(crops / 255), labels)

    def losses(self, images, labels):
        def loss(logits):  # ignored pixels count as 0 in the mean, as in mmsegmentation
            logits, target = resize(logits.float(), labels.shape[1:]), labels.long()
            return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none").mean()
        maps = self.student.features(images)
        main, auxiliary = self.student.decoder(maps), self.student.auxiliary(maps[2])
        return {"main": loss(main), "aux": 0.4 * loss(auxiliary)}

def rename_star(tensors):
    """A checkpoint with a distillation token, perhaps TinyMIM*-T, under a Segmenter's names."""
    tensors = {name.replace("conv1x1.0.", "norm.").replace("conv1x1.1.", "pre_head.0."): tensor
               for name, tensor in tensors.items()}  # to finetune_with_label_teacher.py's
    token, positions = tensors.pop("dist_token"), tensors["pos_embed"]
    if int((positions.shape[1] - 2)**0.5)**2 == positions.shape[1] - 2:
        # As in DeiT, it has a position embedding. Only the sum of the two is ever used.
        token = token + positions[:, 1:2]
        tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return tensors | {"distillation_token": token}

def build(args, checkpoint):
    """A Segmenter that starts from what finetune.settle() read or, with --eval, is just that."""
    tensors, sizes, config = checkpoint
    known = config if args.eval else vars(args)
    names = {"img_size", "num_classes", "channels"}
    if not names <= known.keys():
        raise UserError(f"{args.checkpoint} is not a checkpoint of this script: train it first")
    tensors = rename_star(tensors) if "dist_token" in tensors else tensors
    star_dim = len(tensors.get("pre_head.0.bias", ()))
    if star_dim and not (config or args.heads):
        sizes["heads"] = 12
        print("No, 12: this is TinyMIM*-T")
    model = Segmenter(**sizes | {name: known[name] for name in names}, star_dim=star_dim,
                      distilled="distillation_token" in tensors, drop_path=args.drop_path)
    if tensors and not args.eval:
        own = model.state_dict()
        heads = {n: t for n, t in own.items() if n.startswith(("neck", "decoder", "auxiliary"))}
        neutral = {n: t for n, t in own.items() if n.endswith(("_table", "gamma_1", "gamma_2"))}
        tensors = neutral | tensors | heads
    if tensors:
        tinymim.load_weights(model, tensors, args.checkpoint)
    return model

# ---- 2. Data ------------------------------------------------------------------------------------

def ade20k(root="data"):
    """The folder of ADE20K, downloaded the first time."""
    folder = os.path.join(root, "ADEChallengeData2016")
    if not os.path.isdir(folder):
        os.makedirs(root, exist_ok=True)
        with (tempfile.TemporaryDirectory(dir=root) as partial,  # `folder` appears when it is whole
              tinymim.explained(f"cannot download {ADE20K}")):
            download_and_extract_archive(ADE20K, partial)
            if not os.path.isdir(folder):  # else another process was faster
                os.rename(os.path.join(partial, "ADEChallengeData2016"), folder)
    return folder

def saturate(image, factor):  # in HSV, where it is 1 - min/max of a pixel's colours, at most 1
    most, least = image.amax(dim=0), image.amin(dim=0)
    full = most / (most - least).clamp(min=1e-9)  # the factor that makes `least` 0
    return most - full.clamp(max=factor) * (most - image)

def distort(photo):
    """mmsegmentation's photometric distortion of a uint8 photo. Each change has probability 1/2."""
    changes = [(torch.add, -32 / 255, 32 / 255), (saturate, 0.5, 1.5), (adjust_hue, -0.1, 0.1)]
    changes.insert(1 if torch.rand(()) < 0.5 else 3, (torch.mul, 0.5, 1.5))  # contrast
    image = photo / 255
    for change, low, high in changes:
        if torch.rand(()) < 0.5:
            image = change(image, low + (high - low) * torch.rand(()).item()).clamp(0, 1)
    return (255 * image).round().to(torch.uint8)

def rescale(size):  # the shorter side to `size`, the longer to 4 * size at most, as OpenCV does
    return v2.Resize(int(size), max_size=int(4 * size), antialias=False)

def augment(photo, labels, size):
    """mmsegmentation's: rescale, crop, flip, change the colours, pad to (size, size)."""
    photo, labels = rescale(size * (0.5 + 1.5 * torch.rand(()).item()))(photo, labels)
    crop = v2.RandomCrop([min(size, side) for side in labels.shape])
    for _ in range(11):  # until no class has 75% of what counts
        cropped = crop(photo, labels)
        counts = torch.bincount(cropped[1].flatten(), minlength=256)[:IGNORED]
        if counts.max() < 0.75 * counts.sum():
            break
    photo, labels = v2.RandomHorizontalFlip()(*cropped)
    padding = [0, 0, size - labels.shape[1], size - labels.shape[0]]  # on the right and below
    return pad(distort(photo), padding, finetune.GRAY), pad(labels, padding, IGNORED)

class SegmentationDataset(tinymim.ImageDataset):
    """A photo and its labels, uint8 (3, H, W) and (H, W). In training an epoch has `items`. It goes
    on where the one before ended, through all photos, shuffled once, again and again."""
    def __init__(self, folder, split, num_classes, size, seed=0, items=None):
        images, maps = (os.path.join(folder, kind, split) for kind in ("images", "annotations"))
        super().__init__(tinymim.find_images(images), rescale(size), seed)
        self.num_classes, self.size, self.items = num_classes, size, items
        self.order = np.random.RandomState(seed).permutation(len(self.paths))
        names = [os.path.splitext(os.fsdecode(path).removeprefix(images))[0] for path in self.paths]
        label_paths = [f"{maps}{name}.png" for name in names]
        missing = [path for path in label_paths if not os.path.exists(path)]
        if missing:
            raise UserError(f"{len(missing)} photos have no label map: there is no {missing[0]}")
        if len({*label_paths}) < len(label_paths):
            raise UserError(f"two photos in {images} have the same name, and so one label map")
        self.label_paths = np.array([os.fsencode(path) for path in label_paths])

    def __len__(self):
        return self.items or len(self.paths)

    def __getitem__(self, key):
        index = self.order[int(key) % len(self.order)] if self.items else key
        photo = tinymim.decode(os.fsdecode(self.paths[index]))
        label_path = os.fsdecode(self.label_paths[index])
        with tinymim.explained(f"cannot read {label_path}"):
            labels = torch.from_numpy(np.array(Image.open(label_path)))
        size, most = tuple(photo.shape[1:]), self.num_classes
        if labels.dtype != torch.uint8 or labels.shape != size or labels.max() > most:
            raise UserError(f"{label_path} is not {size} bytes of 0 to --num-classes {most}")
        labels = labels - 1  # of bytes: 0 becomes 255, which is IGNORED
        if not self.items:
            return self.transform(photo), labels
        pair = tv_tensors.Image(photo), tv_tensors.Mask(labels)  # a mask is not blended
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(tinymim.seed_from(self.seed, int(key)))
            return tuple(x.as_subclass(torch.Tensor) for x in augment(*pair, self.size))

# ---- 3. Evaluation ------------------------------------------------------------------------------

def slide(model, image, size, stride):
    """The mean logits (num_classes, H, W) of all windows of an image (3, H, W)."""
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, size - width), 0, max(0, size - height)))
    tops, lefts = ([*range(0, side - size, stride), side - size] for side in image.shape[1:])
    windows = [np.s_[..., top:top + size, left:left + size] for top in tops for left in lefts]
    logits = resize(model(torch.stack([image[window] for window in windows])).float(), (size, size))
    total = logits.new_zeros(logits.shape[1], *image.shape[1:])
    count = torch.zeros_like(total[0])
    for window, window_logits in zip(windows, logits):
        total[window] += window_logits
        count[window] += 1
    return (total / count)[:, :height, :width]

def confusion(predicted, labels, num_classes):
    """How many pixels of class `row` are predicted as `column`, (num_classes, num_classes)."""
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

def scores(matrix):
    """In percent: mIoU, mean and pixel accuracy of the classes that occur; and each class's IoU."""
    matrix = matrix.double()
    right, truth, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = 100 * right / (truth + predicted - right)  # 0 / 0 is nan: the class does not occur
    return {"mIoU": iou.nanmean().item(), "mean_accuracy": 100 * (right / truth).nanmean().item(),
            "pixel_accuracy": 100 * (right.sum() / matrix.sum()).item()}, iou.tolist()

@torch.no_grad()
def evaluate(model, dataset, args):
    """scores() of all photos. Writes segmentation.png: six photos, truth, prediction."""
    model.eval()
    for buffer in model.buffers() if WORLD > 1 else ():  # all use process 0's batch statistics
        dist.broadcast(buffer, 0)
    loader = torch.utils.data.DataLoader(dataset, None, num_workers=args.workers,
                                         sampler=range(RANK, len(dataset), WORLD))
    classes, size = model.config["num_classes"], model.img_size
    matrix = torch.zeros(classes, classes, dtype=torch.long, device=args.device)
    square, pictures = v2.Resize((256, 256), v2.InterpolationMode.NEAREST), []
    for photo, labels in tqdm(loader, "evaluation", disable=RANK > 0 or None, leave=False):
        labels = labels.to(args.device)
        image = tinymim.normalize(photo.to(args.device) / 255)
        with torch.autocast(args.device, DTYPES[args.amp], enabled=args.amp != "off"):
            logits = slide(model, image, size, stride=size * 341 // 512)
        predicted = resize(logits[None], labels.shape)[0].argmax(dim=0)
        matrix += confusion(predicted, labels, classes)
        if len(pictures) < 3 * 6:
            maps = [torch.stack([x, 37 * x, 91 * x]) for x in (labels, predicted.byte())]
            pictures += [square(x).cpu() / 255 for x in (photo, *maps)]  # bytes wrap round: colours
    if WORLD > 1:
        dist.all_reduce(matrix)
    if RANK == 0:
        folder = args.out or os.path.dirname(args.checkpoint)
        save_image(pictures, os.path.join(folder, "segmentation.png"), nrow=6)
    return scores(matrix)

# ---- 4. Training and command line ---------------------------------------------------------------

def linear(epoch, peak, warmup_epochs, epochs, floor=0.0):  # in learning_rate's place
    return peak * (1 - epoch / epochs) * min(1, epoch / max(warmup_epochs, 1e-9))

def parameter_groups(model, weight_decay, layer_decay):
    """finetune.py's, but as in the authors' code all matrices decay: class token, position
    embeddings and bias tables, too. It looks like a slip, but belongs to their results."""
    layers = finetune.parameter_groups(model, 0.0, layer_decay)  # one group for each
    return [dict(params=[p for p in layer["params"] if (p.ndim > 1) == is_matrix],
                 weight_decay=weight_decay * is_matrix, lr_scale=layer["lr_scale"])
            for layer in layers for is_matrix in (True, False)]

def train(args):
    layer_decay = args.layer_decay  # settle() would take that of classification
    checkpoint = finetune.settle(args)
    tinymim.resolve(args)
    tinymim.start_processes(args)
    folder = ade20k() if args.data == "ade20k" else args.data
    model = tinymim.by_options(build, args, checkpoint).to(args.device)
    num_classes, size = model.config["num_classes"], model.img_size
    validation = SegmentationDataset(folder, "validation", num_classes, size)
    if args.eval:
        result, iou = evaluate(model, validation, args)
        if RANK == 0:
            print(*(f"class {i:3}  IoU {value:6.2f}" for i, value in enumerate(iou, 1)), sep="\n")
            print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
        return
    usual = 1.0 if args.checkpoint == "none" else 0.8 if model.config["star_dim"] else 0.75
    args.layer_decay = layer_decay or usual
    if min(args.batch_size, model.grid) < 2:
        raise UserError("batch norm and pooling need --batch-size 2 and 2 patches a side at least")
    images = args.eval_every * args.images_per_update  # in what fit calls an epoch
    dataset = SegmentationDataset(folder, "training", num_classes, size, args.seed, images)
    args.photos = len(dataset.paths)  # --resume compares it
    dataset[0], validation[0]  # what is wrong with all label maps should not show after hours
    if WORLD > 1 and args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, fused=args.device == "cuda")
    tinymim.fit(Supervised(model), dataset, optimizer, args,
                lambda epoch: evaluate(model, validation, args)[0], schedule=linear)

def main(argv=None):
    defaults = tinymim.DEFAULTS | dict(
        data="ade20k", batch_size=16, blr=1.6e-3, iterations=160000, warmup_iterations=1500,
        eval_every=16000, channels=768, num_classes=150,
        student=None, augment="mmsegmentation's")  # for finetune.settle(): it is no option here
    parser = tinymim.make_parser("extras/segment.py", __doc__, defaults,
                                 without=("epochs", "warmup_epochs", "img_size"))
    add = parser.add_argument_group("segmentation").add_argument
    add("--checkpoint", required=True, help="a file, mae_base..., or none: train from scratch")
    add("--img-size", type=COUNT, default=512, help="in pixels, in training (default: 512)")
    add("--patch-size", type=COUNT, help="in pixels, with --checkpoint none")
    add("--iterations", type=COUNT, help="default: 160000")
    add("--warmup-iterations", type=between(int, 0), help="default: 1500")
    add("--eval-every", type=COUNT, help="default: 16000. It also saves")
    add("--layer-decay", type=between(float, 0.01, 1), help="0.75, TinyMIM*-T 0.8, from scratch 1")
    add("--channels", type=COUNT, help="width of UPerNet (default: 768)")
    add("--num-classes", type=between(int, 1, 255), help="but 0 (default: 150)")
    add("--eval", action="store_true", help="only evaluate a checkpoint of this script")
    used = "eval checkpoint data workers device amp".split()
    args = finetune.parse(parser, argv, "-segmented", used)
    if args.iterations % args.eval_every or args.iterations <= args.warmup_iterations:
        parser.error("--iterations: a multiple of --eval-every, and more than --warmup-iterations")
    args.epochs = args.iterations // args.eval_every
    args.warmup_epochs = args.warmup_iterations / args.eval_every
    tinymim.run(parser, train, args)

if __name__ == "__main__":
    main()
