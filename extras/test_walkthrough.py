"""Tests of walkthrough.ipynb: python -m pytest extras/test_walkthrough.py"""

import json
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for the CPU
os.environ["OMP_NUM_THREADS"] = "1"
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The image decoding")  # leaving torchvision
def test_the_notebook_runs_from_both_folders_and_its_student_learns(monkeypatch):
    matplotlib.use("Agg")
    for folder, cells in ((HERE.parent, CODE[:3]), (HERE, CODE)):
        monkeypatch.chdir(folder)
        names = {}
        with matplotlib.rc_context():
            for cell in cells:
                exec("".join(cell["source"]), names)
                names.update(UNLABELLED=640, LABELLED=100, TUNING_EPOCHS=2)
        names["temporary"].cleanup()
        names["plt"].close("all")
    torch.testing.assert_close(names["by_hand"], names["kl"]["vv"])
    assert sum(names["history"][-1]) < 0.8 * sum(names["history"][0])

def test_the_notebook_is_committed_with_its_pictures_and_names_no_path_of_a_machine():
    assert NOTEBOOK.stat().st_size < 900_000
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    texts = [json.dumps(output.get("text", "")) for output in outputs]
    assert not any(path in text for text in texts for path in ("/home", "/root", "/Users", "/tmp"))
