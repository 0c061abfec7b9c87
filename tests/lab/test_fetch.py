import contextlib
import errno
import hashlib
import http.server
import threading
import urllib.request
from collections import deque
from pathlib import Path

import pytest

from layerwise.lab import data
from layerwise.lab.data import cifar, download, fetch, mnist
from layerwise.lab.data.download import ATTEMPTS, MirrorsError, RemoteFile, fetch_file
from layerwise.lab.errors import UsageError

CONTENT = bytes(range(256)) * 4000  # some megabyte: several blocks
MD5 = hashlib.md5(CONTENT).hexdigest()
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a proxy would not find this server


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives `server.contents`; obeys ranges unless the path begins with /plain; misbehaves as `server.tricks` say."""

    def do_GET(self):
        begin = self.headers.get("Range")
        self.server.asked.append((self.path, begin))
        content = self.server.contents.get(self.path)
        if content is None:
            self.send_error(404)
            return
        trick = self.server.tricks.get(self.path, {})
        if begin and not self.path.startswith("/plain"):
            start = int(begin.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            given = trick.get("range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Range", given)
            content = content[start:]
        else:
            self.send_response(trick.get("status", 200))
        if not trick.get("no length"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cuts = trick.get("cuts")
        with contextlib.suppress(ConnectionError):  # it hangs up on a server that gives too much
            self.wfile.write(content[: cuts.popleft()] if cuts else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
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
        remote = RemoteFile("file", len(CONTENT), MD5, urls)
        return fetch_file(remote, tmp_path, progress=progress, opener=OPENER)

    return run


@pytest.fixture
def part(tmp_path):
    return tmp_path / "file.part"


def ranges(server):
    return [begin for _, begin in server.asked]


def test_a_file_is_fetched_checked_and_put_in_its_place(server, get, tmp_path):
    server.contents["/file"] = CONTENT
    seen = []
    assert get("/file", progress=lambda *told: seen.append(told)) == tmp_path / "file"
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == ("file", len(CONTENT), len(CONTENT))


def test_without_an_opener_the_one_of_the_standard_library_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.contents["/file"] = CONTENT
    fetch_file(RemoteFile("file", len(CONTENT), MD5, (f"{server.address}/file",)), tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [1, 300_000, len(CONTENT) - 1])
def test_what_is_there_is_continued(server, get, part, kept):
    server.contents["/file"] = CONTENT
    part.write_bytes(CONTENT[:kept])
    seen = []
    assert get("/file", progress=lambda *told: seen.append(told)).read_bytes() == CONTENT
    assert ranges(server) == [f"bytes={kept}-"]
    assert seen[0][1] > kept
    assert not part.exists()


def test_a_server_without_ranges_gives_all_and_what_is_there_is_skipped(server, get, part):
    server.contents["/plain"] = CONTENT
    part.write_bytes(CONTENT[:300_000])
    assert get("/plain").read_bytes() == CONTENT
    assert ranges(server) == ["bytes=300000-"]


def test_a_whole_part_is_checked_without_a_connection(server, get, part):
    part.write_bytes(CONTENT)
    assert get("/file").read_bytes() == CONTENT
    assert server.asked == []


def test_a_connection_that_breaks_is_made_again_from_there(server, get):
    server.contents["/file"] = CONTENT
    server.tricks["/file"] = {"cuts": deque([1000, 2000])}
    assert get("/file").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1000-", "bytes=3000-"]


def test_a_server_that_always_breaks_at_the_same_byte_is_left_for_the_next(server, get):
    server.contents |= {"/plain": CONTENT, "/file": CONTENT}
    server.tricks["/plain"] = {"cuts": deque([1000] * 9)}
    assert get("/plain", "/file").read_bytes() == CONTENT
    assert server.asked == [("/plain", None), ("/plain", "bytes=1000-"), ("/file", "bytes=1000-")]


def test_a_server_that_breaks_again_and_again_is_given_up_and_what_came_is_kept(server, get, part):
    server.contents["/file"] = CONTENT
    server.tricks["/file"] = {"cuts": deque([1000] * 9)}
    with pytest.raises(
        MirrorsError, match=f"/file \\(the connection ended after {ATTEMPTS}000 of {len(CONTENT)} bytes"
    ):
        get("/file")
    assert part.read_bytes() == CONTENT[: 1000 * ATTEMPTS]
    server.tricks.clear()
    assert get("/file").read_bytes() == CONTENT
    assert server.asked[-1] == ("/file", f"bytes={ATTEMPTS}000-")


def test_a_corrupt_file_is_deleted_and_the_next_server_asked(server, get, tmp_path):
    server.contents |= {"/bad": CONTENT[:-1] + b"x", "/good": CONTENT}
    assert get("/bad", "/good").read_bytes() == CONTENT
    assert server.asked == [("/bad", None), ("/good", None)]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("junk", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_a_corrupt_part_is_thrown_away_and_the_same_server_asked_again(server, get, part, junk):
    server.contents["/file"] = CONTENT
    part.write_bytes(junk)
    assert get("/file").read_bytes() == CONTENT
    assert ranges(server)[-1] is None


def test_if_no_server_gives_it_each_is_named_with_its_reason(server, get, tmp_path):
    server.contents["/bad"] = b"x" * len(CONTENT)
    with pytest.raises(MirrorsError) as caught:
        get("/missing", "/bad")
    words = str(caught.value)
    assert f"{server.address}/missing (HTTP 404 Not Found)" in words
    assert f"{server.address}/bad (MD5 is {hashlib.md5(b'x' * len(CONTENT)).hexdigest()}" in words
    assert f"expected MD5 {MD5}" in words
    assert "\n" not in words
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_named(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/file"
    with pytest.raises(MirrorsError, match=f"{url} \\(.*refused"):
        fetch_file(RemoteFile("file", 5, MD5, (url,)), tmp_path, opener=OPENER)


@pytest.mark.parametrize(
    ("trick", "content", "reason"),
    [
        ({}, b"<html>log in</html>", "19 bytes where 1024000 were expected"),
        ({"status": 203}, CONTENT, "HTTP 203 where 200 or 206 was expected"),
    ],
    ids=["a login page", "a changed copy"],
)
def test_another_answer_leaves_what_is_there_alone(server, get, part, trick, content, reason):
    server.contents["/plain"] = content
    server.tricks["/plain"] = trick
    part.write_bytes(CONTENT[:1000])
    with pytest.raises(MirrorsError, match=reason):
        get("/plain")
    assert part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("given", ["", "bytes 999-1023999/1024000", "bytes 1000-1023999/1024001", "bytes */1024000"])
def test_another_range_than_asked_for_is_refused(server, get, part, given):
    server.contents["/file"] = CONTENT
    server.tricks["/file"] = {"range": given}
    part.write_bytes(CONTENT[:1000])
    with pytest.raises(MirrorsError, match="where bytes from 1000 of 1024000 were asked for"):
        get("/file")
    assert part.read_bytes() == CONTENT[:1000]


def test_a_server_that_gives_too_much_is_stopped_and_left(server, get, part):
    server.contents |= {"/more": CONTENT * 30, "/file": CONTENT}
    server.tricks["/more"] = {"no length": True}
    seen = []
    assert get("/more", "/file", progress=lambda *told: seen.append(told)).read_bytes() == CONTENT
    assert max(done for _, done, _ in seen) == len(CONTENT)
    assert server.asked == [("/more", None), ("/file", None)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, the disk that is always full")
def test_a_full_disk_is_named_and_no_other_server_asked(server, get, part, monkeypatch):
    server.contents["/file"] = CONTENT
    part.symlink_to("/dev/full")
    monkeypatch.setattr(download, "kind_of", lambda path: None)  # a link is refused before
    with pytest.raises(
        UsageError, match=r"file\.part: cannot be written: No space left.*1024000 bytes.*make room"
    ) as told:
        get("/file", "/other")
    assert not isinstance(told.value, MirrorsError)
    assert told.value.__cause__.errno == errno.ENOSPC
    assert server.asked == [("/file", None)]


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
    place = fetch.fetch("mnist", folder, progress=lambda *told: seen.append(told), opener=OPENER)
    assert place == folder / "mnist"
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"a.gz": b"first", "b.gz": b"second"}
    assert seen == [("a.gz", 5, 5), ("b.gz", 6, 6)]


def test_what_is_left_to_do_by_hand_is_said_on_one_line(server, two_files, tmp_path):
    del server.contents["/b.gz"]
    with pytest.raises(UsageError) as caught:
        fetch.fetch("mnist", tmp_path, opener=OPENER)
    words = str(caught.value)
    assert f"{server.address}/b.gz (HTTP 404 Not Found)" in words
    assert f"put into {tmp_path / 'mnist'} by hand: b.gz (6 bytes, MD5 {two_files[1].md5})" in words
    assert "\n" not in words
    assert (tmp_path / "mnist" / "a.gz").read_bytes() == b"first"


def test_too_small_a_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.FILES, "mnist", (RemoteFile("a.gz", 10**18, MD5, ("http://127.0.0.1:9/a",)),))
    with pytest.raises(UsageError, match=r"bytes left and 1000000000000000000 are needed: make room"):
        fetch.fetch("mnist", tmp_path, opener=OPENER)


def test_a_file_in_the_place_of_the_folder_is_named(two_files, tmp_path):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(UsageError, match=r"folder.mnist: .*give a folder that can be written"):
        fetch.fetch("mnist", tmp_path / "folder", opener=OPENER)


def test_unpacked_files_that_are_damaged_and_would_hide_the_archive_are_named(tmp_path):
    place = tmp_path / "cifar10" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    (place / "data_batch_1").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"data_batch_1: damaged.*first move .*cifar-10-batches-py away"):
        fetch.fetch("cifar10", tmp_path, opener=OPENER)


def test_what_may_not_or_need_not_be_fetched_is_told(tmp_path):
    with pytest.raises(
        UsageError, match=r"name='imagenet'.*may not be fetched.*ILSVRC2012_img_val\.tar.*imagenet/train"
    ):
        fetch.fetch("imagenet", tmp_path)
    with pytest.raises(UsageError, match=r"name='digits5k'.*comes with"):
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


def test_the_full_mnist_is_fetched_through_broken_connections_and_read(server, published, tmp_path):
    first, second = (server.address + f"/{number}/" for number in (1, 2))
    for file in fetch.FILES["mnist"]:
        content = (published / file.name).read_bytes()
        server.contents |= {f"/1/{file.name}": content, f"/2/{file.name}": content}
        server.tricks[f"/1/{file.name}"] = {"cuts": deque([file.size // 3])}
    server.contents["/1/t10k-labels-idx1-ubyte.gz"] = b"x" * 4542

    def opener(request, timeout):
        other = first if "ossci" in request.full_url else second
        local = urllib.request.Request(other + request.full_url.rpartition("/")[2], headers=dict(request.headers))
        return OPENER(local, timeout=timeout)

    assert not data.present("mnist", tmp_path)
    assert fetch.fetch("mnist", tmp_path, opener=opener) == tmp_path / "mnist"
    assert data.present("mnist", tmp_path)
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(mnist.FILES["mnist"])
    assert data.load("mnist", tmp_path).train_labels[:5].tolist() == [5, 0, 4, 1, 9]

    asked = len(server.asked)
    assert fetch.fetch("mnist", tmp_path, opener=opener) == tmp_path / "mnist"
    assert len(server.asked) == asked  # it is there

    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    fetch.fetch("mnist", tmp_path, opener=opener)
    assert {path for path, _ in server.asked[asked:]} == {
        "/1/t10k-labels-idx1-ubyte.gz",
        "/2/t10k-labels-idx1-ubyte.gz",
    }
    assert len(data.load("mnist", tmp_path).test_labels) == 10_000


def test_what_can_be_read_elsewhere_in_the_folder_is_not_fetched_again(published):
    def opener(request, timeout):
        raise AssertionError(request.full_url)

    assert fetch.fetch("mnist", published, opener=opener) == published
