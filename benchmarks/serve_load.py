"""Load on the service over loopback: throughput and latency, with micro-batches and one request at a time.

    python benchmarks/serve_load.py [ENCODER] [--seconds 10] [--clients 1,8,32]

Without an encoder it takes the towers of ``clip-tiny``, untrained, which cost what trained ones do. The twin is the
same service with ``--window-ms 0 --batch 1``. Both run at once and are asked in turns, so that what the machine does
otherwise meets both; "cpu ms" is the processor time of an answer, decoding included, which a busy machine changes
least. The clients are one process that writes finished bytes to open connections.
"""

import argparse
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import psutil

CAPTIONS = ["a red square on a table", "a green leaf", "two blue birds", "an old grey stone", "a yellow boat at sea"]
CLASSES = "square,leaf,bird,stone,boat"
SIDE = 96
"""Pixels of the pictures that are sent."""


class Load(NamedTuple):
    """What came of some seconds of questions."""

    statuses: Counter[int]
    milliseconds: np.ndarray
    seconds: float
    cpu: float = 0.0
    """Seconds of processor time that the service took."""

    @property
    def per_second(self) -> float:
        """Return how many questions were answered in a second."""
        return self.statuses[200] / self.seconds

    def quantile(self, q: float) -> float:
        """Return a quantile of the latency in milliseconds."""
        return float(np.quantile(self.milliseconds, q)) if len(self.milliseconds) else float("nan")


def untrained(folder: Path) -> Path:
    """Write a run of the towers of ``clip-tiny`` as they are before training."""
    from mmssl.run import Run
    from tasks.build import build_objective, load_recipe
    from tasks.writer import export

    merges = "\n".join(f"{a} {b}</w>" for a, b in zip("abcdefgh", "ijklmnop", strict=True))
    recipe = load_recipe("clip-tiny", {"towers.text.model.tokenizer.merges": merges})
    made = build_objective(recipe)
    run = Run(folder)
    run.path.mkdir(parents=True)
    run.config_file.write_text(recipe.as_yaml())
    state = made.state_dict()
    export(run, recipe, made, state, state)
    return folder


def question(path: str, fields: dict[str, str], picture: bytes) -> bytes:
    """Return a whole HTTP request."""
    boundary = "b0undary"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head = "".join(parts) + (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + picture + f"\r\n--{boundary}--\r\n".encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
    ).encode() + body


def pictures(count: int) -> list[bytes]:
    """Return JPEGs of smooth noise, each another."""
    found, rng = [], np.random.default_rng(0)
    for _ in range(count):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        out = io.BytesIO()
        PIL.Image.fromarray(small).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC).save(out, "JPEG")
        found.append(out.getvalue())
    return found


class Service:
    """A service in a process of its own."""

    def __init__(self, encoder: Path, *options: str) -> None:
        words = [sys.executable, "-m", "mmssl", "serve", str(encoder), "--port", "0", *options]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, text=True)
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        match = re.search(r"http://[^:]+:(\d+)/", first)
        assert match is not None, first
        self.port = int(match[1])
        # Its access log must go somewhere, or the pipe fills up and it waits.
        self.reader = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def cpu(self) -> float:
        """Return the seconds of processor time that the service and its decoders, ended ones too, have taken."""
        one = psutil.Process(self.process.pid)
        return sum(sum(part.cpu_times()[:4]) for part in (one, *one.children(recursive=True)))

    def stop(self) -> int:
        """Stop it and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.reader.wait(timeout=10)
        return code


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one answer from a connection that stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None, head
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length[1]))


async def load(port: int, clients: int, seconds: float, questions: list[bytes]) -> Load:
    """Ask with so many clients, each the next question as soon as the last one is answered."""
    statuses: Counter[int] = Counter()
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader = writer = None
        asked = number
        while time.perf_counter() < end:
            if writer is None or reader is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begun = time.perf_counter()
            writer.write(questions[asked % len(questions)])
            await writer.drain()
            status, body = await answer(reader)
            statuses[status] += 1
            if status == 200:
                assert json.loads(body), body
                times.append(1000 * (time.perf_counter() - begun))
            asked += clients
        if writer is not None:
            writer.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    return Load(statuses, np.array(times), time.perf_counter() - begun)


def main() -> None:
    """Measure both services and then what too many clients get."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        encoder = given.encoder or untrained(Path(folder) / "clip")
        questions = [question("/v1/zero-shot", {"classes": CLASSES}, one) for one in pictures(64)]
        services = {
            "micro-batches": Service(encoder),
            "one at a time": Service(encoder, "--window-ms", "0", "--batch", "1"),
        }
        try:
            measure(services, [int(n) for n in given.clients.split(",")], given.seconds, given.rounds, questions)
        finally:
            codes = {name: service.stop() for name, service in services.items()}
        print(f"stopped with {codes}")
        overload(encoder, given.seconds, questions)


def measure(
    services: dict[str, Service], clients: list[int], seconds: float, rounds: int, questions: list[bytes]
) -> None:
    """Print the table."""
    for service in services.values():
        asyncio.run(load(service.port, 8, 1.0, questions))
    print(f"{'clients':>7}  {'service':14} {'per second':>10} {'p50 ms':>8} {'p99 ms':>8} {'cpu ms':>8}  statuses")
    for count in clients:
        rates = {}
        found: dict[str, list[Load]] = {name: [] for name in services}
        for _ in range(rounds):
            for name, service in services.items():
                before = service.cpu()
                one = asyncio.run(load(service.port, count, seconds / rounds, questions))
                found[name].append(one._replace(cpu=service.cpu() - before))
        for name, loads in found.items():
            every = Load(
                sum((one.statuses for one in loads), Counter()),
                np.concatenate([one.milliseconds for one in loads]),
                sum(one.seconds for one in loads),
                sum(one.cpu for one in loads),
            )
            rates[name] = every.per_second
            print(
                f"{count:7}  {name:14} {every.per_second:10.1f} {every.quantile(0.5):8.1f} {every.quantile(0.99):8.1f} "
                f"{1000 * every.cpu / every.statuses[200]:8.2f}  {dict(every.statuses)}"
            )
        print(f"{'':7}  ratio {rates['micro-batches'] / rates['one at a time']:.2f}")


def overload(encoder: Path, seconds: float, questions: list[bytes]) -> None:
    """Print what 64 clients get from a service that takes 8 requests at a time."""
    service = Service(encoder, "--max-queue", "8")
    try:
        found = asyncio.run(load(service.port, 64, seconds, questions))
    finally:
        code = service.stop()
    print(
        f"overload, 64 clients and a queue of 8: {dict(found.statuses)}, p99 {found.quantile(0.99):.1f} ms, exit {code}"
    )
    assert set(found.statuses) <= {200, 429}, "an answer that is neither right nor a clear 429"


if __name__ == "__main__":
    main()
