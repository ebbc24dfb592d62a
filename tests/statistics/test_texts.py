from __future__ import annotations

import io
import json
import sys

import pytest

from coachhook.statistics import read_texts


def test_a_text_file_gives_its_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\n  \ntwo züge \nthree".encode())
    assert list(read_texts(file)) == ["one", "two züge ", "three"]
    assert list(read_texts(str(file))) == ["one", "two züge ", "three"]


def test_a_jsonl_file_gives_its_texts(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"text": "one\ntwo", "id": 1}, {"text": "  "}, {"text": "three"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert list(read_texts(file)) == ["one\ntwo", "three"]


def test_a_folder_gives_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("2\n")
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "c.txt").write_text("3")
    (tmp_path / "notes.md").write_text("no")
    (tmp_path / "sub.txt").mkdir()
    assert list(read_texts(tmp_path)) == ["1", "2", "3"]


def _stdin(content, **options):
    return io.TextIOWrapper(io.BytesIO(content), **options)


@pytest.mark.parametrize(
    "options",
    [{"encoding": "utf-8"}, {"encoding": "latin-1"}, {"encoding": "ascii", "newline": "\n"}],
    ids=lambda options: options["encoding"],
)
def test_standard_input_is_read_like_a_file(monkeypatch, tmp_path, options):
    content = "\ufeffone\rmore\r\n\nzwölf\n".encode()
    monkeypatch.setattr(sys, "stdin", _stdin(content, **options))
    (tmp_path / "a.txt").write_bytes(content)
    assert list(read_texts("-")) == list(read_texts(tmp_path)) == ["one\rmore", "zwölf"]


def test_iterables_and_records():
    assert list(read_texts(["a", "", "b"])) == ["a", "b"]
    assert list(read_texts(text for text in ("a", "b"))) == ["a", "b"]
    assert list(read_texts([{"text": "a", "url": "x"}, {"text": "b"}])) == ["a", "b"]
    assert list(read_texts(io.StringIO("a\nb\n"))) == ["a\n", "b\n"]


def test_a_reader_is_read_on():
    reader = read_texts(["a", "b"])
    next(reader)
    assert list(read_texts(reader)) == ["b"]


def test_it_knows_how_far_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("12345\n")
    (tmp_path / "b.txt").write_text("1234567890123\n")
    reader = read_texts(tmp_path)
    shares = [reader.fraction]
    for _ in reader:
        shares.append(reader.fraction)
    assert shares == [0, 0.3, 1.0]
    assert read_texts(iter(["a"])).fraction is None
    items = read_texts(["a", "b", "c", "d"])
    next(items)
    assert items.fraction == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: must be JSON"),
        ('{"text": "a"}\n\n{"body": "b"}', r'line 3: must be an object with a string "text"'),
        ('["text"]', r'line 1: must be an object with a string "text"'),
        ('{"text": 5}', r'line 1: must be an object with a string "text"'),
    ],
)
def test_a_bad_record_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / "a.jsonl"))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: text must be UTF-8"):
        list(read_texts(tmp_path / "a.txt"))


def test_standard_input_that_is_no_text_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", _stdin(b"fine\n\xff\n", errors="surrogateescape"))
    with pytest.raises(ValueError, match="standard input, line 2: text must be UTF-8"):
        list(read_texts("-"))


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: text must be Unicode"):
        list(read_texts(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="item 1: text must be Unicode"):
        list(read_texts(["a", {"text": "b \ud800"}]))


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold \*\.txt or \*\.jsonl files"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="put it in a list"):
        read_texts("Some text, not a path")
    with pytest.raises(TypeError, match="got int"):
        read_texts(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got dict"):
        read_texts({"text": "a"})
    with pytest.raises(TypeError, match=r"item 1 must be a string .* got a record of 'body'"):
        list(read_texts([{"text": "a"}, {"body": "b"}]))


_RECORDS = ["w1 w2", "", "w3", "  ", "w4 w5 w6"]


def _dataset():
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    table = datasets.table.InMemoryTable.from_pydict({"text": _RECORDS, "id": list(range(5))})
    # A fingerprint made by the library pickles parts of pyarrow; not all versions of them agree.
    return datasets.Dataset(table, fingerprint="texts")


def test_a_dataset_and_its_folder(tmp_path):
    dataset = _dataset()
    assert list(read_texts(dataset)) == ["w1 w2", "w3", "w4 w5 w6"]
    assert list(read_texts(dataset.to_iterable_dataset())) == ["w1 w2", "w3", "w4 w5 w6"]
    dataset.save_to_disk(tmp_path / "saved")
    reader = read_texts(tmp_path / "saved")
    assert next(reader) == "w1 w2" and reader.fraction == 0.2
    assert list(reader) == ["w3", "w4 w5 w6"]


def test_a_dataset_of_several_splits_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")

    both = datasets.DatasetDict(train=_dataset(), test=_dataset())
    with pytest.raises(TypeError, match="got DatasetDict; give one of its values.*'train'"):
        read_texts(both)
    both.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"name the folder of one of \['test', 'train'\]"):
        read_texts(tmp_path / "saved")


def test_a_saved_dataset_without_the_library_names_it(tmp_path, monkeypatch):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_texts(tmp_path)


def test_standard_input_that_is_closed_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # as Python finds it after "<&-"
    with pytest.raises(ValueError, match="source must be open, got standard input"):
        read_texts("-")
