# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The folder of a run: what another process finds in it, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.files import whole_file
from mmagic_tome.lab.results import RunFolder, new_folder

MANIFEST = {"steps": 4, "size": (64, 64), "methods": {"half": {"ratio": 0.5}}}


def test_a_new_folder_is_named_by_the_time_and_resume_takes_the_newest(tmp_path):
    made = []
    for command in ("evaluate", "evaluate", "infer"):
        made.append(new_folder(tmp_path / "work"))
        with RunFolder(made[-1]).writing({"command": command}):
            pass
    first, second, _ = made
    assert len({*made}) == 3 and new_folder(tmp_path / "work", "evaluate") == second
    assert first.name[:15] == second.name[:15] or first.name < second.name
    (tmp_path / "work" / "zzz_no_run").mkdir()
    assert new_folder(tmp_path / "work", "evaluate") == second
    with pytest.raises(ToMeError, match=r"no run in .* to go on with; leave out --resume"):
        new_folder(tmp_path / "other", "evaluate")
    (tmp_path / "file").touch()
    with pytest.raises(ToMeError, match=r"cannot write to .*file; choose another --work-dir"):
        new_folder(tmp_path / "file")


def test_rows_are_found_by_another_process(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.add({"kind": "metric", "method": "half", "number": 3, "value": float("inf")})
    folder.add({"kind": "image", "method": "half", "number": 3, "size": (4, 5)})
    other = RunFolder(tmp_path / "run")
    assert other.rows == folder.rows
    assert other.find(kind="image") == [
        {"kind": "image", "method": "half", "number": 3, "size": [4, 5]}
    ]
    assert other.has(kind="metric", number=3)
    assert not other.has(kind="metric", number=None)


def test_what_a_killed_process_left_of_a_row_is_dropped(tmp_path):
    RunFolder(tmp_path).add({"kind": "image", "number": 0, "prompt": "a crème brûlée"})
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    second = json.dumps({"kind": "image", "number": 1}).encode() + b"\n"
    for length in range(1, len(second)):
        path.write_bytes(whole + second[:length])
        folder = RunFolder(tmp_path)
        assert [row["number"] for row in folder.rows] == [0]
    folder.add({"kind": "image", "number": 1})
    folder.add({"kind": "image", "number": 2})
    assert [row["number"] for row in RunFolder(tmp_path).rows] == [0, 1, 2]
    path.write_bytes(b"{broken}\n" + whole)
    with pytest.raises(ToMeError, match="line 1 is no JSON"):
        _ = RunFolder(tmp_path).rows


def test_going_on_needs_the_same_manifest_and_may_add_methods(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.manifest == {}
    with folder.writing(MANIFEST):
        assert folder.manifest["steps"] == 4
    with folder.writing({**MANIFEST, "methods": {"fast": {"cache": "fast"}}}):
        pass
    assert folder.manifest["methods"] == {"half": {"ratio": 0.5}, "fast": {"cache": "fast"}}
    held = (tmp_path / "manifest.json").read_bytes()
    for other, said in [
        ({**MANIFEST, "steps": 5}, r"differs in steps: 4, now 5\. Ask"),
        ({**MANIFEST, "methods": {"half": {"ratio": 0.4}}}, "methods.half.ratio: 0.5, now 0.4"),
        ({**MANIFEST, "dtype": "float16"}, 'dtype: null, now "float16"'),
    ]:
        with pytest.raises(ToMeError, match=said), folder.writing(other):
            pass
    assert (tmp_path / "manifest.json").read_bytes() == held


def test_two_processes_cannot_write_one_folder(tmp_path):
    code = (
        "import sys; from mmagic_tome.lab.results import RunFolder\n"
        "with RunFolder(sys.argv[1]).writing({}):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        message = f"another process writes to {tmp_path}"
        with pytest.raises(ToMeError, match=message), RunFolder(tmp_path).writing({}):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    # A process that was killed holds nothing.
    with RunFolder(tmp_path).writing({}):
        pass


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("half")
        assert part.suffix == ".txt"
        raise KeyboardInterrupt
    assert os.listdir(path.parent) == []
    with whole_file(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_full_disk_is_one_line_and_leaves_whole_rows(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.add({"number": 0})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ToMeError, match=r"No space left on device\. What is there is whole"):
        folder.add({"number": 1})
    assert [row["number"] for row in folder.rows] == [0]
