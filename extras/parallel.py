"""For study.py --jobs: rows side by side. Networks this small leave most of a GPU idle.

Rows of one seed see the same crops. So all cores make the crops once, before any row runs, and keep
them in files, 3 KB for a crop and 150 MB for an epoch of CIFAR-10. A row needs no workers then.
"""

import hashlib
import multiprocessing
import os
import sys
import time

import numpy as np
import torch

import finetune
import tinymim
from tinymim import ImageDataset

class KeptDataset(ImageDataset):
    """An ImageDataset that reads its items from the files of make_epoch(), in `folder`."""
    folder = None

    def __init__(self, paths, transform, seed=0, labels=None):
        super().__init__(paths, transform, seed, labels)
        source = repr((paths.tolist(), repr(transform), seed)).encode()
        self.name, self.epoch = hashlib.sha1(source).hexdigest()[:16], None

    def path(self, epoch):
        return os.path.join(self.folder, f"{self.name}-{epoch}.npy")

    def __getitem__(self, key):
        epoch, index = divmod(int(key), len(self))
        if epoch != self.epoch:
            if not os.path.exists(self.path(epoch)):
                make_epoch(self, epoch)
            self.epoch, self.crops = epoch, torch.from_numpy(np.load(self.path(epoch)))
        crop = self.crops[index]
        return (crop,) if self.labels is None else (crop, self.labels[index])

def make_epoch(dataset, epoch):
    """Write one epoch's crops of a KeptDataset, uint8 (P, 3, H, W)."""
    crops = [ImageDataset.__getitem__(dataset, epoch * len(dataset) + index)[0]
             for index in range(len(dataset))]
    part = f"{dataset.path(epoch)}.{os.getpid()}.npy"
    np.save(part, torch.stack(crops).numpy())
    os.replace(part, dataset.path(epoch))

def make_crops(folder, data, size, lengths):
    """Write what rows will ask for. lengths: {(split, seed): epochs}, split a folder in `data`, or
    "pretrain" for the crops of pre-training."""
    KeptDataset.folder, todo = folder, []
    os.makedirs(folder, exist_ok=True)
    for (split, seed), epochs in lengths.items():
        transform = finetune.train_transform(size, 0.5, "crop")
        if split == "pretrain":
            transform = tinymim.crop_and_flip(size)
            paths = tinymim.find_images(os.path.join(data, "all", "train"))
        else:
            paths = finetune.read_folder(os.path.join(data, split, "train"))[0]
            test = finetune.read_folder(os.path.join(data, split, "val"))[0]
            todo.append((KeptDataset(test, finetune.eval_transform(size)), 0))
        todo += [(KeptDataset(paths, transform, seed), epoch) for epoch in range(epochs)]
    missing = {dataset.path(epoch): (dataset, epoch) for dataset, epoch in todo
               if not os.path.exists(dataset.path(epoch))}
    with multiprocessing.get_context("fork").Pool(initializer=torch.set_num_threads,
                                                  initargs=(1,)) as pool:
        pool.starmap(make_epoch, missing.values(), chunksize=1)

def set_up(folder, log):
    """In each process of run(): its output goes to the file `log`-PROCESS.txt."""
    sys.stdout = sys.stderr = open(f"{log}-{os.getpid()}.txt", "a", buffering=1)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    KeptDataset.folder = folder
    tinymim.ImageDataset = finetune.ImageDataset = KeptDataset

def run(function, items, jobs, seconds, folder, log):
    """function(item) for all items in `jobs` processes. Yields the results in the order in which
    they end, and stops when the time is over. folder, log: see set_up()."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(jobs, set_up, (folder, log)) as pool:
        results = pool.imap_unordered(function, items)
        for _ in items:
            try:
                yield results.next(max(0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print("the time is over: run it again to continue")
                return
