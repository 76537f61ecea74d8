"""Signing and verifying one message: what a verdict and a command cost."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from pyscan.cose import media_type, sign1, verify1
from pyscan.keys import KeyRing, SigningKey

PAYLOAD = bytes(1024)
CONTENT_TYPE = media_type("verdict")
TOPIC = b"pyscan/v1/verdict/card-1/guest"


def bench_sign(benchmark: BenchmarkFixture) -> None:
    """COSE_Sign1 with Ed25519 over 1 KiB."""
    benchmark.group = "signature"
    key = SigningKey.generate()
    assert benchmark(sign1, PAYLOAD, key, CONTENT_TYPE, TOPIC)


def bench_verify(benchmark: BenchmarkFixture) -> None:
    """The same message, verified."""
    benchmark.group = "signature"
    key = SigningKey.generate()
    message = sign1(PAYLOAD, key, CONTENT_TYPE, TOPIC)
    ring = KeyRing.of({"card-1": key.public})
    verified = benchmark(verify1, message, ring, CONTENT_TYPE, TOPIC, len(message))
    assert verified.payload == PAYLOAD
