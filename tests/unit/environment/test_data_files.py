"""The files that a path names: each of them, in order, and nothing else."""

import json
import logging
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from qlora_exp.config.hydra_compose import compose
from qlora_exp.config.sections.dataset import looks_local
from qlora_exp.environment import data_files
from qlora_exp.utils.errors import ConfigError, DataError


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"from": name}))


def found(path: str) -> list[str]:
    data_files.check(path)
    return [file.name for file in data_files.find(path)]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_folder_has_all_its_files_of_rows(caplog):
    write("rows/b.jsonl", "rows/sub/a.json.gz", "rows/c.CSV", "rows/README.md", "rows/_SUCCESS", "rows/.git/x.json")
    write("rows/dataset_info.json")
    with caplog.at_level(logging.INFO):
        assert found("rows") == ["rows/b.jsonl", "rows/c.CSV", "rows/sub/a.json.gz"]
    assert "3 files, from rows/b.jsonl to rows/sub/a.json.gz; not read: rows/README.md" in caplog.text


def test_pattern_names_files():
    write("rows/b.jsonl", "rows/a.jsonl", "rows/sub/c.jsonl", "rows/d.csv")
    assert found("rows/*.jsonl") == ["rows/a.jsonl", "rows/b.jsonl"]
    assert found("rows/**/*.jsonl") == ["rows/a.jsonl", "rows/b.jsonl", "rows/sub/c.jsonl"]
    assert found("rows/[ab].*") == ["rows/a.jsonl", "rows/b.jsonl"]


def test_folder_of_several_splits_is_refused(caplog):
    write("rows/data/train-00000.jsonl", "rows/data/test-00000.jsonl", "rows/data/validation.jsonl")
    for folder in ("rows", "./rows", "rows/", str(Path("rows").absolute())):
        with pytest.raises(DataError, match=r"files of several splits: .*test.*\(test\); .*train.*dataset.eval_path"):
            found(folder)
    assert found("rows/**/*train*") == ["rows/data/train-00000.jsonl"]
    assert len(found("rows/**/*")) == 3
    assert "files of several splits are read as one" in caplog.text
    write("test/one.jsonl", "test/train.jsonl")  # the word of the folder's own name says nothing
    assert len(found("test")) == 2
    write("faq/faq.jsonl", "faq/faq_test.jsonl")
    with pytest.raises(DataError, match=r"faq/faq.jsonl \(no split\); faq/faq_test.jsonl \(test\)"):
        found("faq")


def test_working_folder_has_its_files():
    write("a.jsonl", "1.jsonl", "sub/b.jsonl", "_raw/c.jsonl")
    Path("link").symlink_to("sub")
    assert found(".") == ["1.jsonl", "a.jsonl", "sub/b.jsonl"]
    assert found("_raw/*.jsonl") == ["_raw/c.jsonl"]
    write("train.jsonl", "test.jsonl")
    with pytest.raises(DataError, match="files of several splits"):
        found(".")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.csv", "no file gone.csv .working directory"),
        ("./gone", "no file or folder ./gone .working directory"),
        ("a.jsonl,b.jsonl", "name several files by a folder or a pattern"),
        ("gone/*.jsonl", "no file matches gone/"),
        ("there", "the folder there has no file of rows"),
        ("there/*.md", "there/x.md, which: unknown file format; use one of .jsonl"),
        ("there/x.md", "unknown file format; use one of .jsonl"),
        ("rows.jsonl.zip", "is an archive; unpack it first: unzip rows.jsonl.zip"),
        ("rows.tar.gz", "is an archive; unpack it first: tar xf rows.tar.gz"),
        ("rows.parquet.gz", "is compressed as a whole; decompress it first"),
        ("empty.jsonl", "empty.jsonl: the file is empty"),
    ],
)
def test_path_without_files_of_rows_is_refused(path: str, message: str):
    write("there/x.md", "rows.jsonl.zip", "rows.tar.gz", "rows.parquet.gz")
    Path("empty.jsonl").touch()
    with pytest.raises(DataError, match=message):
        found(path)


@pytest.mark.parametrize("path", ["a.JSONL", "a.csv.GZ", "s3://b/rows", "rows/*", "there", "gone.tsv"])
def test_path_of_files_is_no_dataset_of_the_hub(path: str):
    Path("there").mkdir()
    assert looks_local(path)
    assert not looks_local("owner/name")


# URLs, with a folder in place of a bucket


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    class Bucket(DirFileSystem):
        protocol = "s3"
        fetched: ClassVar[list[str]] = []

        def __init__(self, **_options) -> None:
            super().__init__(str(tmp_path), LocalFileSystem())

        def get_file(self, rpath: str, lpath: str, **options) -> None:
            self.fetched.append(rpath)
            super().get_file(rpath, lpath, **options)

    fsspec.register_implementation("s3", Bucket, clobber=True)
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / ".cache"))
    data_files.fetch.cache_clear()
    yield Bucket
    fsspec.register_implementation("s3", "s3fs.S3FileSystem", clobber=True)
    data_files.fetch.cache_clear()


@pytest.mark.parametrize("url", ["s3://bucket/rows", "s3://bucket/rows/*.jsonl"])
def test_files_of_a_url_are_fetched_once(url: str, bucket):
    write("bucket/rows/b.jsonl", "bucket/rows/a.jsonl", "bucket/rows/notes.txt")
    assert found(url) == ["s3://bucket/rows/a.jsonl", "s3://bucket/rows/b.jsonl"]
    assert [file.path.read_text() for file in data_files.find(url)][1] == json.dumps({"from": "bucket/rows/b.jsonl"})
    bucket.fetched.clear()
    data_files.fetch.cache_clear()  # another process
    found(url)
    assert bucket.fetched == []
    Path("bucket/rows/b.jsonl").write_text('{"changed": 1}')
    data_files.fetch.cache_clear()
    assert "changed" in data_files.find(url)[1].path.read_text()


def test_page_is_fetched_again_unless_its_server_says_that_it_is_the_same(tmp_path, monkeypatch):
    class Page(LocalFileSystem):
        protocol = "http"
        info_of_page: ClassVar[dict] = {"size": 1}
        asked: ClassVar[list[str]] = []

        @classmethod
        def _strip_protocol(cls, path):
            return path

        def info(self, path, **_options):
            return self.info_of_page

        def isdir(self, path):
            raise AssertionError("a page with links would be taken for a folder")

        def get_file(self, rpath, lpath, **_options):
            self.asked.append(rpath)
            Path(lpath).write_text("{}")

        def unstrip_protocol(self, name):
            return name

    fsspec.register_implementation("http", Page, clobber=True)
    monkeypatch.setenv("QLORA_EXP_CACHE", str(tmp_path / ".cache"))
    try:
        for said, count in (({"size": 1}, 2), ({"size": 1, "ETag": "a"}, 3), ({"size": 1, "ETag": "a"}, 3)):
            Page.info_of_page = said
            for _ in range(2 if count == 2 else 1):
                data_files.fetch.cache_clear()
                assert [file.name for file in data_files.find("http://host/a.jsonl")] == ["http://host/a.jsonl"]
            assert len(Page.asked) == count
        with pytest.raises(DataError, match="unknown file format"):
            Page.isdir = lambda *_: False
            data_files.find("http://host/rows")
    finally:
        fsspec.register_implementation("http", "fsspec.implementations.http.HTTPFileSystem", clobber=True)
        data_files.fetch.cache_clear()


def test_url_that_cannot_be_fetched_is_refused(bucket):
    with pytest.raises(DataError, match="s3://bucket/gone.jsonl cannot be fetched"):
        data_files.find("s3://bucket/gone.jsonl")
    with pytest.raises(DataError, match="unknown file format"):
        data_files.check("s3://bucket/rows.txt")


def test_url_whose_package_is_missing_is_refused():
    with pytest.raises(DataError, match="gs:// needs a package: .*gcsfs"):
        data_files.check("gs://bucket/rows.jsonl")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a.jsonl", "begins with ftp://; rows are fetched from s3://"),
        ("file:///etc/a.jsonl", "begins with file://"),
        ("simplecache::s3://b/a.jsonl", "rows are fetched from s3://"),
        ("s3://KEY:SECRET@bucket/a.jsonl", "a user name, a password or a query"),
        ("https://host/a.jsonl?token=SECRET", "a user name, a password or a query"),
        ("az://box/a.jsonl?sig=SECRET", "a user name, a password or a query"),
        ("https://host/a.jsonl;sig=SECRET", "a user name, a password or a query"),
    ],
)
def test_url_with_a_secret_or_of_another_kind_is_refused(url: str, message: str):
    with pytest.raises(ConfigError, match=message) as refused:
        compose(["dataset=own", f"dataset.path='{url}'"])
    assert "SECRET" not in str(refused.value)
