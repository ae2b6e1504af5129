"""The balancer hands on what clients and replicas say to each other, when they say it."""

import asyncio
import json

import pytest
from machinery import free_port, nginx


class Replica:
    """As little of a replica as these tests need, on loopback."""

    def __init__(self):
        self.seen = []
        self.first_event_arrived = asyncio.Event()

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.strip().split("\r\n")
        path = line.split()[1]
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        self.seen.append(path)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if path == "/stream":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n")
            await writer.drain()
            await asyncio.wait_for(self.first_event_arrived.wait(), 10)
            writer.write(b"data: 2\n\n")
        elif path == "/socket":
            assert headers["upgrade"] == "websocket" and headers["connection"] == "upgrade", headers
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
            writer.write((await reader.readexactly(4))[::-1])
        elif path == "/die":
            pass
        else:
            said = json.dumps({"body": len(body), "headers": headers}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nx-quota: " + b"q" * 40_000 + b"\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said))
        await writer.drain()
        writer.close()


async def ask(port, head, body=b""):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    await writer.drain()
    status = (await reader.readline()).split()[1]
    await reader.readuntil(b"\r\n\r\n")
    return int(status), reader, writer


def with_replicas(processes, scenario):
    async def run():
        replica = Replica()
        # The first one is not there: its share must go on to the others.
        upstreams = [free_port(), await replica.start(), await replica.start()]
        port = await asyncio.to_thread(nginx, processes, upstreams)
        await asyncio.wait_for(scenario(port, replica), 60)
    asyncio.run(run())


def test_an_event_arrives_before_the_stream_ends(processes):
    async def scenario(port, replica):
        status, reader, _ = await ask(port, "GET /stream HTTP/1.0\nhost: h")
        assert (status, await reader.readuntil(b"\n\n")) == (200, b"data: 1\n\n")
        replica.first_event_arrived.set()
        assert await reader.read() == b"data: 2\n\n"
    with_replicas(processes, scenario)


def test_a_websocket_passes(processes):
    async def scenario(port, _):
        head = "GET /socket HTTP/1.1\nhost: h\nupgrade: websocket\nconnection: Upgrade"
        status, reader, writer = await ask(port, head)
        writer.write(b"ping")
        assert (status, await reader.readexactly(4)) == (101, b"gnip")
    with_replicas(processes, scenario)


@pytest.mark.parametrize(("size", "status"), [(64 << 20, 200), (66 << 20, 413)])
def test_the_largest_body_passes_and_no_larger_one(processes, size, status):
    async def scenario(port, _):
        head = f"POST /v1/responses HTTP/1.1\nhost: h\nconnection: close\ncontent-length: {size}"
        answered, reader, _ = await ask(port, head, bytes(size) if status == 200 else b"")
        assert answered == status
        if status == 200:
            assert json.loads(await reader.read())["body"] == size
    with_replicas(processes, scenario)


def test_headers_of_clients_arrive_also_those_with_an_underscore(processes):
    async def scenario(port, _):
        long = "m" * 20_000
        head = f"GET /echo HTTP/1.1\nhost: pool:81\nconnection: close\nsession_id: s1\nauthorization: Bearer k\nx-codex-turn-metadata: {long}"
        status, reader, _ = await ask(port, head)
        headers = json.loads(await reader.read())["headers"]
        assert status == 200
        assert (headers["session_id"], headers["authorization"], headers["host"]) == ("s1", "Bearer k", "pool:81")
        assert headers["x-codex-turn-metadata"] == long
        # Drawbridge lets nobody in without a key who came through a proxy, and knows by this that one was there.
        assert headers["x-forwarded-for"] == "127.0.0.1"
    with_replicas(processes, scenario)


def test_a_replica_that_is_away_is_passed_over_and_a_turn_that_was_sent_is_not_sent_again(processes):
    async def scenario(port, replica):
        post = "POST /v1/responses HTTP/1.1\nhost: h\nconnection: close\ncontent-length: 2"
        for _ in range(6):
            status, *_ = await ask(port, post, b"{}")
            assert status == 200
        replica.seen.clear()
        status, *_ = await ask(port, post.replace("/v1/responses", "/die"), b"{}")
        assert (status, replica.seen) == (502, ["/die"])
    with_replicas(processes, scenario)
