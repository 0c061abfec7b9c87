import contextlib
import errno
import gzip
import hashlib
import http.server
import os
import sys
import threading
from dataclasses import replace

import pytest

from layerwise.lab import data
from layerwise.lab.data import cifar, download, fetch, mnist
from layerwise.lab.data.download import MirrorsError, RemoteFile, fetch_file
from layerwise.lab.errors import UsageError

CONTENT = bytes(range(256)) * 4000  # some megabyte: several blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives `server.contents`; misbehaves as `server.tricks` say."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.contents.get(self.path)
        if content is None:
            self.send_error(404)
            return
        trick = self.server.tricks.get(self.path, {})
        self.send_response(200)
        if not trick.get("no length"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # it hangs up on a server that gives too much
            self.wfile.write(content[: trick.get("cut")])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a proxy would not find this server
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.contents, running.tricks, running.asked = {}, {}, []
        running.address = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path):
    """Return a function that fetches `file` from the paths of the server, in this order."""

    def run(*paths, progress=None):
        urls = tuple(server.address + path for path in paths)
        return fetch_file(RemoteFile("file", len(CONTENT), MD5, urls), tmp_path, progress=progress)

    return run


def test_a_file_is_fetched_checked_and_put_in_its_place(server, get, tmp_path, capfd):
    server.contents["/file"] = CONTENT
    seen = []
    assert get("/file", progress=lambda *told: seen.append(told)) == tmp_path / "file"
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == ("file", len(CONTENT), len(CONTENT))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="rights are others there")
def test_who_may_read_the_folder_may_read_the_file(server, get, tmp_path):
    server.contents["/file"] = CONTENT
    tmp_path.chmod(0o755)
    assert get("/file").stat().st_mode & 0o777 == 0o644


def test_a_file_is_not_decompressed_on_the_way(server, tmp_path):
    content = gzip.compress(CONTENT)
    server.contents["/file.gz"] = content
    remote = RemoteFile("file.gz", len(content), hashlib.md5(content).hexdigest(), (f"{server.address}/file.gz",))
    assert fetch_file(remote, tmp_path).read_bytes() == content


def test_a_connection_that_breaks_is_left_for_the_next_server(server, get, tmp_path):
    server.contents |= {"/breaks": CONTENT, "/file": CONTENT}
    server.tricks["/breaks"] = {"cut": 300_000}
    assert get("/breaks", "/file").read_bytes() == CONTENT
    assert server.asked == ["/breaks", "/file"]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_of_a_download_that_breaks_nothing_is_left(server, get, tmp_path):
    server.contents["/file"] = CONTENT
    server.tricks["/file"] = {"cut": 1000}
    with pytest.raises(MirrorsError, match=r"/file \(.*1000 bytes read, 1023000 more expected"):
        get("/file")
    assert list(tmp_path.iterdir()) == []
    server.tricks.clear()
    assert get("/file").read_bytes() == CONTENT


def test_a_corrupt_file_is_deleted_and_the_next_server_asked(server, get, tmp_path):
    server.contents |= {"/bad": CONTENT[:-1] + b"x", "/good": CONTENT}
    assert get("/bad", "/good").read_bytes() == CONTENT
    assert server.asked == ["/bad", "/good"]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_of_the_same_name_is_renamed_when_the_right_one_has_come(server, get, tmp_path):
    (tmp_path / "file").write_bytes(b"of the user")
    with pytest.raises(MirrorsError):
        get("/missing")
    assert (tmp_path / "file").read_bytes() == b"of the user"
    server.contents["/file"] = CONTENT
    assert get("/file").read_bytes() == CONTENT
    assert (tmp_path / "file.before").read_bytes() == b"of the user"


def test_if_no_server_gives_it_each_is_named_with_its_reason(server, get, tmp_path):
    server.contents["/bad"] = b"x" * len(CONTENT)
    with pytest.raises(MirrorsError) as caught:
        get("/missing", "/bad")
    words = str(caught.value)
    assert f"{server.address}/missing (HTTP 404 Not Found)" in words
    assert f"{server.address}/bad (MD5 hash of downloaded file (file) does not match" in words
    assert f"but got {hashlib.md5(b'x' * len(CONTENT)).hexdigest()})" in words
    assert f"expected MD5 {MD5}" in words
    assert "\n" not in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("server")
def test_a_server_that_is_not_there_is_named(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/file"
    with pytest.raises(MirrorsError, match=f"{url} \\(.*refused"):
        fetch_file(RemoteFile("file", 5, MD5, (url,)), tmp_path)


def test_a_login_page_is_recognised_by_its_length(server, get):
    server.contents["/file"] = b"<html>log in</html>"
    with pytest.raises(MirrorsError, match="19 bytes where 1024000 were expected"):
        get("/file")


def test_a_server_that_gives_too_much_is_stopped_and_left(server, get):
    server.contents |= {"/more": CONTENT * 30, "/file": CONTENT}
    server.tricks["/more"] = {"no length": True}
    seen = []
    assert get("/more", "/file", progress=lambda *told: seen.append(told)).read_bytes() == CONTENT
    assert max(done for _, done, _ in seen) == len(CONTENT)
    assert len(seen) < 20
    assert server.asked == ["/more", "/file"]


def test_a_full_disk_is_named_and_no_other_server_asked(server, get, tmp_path, monkeypatch):
    server.contents["/file"] = CONTENT

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "replace", full)
    with pytest.raises(
        UsageError, match=r"file: cannot be written: No space left.*make room for 1024000 bytes"
    ) as told:
        get("/file", "/other")
    assert not isinstance(told.value, MirrorsError)
    assert told.value.__cause__.errno == errno.ENOSPC
    assert server.asked == ["/file"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_is_named(server, get, tmp_path):
    server.contents["/file"] = CONTENT
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"file: .*directory.*give a folder that can be written"):
        get("/file")


# A whole data set.


@pytest.fixture
def two_files(server, monkeypatch):
    """Put a data set of two small files, on this server, in the place of MNIST's four."""
    contents = {"a.gz": b"first", "b.gz": b"second"}
    server.contents |= {f"/{name}": content for name, content in contents.items()}
    files = tuple(
        RemoteFile(name, len(content), hashlib.md5(content).hexdigest(), (f"{server.address}/{name}",))
        for name, content in contents.items()
    )
    monkeypatch.setitem(fetch.FILES, "mnist", files)
    return files


def test_the_files_of_a_data_set_go_to_the_folder_of_its_name(two_files, tmp_path):
    folder = tmp_path / "new" / "folder"
    seen = []
    place = fetch.fetch("mnist", folder, progress=lambda *told: seen.append(told))
    assert place == folder / "mnist"
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"a.gz": b"first", "b.gz": b"second"}
    assert seen == [("a.gz", 5, 5), ("b.gz", 6, 6)]


def test_what_is_left_to_do_by_hand_is_said_on_one_line(server, two_files, tmp_path):
    del server.contents["/b.gz"]
    with pytest.raises(UsageError) as caught:
        fetch.fetch("mnist", tmp_path)
    words = str(caught.value)
    assert f"{server.address}/b.gz (HTTP 404 Not Found)" in words
    assert f"put into {tmp_path / 'mnist'} by hand: b.gz (6 bytes, MD5 {two_files[1].md5})" in words
    assert "\n" not in words
    assert (tmp_path / "mnist" / "a.gz").read_bytes() == b"first"


def test_too_small_a_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.FILES, "mnist", (RemoteFile("a.gz", 10**18, MD5, ("http://127.0.0.1:9/a",)),))
    with pytest.raises(UsageError, match=r"bytes left and 1000000000000000000 are needed: make room"):
        fetch.fetch("mnist", tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(two_files, tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(UsageError, match=r"folder.mnist: .*give a folder that can be written"):
        fetch.fetch("mnist", tmp_path / "folder")


def test_unpacked_files_that_are_damaged_and_would_hide_the_archive_are_named(tmp_path):
    place = tmp_path / "cifar10" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    (place / "data_batch_1").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"data_batch_1: damaged.*first move .*cifar-10-batches-py away"):
        fetch.fetch("cifar10", tmp_path)


def test_what_may_not_or_need_not_be_fetched_is_told(tmp_path):
    with pytest.raises(
        UsageError, match=r"name='imagenet'.*may not be fetched.*ILSVRC2012_img_val\.tar.*imagenet/train"
    ):
        fetch.fetch("imagenet", tmp_path)
    with pytest.raises(UsageError, match=r"name='digits5k'.*come with"):
        fetch.fetch("digits5k", tmp_path)
    with pytest.raises(UsageError, match="name='svhn': use one of 'digits5k', 'mnist', 'fashion-mnist'"):
        fetch.fetch("svhn", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_file_has_several_addresses_with_its_name_a_size_and_a_checksum():
    assert set(fetch.FILES) == {"mnist", "fashion-mnist", "cifar10", "cifar100"}
    for file in [file for files in fetch.FILES.values() for file in files]:
        assert len(set(file.urls)) >= 2
        assert all(url.startswith("http") and url.endswith(f"/{file.name}") for url in file.urls)
        assert file.size > 1000
        assert len(file.md5) == 32
    assert fetch.FILES["cifar10"][0].md5 == cifar.FORMS["cifar10"][0].md5


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_the_instructions_name_path_size_checksum_and_addresses_of_each_file(name, tmp_path):
    words = fetch.instructions(name, tmp_path)
    for file in fetch.FILES[name]:
        assert f"  {tmp_path / name / file.name}\n      {file.size} bytes, MD5 {file.md5}\n" in words
        assert all(f"      {url}\n" in words for url in file.urls)
    assert ("dataset-fashion-mnist" in words) == (name == "fashion-mnist")


def test_the_instructions_of_the_others(tmp_path):
    assert "nothing to fetch" in fetch.instructions("digits5k", tmp_path)
    assert f"{tmp_path}/imagenet/val/<class>/*.JPEG" in fetch.instructions("imagenet", tmp_path)
    with pytest.raises(UsageError, match="name='svhn'"):
        fetch.instructions("svhn", tmp_path)


@pytest.fixture
def published(mnist_folder):
    """Give the published files of MNIST, or skip."""
    place = mnist.find(mnist_folder)
    if place is None or not all((place / file.name).is_file() for file in fetch.FILES["mnist"]):
        pytest.skip("LAYERWISE_DATA holds no MNIST as published: fetching it is not tested")
    return place


def test_the_full_mnist_is_fetched_through_broken_connections_and_read(server, published, tmp_path, monkeypatch):
    for file in fetch.FILES["mnist"]:
        content = (published / file.name).read_bytes()
        server.contents |= {f"/1/{file.name}": content, f"/2/{file.name}": content}
        server.tricks[f"/1/{file.name}"] = {"cut": file.size // 3}
    server.contents["/1/t10k-labels-idx1-ubyte.gz"] = b"x" * 4542
    files = tuple(
        replace(file, urls=(f"{server.address}/1/{file.name}", f"{server.address}/2/{file.name}"))
        for file in fetch.FILES["mnist"]
    )
    monkeypatch.setitem(fetch.FILES, "mnist", files)

    assert not data.present("mnist", tmp_path)
    assert fetch.fetch("mnist", tmp_path) == tmp_path / "mnist"
    assert data.present("mnist", tmp_path)
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(mnist.FILES["mnist"])
    assert data.load("mnist", tmp_path).train_labels[:5].tolist() == [5, 0, 4, 1, 9]

    asked = len(server.asked)
    assert fetch.fetch("mnist", tmp_path) == tmp_path / "mnist"
    assert len(server.asked) == asked  # it is there

    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    fetch.fetch("mnist", tmp_path)
    assert server.asked[asked:] == ["/1/t10k-labels-idx1-ubyte.gz", "/2/t10k-labels-idx1-ubyte.gz"]
    assert len(data.load("mnist", tmp_path).test_labels) == 10_000


def test_what_can_be_read_elsewhere_in_the_folder_is_not_fetched_again(published, monkeypatch):
    monkeypatch.setattr(fetch, "fetch_file", None)
    assert fetch.fetch("mnist", published) == published
