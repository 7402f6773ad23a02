"""For study.py --jobs: rows side by side. Networks this small leave most of a GPU idle.

Rows of one seed see the same crops. So all cores make the crops once, before any row runs, and keep
them in files, 3 KB for a crop and 150 MB for an epoch of CIFAR-10. A row needs no workers then.
"""

import concurrent.futures
import hashlib
import multiprocessing
import os
import sys
import threading

import numpy as np
import torch

import data
import finetune
import tinymim
from tinymim import ImageDataset, UserError

class KeptDataset(ImageDataset):
    """An ImageDataset whose items are read from the files of make_epoch(), in `folder`."""
    folder = None

    def __init__(self, paths, transform, seed=0, labels=None):
        super().__init__(paths, transform, seed, labels)
        changed = [os.stat(path).st_mtime_ns for path in paths]  # other photos, other files
        source = repr((paths.tolist(), changed, repr(transform), seed)).encode()
        self.name, self.epoch = hashlib.sha1(source).hexdigest()[:16], None

    def path(self, epoch):
        return os.path.join(self.folder, f"{self.name}-{epoch}.npy")

    def __getitem__(self, key):
        epoch, index = divmod(int(key), len(self))
        if epoch != self.epoch:
            self.epoch, self.crops = epoch, torch.from_numpy(np.load(self.path(epoch)))
        crop = self.crops[index]
        return (crop,) if self.labels is None else (crop, self.labels[index])

def make_epoch(item):
    """Write one epoch's crops, uint8 (P, 3, H, W). item: a KeptDataset and the epoch."""
    dataset, epoch = item
    crops = [ImageDataset.__getitem__(dataset, epoch * len(dataset) + index)[0]
             for index in range(len(dataset))]
    part = f"{dataset.path(epoch)}.{os.getpid()}"
    with open(part, "wb") as file:
        np.save(file, torch.stack(crops).numpy())
    os.replace(part, dataset.path(epoch))

def set_up(folder, log):
    """In each process. Its output goes to the file `log`-PROCESS.txt. It ends with its parent."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(f"{log}-{os.getpid()}.txt", "a", buffering=1)
    data.use_one_thread()
    KeptDataset.folder = folder
    tinymim.ImageDataset = finetune.ImageDataset = KeptDataset
    data.keep_small_photos()

def in_processes(function, items, jobs, folder, log):
    """Yields function(item) of all items, as they end in `jobs` processes. See set_up()."""
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, spawn, set_up, (folder, log))
    try:
        for task in concurrent.futures.as_completed([pool.submit(function, x) for x in items]):
            yield task.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(f"a process was killed, for its memory perhaps: see {log}-*.txt, or try "
                        "fewer --jobs") from None
    except BaseException:  # of one row: do not wait for the others
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
