"""study.by_layer: the scores of eval.py, with one layer in memory."""

import weakref

import pytest
from helpers import error_line, must, read_json, run

from study import by_layer

FLAGS = "--sequence_length=32", "--eval_windows=6"


@pytest.mark.parametrize("kind", ["seed", "btx"])
def test_the_scores_are_those_of_the_whole_model(kind, data, eval_config, tmp_path, request):
    folder, flags = request.getfixturevalue(kind), [*FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}"]
    must(run("eval.py", eval_config, *flags, f"--model={folder}"))
    must(run("study/by_layer.py", *flags, f"--model={folder}", "--batch_size=4", "--device=cpu"))
    (row,), found = read_json(tmp_path / "results.json")["rows"], read_json(tmp_path / "by_layer.json")
    assert found["bpb"] == pytest.approx(row["bpb"], abs=1e-6) and len(row["bpb"]) == 3
    assert found.get("load") == row.get("load")


def test_one_layer_is_in_memory_at_a_time(btx, data, tmp_path, monkeypatch):
    """When a layer is read, those before it are gone; nothing reads the whole model."""
    read, before = by_layer.read_layer, []

    def counted(*arguments):
        assert not [one for one in before if one() is not None]
        before.append(weakref.ref(layer := read(*arguments)))
        return layer

    monkeypatch.setattr(by_layer, "read_layer", counted)
    flags = *FLAGS, f"--data_dir={data}", f"--out_dir={tmp_path}", f"--model={btx}", "--device=cpu"
    monkeypatch.setattr("sys.argv", ["study/by_layer.py", *flags])
    by_layer.main()
    assert len(before) == 2


def test_what_cannot_be_scored(seed, data, tmp_path):
    flags = f"--data_dir={data}", f"--out_dir={tmp_path}"
    assert "nothing to score" in error_line(run("study/by_layer.py", *flags))
    message = error_line(run("study/by_layer.py", *flags, f"--model={seed}", "--sequence_length=999"))
    assert "--sequence_length=999" in message
