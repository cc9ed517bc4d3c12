"""Certificates and pinning, on a real loopback server."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from plait.errors import BadSignature, ConfigError, RemoteProtocolError
from plait.identity import SigningKey
from plait.net import tls
from plait.testing.echo import METHOD

NOW = 1_000_000
PEER = SigningKey.from_seed(bytes(32)).peer_id
OTHER = SigningKey.from_seed(bytes([1] * 32)).peer_id
ECHO = "/plait.test/Echo"


async def echo(request: bytes, context: tls.CallContext) -> bytes:
    return tls.caller_certificate(context) or request


class Echo(grpc.GenericRpcHandler):
    """Answers with the caller's certificate."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(cast(Any, echo))


def fresh_identity() -> tls.TlsIdentity:
    return tls.create_identity(SigningKey.generate().peer_id)


@asynccontextmanager
async def serving(credentials: grpc.ServerCredentials) -> AsyncIterator[str]:
    server = grpc.aio.server(options=tls.server_options())
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def call(address: str, pinned: bytes, identity: tls.TlsIdentity | None) -> bytes:
    async with tls.channel(address, pinned, identity) as channel:
        method = cast(Callable[..., Awaitable[bytes]], channel.unary_unary(ECHO))
        return await method(b"hello", timeout=3)


async def refused(address: str, pinned: bytes, identity: tls.TlsIdentity | None) -> bool:
    try:
        await call(address, pinned, identity)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_certificates_are_small_private_and_stable(tmp_path: Path) -> None:
    first = tls.load_or_create(tmp_path, PEER)
    assert len(first.cert_der) <= 400
    assert (tmp_path / "tls.key").stat().st_mode & 0o777 == 0o600
    assert tls.load_or_create(tmp_path, PEER) == first
    assert "PRIVATE" not in repr(first)


def test_damaged_tls_files_are_named(tmp_path: Path) -> None:
    tls.load_or_create(tmp_path, PEER)
    (tmp_path / "tls.key").chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        tls.load_or_create(tmp_path, PEER)
    (tmp_path / "tls.key").chmod(0o600)
    (tmp_path / "tls.crt").write_bytes(tls.create_identity(PEER).cert_pem)
    with pytest.raises(ConfigError, match="not the certificate's"):
        tls.load_or_create(tmp_path, PEER)
    (tmp_path / "other").mkdir()
    tls.load_or_create(tmp_path / "other", OTHER)
    with pytest.raises(ConfigError, match=f"not {PEER}'s"):
        tls.load_or_create(tmp_path / "other", PEER)
    (tmp_path / "tls.key").write_bytes(b"junk")
    with pytest.raises(ConfigError):
        tls.load_or_create(tmp_path, PEER)


def test_channel_cert_binds_peer_and_certificate() -> None:
    key = SigningKey.from_seed(bytes(32))
    identity = tls.create_identity(PEER)
    envelope = tls.make_channel_cert(key, identity, "net", NOW, 1000)
    assert tls.check_channel_cert(envelope, "net", NOW + 999) == (key.peer_id, identity.cert_der)
    with pytest.raises(RemoteProtocolError, match="expired"):
        tls.check_channel_cert(envelope, "net", NOW + 1000)
    with pytest.raises(RemoteProtocolError, match="another network"):
        tls.check_channel_cert(envelope, "other", NOW)
    stolen = tls.make_channel_cert(SigningKey.generate(), identity, "net", NOW, 1000)
    with pytest.raises(RemoteProtocolError, match="certificate of the peer"):
        tls.check_channel_cert(stolen, "net", NOW)
    envelope.signature = bytes(64)
    with pytest.raises(BadSignature):
        tls.check_channel_cert(envelope, "net", NOW)


def _certificate(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    algorithm: hashes.SHA256 | None,
    names: Sequence[str],
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, PEER[-20:])])
    alternative = x509.SubjectAlternativeName([x509.DNSName(entry) for entry in names])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(tls._NOT_BEFORE)
        .not_valid_after(tls._NOT_AFTER)
        .add_extension(alternative, critical=False)
    )
    return builder.sign(signer or key, algorithm).public_bytes(Encoding.DER)


def test_only_certificates_of_our_own_shape_reach_the_root_store() -> None:
    p256, sha = ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()
    assert tls.acceptable_certificate(_certificate(p256, sha, ["plait"]), PEER)
    bad = [
        b"",
        b"junk",
        tls.create_identity(PEER).cert_der + b"\0",
        tls.create_identity(OTHER).cert_der,
        _certificate(p256, sha, ["plait", "other"]),
        _certificate(p256, sha, ["other"]),
        _certificate(ec.generate_private_key(ec.SECP384R1()), sha, ["plait"]),
        _certificate(ed25519.Ed25519PrivateKey.generate(), None, ["plait"]),
        _certificate(p256, sha, ["plait"], signer=ec.generate_private_key(ec.SECP256R1())),
        _certificate(p256, sha, ["plait"] * 60),
    ]
    assert [tls.acceptable_certificate(der, PEER) for der in bad] == [False] * len(bad)


@pytest.mark.slow
def test_no_damaged_certificate_is_acceptable_nor_raises() -> None:
    good = tls.create_identity(PEER).cert_der
    for index in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = good[:index] + bytes([good[index] ^ flip]) + good[index + 1 :]
            assert not tls.acceptable_certificate(damaged, PEER)


async def test_public_port_is_pinned_and_anonymous() -> None:
    identity, other = tls.create_identity(PEER), tls.create_identity(PEER)
    async with serving(tls.server_credentials_public(identity)) as address:
        assert await call(address, identity.cert_der, None) == b"hello"
        assert await refused(address, other.cert_der, None)


@pytest.mark.slow
async def test_peer_port_follows_the_trusted_set() -> None:
    identity, known, stranger = (fresh_identity() for _ in range(3))
    trusted: list[tuple[bytes, ...]] = [(known.cert_der,)]
    source: Callable[[], tuple[bytes, ...]] = lambda: trusted[0]  # noqa: E731
    async with serving(tls.server_credentials_peer(identity, source)) as address:
        assert await call(address, identity.cert_der, known) == known.cert_der
        assert await refused(address, identity.cert_der, stranger)
        assert await refused(address, identity.cert_der, None)
        assert await refused(address, stranger.cert_der, known)
        trusted[0] = (stranger.cert_der,)
        assert await call(address, identity.cert_der, stranger) == stranger.cert_der
        assert await refused(address, identity.cert_der, known)


@pytest.mark.slow
async def test_the_right_root_is_found_among_a_thousand() -> None:
    identity, last = fresh_identity(), fresh_identity()
    crowd = tuple(fresh_identity().cert_der for _ in range(1000))
    credentials = tls.server_credentials_peer(identity, lambda: (*crowd, last.cert_der))
    async with serving(credentials) as address:
        assert await call(address, identity.cert_der, last) == last.cert_der


@pytest.mark.slow
async def test_a_peer_that_hangs_breaks_the_stream() -> None:
    program = (sys.executable, "-m", "plait.testing.echo")
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        said = json.loads(await process.stdout.readline())
        address, certificate = f"127.0.0.1:{said['port']}", bytes.fromhex(said["certificate"])
        async with tls.channel(address, certificate) as channel:
            call: Any = channel.stream_stream(METHOD)()
            await call.write(b"alive")
            assert await call.read() == b"alive"
            process.send_signal(signal.SIGSTOP)  # its kernel goes on to acknowledge bytes
            await call.write(b"and now?")
            with pytest.raises(grpc.aio.AioRpcError, match="ping"):
                async with asyncio.timeout(30):
                    await call.read()
    finally:
        process.kill()
        await process.wait()
