"""Images behind URLs, from a server on this machine."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.pictures import encode, plain
from vembed import image_urls
from vembed.data import ImageRules, load_dataset_records
from vembed.errors import DataError
from vembed.image_urls import find_url
from vembed.images import ImageError, ImageLimits, load_image, probe_image

PICTURE = encode(plain("red"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server; `asked` lists the paths that it was asked for, `answers` what it says to them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.asked.append(self.path)
            status, headers, body = served.answers.get(self.path, (200, {}, PICTURE))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.asked, served.answers = [], {}
    served.host = f"127.0.0.1:{served.server_port}"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(image_urls, "_PAUSES_SECONDS", (0, 0))
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def url_of(server, path="/red.png", **limits):
    url = f"http://{server.host}{path}"
    return find_url(url, limits=ImageLimits(hosts=(server.host,), **limits), where="f:1: query")


def test_an_image_is_fetched_once(server):
    source = url_of(server)
    assert server.asked == []
    assert load_image(source).getpixel((0, 0)) == plain("red").getpixel((0, 0))
    assert probe_image(source).format == "PNG"
    assert server.asked == ["/red.png"]
    assert [path.name for path in image_urls.cache_folder().iterdir()] == [source.kept_path.name]
    assert source.identity == f"http://{server.host}/red.png"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://169.254.169.254/latest/meta-data", "of a host in image_hosts (a.org, b.org:81)"),
        ("http://a.org.evil.com/x.png", "of host 'a.org.evil.com'"),
        ("http://a.org:8080/x.png", "of host 'a.org:8080'"),
        ("http://b.org/x.png", "of host 'b.org'"),
        ("http://a.org@evil.com/x.png", "must not hold a user name or password"),
        ("http://a.org:99999/x.png", "must be well-formed"),
        ("http://[a.org/x.png", "must be well-formed"),
        ("file:///etc/passwd", "must begin with http:// or https://"),
        ("FILE:/etc/passwd", "must begin with http:// or https://"),
        ("ftp://a.org/x.png", "must begin with http:// or https://"),
        ("data:image/png;base64,AAAA", "must begin with http:// or https://"),
    ],
)
def test_urls_that_are_refused(url, expected):
    with pytest.raises(ImageError) as caught:
        find_url(url, limits=ImageLimits(hosts=("a.org", "b.org:81")), where="f:1: query")
    assert str(caught.value).startswith("f:1: query: an image URL ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "url", ["https://a.org/x.png", "HTTP://A.ORG:80/x.png", "https://a.org./x", "http://b.org:81/x"]
)
def test_urls_of_named_hosts(url):
    assert find_url(url, limits=ImageLimits(hosts=("a.org", "b.org:81"))).url == url


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://127.0.0.2:{port}/secret", "redirects to 'http://127.0.0.2"),
        ("file:///etc/passwd", "url 'file:///etc/passwd' is not allowed"),
        ("/loop", "answers 302"),
    ],
)
def test_redirects_are_held_to_the_same_rules(server, target, expected):
    target = target.format(port=server.server_port)
    server.answers["/red.png"] = server.answers["/loop"] = (302, {"Location": target}, b"")
    with pytest.raises(ImageError) as caught:
        url_of(server).open()
    assert expected in str(caught.value)
    assert "/secret" not in server.asked


def test_a_redirect_to_the_same_host_is_followed(server):
    server.answers["/red.png"] = (302, {"Location": "/blue.png"}, b"")
    assert url_of(server).read() == PICTURE
    assert server.asked == ["/red.png", "/blue.png"]


@pytest.mark.parametrize("name", ["localhost", "LocalHost"])
def test_a_name_of_this_machine_is_no_public_host(server, name):
    limits = ImageLimits(hosts=(f"localhost:{server.server_port}",))
    source = find_url(f"http://{name}:{server.server_port}/red.png", limits=limits)
    with pytest.raises(ImageError, match="must have a public address.*whose host 'localhost' is"):
        source.open()
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "attempts", "error"),
    [(404, 1, ImageError), (403, 1, ImageError), (503, 3, DataError)],
)
def test_no_answer_is_told_from_no_image(server, status, attempts, error):
    server.answers["/red.png"] = (status, {}, b"no")
    with pytest.raises(DataError, match=f"the host answers {status}") as caught:
        url_of(server).open()
    assert type(caught.value) is error
    assert len(server.asked) == attempts
    assert list(image_urls.cache_folder().iterdir()) == []


def test_an_answer_that_breaks_off_is_asked_for_again(server):
    server.answers["/red.png"] = (200, {"Content-Length": str(len(PICTURE) + 10)}, PICTURE)
    with pytest.raises(DataError, match="could not be fetched, in 3 attempts.*f:1|f:1.*3 attempts"):
        url_of(server).open()
    assert list(image_urls.cache_folder().iterdir()) == []


def test_no_more_is_fetched_than_is_allowed(server):
    with pytest.raises(ImageError, match="must not be larger"):
        url_of(server, max_bytes=10).open()
    assert list(image_urls.cache_folder().iterdir()) == []


def test_a_host_that_nobody_answers_for(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        source = find_url(f"http://{host}/a.png", limits=ImageLimits(hosts=(host,)))
        with pytest.raises(DataError, match="could not be fetched"):
            source.open()


def test_rows_that_name_urls(server, tmp_path):
    url = f"http://{server.host}/red.png"
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"query": "red", "positive": "{url}"}}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: positive: .* not a URL.*image_hosts"):
        load_dataset_records(str(path), retrieval_mode="t2i")
    rules = ImageRules(hosts=(server.host,))
    for _ in range(2):
        (record,) = load_dataset_records(str(path), retrieval_mode="t2i", images=rules)
        assert load_image(record.positives[0].image).size == load_image(url_of(server)).size
    assert server.asked == ["/red.png"]
    server.answers["/gone.png"] = (404, {}, b"")
    path.write_text(f'{{"query": "red", "positive": "{url.replace("red", "gone")}"}}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: positive\[0\]: .*the host answers 404"):
        load_dataset_records(str(path), retrieval_mode="t2i", images=rules)
