"""A Hub on localhost: users, repositories, LFS uploads and downloads, and the ways in which a real one fails."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_canary_0123456789"


class FakeHub(ThreadingHTTPServer):
    """Call `start`, then look at `repos` and `requests`.

    Attributes:
        repos: id -> {"private": bool, "files": {path: bytes}}; a dataset's id begins with "datasets/".
        fault: (pattern, status) answers requests whose "METHOD path" matches with that status; "hang" never answers,
            until `reset`, "hang in the body" begins to, "reset" ends the connection, and "no JSON" answers a page.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.released = threading.Event()
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.released.set()
        self.repos, self.blobs, self.requests, self.fault, self.released = {}, {}, [], None, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: object = None, headers: dict | None = None, head_only: bool = False):
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head_only:
            self.wfile.write(body)

    def handle_any(self):
        hub: FakeHub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, self.path, body, self.headers.get("Authorization")))
        if hub.fault and re.search(hub.fault[0], f"{self.command} {self.path}"):
            if hub.fault[1] in ("hang", "hang in the body"):
                if hub.fault[1] == "hang in the body":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"begun")
                hub.released.wait()
                self.close_connection = True
                return
            if hub.fault[1] == "reset":
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if hub.fault[1] == "no JSON":
                return self.answer(200, b"<html>Please log in to this network</html>")
            return self.answer(hub.fault[1], {"error": "fault"})
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {self.path.split('?')[0]}")
            if found:
                return action(self, hub, body, *found.groups())
        self.answer(404, {"error": f"{self.command} {self.path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def whoami(self, hub, body):
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.answer(200 if known else 401, {"name": "ann", "type": "user", "orgs": [], "auth": {}} if known else {})

    def create(self, hub, body):
        wanted = json.loads(body)
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{kind}{wanted.get('organization') or 'ann'}/{wanted['name']}"
        exists = name in hub.repos
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        hub.repos.setdefault(name, {"private": private, "files": {}})
        self.answer(409 if exists else 200, {"url": f"{hub.url}/{name}", "id": name, "name": name})

    def info(self, hub, body, name):
        if name not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self.answer(200, {"id": name, "private": hub.repos[name]["private"], "sha": "0" * 40, "siblings": []})

    def tree(self, hub, body, name, revision):
        files = hub.repos.get(name, {"files": {}})["files"].items()
        self.answer(200, [{"type": "file", "path": path, "size": len(x), "oid": "0" * 40} for path, x in files])

    def may_write(self, hub, body, name):
        self.answer(200 if name.removeprefix("datasets/").startswith("ann/") else 403)

    def preupload(self, hub, body, name):
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".parquet")) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs(self, hub, body, name):
        objects = [
            {**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def blob(self, hub, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        hub.blobs[oid] = body
        self.answer(200)

    def commit(self, hub, body, name):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repos[name]["files"][value["path"]] = hub.blobs[value["oid"]]
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}"})

    def resolve(self, hub, body, name, revision, path):
        content = hub.repos.get(name, {"files": {}})["files"].get(path)
        if content is None:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"}, self.command == "HEAD")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        self.answer(200, content, headers, self.command == "HEAD")


NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
API = f"/api/(?:models/)?{NAME}"
ROUTES = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    (f"GET {API}/auth-check/write", Handler.may_write),
    (f"GET {API}", Handler.info),
    (f"GET {API}/tree/([^/]+)", Handler.tree),
    ("POST /api/validate-yaml", lambda self, hub, body: self.answer(200, {"errors": [], "warnings": []})),
    (f"POST {API}/preupload/main", Handler.preupload),
    (f"POST /{NAME}.git/info/lfs/objects/batch", Handler.lfs),
    ("PUT /blob/(.+)", Handler.blob),
    (f"POST {API}/commit/main", Handler.commit),
    (f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
