"""A small Hugging Face Hub on localhost, for tests: repositories in memory, real HTTP, nothing else.

It knows models and datasets, commits, branches, regular and LFS uploads, range requests. It has no login: any token
is the owner's. `huggingface_hub`, `transformers` and `datasets` talk to it when HF_ENDPOINT is its address.

    with FakeHub() as hub:
        hub.add("model", "me/tiny", folder)
        subprocess.run(command, env={**os.environ, **hub.environment(cache)})
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = dict[str, bytes]  # by path inside the repository

NAME = r"[^/]+/[^/]+"
RESOLVE = re.compile(rf"/(datasets/)?({NAME})/resolve/([^/]+)/(.+)")
LFS_BATCH = re.compile(rf"/(datasets/)?({NAME})\.git/info/lfs/objects/batch")
API = re.compile(rf"/api/(models|datasets)/({NAME})(?:/([^/]+)(?:/(.+))?)?")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class HubError(Exception):
    """An answer other than success: the status, and the Hub's own code for it, which its clients look at."""

    def __init__(self, status: int, code: str, commit: str = "", **body: str):
        super().__init__(code)
        self.status, self.body = status, {"error": code, **body}
        self.headers = {"X_Error_Code": code, **({"X_Repo_Commit": commit} if commit else {})}


class Repository:
    """Commits and the branches that point at them."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.commit({}, "main")

    def commit(self, files: Files, branch: str) -> str:
        """Make `files` the whole content of the branch; return the commit's id."""
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch or a commit id means."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return oid

    def apply(self, operations: Iterator[dict[str, Any]], branch: str, lfs: Mapping[str, bytes]) -> str:
        """Carry out the lines of a commit request."""
        files = dict(self.commits[self.resolve(branch)])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = lfs[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            elif kind == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: data for path, data in files.items() if not path.startswith(folder)}
            elif kind != "header":
                raise HubError(400, f"unknown operation {kind}")
        return self.commit(files, branch)


class FakeHub:
    """The server. A context manager: it listens from the entry to the exit.

    `lfs_over`: files of more bytes go through the LFS protocol, as large ones do on the real Hub. `requests` holds
    (method, path) of everything that was asked.
    """

    def __init__(self, user: str = "tester", lfs_over: int = 10_000):
        self.user, self.lfs_over = user, lfs_over
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment in which a subprocess sees this Hub, with all its caches under `cache`."""
        local = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": "hf_fake", **switches, **local}

    def add(self, kind: str, name: str, content: Path | Files) -> Repository:
        """Make a repository ("model" or "dataset") out of a folder or of files; an older one of that name goes."""
        if isinstance(content, Path):
            paths = (path for path in content.rglob("*") if path.is_file())
            content = {path.relative_to(content).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories[kind, name] = Repository()
        repository.commit(content, "main")
        return repository

    def files(self, kind: str, name: str, revision: str = "main") -> Files:
        """The files of a repository."""
        repository = self.find(kind, name)
        return repository.commits[repository.resolve(revision)]

    def find(self, kind: str, name: str) -> Repository:
        """The repository, or the error that the Hub's clients know."""
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound")
        return self.repositories[kind, name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def handle_request(self) -> None:
        data, path = self.body(), urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            if path.startswith("/lfs/"):
                self.hub.lfs[path.removeprefix("/lfs/")] = data
                self.answer({})
            elif match := LFS_BATCH.fullmatch(path):
                self.answer(self.lfs_batch(json.loads(data)))
            elif match := API.fullmatch(path):
                self.answer(self.api(match[1].removesuffix("s"), match[2], match[3], match[4] or "main", data))
            elif match := RESOLVE.fullmatch(path):
                self.send_file("dataset" if match[1] else "model", *match.groups()[1:])
            else:
                self.answer(self.account(path, data))
        except HubError as error:
            self.answer(error.body, error.status, **error.headers)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        """Send JSON, or bytes as they are; `X_Some_Header` becomes X-Some-Header."""
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def account(self, path: str, data: bytes) -> dict[str, Any]:
        """Answer requests that concern no repository."""
        hub = self.hub
        if path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"role": "write"}}
            return {"type": "user", "name": hub.user, "orgs": [], "auth": token}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wish = json.loads(data)
            kind, name = wish.get("type") or "model", f"{wish.get('organization') or hub.user}/{wish['name']}"
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
            if (kind, name) in hub.repositories:
                raise HubError(409, "RepoExists", url=url)  # a client that says exist_ok reads the address
            hub.add(kind, name, {})
            return {"url": url, "name": name, "id": name}
        raise HubError(404, f"not faked: {path}")

    def api(self, kind: str, name: str, verb: str | None, revision: str, data: bytes) -> object:
        """Answer requests that concern one repository."""
        repository = self.hub.find(kind, name)
        if verb == "preupload":
            wishes = json.loads(data)["files"]
            return {"files": [{"path": w["path"], "shouldIgnore": False, "uploadMode": self.mode(w)} for w in wishes]}
        if verb == "commit":
            oid = repository.apply(map(json.loads, data.splitlines()), revision, self.hub.lfs)
            return {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if verb == "branch":
            repository.branches[revision] = repository.branches["main"]
            return {}
        if verb == "tree":
            revision, _, folder = revision.partition("/")
            return self.tree(repository.commits[repository.resolve(revision)], folder)
        if verb == "paths-info":
            wanted = {path.rstrip("/") for path in self.paths(data)}
            files = repository.commits[repository.resolve(revision)]
            return [self.entry(path, files[path]) for path in files if path in wanted]
        if verb not in (None, "revision"):
            raise HubError(404, f"not faked: {verb}")
        oid = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        return {"id": name, "sha": oid, "private": False, "tags": [], "siblings": siblings}

    def mode(self, wish: dict[str, Any]) -> str:
        return "lfs" if wish["size"] > self.hub.lfs_over else "regular"

    def paths(self, data: bytes) -> list[str]:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            return json.loads(data)["paths"]
        return urllib.parse.parse_qs(data.decode())["paths"]

    def tree(self, files: Files, folder: str) -> list[dict[str, Any]]:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, "EntryNotFound")
        tops = {path: path[len(prefix) :].partition("/") for path in inside}
        folders = sorted({prefix + top for top, slash, _ in tops.values() if slash})
        shown = [self.entry(path, data) for path, data in inside.items() if recursive or not tops[path][1]]
        return [*shown, *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders)]

    @staticmethod
    def entry(path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def lfs_batch(self, wish: dict[str, Any]) -> dict[str, Any]:
        """Where to upload the objects that are not here yet."""
        objects = []
        for wanted in wish["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            missing = {} if wanted["oid"] in self.hub.lfs else {"actions": upload}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **missing})
        return {"transfer": "basic", "objects": objects}

    def send_file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self.hub.find(kind, name)
        oid = repository.resolve(revision)
        data = repository.commits[oid].get(path)
        if data is None:
            raise HubError(404, "EntryNotFound", commit=oid)
        headers = {"X_Repo_Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        if match := RANGE.fullmatch(self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            self.answer(data[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)
        else:
            self.answer(data, **headers)
