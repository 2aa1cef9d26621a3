"""A phone's side of the ADB protocol, for Debian's real ``adb`` to talk to.

It speaks what a phone's adbd speaks to ``adb connect``: the handshake with its RSA signature,
streams with flow control, the shell protocol with separate outputs and exit codes, and sync with
both kinds of stat. What it is asked to run, it really runs, on the file tree of a
:class:`phone.Phone`.

Written from the protocol's description in the Android source, packages/modules/adb: protocol.txt
(messages), SYNC.TXT, SERVICES.TXT, shell_protocol.h.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import hashlib
import os
import re
import select
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import IO

from devices.phone import Phone

VERSION, MAX_DATA = 0x01000001, 1 << 20
FEATURES = "cmd,shell_v2,stat_v2"
TOKEN, SIGNATURE, RSA_PUBLIC_KEY = 1, 2, 3
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
SYNC_CHUNK = 64 << 10
ENOENT = 2
# DER of a SHA-1 digest, as RSA's PKCS #1 v1.5 signatures carry it (RFC 8017, section 9.2).
SHA1_PREFIX = bytes.fromhex("3021300906052b0e03021a05000414")


class Daemon:
    """Listens on a port of this machine.

    authorize: "ask" accepts a new key as a person would, "refuse" leaves the question open.
    answer: False takes connections and says nothing, as a phone that is offline.
    """

    def __init__(self, phone: Phone, authorize: str = "ask", answer: bool = True) -> None:
        self.phone, self.authorize, self.answer = phone, authorize, answer
        self.keys: list[tuple[int, int]] = []
        self.signatures_checked = 0
        self.services: list[str] = []
        self._connections: list[Connection] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(self, client)
            self._connections.append(connection)
            if self.answer:
                threading.Thread(target=connection.serve, daemon=True).start()

    def pull_the_cable(self) -> None:
        """Every connection ends at once, as does every pipe to what was running."""
        self._listener.close()
        for connection in self._connections:
            connection.close()

    close = pull_the_cable


class Connection:
    """One host."""

    def __init__(self, daemon: Daemon, client: socket.socket) -> None:
        self.daemon, self._socket = daemon, client
        self._sending = threading.Lock()
        self._streams: dict[int, Stream] = {}

    def serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._handshake()
            while True:
                command, arg0, arg1, data = self._receive()
                if command == b"OPEN":
                    self._open(arg0, data)
                elif stream := self._streams.get(arg1):
                    stream.take(command, data)
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for stream in list(self._streams.values()):
            stream.take(b"CLSE", b"")

    def send(self, command: bytes, arg0: int, arg1: int, data: bytes = b"") -> None:
        (number,) = struct.unpack("<I", command)
        header = struct.pack(
            "<4s5I", command, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF
        )
        with self._sending:
            self._socket.sendall(header + data)

    def forget(self, stream: Stream) -> None:
        self._streams.pop(stream.local, None)

    def _receive(self) -> tuple[bytes, int, int, bytes]:
        header = self._read(24)
        command, arg0, arg1, length, _, magic = struct.unpack("<4s5I", header)
        assert magic == struct.unpack("<I", command)[0] ^ 0xFFFFFFFF
        assert length <= MAX_DATA
        return command, arg0, arg1, self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _handshake(self) -> None:
        command, *_ = self._receive()
        assert command == b"CNXN"
        while True:
            token = os.urandom(20)
            self.send(b"AUTH", TOKEN, 0, token)
            command, kind, _, data = self._receive()
            assert command == b"AUTH"
            if kind == SIGNATURE and any(verify(key, token, data) for key in self.daemon.keys):
                self.daemon.signatures_checked += 1
                break
            if kind == RSA_PUBLIC_KEY:
                if self.daemon.authorize == "refuse":
                    self._read(1)  # the question stays on the screen
                self.daemon.keys.append(public_key(data))
                break
        facts = {"name": "sim", "model": "Sim_Phone", "device": "sim"}
        banner = "device::" + "".join(f"ro.product.{k}={v};" for k, v in facts.items())
        self.send(b"CNXN", VERSION, MAX_DATA, f"{banner}features={FEATURES}".encode())

    def _open(self, remote: int, data: bytes) -> None:
        service = data.rstrip(b"\0").decode()
        self.daemon.services.append(service)
        local = len(self.daemon.services)
        kind, _, rest = service.partition(":")
        if kind.split(",")[0] == "shell":
            stream: Stream = Shell(self, local, remote, rest, is_v2="v2" in kind)
        elif kind == "sync":
            stream = Sync(self, local, remote)
        else:
            self.send(b"CLSE", 0, remote)
            return
        self._streams[local] = stream
        self.send(b"OKAY", local, remote)
        threading.Thread(target=stream.run, daemon=True).start()


class Stream(abc.ABC):
    """One service of a connection: a byte stream each way, one unacknowledged message at most."""

    def __init__(self, connection: Connection, local: int, remote: int) -> None:
        self.connection, self.phone = connection, connection.daemon.phone
        self.local, self._remote = local, remote
        self._may_send = threading.Semaphore(1)
        self._incoming = bytearray()
        self._arrived = threading.Condition()
        self._closed = False

    def take(self, command: bytes, data: bytes) -> None:
        """A message of the host."""
        if command == b"OKAY":
            self._may_send.release()
        elif command == b"WRTE":
            with self._arrived:
                self._incoming += data
                self._arrived.notify_all()
            self.connection.send(b"OKAY", self.local, self._remote)
        elif command == b"CLSE":
            with self._arrived:
                self._closed = True
                self._arrived.notify_all()
            self._may_send.release()
            self.connection.forget(self)

    def read(self, count: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._incoming) >= count or self._closed)
            if len(self._incoming) < count:
                raise EOFError
            data = bytes(self._incoming[:count])
            del self._incoming[:count]
            return data

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), SYNC_CHUNK):
            self._may_send.acquire()
            if self._closed:
                raise EOFError
            self.connection.send(
                b"WRTE", self.local, self._remote, data[start : start + SYNC_CHUNK]
            )

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            self.serve()
        if not self._closed:
            with contextlib.suppress(OSError):
                self.connection.send(b"CLSE", self.local, self._remote)

    @abc.abstractmethod
    def serve(self) -> None:
        """Answer until the stream ends."""


class Shell(Stream):
    """``shell,v2,raw:SCRIPT``, or ``shell:SCRIPT`` with both outputs in one and no exit code."""

    def __init__(
        self, connection: Connection, local: int, remote: int, script: str, is_v2: bool
    ) -> None:
        super().__init__(connection, local, remote)
        self._script, self._is_v2 = script, is_v2
        self._writing = threading.Lock()

    def serve(self) -> None:
        process = self.phone.start(self._script)
        threading.Thread(target=self._feed, args=(process,), daemon=True).start()
        outputs = [
            threading.Thread(target=self._copy, args=(pipe, kind), daemon=True)
            for pipe, kind in ((process.stdout, STDOUT), (process.stderr, STDERR))
            if pipe
        ]
        for output in outputs:
            output.start()
        for output in outputs:
            output.join()
        status = process.wait()
        if self._is_v2:
            self._packet(EXIT, bytes([status if status >= 0 else 128 - status]))

    def _copy(self, pipe: IO[bytes], kind: int) -> None:
        """Whole lines where there are any, until the program or the connection ends."""
        held, file = b"", pipe.fileno()
        with contextlib.suppress(EOFError, OSError):
            while not self._closed:
                if not select.select([file], [], [], 0.05)[0]:
                    continue
                data = os.read(file, SYNC_CHUNK)
                whole, newline, rest = (held + data).rpartition(b"\n")
                if len(rest) > SYNC_CHUNK or not data:
                    whole, rest = held + data, b""
                held = rest
                if whole or newline:
                    self._packet(kind, self.phone.leave(whole + newline))
                if not data:
                    break
        pipe.close()  # as adbd does: what still runs and writes gets SIGPIPE

    def _packet(self, kind: int, data: bytes) -> None:
        if not self._is_v2:
            self.write(data)
            return
        with self._writing:
            self.write(struct.pack("<BI", kind, len(data)) + data)

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                kind, length = struct.unpack("<BI", self.read(5))
                data = self.read(length)
                if kind == CLOSE_STDIN:
                    break
                assert kind == STDIN
                if "--json" in self._script:
                    data = self.phone.enter(data.decode()).encode()
                process.stdin.write(data)
                process.stdin.flush()
        with contextlib.suppress(OSError):
            process.stdin.close()


class Sync(Stream):
    """``sync:``: files."""

    def serve(self) -> None:
        while True:
            request, length = struct.unpack("<4sI", self.read(8))
            if request == b"QUIT":
                return
            path = self.read(length).decode()
            {
                b"STAT": self._stat,
                b"STA2": self._stat2,
                b"LST2": self._stat2,
                b"SEND": self._send,
                b"RECV": self._receive,
            }[request](request, path)

    def _status(self, path: str) -> os.stat_result | None:
        try:
            return Path(self.phone.enter(path)).stat()
        except OSError:
            return None

    def _stat(self, request: bytes, path: str) -> None:
        found = self._status(path)
        mode, size, mtime = (found.st_mode, found.st_size, found.st_mtime) if found else (0, 0, 0)
        self.write(struct.pack("<4s3I", request, mode, size, int(mtime)))

    def _stat2(self, request: bytes, path: str) -> None:
        s = self._status(path)
        numbers = (
            (0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
            if s is None
            else (
                *(s.st_dev, s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size),
                *(int(s.st_atime), int(s.st_mtime), int(s.st_ctime)),
            )
        )
        self.write(struct.pack("<4sIQQIIIIQqqq", request, 0 if s else ENOENT, *numbers))

    def _send(self, _: bytes, target: str) -> None:
        path, _, mode = target.rpartition(",")
        local = Path(self.phone.enter(path))
        failure = ""
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            file = local.open("wb")
        except OSError as error:
            failure = f"couldn't create file: {error.strerror}"
            file = Path(os.devnull).open("wb")  # noqa: SIM115
        with file:
            while True:
                kind, length = struct.unpack("<4sI", self.read(8))
                if kind == b"DONE":
                    break
                assert kind == b"DATA"
                assert length <= SYNC_CHUNK
                file.write(self.read(length))
                if self.phone.is_full and not failure:
                    failure = "write failed: No space left on device"
        if failure:
            local.unlink(missing_ok=True)
            self.write(struct.pack("<4sI", b"FAIL", len(failure)) + failure.encode())
            return
        local.chmod(int(mode) & 0o777)
        self.write(struct.pack("<4sI", b"OKAY", 0))

    def _receive(self, _: bytes, path: str) -> None:
        try:
            data = Path(self.phone.enter(path)).read_bytes()
        except OSError as error:
            message = f"open failed: {error.strerror}".encode()
            self.write(struct.pack("<4sI", b"FAIL", len(message)) + message)
            return
        for start in range(0, len(data), SYNC_CHUNK):
            part = data[start : start + SYNC_CHUNK]
            self.write(struct.pack("<4sI", b"DATA", len(part)) + part)
        self.write(struct.pack("<4sI", b"DONE", 0))


def public_key(data: bytes) -> tuple[int, int]:
    """(modulus, exponent) of Android's public key: base64 of a struct of words, then a name."""
    blob = base64.b64decode(re.split(rb"[ \0]", data)[0])
    words = struct.unpack_from("<I", blob)[0]
    modulus = int.from_bytes(blob[8 : 8 + 4 * words], "little")
    return modulus, struct.unpack_from("<I", blob, 8 + 8 * words)[0]


def verify(key: tuple[int, int], token: bytes, signature: bytes) -> bool:
    """PKCS #1 v1.5 of the token, which takes the place of a SHA-1 digest."""
    modulus, exponent = key
    size = (modulus.bit_length() + 7) // 8
    text = pow(int.from_bytes(signature, "big"), exponent, modulus).to_bytes(size, "big")
    digest = SHA1_PREFIX + token
    assert hashlib.sha1(usedforsecurity=False).digest_size == len(token)
    return text == b"\0\1" + b"\xff" * (size - len(digest) - 3) + b"\0" + digest
