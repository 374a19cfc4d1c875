"""Fetching: from public addresses alone, pinned, checked at every hop; against servers in this process, whose address the test allows."""

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from garage.core.errors import UserError
from garage.data import fetch
from garage.data.ingest import ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_documents

PAGE = b"<h1>Shop</h1><p>Opens at nine.</p>"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        self.server.answer(self)

    def reply(self, body, status=200, kind="text/html", **headers):
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | named).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen, server.answer, server.daemon_threads = [], answer, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rules(**changes):
    return fetch.WEB._replace(is_allowed=lambda address: address == "127.0.0.1", seconds=10.0)._replace(**changes)


NOT_PUBLIC = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808",
    "2002:7f00:1::", "2002:808:808::1", "2001:0:808:808::1", "2001:db8::1", "::7f00:1", "::808:808", "fec0::1", "100::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public_are_refused(address):
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address):
    assert fetch.is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:7f00:1]"])
def test_every_spelling_of_this_machine_is_refused_before_a_connection(serve, tmp_path, host):
    server, _ = serve(lambda request: request.reply(PAGE))
    with pytest.raises(UserError) as caught:
        fetch.fetch(f"http://{host}:{server.server_port}/", tmp_path)
    assert server.seen == [] and caught.value.remedy


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://8.8.8.8/x", "http://user:word@8.8.8.8/", "http://8.8.8.8\\@127.0.0.1/", "http:///x",
                                 "gopher://8.8.8.8/", "http://8.8.8.8:99999/"])  # fmt: skip
def test_other_schemes_and_passwords_are_refused(tmp_path, url):
    with pytest.raises(UserError) as caught:
        fetch.fetch(url, tmp_path)
    assert caught.value.remedy and not list(tmp_path.iterdir())


def test_a_page_becomes_a_file_and_gives_nothing_away(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server, base = serve(lambda request: request.reply(PAGE, Set_Cookie="a=b"))
    path, name = fetch.fetch(f"{base}/shop?x=ä b#part", tmp_path, rules())
    assert (path.suffix, path.read_bytes(), name) == (".html", PAGE, f"{base}/shop?x=ä b")
    ((place, headers),) = server.seen
    assert place == "/shop?x=%C3%A4%20b" and not {"Cookie", "Authorization"} & set(headers) and headers["Accept-Encoding"] == "identity"


def test_a_redirect_to_an_inner_address_is_refused_and_the_twin_without_the_check_fetches_it(serve, tmp_path):
    inner, secret = serve(lambda request: request.reply(b"secret", kind="text/plain"))
    _, base = serve(lambda request: request.reply(b"", 302, Location=secret.replace("127.0.0.1", "127.0.0.2")))
    with pytest.raises(UserError, match=r"127\.0\.0\.2"):
        fetch.fetch(base, tmp_path, rules())
    assert inner.seen == []
    _, base = serve(lambda request: request.reply(b"", 302, Location=secret))
    path, _ = fetch.fetch(base, tmp_path, rules(is_allowed=lambda address: True))  # the broken twin: any address will do
    assert path.read_text() == "secret"


def test_redirects_are_counted(serve, tmp_path):
    server, base = serve(lambda request: request.reply(b"", 301, Location=request.path + "x"))
    with pytest.raises(UserError, match="redirect after 5"):
        fetch.fetch(base + "/", tmp_path, rules())
    assert len(server.seen) == 6


def test_the_connection_goes_to_the_address_that_was_checked(serve, tmp_path, monkeypatch):
    """DNS rebinding: the second answer of the name server would be another one, and it is never asked for."""
    server, _ = serve(lambda request: request.reply(PAGE))
    asked, real = [], socket.getaddrinfo

    def names(host, port, *rest, **others):
        if host == "rebind.test":
            asked.append(host)
            return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port, *rest, **others)
        return real(host, port, *rest, **others)

    monkeypatch.setattr(socket, "getaddrinfo", names)
    path, _ = fetch.fetch(f"http://rebind.test:{server.server_port}/", tmp_path, rules())
    assert path.read_bytes() == PAGE and asked == ["rebind.test"]
    assert server.seen[0][1]["Host"] == f"rebind.test:{server.server_port}"


def drip(request):
    request.send_response(200)
    request.send_header("Content-Type", "text/plain")
    request.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(200):
            request.wfile.write(b"x")
            time.sleep(0.05)


def endless(request):
    request.send_response(200)
    request.send_header("Content-Type", "text/plain")
    request.end_headers()
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(b"x" * 65536)


FAULTS = {
    "drip": (drip, {"seconds": 0.5}, "takes longer than 0.5 s"),
    "endless": (endless, {"max_bytes": 1 << 20}, "larger than 1 MB"),
    "cut": (lambda r: r.reply(b"half", Content_Length="100"), {}, "ends early"),
    "missing": (lambda r: r.reply(b"no", 404), {}, "answers 404"),
    "packed": (lambda r: r.reply(b"\x1f\x8b", Content_Encoding="gzip"), {}, "answers 200"),
    "picture": (lambda r: r.reply(b"GIF", kind="image/gif"), {}, "type image/gif"),
    "charset": (lambda r: r.reply(b"x", kind="text/plain; charset=nonsense"), {}, "nonsense"),
    "silence": (lambda r: r.close_connection, {}, "cannot be fetched"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_misbehaves_costs_a_bounded_time_and_gives_an_error(serve, tmp_path, name):
    answer, changes, says = FAULTS[name]
    _, base = serve(answer)
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        fetch.fetch(base, tmp_path, rules(**changes))
    assert time.monotonic() - start < 5 and caught.value.remedy


@pytest.mark.parametrize(
    ("place", "kind", "suffix"),
    [("/", "text/html; charset=utf-8", ".html"), ("/a.md", "text/plain", ".md"), ("/a", "text/plain", ".txt"),
     ("/b.pdf", "application/pdf", ".pdf"),
     ("/c.xlsx", "application/octet-stream", ".xlsx"), ("/d", "application/json", ".json"), ("/e.php", "text/html", ".html")],
)  # fmt: skip
def test_the_type_of_a_page_becomes_an_ending_of_ours(serve, tmp_path, place, kind, suffix):
    _, base = serve(lambda request: request.reply(b"x", kind=kind))
    assert fetch.fetch(base + place, tmp_path, rules())[0].suffix == suffix


def test_other_charsets_become_utf_8(serve, tmp_path):
    _, base = serve(lambda request: request.reply("café".encode("latin-1"), kind="text/plain; charset=iso-8859-1"))
    assert fetch.fetch(base, tmp_path, rules())[0].read_text(encoding="utf-8-sig") == "café"


def test_a_fetched_page_is_a_document_and_one_that_is_refused_costs_only_itself(serve, tmp_path, monkeypatch):
    _, base = serve(lambda request: request.reply(b"Plain words.", kind="text/plain"))
    monkeypatch.setattr(fetch.fetch, "__defaults__", (rules(),))
    spec = IngestSpec(paths=(f"{base}/a.txt", "http://127.0.0.2/b.txt"), out=tmp_path / "corpus")
    made = ingest(spec, count_tokens=len)
    ((document, text),) = read_documents(spec.out)
    assert (document.path, text) == (f"{base}/a.txt", "Plain words.")
    assert [failure.path for failure in made.failed] == ["http://127.0.0.2/b.txt"] and made.failed[0].remedy


# --- git -------------------------------------------------------------------------------------------------------------------------

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="the program git is not installed")


@pytest.fixture
def repository(tmp_path):
    """A repository with two commits, a hook, a link out of it, and a submodule that must not be asked for."""
    place = tmp_path / "origin"
    (place / "docs").mkdir(parents=True)
    (place / "docs" / "a.md").write_text("# Alpha\n\nText.\n")
    (place / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = http://127.0.0.1:9/x.git\n')
    (place / "link.txt").symlink_to("/etc/passwd")

    def git(*words):
        names = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return subprocess.check_output(["git", "-C", str(place), *words], env={**os.environ, **names}, text=True)

    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one"), ("commit", "-q", "--allow-empty", "-m", "two")):
        git(*words)
    return place, git("rev-parse", "HEAD").strip()


@pytest.fixture
def serve_git(serve, repository):
    """Git's own server program behind ours."""
    folder, _ = repository

    def answer(request):
        length = int(request.headers.get("Content-Length", 0))
        path, _, query = request.path.partition("?")
        variables = {"GIT_PROJECT_ROOT": str(folder.parent), "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query,
                     "REQUEST_METHOD": request.command, "CONTENT_TYPE": request.headers.get("Content-Type", ""),
                     "CONTENT_LENGTH": str(length),
                     "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}  # fmt: skip
        if protocol := request.headers.get("Git-Protocol"):
            variables["GIT_PROTOCOL"] = protocol
        asked, env = request.rfile.read(length), {**os.environ, **variables}
        said = subprocess.run(["git", "http-backend"], input=asked, env=env, capture_output=True, check=False).stdout
        head, _, body = said.partition(b"\r\n\r\n")
        kind = next((line.split(b": ")[1].decode() for line in head.splitlines() if line.lower().startswith(b"content-type")), "text/plain")
        request.reply(body, 404 if b"Status: 404" in head else 200, kind)

    Handler.do_POST = Handler.do_GET
    server, base = serve(answer)
    return server, base


def git_rules(**changes):
    return fetch.GIT._replace(schemes=("http",), is_allowed=lambda address: address == "127.0.0.1", seconds=30.0)._replace(**changes)


@needs_git
def test_a_repository_becomes_documents_that_name_their_commit(serve_git, repository, tmp_path, monkeypatch):
    server, base = serve_git
    monkeypatch.setattr(fetch.clone, "__defaults__", (git_rules(),))
    spec = IngestSpec(paths=(f"git+{base}/origin/.git",), out=tmp_path / "corpus")
    made = ingest(spec, count_tokens=len)
    assert [document.path for document, _ in read_documents(spec.out)] == [f"{base}/origin/.git@{repository[1]}:docs/a.md"]
    assert ["link.txt" in failure.path and "no ordinary file" in failure.error for failure in made.failed] == [True]
    assert not any("x.git" in place for place, _ in server.seen)


@needs_git
def test_only_the_last_commit_comes_and_the_address_is_the_checked_one(serve_git, tmp_path, monkeypatch):
    server, _ = serve_git
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **how: real({"rebind.test": "127.0.0.1"}.get(host, host), *rest, **how))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "x").mkdir()
    path, _ = fetch.clone(f"http://rebind.test:{server.server_port}/origin/.git", tmp_path / "x", git_rules())
    log = subprocess.run(["git", "-C", str(path), "log", "--oneline"], capture_output=True, text=True, check=True).stdout
    assert len(log.splitlines()) == 1 and not list((path / ".git").glob("hooks/*"))


@needs_git
def test_git_over_anything_but_https_is_refused(tmp_path):
    for url in ("git+http://8.8.8.8/x.git", "git+ssh://git@8.8.8.8/x.git", "git+file:///tmp/x.git", "https://localhost/x.git"):
        with pytest.raises(UserError) as caught:
            fetch.clone(url, tmp_path)
        assert caught.value.remedy


@needs_git
@pytest.mark.parametrize(("changes", "says"), [({"max_bytes": 10}, "more than"), ({"seconds": 0.0}, "more than")])
def test_a_repository_that_is_too_large_or_slow_is_given_up(serve_git, tmp_path, changes, says):
    _, base = serve_git
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=says):
        fetch.clone(f"{base}/origin/.git", tmp_path / "x", git_rules(**changes))


@needs_git
def test_a_repository_that_is_not_there_does_not_ask_for_a_password(serve, tmp_path):
    _, base = serve(lambda request: request.reply(b"", 401, WWW_Authenticate="Basic realm=x"))
    with pytest.raises(UserError, match="fails") as caught:
        fetch.clone(f"{base}/none.git", tmp_path, git_rules())
    assert "login" in caught.value.remedy


@needs_git
def test_git_follows_no_redirect(serve, serve_git, tmp_path):
    inner, target = serve_git
    _, base = serve(lambda request: request.reply(b"", 302, Location=f"{target}{request.path}"))
    with pytest.raises(UserError):
        fetch.clone(f"{base}/origin/.git", tmp_path, git_rules())
    assert inner.seen == []
