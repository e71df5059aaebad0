"""Images behind URLs: refused unless the user names the host, fetched once, kept on disk.

A row is not trusted: what it names must not make this machine ask its own network (a cloud's
metadata service, a neighbour's port). So the host must be one that the user listed, after every
redirect too, and what its name resolves to must be a public address.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import re
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from vembed.errors import DataError, quote_path
from vembed.images import ImageError, ImageLimits, ImageSource, is_url, stamp_file

_DEFAULT_PORTS = {"http": 80, "https": 443}
_TIMEOUT_SECONDS = 20
_DEADLINE_SECONDS = 300
_PAUSES_SECONDS = (1, 4)
_CHUNK_BYTES = 2**16


@dataclass(frozen=True)
class ImageUrl(ImageSource):
    """An image behind a URL; made by `find_url`, which checks it.

    Attributes:
        url: `http` or `https`, of a host among those of `limits`.
    """

    url: str

    def __str__(self) -> str:
        return quote_path(self.url)

    @property
    def identity(self) -> str:
        """The URL: the image behind it may only be known to one machine yet."""
        return self.url

    def stamp(self) -> str:
        """Place, size and time of the file that it is kept in.

        Raises:
            ImageError: as `open` does.
            DataError: as `open` does.
        """
        with self.open() as file:
            return stamp_file(file)

    @property
    def kept_path(self) -> Path:
        """Where it is kept once it is fetched."""
        return cache_folder() / hashlib.blake2b(self.url.encode(), digest_size=20).hexdigest()

    def open(self) -> BinaryIO:
        """The image's bytes, fetched unless they were before.

        Raises:
            ImageError: if the host has no such image, or it is empty or too large.
            DataError: if the host cannot be reached, so that nothing is known of the image.
        """
        if not self.kept_path.exists():
            self._fetch()
        file = open(self.kept_path, "rb")  # noqa: SIM115 - the caller closes it
        try:
            self.check_size(os.fstat(file.fileno()).st_size)
        except ImageError:
            file.close()
            raise
        return file

    def _fetch(self) -> None:
        for pause in (*_PAUSES_SECONDS, None):
            try:
                return self._fetch_once()
            except urllib.error.HTTPError as error:
                reason = f"the host answers {error.code} {error.reason}"
                if error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                    raise self.error("an image must be behind its URL", reason) from None
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if pause is not None:
                time.sleep(pause)
        where = f"{self.where}: " if self.where else ""
        raise DataError(
            f"{where}an image could not be fetched, in {len(_PAUSES_SECONDS) + 1} attempts. "
            f"Received: {self}, {reason}. Start again later: what was fetched is kept"
        )

    def _fetch_once(self) -> None:
        folder = self.kept_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(self.url, headers={"User-Agent": "vembed"})
        with (
            _opener(self).open(request, timeout=_TIMEOUT_SECONDS) as answer,
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
        ):
            try:
                self._copy(answer, file)
            except BaseException:
                os.unlink(file.name)
                raise
        # Processes may fetch the same image at the same time: each renames a whole file.
        shutil.move(file.name, self.kept_path)

    def _copy(self, answer: http.client.HTTPResponse, file: Any) -> None:
        started, size = time.monotonic(), 0
        while chunk := answer.read(_CHUNK_BYTES):
            size += len(chunk)
            self.check_size(size)
            if time.monotonic() - started > _DEADLINE_SECONDS:
                raise TimeoutError(f"not whole after {_DEADLINE_SECONDS} seconds")
            file.write(chunk)
        if answer.length:
            raise http.client.IncompleteRead(b"", answer.length)


def find_url(url: str, *, limits: ImageLimits, where: str = "") -> ImageUrl:
    """The image that a URL stands for; nothing is fetched yet.

    Args:
        url: As a row has it.
        limits: Its `hosts` are those that images may be fetched from.
        where: `file:line: field` for messages.

    Raises:
        ImageError: if it is none, or of a host that the user did not name.
    """
    source = ImageUrl(url=url, limits=limits, where=where)
    _check_host(source, url)
    return source


def read_host(host: str) -> str:
    """A host as `ImageLimits.hosts` has it.

    Raises:
        ValueError: if it is no `name` or `name:port`.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d+)?", host, re.IGNORECASE):
        raise ValueError("expected host or host:port, as in example.org")
    return host.lower()


def cache_folder() -> Path:
    """Where fetched images are kept: a folder beside the caches of Hugging Face."""
    home = os.environ.get("HF_HOME", os.path.join("~", ".cache", "huggingface"))
    return Path(home).expanduser() / "vembed" / "images"


def _check_host(source: ImageUrl, url: str) -> None:
    """Raise ImageError unless `url`, which may be a redirect of the source's, may be asked."""
    hosts = source.limits.hosts
    if not is_url(url) or not hosts:
        raise source.error(
            "an image path must be a file, not a URL",
            advice="Download it and name the file, or allow its host with image_hosts.",
        )
    detail = "" if url == source.url else f"which redirects to {quote_path(url)}"
    try:
        parts = urlsplit(url)
        host = _host_of(parts)
    except ValueError as error:
        raise source.error("an image URL must be well-formed", str(error)) from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise source.error("an image URL must begin with http:// or https://", detail)
    if parts.username is not None or parts.password is not None:
        raise source.error("an image URL must not hold a user name or password", detail)
    if host not in hosts:
        raise source.error(
            f"an image URL must be of a host in image_hosts ({', '.join(hosts)})",
            detail or f"of host {host!r}",
            "Add the host, if you trust it with what this machine can reach.",
        )


def _host_of(parts: SplitResult) -> str:
    """Host of a URL as image_hosts has it, with the port unless it is the scheme's own."""
    host = (parts.hostname or "").rstrip(".")
    if parts.port is None or parts.port == _DEFAULT_PORTS.get(parts.scheme):
        return host
    return f"{host}:{parts.port}"


def _is_public(address: str) -> bool:
    return ipaddress.ip_address(address.split("%", maxsplit=1)[0]).is_global


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _opener(source: ImageUrl) -> urllib.request.OpenerDirector:
    """Opens http and https, and nothing else, for one image."""
    names = {urlsplit(f"//{host}").hostname for host in source.limits.hosts}

    def check_peer(written: str, peer: socket.socket) -> None:
        host = written.lower().rstrip(".")
        # After connecting, not by a look-up of our own: a name may resolve differently each time.
        # An address that the user wrote in image_hosts is meant; a proxy is no host of ours.
        address = peer.getpeername()[0]
        if host in names and not _is_address(host) and not _is_public(address):
            peer.close()
            raise source.error(
                "a host in image_hosts must have a public address",
                f"whose host {host!r} is at {address}",
                "If it is meant, write the address itself into image_hosts.",
            )

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            check_peer(self.host, self.sock)

    class SecureConnection(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            check_peer(self.host, self.sock)

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Connection, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(SecureConnection, request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any, **named: Any) -> Any:
            request = super().redirect_request(*arguments, **named)
            if request is not None:
                _check_host(source, request.full_url)
            return request

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Handler(),
        SecureHandler(),
        Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
