"""An API server for tests: the part of the Kubernetes API that sandboxes use, over TLS, with pods on a `Node`.

Pods (create, read, list, watch, delete), leases with the deletion of what belongs to them, network policies, and
`exec` by WebSocket in versions 4 and 5 of the channel protocol.
"""

import asyncio
import contextlib
import copy
import json
import subprocess
import threading
import uuid
from pathlib import Path
from typing import Any

import uvicorn
from envs.swe.kubernetes_node import Node, Pod
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

NAMESPACE, TOKEN = "aem-sandboxes", "test-token"
DENY = {
    "metadata": {"name": "no-network"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
}


def status(code: int, message: str) -> JSONResponse:
    """An error, in the form of the API."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
    return JSONResponse(body, code)


class ApiServer:
    """Serves one namespace until it is closed.

    Attributes:
        kubeconfig: path of a configuration for clients.
        node: where the pods run.
        pods: name -> pod.
        leases: name -> lease.
        policies: the namespace's network policies.
        protocols: the versions of `exec` that are offered.
        max_pods: the quota.
        refuse: number of requests that are answered with status 503 first.
        cut_off: whether connections of `exec` end before their program.
        created: the manifests of all pods that were created.
    """

    def __init__(self, folder: Path):
        self.node, self.pods, self.leases = Node(), dict[str, Pod](), dict[str, dict[str, Any]]()
        self.created: list[dict[str, Any]] = []
        self.reset()
        certificate = _certificate(folder)
        base = f"/api/v1/namespaces/{NAMESPACE}"
        leases = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
        app = Starlette(
            routes=[
                Route(f"{base}/pods", self._list, methods=["GET"]),
                Route(f"{base}/pods", self._create, methods=["POST"]),
                Route(f"{base}/pods/{{name}}", self._read, methods=["GET"]),
                Route(f"{base}/pods/{{name}}", self._delete, methods=["DELETE"]),
                WebSocketRoute(f"{base}/pods/{{name}}/exec", self._exec),
                Route(f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies", self._policies),
                Route(leases, self._leases, methods=["GET", "POST"]),
                Route(f"{leases}/{{name}}", self._lease, methods=["PATCH", "DELETE"]),
            ]
        )
        app.add_middleware(_Guard, server=self)
        # uvloop's programs inherit its sockets
        config = uvicorn.Config(app, port=0, loop="asyncio", log_level="critical", timeout_graceful_shutdown=1)
        if certificate:
            config.ssl_certfile, config.ssl_keyfile = map(str, certificate)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.node.variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}
        cluster = {"server": f"http{'s' if certificate else ''}://127.0.0.1:{port}"}
        self.kubeconfig = folder / "kubeconfig"
        contexts = {"cluster": "test", "user": "test"}
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": cluster
                            | ({"certificate-authority": str(certificate[0])} if certificate else {}),
                        }
                    ],
                    "users": [{"name": "test", "user": {"token": TOKEN}}],
                    "contexts": [{"name": "test", "context": contexts}],
                    "current-context": "test",
                }
            )
        )

    def reset(self) -> None:
        """Returns to a healthy cluster."""
        self.node.reset()
        self.policies: list[dict[str, Any]] = [copy.deepcopy(DENY)]
        self.protocols = ("v5.channel.k8s.io", "v4.channel.k8s.io")
        self.max_pods, self.refuse, self.cut_off = 100, 0, False

    def close(self) -> None:
        """Ends all pods and the server."""
        for pod in list(self.pods.values()):
            pod.delete()
        self._server.should_exit = True
        self._thread.join()

    async def _list(self, request: Request) -> Response:
        names = [
            f.removeprefix("metadata.name=") for f in request.query_params.get("fieldSelector", "").split(",") if f
        ]
        chosen = lambda: {name: pod for name, pod in self.pods.items() if not names or name in names}
        if request.query_params.get("watch", "").lower() != "true":
            return JSONResponse({"kind": "PodList", "items": [pod.manifest for pod in chosen().values()]})
        seconds = float(request.query_params["timeoutSeconds"])

        async def events():
            seen: dict[str, str] = {}
            for _ in range(int(seconds * 100)):
                now = {name: json.dumps(pod.manifest) for name, pod in chosen().items()}
                for name in seen.keys() | now.keys():
                    if name not in now:
                        yield json.dumps({"type": "DELETED", "object": json.loads(seen[name])}) + "\n"
                    elif now[name] != seen.get(name):
                        kind = "MODIFIED" if name in seen else "ADDED"
                        yield json.dumps({"type": kind, "object": json.loads(now[name])}) + "\n"
                seen = now
                await asyncio.sleep(0.01)

        return StreamingResponse(events(), media_type="application/json")

    async def _create(self, request: Request) -> Response:
        manifest = await request.json()
        name = manifest["metadata"]["name"]
        if len(self.pods) >= self.max_pods:
            used = f"used: pods={len(self.pods)}, limited: pods={self.max_pods}"
            return status(403, f'pods "{name}" is forbidden: exceeded quota: sandboxes, requested: pods=1, {used}')
        if name in self.pods:
            return status(409, f'pods "{name}" already exists')
        self.created.append(copy.deepcopy(manifest))
        manifest["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": NAMESPACE}
        manifest["status"] = {"phase": "Pending"}
        self.pods[name] = Pod(manifest, self.node)
        return JSONResponse(manifest, 201)

    async def _read(self, request: Request) -> Response:
        pod = self.pods.get(request.path_params["name"])
        return JSONResponse(pod.manifest) if pod else status(404, f'pods "{request.path_params["name"]}" not found')

    async def _delete(self, request: Request) -> Response:
        pod = self.pods.pop(request.path_params["name"], None)
        if pod is None:
            return status(404, f'pods "{request.path_params["name"]}" not found')
        await asyncio.to_thread(pod.delete)
        return JSONResponse(pod.manifest)

    async def _policies(self, request: Request) -> Response:
        return JSONResponse({"kind": "NetworkPolicyList", "items": self.policies})

    async def _leases(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"kind": "LeaseList", "items": list(self.leases.values())})
        lease = await request.json()
        lease["metadata"]["uid"] = str(uuid.uuid4())
        self.leases[lease["metadata"]["name"]] = lease
        return JSONResponse(lease, 201)

    async def _lease(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.leases:
            return status(404, f'leases "{name}" not found')
        lease = self.leases[name]
        if request.method == "PATCH":
            if "json-patch" in request.headers["content-type"]:
                return status(400, "expected a merge patch")
            lease["spec"] |= (await request.json())["spec"]
            return JSONResponse(lease)
        del self.leases[name]
        for owned, pod in list(self.pods.items()):  # as the garbage collector does
            if lease["metadata"]["uid"] in [o["uid"] for o in pod.manifest["metadata"].get("ownerReferences", ())]:
                del self.pods[owned]
                await asyncio.to_thread(pod.delete)
        return JSONResponse({"kind": "Status", "status": "Success"})

    async def _exec(self, websocket: WebSocket) -> None:
        offered = websocket.scope["subprotocols"]
        protocol = next((name for name in self.protocols if name in offered), None)
        pod = self.pods.get(websocket.path_params["name"])
        main = pod.main if pod else None
        if pod is None or main is None or main.process.poll() is not None or protocol is None:
            await websocket.send_denial_response(status(404 if pod is None else 500, "container not found"))
            return
        query = websocket.query_params
        assert query["container"] == pod.manifest["spec"]["containers"][0]["name"] and query["tty"].lower() == "false"
        await websocket.accept(subprotocol=protocol)
        pipe = asyncio.subprocess.PIPE
        command = main.enter(query.getlist("command"))
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert process.stdin and process.stdout and process.stderr
        outputs = [
            asyncio.create_task(_send(websocket, channel, stream))
            for channel, stream in ((1, process.stdout), (2, process.stderr))
        ]
        inputs = asyncio.create_task(_receive(websocket, process.stdin))
        if self.cut_off:
            await websocket.close(1011)
            return
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # a client that left; the program goes on
            await asyncio.gather(*outputs)
            code = await process.wait()
            code = 128 - code if code < 0 else code
            causes = {"causes": [{"reason": "ExitCode", "message": str(code)}]}
            failure = {"status": "Failure", "reason": "NonZeroExitCode", "details": causes}
            if main.process.poll() is not None:
                failure = {"status": "Failure", "reason": "InternalError", "message": "task not found"}
            await websocket.send_bytes(b"\3" + json.dumps(failure if code else {"status": "Success"}).encode())
            await websocket.close(1000)
        inputs.cancel()


async def _send(websocket: WebSocket, channel: int, stream: asyncio.StreamReader) -> None:
    while data := await stream.read(32768):
        await websocket.send_bytes(bytes([channel]) + data)


async def _receive(websocket: WebSocket, stdin: asyncio.StreamWriter) -> None:
    with contextlib.suppress(WebSocketDisconnect, ConnectionError):
        while True:
            data = await websocket.receive_bytes()
            if data[0] == 255:
                stdin.close()
            elif data[0] == 0:
                stdin.write(data[1:])
                await stdin.drain()


class _Guard:
    """Checks the token, and refuses some requests."""

    def __init__(self, app: Any, server: ApiServer):
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            response = None
            if headers.get(b"authorization") != f"Bearer {TOKEN}".encode():
                response = status(401, "Unauthorized")
            elif scope["type"] == "http" and self._server.refuse > 0:
                self._server.refuse -= 1
                response = status(503, "the server is currently unable to handle the request")
            if response is not None:
                assert scope["type"] == "http"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _certificate(folder: Path) -> tuple[Path, Path] | None:
    """Makes a certificate for 127.0.0.1; None without openssl."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return certificate, key
