from datasets import Dataset, load_dataset

from qlora_exp.libraries.datasets import content_key


def test_a_key_follows_content_and_changes(tmp_path):
    def loaded(text: str) -> Dataset:
        (tmp_path / "rows.jsonl").write_text(text)
        return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))

    first = loaded('{"a": 1}\n{"a": 2}\n')
    assert content_key(first) == content_key(
        load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    )
    assert content_key(first) != content_key(first.select([0]))
    assert content_key(first) != content_key(loaded('{"a": 1}\n{"a": 33}\n'))
