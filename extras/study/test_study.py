"""Tests of the study: python -m pytest extras/study"""
import io, json, multiprocessing, os, shutil, subprocess, sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
from test_tinymim import fails, refused  # first: it hides the GPU
import pytest, torch, results, rows, study, tinymim

def result(key, seed, top1, **changes):
    usual = dict(labels="few", photos=5000, epochs=3, teacher="t", data="d", device="cpu")
    return usual | dict(row=key, seed=seed, top1=top1) | changes

@pytest.mark.slow
def test_every_row_works_at_its_smallest_and_is_not_run_again(tmp_path):
    options = ["--smallest", "--labels", "few", "--out", str(tmp_path)]
    command = [sys.executable, HERE / "study.py", *options, "--jobs", "2"]
    printed = subprocess.check_output(command, encoding="utf-8")
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows.ROWS) + 2 * len({row.table for row in rows.ROWS})
    assert all(top1.strip(" |") for _, _, top1 in lines)  # no number is missing
    shutil.rmtree(tmp_path / "students")
    study.main(options)
    assert not (tmp_path / "students").exists()

def test_splits_share_no_photo(tmp_path):
    def photos(part):
        found = tinymim.find_images(tmp_path / "data" / part)
        return {os.path.realpath(os.fsdecode(path)) for path in found}

    shapes, _ = study.draw_smallest(tmp_path)
    assert study.link_splits(shapes, tmp_path) == {"few": 10, "all": 40}
    assert photos("few/train") < photos("all/train") and len(photos("few/train")) == 10
    assert photos("few/val") == photos("all/val") and not photos("all/val") & photos("all/train")
    moved = shapes.rename(tmp_path / "moved")
    study.link_splits(moved, tmp_path)
    assert all(str(moved) in photo for photo in photos("few/train"))
    shutil.rmtree(moved / "val/disc")
    refused("different classes", study.link_splits, moved, tmp_path)
    fails(study.main, ["--data", "missing", "--out", str(tmp_path)], "cifar10.py --jpeg")

def test_a_result_of_other_settings_teacher_or_photos_is_not_taken(tmp_path):
    prepare = lambda: study.prepare(tmp_path, shapes, teacher, 1, study.SMALLEST)
    shapes, teacher = study.draw_smallest(tmp_path)
    shared, jobs = prepare(), (rows.ROWS[:1], ["few"], [0])
    [[job]] = study.list_jobs(shared, *jobs)
    path, wanted = study.result_path(shared, *job), study.settings(shared, *job)
    results.write(path, json.dumps(wanted | {"top1": 10.0}))
    assert study.list_jobs(shared, *jobs) == []
    results.write(path, json.dumps(wanted | {"blr": [1, 1]}))
    refused(r"seed-0.json has blr \[1, 1\], not", study.list_jobs, shared, *jobs)
    content = tinymim.load_file(teacher)
    content["model"]["cls_token"] += 1
    torch.save(content, teacher)
    refused("study.json has teacher", prepare)
    study.draw_smallest(tmp_path)
    next(shapes.glob("val/disc/*")).rename(shapes / "val/disc/new.png")
    refused("study.json has data", prepare)

def test_tables_compare_with_the_first_row_in_the_same_seeds():
    qk, qq = "relation-qk-vv-epochs-3", "relation-qq-kk-vv-epochs-3"
    found = [result(qk, 0, 70.0), result(qk, 1, 72.0), result(qq, 0, 73.0),
             result("cls-epochs-3", 2, 60.0), result("output-epochs-3", 1, 71.0, device="gpu")]
    text = results.table(T8 := [row for row in rows.ROWS if row.table == "T8"], found)
    lines = dict(line.strip("| ").partition(" | ")[::2] for line in text.splitlines())
    assert lines["relation (qk vv)"] == "75.8 | 71.0 ± 1.4"
    assert lines["relation (qq kk vv)"] == " | 73.0 (+3.0)"  # of seed 0
    assert lines["class token"] == "70.6 (-5.2) | 60.0"  # no seed in common
    assert lines["feature"] == "73.4 (-2.4) | 71.0 (-1.0) *" and "* also or only on gpu" in text
    found.append(result(qk, 2, 70.0, epochs=1))
    refused("seed 2 has epochs 1, not 3", results.table, T8, found)

def write_many(out, name):
    for i in range(100):
        results.write(out / "results" / f"{name}{i}.json", json.dumps(result(name, i, 1)))
        results.collect(out)

def test_two_writers_lose_nothing(tmp_path):
    (tmp_path / "results").mkdir()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(write_many, [(tmp_path, "a"), (tmp_path, "b")])
    assert len(results.load_all(results.collect(tmp_path))) == 200

def test_what_is_here_belongs_together_and_prints_without_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    study.main(["--print", "--tables", "T11"])
    assert "| teacher &#8594; student | 74.4 (-0.6) |" in sys.stdout.buffer.getvalue().decode()
    known, found = {row.key: row for row in rows.ROWS}, results.load_all(HERE / "results.json")
    assert all(one["blr"] == list(rows.rates(known[one["row"]])) for one in found)
    teacher = study.ROOT / "assets" / "cifar10_teacher.pth"
    assert found[0]["teacher"] == study.copy_teacher(teacher, tmp_path, 192, 6)[1]
    pytest.importorskip("matplotlib")
    import plot
    plot.main([str(HERE / "results.json"), str(tmp_path / "lengths.svg")])
    assert "</svg>" in (tmp_path / "lengths.svg").read_text()

def test_options_without_effect_are_refused(capsys):
    for options in ["--print", "--jobs", "2"], ["--smallest", "--data", "x"]:
        refused("2", study.main, options, error=SystemExit)
        assert f"{options[1]} has no effect with {options[0]}" in capsys.readouterr().err
